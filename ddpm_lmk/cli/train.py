"""Commands that train: `pretrain`, `finetune`, `sweep`, `calibrate`; and `launch slurm`, which writes a batch job."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_lmk.errors import ConfigError, LmkError, StoppedError
from ddpm_lmk.system import environment, files, shipped
from ddpm_lmk.system.console import console, print_status, print_table, reader_width
from ddpm_lmk.system.signals import leaving_at_once

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.config.values import Stage
    from ddpm_lmk.launcher import Placement
    from ddpm_lmk.sweep import Sweep


def shipped_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of every argument that names a run or launch file: a shipped one is used where there is none here."""
    if path is None or context.resilient_parsing:  # the words of an unfinished line are looked at to complete it
        return path
    file = shipped.find(path)
    if file != path:
        print_status(f"{path} is the one shipped with ddpm-lmk, {file}; `ddpm-lmk init DIR` copies it out to be edited")
    return file


def complete_file(incomplete: str) -> list[str]:
    """Names of YAML files and folders here that begin so, and of those shipped."""
    folder, _, name = incomplete.rpartition("/")
    here = sorted(Path(folder or "/" if incomplete.startswith("/") else folder).glob(f"{glob.escape(name)}*"))
    own = [f"{path}/" if path.is_dir() else str(path) for path in here if path.is_dir() or path.suffix == ".yaml"]
    return list(dict.fromkeys([*own, *(known for known in shipped.names() if known.startswith(incomplete))]))


def complete_key(incomplete: str) -> list[str]:
    """`key=` of each setting of a run file that begins so; one section further where nothing else is left."""
    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.config.explain import explain

    keys = [f"{row[0]}=" for row in explain(RunConfig) if row[0].startswith(incomplete)]
    end = len(incomplete)
    shortened = list(dict.fromkeys(key[: key.find(".", end) + 1] if "." in key[end:] else key for key in keys))
    return shortened if len(shortened) > 1 else keys  # a shell writes a space behind the only one


SHIPPED: dict[str, Any] = {"callback": shipped_file, "autocompletion": complete_file}  # an argument that names a file


train_app = typer.Typer()
launch_app = typer.Typer(help="Write what a cluster starts.", no_args_is_help=True)

RunFileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN.yaml", help="run file; `ddpm-lmk init` lists those shipped", **SHIPPED),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="settings that win over the file", autocompletion=complete_key),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run directory", show_default="runs/NAME")]
GpusOption = Annotated[int | None, typer.Option("--gpus", metavar="N", help="use N GPUs of this node")]
CpuOption = Annotated[int | None, typer.Option("--cpu", metavar="N", help="use N CPU processes")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would run, and stop")]
ExplainOption = Annotated[
    bool,
    typer.Option(
        "--explain", help="list the settings with default, type and bound; `--explain train` those that begin so"
    ),
]


def _add_training_command(name: Stage, text: str) -> None:
    """`pretrain` and `finetune` are one command that takes another kind of task."""

    @train_app.command(name, help=text)
    def command(
        run_file: RunFileArgument = None,
        overrides: Overrides = None,
        out: OutOption = None,
        gpus: GpusOption = None,
        cpu: CpuOption = None,
        nodes: Annotated[int | None, typer.Option(metavar="M", help="nodes; the same command runs on each")] = None,
        node_rank: Annotated[int, typer.Option(metavar="R", help="number of this node, from 0")] = 0,
        rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="address of node 0")] = None,
        launch: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="launch file, e.g. launch/gpu8.yaml", **SHIPPED),
        ] = None,
        fork: Annotated[
            Path | None,
            typer.Option("--fork", metavar="NEWDIR", help="continue there from the newest checkpoint of --out"),
        ] = None,
        share_group: Annotated[
            bool, typer.Option("--share-group", help="let the group read and write the outputs")
        ] = False,
        strict: Annotated[bool, typer.Option("--strict", help="refuse mixed devices and failed validations")] = False,
        loader: Annotated[str | None, typer.Option(metavar="auto|torch|dali", help="short for runtime.loader=")] = None,
        dry_run: DryRunOption = False,
        explain: ExplainOption = False,
        show_all: Annotated[
            bool, typer.Option("--all", help="with --explain: every setting, rarely set ones too")
        ] = False,
        diff: Annotated[
            Path | None,
            typer.Option(metavar="OTHER.yaml", help="compare with another run file", **SHIPPED),
        ] = None,
    ) -> None:
        # Imports take seconds, and a scheduler that asks for a stop meanwhile gets its exit code.
        with leaving_at_once():
            from ddpm_lmk.cli.dry_run import plan_run, smaller_run
            from ddpm_lmk.config import RunConfig
            from ddpm_lmk.config.load import load_run
            from ddpm_lmk.launcher import launch as launch_run
            from ddpm_lmk.launcher import place
            from ddpm_lmk.launcher.preflight import check_run
            from ddpm_lmk.report.collect import short_pretraining
            from ddpm_lmk.rundir.lock import check_unlocked

            if explain:
                kind = {"task": "denoise" if name == "pretrain" else "landmarks"}
                _explain(RunConfig, [run_file, *(overrides or [])], kinds=None if show_all else kind)
            if share_group:
                files.protect(share_group=True)
            words = [*(overrides or []), *([f"runtime.loader={loader}"] if loader is not None else [])]
            run_file = _require_file(run_file, "RUN.yaml")
            if diff is not None:
                _show_difference(run_file, words, diff)
            cfg = load_run(run_file, words)
            if cfg.task.stage != name:
                right = f"ddpm-lmk {cfg.task.stage} {run_file}"
                raise ConfigError(f"{run_file} has task.kind={cfg.task.kind}; use `{right}`")
            source = out or Path("runs") / cfg.name
            folder = fork or source
            if node_rank == 0 and not dry_run:  # before torch is imported; the other nodes work in the same place
                check_unlocked(folder)
            placement = place(gpus=gpus, cpu=cpu, nodes=nodes, node_rank=node_rank, rdzv=rdzv, launch_file=launch)
            instead = smaller_run(cfg, name, run_file, placement.device)
            # Before anything is written, and before ranks are started that would each say the same.
            for remark in check_run(cfg, folder, placement, fork=None if fork is None else source):
                print_status(remark)
            if dry_run:
                print_table(("", ""), plan_run(cfg, placement, source, instead=instead))
                return
            environment.check_copies(placement.nodes)  # srun and mpirun start copies of one command
            job = {"config": cfg.model_dump(mode="json"), "out": str(folder), "strict": strict, "instead": instead}
            job["fork"] = None if fork is None else str(source)
            print_status(f"{cfg.name}: {placement}, {folder}")
            code = launch_run(job, placement)
            if code == 0:
                typer.echo(f"{folder / 'results.json'}")
                if (short := short_pretraining(files.read_json(folder / "results.json") or {})) is not None:
                    print_status(f"{cfg.name}: {short}")
                print_status(f"next: {_next_step(cfg, folder)}")
            raise typer.Exit(code)


