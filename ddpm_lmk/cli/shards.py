"""`ddpm-lmk shards`: packing x-rays into shards, checking and showing them."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_lmk.data.sources.kinds import ANNOTATED, KINDS
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system.console import print_status, print_table, progress

if TYPE_CHECKING:
    from ddpm_lmk.data.shards.pack import PackSummary

shards_app = typer.Typer(name="shards", help="Pack x-rays into shards, check them, look at them.", no_args_is_help=True)

PIXELS = "for pixels"
LABELS = "for labels"
TOOLS = "for labels of other tools"
MAX_LINES = 5  # of a list on the terminal; files hold all of them

DatasetArgument = Annotated[
    str, typer.Argument(metavar="DIR|URL", help="folder written by `shards pack`, or a URL of one")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="folder written by `shards pack`")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"folder, list or tars of x-rays; labels of {', '.join(ANNOTATED)}; for phantoms: chest, skull or hand",
    ),
]
Kind = Annotated[str, typer.Option(help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="new folder for the shards")]
Size = Annotated[int, typer.Option(help="side of the stored square, pixels")]
Workers = Annotated[int | None, typer.Option(min=1, help="decoding processes", show_default="one per core")]
Name = Annotated[str | None, typer.Option(help="name of the dataset", show_default="from the source")]
Seed = Annotated[int, typer.Option(min=0, help="root of phantoms and of the validation share")]
Aspect = Annotated[str, typer.Option(help="squeeze to the square (paper) or pad", rich_help_panel=PIXELS)]
Filter = Annotated[str, typer.Option(help="area, linear or gaussian", rich_help_panel=PIXELS)]
Bits = Annotated[int, typer.Option(help="8 or 16 per stored pixel", rich_help_panel=PIXELS)]
Window = Annotated[
    str | None,
    typer.Option(
        help="black and white of deeper sources: percentile, minmax, full, or voi (the DICOM file's own)",
        show_default="voi for dicom and dicom-sr, else percentile",
        rich_help_panel=PIXELS,
    ),
]
Frame = Annotated[int | None, typer.Option(min=0, help="of files with several frames", rich_help_panel=PIXELS)]
BurnedIn = Annotated[
    bool, typer.Option("--allow-burned-in", help="take DICOM files with text in the picture", rich_help_panel=PIXELS)
]
IdKey = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="key that makes ids of paths; made if absent",
        show_default="OUT.key for dicom and dicom-sr, else none",
    ),
]
IdMap = Annotated[Path | None, typer.Option(metavar="FILE", help="where to write which id is which file")]
Encoding = Annotated[str, typer.Option(help="raw, png or jpeg", rich_help_panel=PIXELS)]
Quality = Annotated[int, typer.Option(min=1, max=100, help="of JPEG", rich_help_panel=PIXELS)]
Convention = Annotated[str, typer.Option(help="splits: paper (its code) or published", rich_help_panel=LABELS)]
Split = Annotated[str | None, typer.Option(help="one split for every image", rich_help_panel=LABELS)]
ValFraction = Annotated[float, typer.Option(help="share of a folder for validation", rich_help_panel=LABELS)]
Annotator = Annotated[str, typer.Option(help="mean, or one reader", rich_help_panel=LABELS)]
Spec = Annotated[str | None, typer.Option(help="known set whose rules the labels follow", rich_help_panel=LABELS)]
Unit = Annotated[str | None, typer.Option(help="mm or px, of errors", rich_help_panel=LABELS)]
Thresholds = Annotated[
    list[float] | None,
    typer.Option("--threshold", help="SDR threshold in the unit, repeatable", rich_help_panel=LABELS),
]
SpacingPair = Annotated[
    str | None, typer.Option(metavar="I,J", help="two landmarks that lie 50 mm apart", rich_help_panel=LABELS)
]
ClipLandmarks = Annotated[
    bool, typer.Option("--clip-landmarks", help="move points outside onto the edge", rich_help_panel=LABELS)
]
KeepUnlabelled = Annotated[
    bool, typer.Option("--keep-unlabelled", help="keep images without label too", rich_help_panel=LABELS)
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", metavar="DIR", help="images of the labels", show_default="in SOURCE", rich_help_panel=TOOLS
    ),
]
Landmarks = Annotated[
    Path | None,
    typer.Option("--landmarks", metavar="FILE", help="their names in order, one a line", rich_help_panel=TOOLS),
]
PixelOrigin = Annotated[
    str | None,
    typer.Option(
        help="(0, 0) is the centre or the corner of the top-left pixel",
        show_default="as the tool counts",
        rich_help_panel=TOOLS,
    ),
]
MmPerPx = Annotated[float | None, typer.Option(help="spacing of all images, if known", rich_help_panel=TOOLS)]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="ROLE=NAME|FILE",
        help="of a spreadsheet, e.g. image=Datei; repeatable",
        rich_help_panel=TOOLS,
    ),
]
Counts = Annotated[
    list[str] | None,
    typer.Option("--count", metavar="SPLIT=N", help="phantoms per split, repeatable", rich_help_panel=LABELS),
]


@shards_app.command()
def pack(
    source: Source,
    kind: Kind,
    out: Out,
    size: Size = 256,
    workers: Workers = None,
    name: Name = None,
    seed: Seed = 0,
    aspect: Aspect = "squeeze",
    filter: Filter = "area",  # noqa: A002 - the field's word
    bits: Bits = 8,
    window: Window = None,
    frame: Frame = None,
    allow_burned_in: BurnedIn = False,
    encoding: Encoding = "raw",
    quality: Quality = 95,
    convention: Convention = "paper",
    split: Split = None,
    val_fraction: ValFraction = 0.0,
    annotator: Annotator = "mean",
    spec: Spec = None,
    unit: Unit = None,
    thresholds: Thresholds = None,
    spacing_pair: SpacingPair = None,
    clip_landmarks: ClipLandmarks = False,
    keep_unlabelled: KeepUnlabelled = False,
    images: Images = None,
    landmarks: Landmarks = None,
    pixel_origin: PixelOrigin = None,
    mm_per_px: MmPerPx = None,
    columns: Columns = None,
    counts: Counts = None,
    id_key: IdKey = None,
    id_map: IdMap = None,
) -> None:
    """Decode and resize x-rays once, and write them as WebDataset shards with an index."""
    given = dict(locals())
    from ddpm_lmk.data.annotations.spreadsheet import columns_of
    from ddpm_lmk.data.pack_settings import PackSettings
    from ddpm_lmk.data.shards.pack import pack as pack_shards

    chosen = {key: given[key] for key in PackSettings.model_fields if key in given}  # checked, and named, there
    chosen |= {"name": name or "", "thresholds": thresholds or (), "spacing_pair": _pair(spacing_pair)}
    chosen |= {"landmarks": _lines(landmarks), "columns": columns_of(columns or ())}
    settings = PackSettings.model_validate(chosen | {"counts": _counts(counts or [])})
    with progress(f"packing {source}") as show:
        summary = pack_shards(
            source, out, settings, images=images, id_key=id_key, id_map=id_map, workers=workers, progress=show
        )
    _report(summary)


def _report(summary: PackSummary) -> None:
    for warning in summary.warnings:
        print_status(f"warning: {warning}")
    for line in summary.refused[:MAX_LINES]:
        print_status(f"refused: {line['id']}: {line['reason']}")
    if summary.num_refused > MAX_LINES:
        print_status(f"... all {summary.num_refused} refused images are in {summary.out / 'refused.jsonl'}")
    if summary.resumed_at:
        print_status(f"resumed after the {summary.resumed_at} images of an interrupted packing")
    # Resumed and very small packings take no measurable time.
    speed = summary.packed / max(summary.seconds, 1e-9)
    typer.echo(
        f"{summary.out}: {summary.packed} images ({_listed(summary.per_split)}), "
        f"{summary.num_refused} refused{_by_code(summary)}, "
        f"{_mib(summary.image_bytes)} in {summary.seconds:.1f} s ({speed:.0f} images/s)"
    )
    print_status(
        f"next: `ddpm-lmk shards show {shlex.quote(str(summary.out))}` to look at them; runs read them with data.path="
    )


def _by_code(summary: PackSummary) -> str:
    codes = ", ".join(f"{code} {count}" for code, count in summary.reasons.most_common())
    return f" ({codes})" if codes else ""


@shards_app.command()
def verify(folder: DatasetArgument) -> None:
    """Read everything again: checksums, tar members, pixels, labels and counts."""
    from ddpm_lmk.data.shards.verify import verify as verify_shards

    report = verify_shards(folder)
    for line in [*report.foreign, *report.problems][:MAX_LINES]:
        print_status(line)
    report.check()
    if not report.is_listed:
        print_status("the server lists no files, so foreign ones were not checked for")
    splits = _listed(report.per_split)
    typer.echo(f"{folder}: good; {report.samples} samples ({splits}) in {report.shards} shards, {_mib(report.bytes)}")


@shards_app.command()
def index(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="tars of a WebDataset: path, folder, URL, x-{000..012}.tar, a::b")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="new folder", show_default="rebuild index.npy of SOURCE"),
    ] = None,
    size: Size = 256,
    workers: Workers = None,
    name: Name = None,
    seed: Seed = 0,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="EXT", help="member with the image, repeatable", show_default="the only one"),
    ] = None,
    split_from: Annotated[
        str | None, typer.Option(metavar="EXT[:KEY]", help="member that names the split, e.g. json:split")
    ] = None,
    patient_from: Annotated[
        str | None, typer.Option(metavar="EXT[:KEY]", help="member that names the patient, e.g. json:patient_id")
    ] = None,
    split: Split = None,
    val_fraction: ValFraction = 0.0,
    aspect: Aspect = "squeeze",
    filter: Filter = "area",  # noqa: A002 - the field's word
    bits: Bits = 8,
    window: Window = None,
    frame: Frame = None,
    allow_burned_in: BurnedIn = False,
    id_key: IdKey = None,
) -> None:
    """Use tars of a WebDataset where they lie, without packing; or rebuild the index.npy of a dataset."""
    given = dict(locals())
    from ddpm_lmk.data.pack_settings import PackSettings
    from ddpm_lmk.data.shards.in_place import index_in_place
    from ddpm_lmk.data.shards.index import rebuild_index
    from ddpm_lmk.data.shards.manifest import read_header
    from ddpm_lmk.data.sources.webdataset import Roles

    if out is None:
        parameters = inspect.signature(index).parameters
        vain = [key for key, value in given.items() if key != "source" and value != parameters[key].default]
        if vain:
            raise ConfigError(f"--{vain[0].replace('_', '-')} is for the tars of a WebDataset, which need --out too")
        typer.echo(str(rebuild_index(Path(source), read_header(Path(source)))))
        return
    chosen = {key: given[key] for key in PackSettings.model_fields if key in given} | {"name": name or ""}
    settings = PackSettings.model_validate(chosen | {"kind": "folder"})
    roles = Roles(
        tuple(map(_member, image or ())), split_from and _member(split_from), patient_from and _member(patient_from)
    )
    with progress(f"indexing {source}, MiB") as show:
        summary = index_in_place(source, out, settings, roles, id_key=id_key, workers=workers, progress=show)
    _report(summary)


@shards_app.command()
def sign(
    folder: FolderArgument,
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="key file; made where there is none")],
) -> None:
    """Sign a dataset; where LMK_SIGNING_KEY names the key file, only datasets signed with it are read."""
    from ddpm_lmk.data.shards.manifest import Manifest
    from ddpm_lmk.data.shards.manifest import sign as sign_shards

    Manifest.open(folder).close()  # a damaged one is refused: the signature is of what its manifest says
    typer.echo(str(sign_shards(folder, key)))


@shards_app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="datasets, as data.path of a run would name them")
    ],
    protect: Annotated[
        list[Path] | None, typer.Option("--protect", metavar="DIR", help="as data.protect; repeatable")
    ] = None,
    splits: Annotated[list[str] | None, typer.Option("--split", help="as data.splits; repeatable")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="the record of it, as JSON")] = None,
) -> None:
    """Find what pre-training would leave out: images of test sets, of their patients, and duplicates."""
    from ddpm_lmk.config import DataConfig
    from ddpm_lmk.data.duplicates.fingerprints import ensure_fingerprints
    from ddpm_lmk.data.duplicates.leakage import Uncompared, exclusion
    from ddpm_lmk.data.shards.manifest import Manifest
    from ddpm_lmk.system.files import write_json

    for folder in [*folders, *(protect or [])]:
        ensure_fingerprints(Manifest.open(folder))
    data = DataConfig(
        path=tuple(map(str, folders)), protect=tuple(map(str, protect or ())), splits=tuple(splits or ("train",))
    )
    record = exclusion([Manifest.open(folder) for folder in folders], data).record
    print_table(("", "images", *record["leaks"]), compare_rows(record))
    typer.echo(f"{record['left_out']} images would be left out of pre-training")
    for pair in record["patients_not_compared"]:
        typer.echo(str(Uncompared(**pair)))
    if out is not None:
        write_json(out, record)
        typer.echo(str(out))


def compare_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was compared, and what was found, as lines of a table."""
    rows: list[tuple[str, ...]] = [
        (f"{part.replace('_', ' ')}: {facts['dataset']} {', '.join(facts['splits'])}", str(facts["images"]), "", "", "")
        for part in ("trained_on", "protected")
        for facts in record[part]
    ]
    for what, name in (("leaks", "also in a protected split"), ("copies", "copies of an earlier one")):
        counts = record[what]
        rows.append((name, str(sum(counts.values())), *map(str, counts.values())))
    return rows


