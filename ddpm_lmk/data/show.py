"""A look at packed shards: a contact sheet with landmarks, and a page of statistics.

For people, not for programs. Large sets are sampled evenly, and the page says so. The page is one file and loads
nothing from elsewhere; it shows patients' images, so keep it where they may be.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ddpm_lmk.atomic import write_bytes, write_text
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.data.records import SampleRecord

_TILE_PX = 224
_CAPTION_PX = 34
_MAX_SAMPLED = 512
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Shown:
    """The files written, and the statistics as (label, value) lines."""

    sheet: Path
    page: Path
    lines: list[tuple[str, str]]


@dataclass(frozen=True)
class _Sample:
    """What statistics need of the sampled rows; points in stored px."""

    records: list[SampleRecord]
    points: np.ndarray  # [K, N, 2], of those with labels
    histogram: np.ndarray  # [64] shares of pixels, over the full range of the type
    mean_image: np.ndarray  # [S, S] in [0, 1]


def show(path: str | Path, out: str | Path, *, count: int = 24) -> Shown:
    """Write `contact_sheet.png` (with `count` images) and `index.html` into the folder `out`.

    Raises:
        DataError: not a folder of shards, or a sample is damaged.
        ResourceError: `out` cannot be written.
    """
    manifest = Manifest.open(path)
    sample = _sampled(manifest)
    lines = _statistics(manifest, sample)
    sheet = cv2.imencode(".png", contact_sheet(manifest, _evenly(len(manifest), count)))[1].tobytes()
    shown = Shown(Path(out) / "contact_sheet.png", Path(out) / "index.html", lines)
    write_bytes(shown.sheet, sheet)
    write_text(shown.page, _page(manifest, lines, sheet, _charts(manifest, sample)))
    manifest.close()
    return shown


def contact_sheet(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """The stored images of these rows in a grid, uint8 `[H, W, 3]` (BGR), with landmarks, id and split."""
    columns = min(len(rows), 6)
    tiles = [_tile(manifest, int(row)) for row in rows]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)])


def _tile(manifest: Manifest, row: int) -> np.ndarray:
    record = manifest.read_record(row)
    pixels = _unit(manifest.decode(row))
    size = (_TILE_PX, _TILE_PX)
    shrinks = pixels.shape[0] > _TILE_PX
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    tile = cv2.cvtColor(np.rint(small * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    if record.points is not None:
        _draw_points(tile, (_stored(record) + 0.5) * (_TILE_PX / manifest.stored_size) - 0.5)
    caption = np.full((_CAPTION_PX, _TILE_PX, 3), 24, np.uint8)
    name = record.id.encode("ascii", "replace").decode("ascii")
    native = f"{record.split}  {record.native_size[0]} x {record.native_size[1]}"
    for text, y in ((name[-30:], 14), (native, 28)):
        cv2.putText(caption, text, (4, y), _FONT, 0.4, (230, 230, 230), 1, cv2.LINE_AA)
    return np.vstack([tile, caption])


def _draw_points(tile: np.ndarray, points: np.ndarray) -> None:
    """Rings with a thin dark edge, one hue per landmark; sub-pixel positions through OpenCV's fixed point."""
    for (x, y), colour in zip(points, _hues(len(points))):
        centre = (round(float(x) * 16), round(float(y) * 16))
        cv2.circle(tile, centre, 4 * 16, (0, 0, 0), 3, cv2.LINE_AA, 4)
        cv2.circle(tile, centre, 4 * 16, colour, 1, cv2.LINE_AA, 4)


def _hues(count: int) -> list[tuple[int, int, int]]:
    hsv = np.array([[[round(180 * index / count), 200, 255] for index in range(count)]], np.uint8)
    return [(int(b), int(g), int(r)) for b, g, r in cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0]]