_add_training_command("pretrain", "Pre-train on unlabelled x-rays. Continues when --out already holds this run.")
_add_training_command("finetune", "Train a landmark detector, from random or pre-trained weights, and score it.")


@train_app.command()
def sweep(
    sweep_file: Annotated[
        Path | None,
        typer.Argument(metavar="SWEEP.yaml", help="sweep file, e.g. configs/sweep/base.yaml", **SHIPPED),
    ] = None,
    overrides: Overrides = None,
    out: OutOption = None,
    gpus: GpusOption = None,
    cpu: CpuOption = None,
    per_device: Annotated[str, typer.Option(metavar="N|auto", help="workers that share a device; auto: try")] = "1",
    scale: Annotated[str | None, typer.Option(metavar="NAME", help="a variant of the file, e.g. small")] = None,
    dry_run: DryRunOption = False,
    explain: ExplainOption = False,
) -> None:
    """Pre-train what is missing, then fine-tune over methods × shots × seeds; finished cells are kept."""
    from ddpm_lmk.cli.dry_run import smaller_sweep
    from ddpm_lmk.engine.forecast import LONG_S
    from ddpm_lmk.launcher import place
    from ddpm_lmk.sweep import SweepFile, load_sweep, plan_table
    from ddpm_lmk.sweep.check import check_sweep
    from ddpm_lmk.sweep.forecast import forecast_sweep, workers_per_device
    from ddpm_lmk.sweep.run import run_sweep

    if explain:
        _explain(SweepFile, [sweep_file, *(overrides or [])])
    file = _require_file(sweep_file, "SWEEP.yaml")
    loaded = load_sweep(file, overrides or [], out=out, scale=scale)
    if dry_run:
        console().print(plan_table(loaded))
        placement = _placement_of_dry_run(gpus, cpu)
    else:
        placement = place(gpus=gpus, cpu=cpu)
    for remark in check_sweep(loaded, placement):
        print_status(remark)
    if dry_run and gpus is None and cpu is None:
        placement = place()  # only now: it imports torch
    device, devices = placement.device, placement.processes
    # `auto` trains for some steps, which a dry run does not.
    each = (
        1
        if dry_run and per_device == "auto"
        else workers_per_device(per_device, loaded, device=device, say=print_status)
    )
    if not dry_run:
        print_status(f"sweep {loaded.name}: {placement}, {loaded.out}{f', {each} workers on each' if each > 1 else ''}")
    _warn_of_emulation(loaded, device)
    forecast = forecast_sweep(loaded, device, workers=devices * each, devices=devices)
    instead = smaller_sweep(loaded, file, device, scale=scale) if forecast.total_s > LONG_S else None
    if dry_run and forecast.runs:
        print_table(("what is left", "runs", "time of a run", "worker time"), forecast.rows())
    for line in (f"sweep {loaded.name}: {forecast}", *([instead] if instead is not None else [])):
        typer.echo(line) if dry_run else print_status(line)
    if not dry_run:
        seconds = None if forecast.unknown else forecast.seconds()
        raise typer.Exit(run_sweep(loaded, processes=devices, per_device=each, device=device, seconds=seconds))


