"""Commands about finished runs: evaluate, predict, suggest, sample, export, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddpm_lmk.data.sources.kinds import ANNOTATED
from ddpm_lmk.system.console import print_status, print_table

results_app = typer.Typer()

MAX_NAMES = 8

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="run directory or snapshot", show_default=False)]
AcknowledgeOption = Annotated[
    bool, typer.Option("--acknowledge-leakage", help="show scores on images that pre-training saw, with a remark")
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: a GPU if there is one")]


@results_app.command()
def evaluate(
    run_dir: RunArgument,
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="folder of labelled shards")],
    split: Annotated[str, typer.Option("--split", help="split that is scored")] = "test",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default="RUN/evaluate-SPLIT")] = None,
    device: DeviceOption = "auto",
    acknowledge_leakage: AcknowledgeOption = False,
) -> None:
    """Score a finished run on a split of any dataset with the same landmarks."""
    from ddpm_lmk.data.duplicates.report import refuse_seen
    from ddpm_lmk.inference.evaluate import evaluate_run

    folder = out or run_dir / f"evaluate-{split}"
    results = evaluate_run(run_dir, data=data, split=split, out=folder, device=device)
    # After scoring and writing: the numbers are kept, and shown only to those who know what they are.
    for line in refuse_seen([results], acknowledged=acknowledge_leakage):
        typer.echo(line)
    for protocol, scores in results["protocols"].items():
        shape = results["mean_shape"][protocol]
        typer.echo(f"{protocol}: MRE {scores['mre']:.3f} {scores['unit']} (mean shape {shape['mre']:.3f})")
    if "radius" in results:
        typer.echo(radius_line(results["radius"]))
    typer.echo(f"{results['num_images']} images; {folder / 'results.json'}")


def radius_line(measured: dict[str, Any]) -> str:
    """What the radii of a run hold on images that are scored, beside one radius for all points."""
    unit, constant = measured["unit"], measured.get("constant")
    text = f"radius: {measured['within_pct']:.1f} % of the true points are within theirs, wanted "
    text += f"{100 * measured['coverage']:g} %; mean {measured['mean']:.2f} {unit}"
    if constant is None:
        return text
    return f"{text} (one of {constant['mean']:.2f} {unit} for all: {constant['within_pct']:.1f} %)"


@results_app.command()
def predict(
    run_dir: RunArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="image files, or folders of them", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for CSV, JSON and overlays")],
    mm_per_px: Annotated[float | None, typer.Option(help="pixel spacing of these files, if known")] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="whose landmarks, where the run has learnt several sets")
    ] = None,
    frame: Annotated[int | None, typer.Option(min=0, help="of files with several frames")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"also write DIR/FORMAT: {', '.join(ANNOTATED)}, to correct there and pack again; dicom-gsps; "
            "repeatable",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit with code 3 if any file could not be read, not only if all")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Find the landmarks in x-rays: points in pixels of the file, their uncertainty, and a picture with them.

    After `ddpm-lmk calibrate RUN` each point has a radius that holds the true point with 90 %.
    A file that cannot be read is a row with its error, and the others are done: exit code 0, or 3 if all failed.
    """
    from ddpm_lmk.inference.predict import predict_images

    summary = predict_images(
        run_dir,
        images,
        out,
        mm_per_px=mm_per_px,
        dataset=dataset,
        frame=frame,
        formats=tuple(formats or ()),
        device=device,
    )
    # One bad file among thousands must not cost the others; `check` decides on the exit code.
    for name, reason in summary.errors.items():
        print_status(f"failed: {name}: {reason}")
    if summary.passed_over:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in summary.passed_over.most_common(5))
        print_status(f"{summary.passed_over.total()} files that are no images were skipped ({kinds})")
    if summary.coverage is None and summary.predicted:
        print_status(f"no radius_px: `ddpm-lmk calibrate {run_dir}` learns which radius holds a point with 90 %")
    for name in dict.fromkeys(formats or ()):
        again = f"; correct them there, then `ddpm-lmk shards pack {summary.out / name} --kind {name}`"
        print_status(f"drafts: {summary.out / name}{again if name in ANNOTATED else ''}")
    typer.echo(f"{summary.predicted} predicted, {len(summary.errors)} failed; {summary.out / 'predictions.csv'}")
    summary.check(strict=strict)