def _sampled(manifest: Manifest) -> _Sample:
    records, points = [], []
    counts = np.zeros(64)
    total = np.zeros((manifest.stored_size, manifest.stored_size))
    rows = _evenly(len(manifest), _MAX_SAMPLED)
    for row in rows:
        record, pixels = manifest.read_record(int(row)), _unit(manifest.decode(int(row)))
        records.append(record)
        if record.points is not None:
            points.append(_stored(record))
        counts += np.histogram(pixels, bins=64, range=(0, 1))[0]
        total += pixels
    shape = np.array(points).reshape(len(points), manifest.spec.num_landmarks, 2)
    return _Sample(records, shape, counts / counts.sum(), total / len(rows))


def _statistics(manifest: Manifest, sample: _Sample) -> list[tuple[str, str]]:
    index, spec = manifest.index, manifest.spec
    per_split = manifest.count_per_split()
    widths, heights = index["width"], index["height"]
    spacings = [record.mm_per_px for record in sample.records if record.mm_per_px is not None]
    groups = {record.group for record in sample.records if record.group is not None}
    lines = [
        ("dataset", manifest.dataset),
        ("images", f"{len(manifest)} ({', '.join(f'{name} {number}' for name, number in per_split.items())})"),
        ("stored as", f"{manifest.stored_size} px square, {manifest.aspect}, {manifest.bits} bit, {manifest.encoding}"),
        ("size", f"{sum(shard['size'] for shard in manifest.shards) / 1e6:.1f} MB in {len(manifest.shards)} shards"),
        ("native width", f"{widths.min()} to {widths.max()} px"),
        ("native height", f"{heights.min()} to {heights.max()} px"),
        ("landmarks", f"{spec.num_landmarks}, unit {spec.unit}, spacing {spec.spacing.kind}"),
        ("fingerprint", manifest.fingerprint),
        ("sampled", f"{len(sample.records)} images, {len(sample.points)} with labels, {len(groups)} patients named"),
    ]
    if spacings:
        spread = f"{min(spacings):.4f} to {max(spacings):.4f}, mean {np.mean(spacings):.4f} mm per native px"
        lines.insert(7, ("pixel spacing", spread))
    return lines


def _charts(manifest: Manifest, sample: _Sample) -> bytes:
    """Native sizes, intensities, and mean shape over mean image, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    sizes, intensities, shape = figure.subplots(1, 3)
    native = np.array([record.native_size for record in sample.records])
    sizes.scatter(native[:, 0], native[:, 1], s=12, alpha=0.5, linewidths=0)
    sizes.set(xlabel="native width, px", ylabel="native height, px", title="native sizes")
    intensities.bar((np.arange(64) + 0.5) / 64, sample.histogram, width=1 / 64)
    intensities.set(xlabel="stored intensity, share of the range", ylabel="share of pixels", title="intensities")
    shape.imshow(sample.mean_image, cmap="gray")
    shape.set(title="mean image" if not len(sample.points) else "mean image and shape, ± 1 SD")
    shape.set_axis_off()
    if len(sample.points):
        mean, spread = sample.points.mean(0), sample.points.std(0)
        colours = [(r / 255, g / 255, b / 255) for b, g, r in _hues(len(mean))]
        for (x, y), (sx, sy), colour in zip(mean, spread, colours):
            shape.errorbar(x, y, yerr=sy, xerr=sx, fmt="o", ms=3, lw=1, color=colour)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _page(manifest: Manifest, lines: list[tuple[str, str]], sheet: bytes, charts: bytes) -> str:
    rows = "".join(f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in lines)
    names = ", ".join(f"{index} {html.escape(name)}" for index, name in enumerate(manifest.spec.landmark_names))
    pictures = "".join(f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">' for png in (charts, sheet))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(manifest.dataset)}</title>'
        "<style>body{font:15px system-ui,sans-serif;margin:2em;max-width:1360px;color:#222}"
        "th{text-align:left;padding:2px 1.5em 2px 0;color:#666;font-weight:normal}"
        "img{max-width:100%;margin-top:1em}</style>"
        f"<h1>{html.escape(manifest.dataset)}</h1><table>{rows}</table><p>{names}</p>{pictures}</html>\n"
    )


def _stored(record: SampleRecord) -> np.ndarray:
    assert record.points is not None
    return record.points @ record.to_stored[:, :2].T + record.to_stored[:, 2]


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


def _evenly(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))