@shards_app.command()
def show(
    folders: Annotated[list[str], typer.Argument(metavar="DIR|URL...", help="datasets to show, alone or as a pool")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default="./show-NAME")] = None,
    count: Annotated[int, typer.Option(min=1, max=400, help="images of each dataset on the contact sheet")] = 24,
) -> None:
    """Contact sheets with landmarks, statistics, duplicates, leakage and refused images, as pictures and one page."""
    from ddpm_lmk.data.preview import show as show_shards

    name = _last_part(folders[0]) if len(folders) == 1 else "pool"
    shown = show_shards(folders, out or Path(f"show-{name}"), count=count)
    print_table(("", ""), shown.lines)
    typer.echo(f"{shown.sheet}\n{shown.page}")


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] if "://" in place else Path(place).resolve().name


def _listed(per_split: dict[str, int]) -> str:
    return ", ".join(f"{split} {number}" for split, number in per_split.items())


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _member(text: str) -> str:
    """EXT or EXT:KEY as samples have it: without the dot, in lower case."""
    extension, colon, key = text.partition(":")
    return f"{extension.lstrip('.').lower()}{colon}{key}"


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, comma, second = text.partition(",")
    if not comma or not first.strip().isdigit() or not second.strip().isdigit():
        raise ConfigError(f"--spacing-pair {text!r}; wanted two landmark numbers, e.g. 0,4")
    return int(first), int(second)


def _lines(path: Path | None) -> tuple[str, ...]:
    try:
        lines = [] if path is None else path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--landmarks {path}: no readable text; wanted a name on each line") from error
    return tuple(" ".join(line.split()) for line in lines if line.strip())


def _counts(words: list[str]) -> dict[str, int]:
    counts = {}
    for word in words:
        split, equals, number = word.partition("=")
        if not equals or not split or not number.isdigit():
            raise ConfigError(f"--count {word!r}; wanted SPLIT=N, e.g. train=400")
        counts[split] = int(number)
    return counts