@results_app.command()
def suggest(
    run_dir: RunArgument,
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="folder of shards, with or without labels")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the list and a sheet of images")],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="whose images, once for each", show_default="train")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="images to suggest")] = 10,
    labelled: Annotated[
        list[str] | None,
        typer.Option(
            "--labelled",
            metavar="ID|FILE.csv",
            help="labelled already, once for each; a CSV file has a column image_id",
            show_default="the shots of a landmark run",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Rank the images to label next: those that stand for all the others best, by the features of a finished run.

    To train on the first five of them, once they are labelled and packed: data.draw=listed data.shots=5
    data.images=DIR/suggestions.csv
    """
    from ddpm_lmk.inference.suggest import suggest_images

    splits = tuple(split or ("train",))
    summary = suggest_images(
        run_dir, data=data, out=out, splits=splits, count=count, labelled=labelled or (), device=device
    )
    rows = [
        (str(each.rank), each.image_id, f"{each.coverage:.3f}", f"{each.gain:.3f}", each.nearest_labelled or "")
        for each in summary.suggestions
    ]
    print_table(("rank", "image", "coverage", "gain", "nearest labelled or above"), rows)
    if summary.named > summary.labelled:
        missing = summary.named - summary.labelled
        print_status(f"{missing} of {summary.named} labelled images are not in {data}; they cover nothing here")
    if summary.bad:
        print_status(f"{len(summary.bad)} images cannot be read and were left out; suggestions.json lists them")
    typer.echo(f"{summary.num_images} images, {summary.labelled} labelled; {summary.out / 'suggestions.csv'}")


@results_app.command()
def sample(
    run_dir: RunArgument,
    count: Annotated[int, typer.Option(help="images on the sheet")] = 16,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="the sheet")] = Path("samples.png"),
    steps: Annotated[int, typer.Option(help="DDIM steps")] = 50,
    device: DeviceOption = "auto",
) -> None:
    """Draw x-rays from a pre-trained model, as one picture."""
    from ddpm_lmk.inference.export import sample_run

    typer.echo(str(sample_run(run_dir, count=count, file=out, num_steps=steps, device=device)))


@results_app.command()
def export(
    run_dir: RunArgument,
    format: Annotated[str, typer.Option("--format", help="safetensors, onnx or hub")] = "safetensors",  # noqa: A002
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="new file or folder", show_default="in RUN/export")
    ] = None,
    license: Annotated[  # noqa: A002
        str | None,
        typer.Option("--license", metavar="ID", help="for the card of hub, e.g. mit", show_default="unspecified"),
    ] = None,
) -> None:
    """Weights as one safetensors file, the network as ONNX, or a folder for the Hugging Face hub with a model card."""
    if format == "hub":
        from ddpm_lmk.report.hub import export_hub

        typer.echo(str(export_hub(run_dir, out=out, license=license)))
        return
    from ddpm_lmk.errors import ConfigError
    from ddpm_lmk.inference.export import export_run

    if license is not None:
        raise ConfigError(f"--license={license} is written into the card of --format hub; {format} has none")
    for path in export_run(run_dir, format=format, out=out):  # type: ignore[arg-type] # checked there
        typer.echo(str(path))


@results_app.command("import-weights")
def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="a PyTorch checkpoint", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="the new file")],
    take: Annotated[
        str | None, typer.Option("--take", metavar="NAME", help="which of several sets of weights, e.g. ema")
    ] = None,
) -> None:
    """Tensors of a foreign PyTorch file (the paper's, torchvision's, DINO's) as safetensors, read in a sandbox."""
    from ddpm_lmk.models import import_torch as door

    found = door.import_weights(file, out, take)
    cut = f", {found['cut']} cut off the names" if found["cut"] else ""
    if found["taken"]:
        typer.echo(f"taken: {found['taken']}{cut}")
    elif cut:
        typer.echo(cut.removeprefix(", "))
    for name, count in found["others"].items():
        typer.echo(f"also in the file: {name}, {count} tensors; --take {name} takes it instead")
    if found["passed_over"]:
        more = ", ..." if len(found["passed_over"]) > MAX_NAMES else ""
        typer.echo(f"skipped, no weights: {', '.join(found['passed_over'][:MAX_NAMES])}{more}")
    typer.echo(f"{found['network']}; {found['num_tensors']} tensors, {found['num_parameters']:,} parameters; {out}")
    typer.echo(f"sha256 {found['sha256']}")
    if not found["network"].startswith("unknown"):  # other tensors are kept too, but no run can use them
        typer.echo(f"a run starts from them with init.weights={out}")


@results_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="runs and sweeps", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="self-contained HTML")] = Path("report.html"),
    against: Annotated[Literal["paper"] | None, typer.Option("--against", help="beside whose tables")] = None,
    acknowledge_leakage: AcknowledgeOption = False,
) -> None:
    """Tables, curves and overlays of finished runs in one HTML file, with CSV and Markdown beside it."""
    from ddpm_lmk.report.page import write_report

    for path in write_report(folders, out, against_paper=against == "paper", acknowledge_leakage=acknowledge_leakage):
        typer.echo(str(path))