@train_app.command()
def calibrate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished fine-tuning runs", show_default=False)],
    folds: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="parts of the labelled images", show_default="each image, at most 5"),
    ] = None,
    coverage: Annotated[
        float, typer.Option(min=0.5, max=0.99, help="probability with which a radius holds its true point")
    ] = 0.9,
    gpus: GpusOption = None,
    cpu: CpuOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Learn the radius around a predicted point that holds the true point with 90 %, from errors on left-out images.

    A run is trained again without each part of its labelled images (RUN/folds), which takes that many times as long.
    RUN/radius.json is the result; `predict`, `evaluate` and `report` use it. Not to be confused with the temperatures
    of contour-hugging runs (calibration.json).
    """
    with leaving_at_once():
        from ddpm_lmk.cli.results import radius_line
        from ddpm_lmk.launcher import place
        from ddpm_lmk.sweep import folds as folding

        placement = _placement_of_dry_run(gpus, cpu) if dry_run else place(gpus=gpus, cpu=cpu)
        failures: list[LmkError] = []
        for run in runs:
            try:
                planned = folding.plan_calibration(run, folds)
                for remark in folding.check_folds(planned, placement):
                    print_status(remark)
                if dry_run:
                    typer.echo(str(planned))
                    continue
                print_status(str(planned))
                found = folding.calibrate(planned, placement, coverage=coverage)
            except StoppedError:
                raise
            except LmkError as error:  # a run that has no radius must not stop the others; the first error is told last
                if len(runs) > 1:
                    print_status(f"failed: {error}")
                failures.append(error)
                continue
            for each in found:
                typer.echo(_radius_found(each))
                if each["measured"] is not None:
                    typer.echo(f"split {each['split']}: {radius_line(each['measured'])}")
        if failures:
            raise failures[0]


def _radius_found(facts: dict[str, Any]) -> str:
    """What a calibration has learnt of one dataset."""
    told = f"{facts['points']} points of {facts['images']} left-out images tell as much as "
    told += f"{facts['independent_points']:.0f} independent ones"
    if facts["factor"] is None:
        wanted = f"{100 * facts['coverage']:g} %"
        return f"{facts['folder']}: no radius. {told}: too few for {wanted}, or too many could not be read; label more"
    file = facts["folder"] / "radius.json"
    return f"{file}: {facts['factor']:.2f} times the spread holds {100 * facts['coverage']:g} % ({told})"


def _placement_of_dry_run(gpus: int | None, cpu: int | None) -> Placement:
    """For the checks of a dry run, which answer before torch is imported; its GPUs need not be on this machine."""
    from ddpm_lmk.launcher import Placement, place

    if gpus is None and cpu is None:
        return Placement("cpu", 1)
    return Placement("cuda", gpus) if gpus and cpu is None else place(gpus=gpus, cpu=cpu)


@launch_app.callback()
def _launch() -> None:
    """Keeps the name of the only command below on the command line."""


@launch_app.command("slurm")
def slurm(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="run file", **SHIPPED)],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="GPUs of each node")] = None,
    cpu: Annotated[int | None, typer.Option("--cpu", metavar="N", help="CPU processes on each node")] = None,
    launch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="launch file instead", **SHIPPED),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="M", min=1, help="number of nodes")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run directory, seen by all nodes")] = None,
    script: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to write it", show_default="NAME.sbatch")
    ] = None,
    time: Annotated[
        str, typer.Option(metavar="HH:MM:SS", help="time limit of one job; the run continues in the next")
    ] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option(metavar="N", min=1, help="cores of each node")] = 8,
    grace: Annotated[
        int, typer.Option(metavar="SECONDS", min=10, help="time to save in before the nodes are taken")
    ] = 120,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="as in sbatch")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="as in sbatch")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="hand it to sbatch as well")] = False,
) -> None:
    """Write (and submit) a batch script that saves and queues itself again when it is preempted."""
    from ddpm_lmk.config.load import load_run
    from ddpm_lmk.launcher import LaunchFile, Placement
    from ddpm_lmk.launcher import slurm as writer
    from ddpm_lmk.launcher.placement import read_launch_file
    from ddpm_lmk.launcher.preflight import check_run

    # The node that queues the job may have no GPU, so none is taken for granted.
    if (gpus is not None) + (cpu is not None) + (launch is not None) != 1:
        raise ConfigError("give one of --gpus N, --cpu N and --launch FILE: what each node has to start")
    if launch is not None:
        file = read_launch_file(launch)
    else:
        file = LaunchFile(device="cuda" if gpus else "cpu", processes=gpus or cpu or 1)
    on_gpus = file.processes if file.device == "cuda" else 0
    cfg = load_run(run_file, overrides or [])
    folder = (out or Path("runs") / cfg.name).absolute()
    # A queue is long; what a login node does not see is checked as the job starts.
    if all((Path(path) / "manifest.json").is_file() for path in (*cfg.data.path, *cfg.data.unlabelled_path)):
        placement = Placement(file.device, file.processes, nodes or file.nodes, zero=file.zero)
        for remark in check_run(cfg, folder, placement):
            print_status(remark)
    job = writer.Job(
        name=cfg.name,
        command=writer.command(cfg, run_file, overrides or [], gpus=on_gpus, cpu=cpu or 0, out=folder, launch=launch),
        nodes=nodes or file.nodes,
        gpus_per_node=on_gpus,
        cpus_per_task=cpus_per_task,
        time=time,
        grace_s=grace,
        partition=partition,
        account=account,
    )
    path = script or Path(f"{cfg.name}.sbatch")
    writer.write_script(job, path)
    typer.echo(writer.submit(path) if submit else f"{path}: submit it with `sbatch {path}`")


def _require_file(path: Path | None, name: str) -> Path:
    """--explain needs no file, everything else does."""
    if path is None:
        raise ConfigError(f"{name} is missing; `ddpm-lmk init` lists those shipped, --explain every setting of one")
    return path


def _warn_of_emulation(sweep: Sweep, device: str) -> None:
    """Say once that this processor has no instructions for the precision asked for; each cell only logs it."""
    asked = {run.cfg.train.precision: run.cfg for run in (*sweep.cells, *sweep.stages)}
    if device != "cpu" or not asked.keys() & {"bf16", "fp16"}:
        return  # without importing torch
    from ddpm_lmk.engine.device_fit import choose_precision, emulation_warning

    for cfg in asked.values():
        if warning := emulation_warning(cfg, choose_precision(cfg, device).name, device):
            print_status(f"warning: {warning}")


def _next_step(cfg: RunConfig, out: Path) -> str:
    """What is usually done with a finished run."""
    run = shlex.quote(str(out))
    if cfg.task.stage == "pretrain":
        return f"fine-tune from it: init.weights={run} in `ddpm-lmk finetune`, start.pretrained={run} in a sweep"
    return f"`ddpm-lmk predict {run} IMAGES --out found`, or `ddpm-lmk report {run}` for a page"


def _explain(model: type[BaseModel], words: list[str | Path | None], *, kinds: dict[str, str] | None = None) -> None:
    """Words are beginnings of keys; a run file among them says which kinds of sections are shown in an overview."""
    from ddpm_lmk.config.explain import page
    from ddpm_lmk.config.load import kinds_of

    files = [word for word in words if word is not None and Path(word).suffix in (".yaml", ".yml")]
    wanted = [str(word) for word in words if word is not None and word not in files]
    if kinds is not None and files:
        kinds |= kinds_of(files[0])
    typer.echo(page(model, wanted, width=reader_width(), kinds=kinds))
    raise typer.Exit()


def _show_difference(run_file: Path, words: list[str], other: Path) -> None:
    """Print a row (key, value here, value there, what it is) where two run files differ, and stop.

    Args:
        words: `key=value` of the command line; they belong to the first file.
    """
    from ddpm_lmk.config.explain import descriptions
    from ddpm_lmk.config.load import diff_runs, load_run

    here, there = load_run(run_file, [*_stand_in(run_file), *words]), load_run(other, _stand_in(other))
    texts = descriptions(there) | descriptions(here)
    rows = [(key, str(a), str(b), texts.get(key, "")) for key, a, b in diff_runs(here, there)]
    if rows:
        print_table(("key", str(run_file), str(other), "what"), rows)
    else:
        typer.echo("no difference")
    raise typer.Exit()


def _stand_in(path: Path) -> list[str]:
    """A data.path for a run file that leaves it to the command line, as those in configs/ do."""
    from ddpm_lmk.config.load import load_yaml

    data = load_yaml(path).get("data") or {}
    return [] if isinstance(data, dict) and "path" in data else ["data.path=(not given)"]
