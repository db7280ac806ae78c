"""`shards show`: contact sheets with landmarks, statistics, duplicates, leakage and refused files of datasets.

For people, not for programs. Large sets are sampled evenly, and the page says so. The page is one file and loads
nothing from elsewhere; it shows patients' images, so keep it where they may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk.data.duplicates.leakage import Leakage, Source, compare
from ddpm_lmk.data.preview import page, pictures
from ddpm_lmk.data.preview.samples import sample_dataset
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.system.files import write_bytes, write_text


@dataclass(frozen=True)
class Shown:
    """The files written, and the statistics of each dataset as (label, value) lines."""

    sheet: Path
    page: Path
    lines: list[tuple[str, str]]


def show(paths: str | Path | Sequence[str | Path], out: str | Path, *, count: int = 24) -> Shown:
    """Write into the folder `out`: `contact_sheet.png` (with `count` images of each dataset), `statistics.png`, and
    `copies.png` where there are any; `index.html` holds all of them.

    Raises:
        DataError: not a folder of shards, or a sample is damaged.
        ResourceError: `out` cannot be written.
    """
    manifests = [Manifest.open(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    samples = [sample_dataset(manifest) for manifest in manifests]
    leakage = compared(manifests)
    drawn = {
        "contact_sheet.png": pictures.contact_sheet(manifests, count),
        "statistics.png": pictures.statistics(samples),
        "copies.png": pictures.pair_sheet(leakage) if leakage.leaks or leakage.copies else None,
    }
    written = {name: content for name, content in drawn.items() if content is not None}
    for name, content in written.items():
        write_bytes(Path(out) / name, content)
    write_text(Path(out) / "index.html", page.render(samples, leakage, written))
    for manifest in manifests:
        manifest.close()
    lines = [line for sample in samples for line in sample.lines()] + page.duplicate_lines(leakage)
    return Shown(Path(out) / "contact_sheet.png", Path(out) / "index.html", lines)


def compared(manifests: Sequence[Manifest]) -> Leakage:
    """What pre-training on the split train of these datasets would leave out, every other split being protected."""
    parts = [
        tuple(tuple(s for s in m.splits if (s == "train") is wanted) for wanted in (True, False)) for m in manifests
    ]
    trained = [Source(manifest, train) for manifest, (train, _) in zip(manifests, parts, strict=True)]
    protected = [Source(manifest, rest) for manifest, (_, rest) in zip(manifests, parts, strict=True) if rest]
    return compare(trained, protected)
