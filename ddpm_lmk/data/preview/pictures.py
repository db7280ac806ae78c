"""Pictures of datasets as PNGs: contact sheets, pairs of images that repeat one another, and charts of statistics."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_lmk.data.duplicates.leakage import Finding, Leakage
from ddpm_lmk.data.preview.samples import BINS, DatasetSample, evenly_spaced, stored_points, to_unit_range
from ddpm_lmk.data.shards.manifest import Manifest

TILE = 208
GAP = 12
CAPTION = 40
TITLE = 52
COLUMNS = 6
PAIR_COLUMNS = 3
MOST_PAIRS = 18
MOST_SUGGESTED = 59
INK, MUTED, PAPER = (236, 240, 244), (150, 161, 173), (17, 21, 26)
ALARM = (240, 128, 110)
Rgb = tuple[int, int, int]


def contact_sheet(manifests: Sequence[Manifest], count: int) -> bytes:
    """A PNG with `count` images of each dataset, landmarks drawn in, captioned with id, split and native size."""
    parts = [_contact_sheet(manifest, evenly_spaced(len(manifest), count)) for manifest in manifests]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return _png(sheet)


def _contact_sheet(manifest: Manifest, rows: np.ndarray) -> Image.Image:
    facts = f"{len(manifest):,} images, {manifest.stored_size} px {manifest.bits} bit; {len(rows)} of them"
    sheet, pen, corners = _grid(manifest.dataset, facts, len(rows), COLUMNS, (TILE + GAP, TILE + CAPTION + GAP))
    for row, corner in zip(rows.tolist(), corners):
        record = manifest.read_record(row)
        _paste(
            sheet, pen, corner, manifest, row, f"{record.split}  ·  {record.native_size[0]} x {record.native_size[1]}"
        )
    return sheet


def pair_sheet(leakage: Leakage) -> bytes:
    """A PNG with the first leaks and duplicates: each image, and beside it the one it repeats."""
    chosen: list[tuple[Finding, bool]] = [(each, True) for each in leakage.leaks[: MOST_PAIRS // 2]]
    chosen += [(each, False) for each in leakage.copies[: MOST_PAIRS - len(chosen)]]
    counts = f"{len(leakage.leaks)} images also in a protected split, {len(leakage.copies)} duplicates"
    cell = (2 * (TILE + 1 + GAP), TILE + CAPTION + 16 + GAP)
    sheet, pen, corners = _grid("Repeated images", f"{counts}; {len(chosen)} of them", len(chosen), PAIR_COLUMNS, cell)
    sources = [*leakage.trained, *leakage.protected]
    for (finding, is_leak), (left, top) in zip(chosen, corners):
        for side, (source, row) in enumerate((finding.image, finding.of)):
            manifest = sources[source].manifest
            caption = f"{manifest.dataset}  ·  {manifest.read_record(row).split}"
            _paste(sheet, pen, (left + side * (TILE + 2), top), manifest, row, caption)
        words = f"{finding.kind}, in a protected split" if is_leak else finding.kind
        pen.text((left, top + TILE + CAPTION - 2), words, fill=ALARM if is_leak else INK, font=_font(13))
    return _png(sheet)


def suggestion_sheet(images: Sequence[tuple[Manifest, int]], coverage: Sequence[float]) -> bytes:
    """A PNG of the images suggested for labelling (dataset and row of each, best first), and a curve of the coverage.

    Landmarks are not drawn: what is to be labelled is shown as an annotator will see it.
    """
    count = min(len(images), MOST_SUGGESTED)
    facts = f"{len(images)} images" + (f"; {count} of them" if count < len(images) else "")
    cell = (TILE + GAP, TILE + CAPTION + GAP)
    sheet, pen, corners = _grid("Label these next", facts, count + 1, COLUMNS, cell)
    for rank, ((manifest, row), share, corner) in enumerate(zip(images, coverage, corners), start=1):
        _paste(sheet, pen, corner, manifest, row, f"coverage {share:.3f}", draws_points=False)
        pen.rectangle((*corner, corner[0] + 34, corner[1] + 24), fill=PAPER)
        pen.text((corner[0] + 6, corner[1] + 2), str(rank), fill=INK, font=_font(18))
    _curve(pen, next(corners), coverage)
    return _png(sheet)


def _curve(pen: ImageDraw.ImageDraw, corner: tuple[int, int], values: Sequence[float]) -> None:
    """Values in [0, 1] over their number, in a tile."""
    left, top = corner
    high = max(values) or 1.0
    step = TILE / max(1, len(values) - 1)
    line = [(left + step * n, top + TILE * (1 - value / high)) for n, value in enumerate(values)]
    pen.line(((left, top), (left, top + TILE), (left + TILE, top + TILE)), fill=MUTED)
    pen.line(line, fill=INK, width=2)
    for x, y in line:
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=INK)
    pen.text((left, top + TILE + 4), f"coverage, 0 to {high:.3f}", fill=INK, font=_font(13))
    pen.text((left, top + TILE + 20), f"with images 1 to {len(values)} labelled", fill=MUTED, font=_font(12))


def _grid(
    title: str, facts: str, count: int, most_columns: int, cell: tuple[int, int]
) -> tuple[Image.Image, ImageDraw.ImageDraw, Iterator[tuple[int, int]]]:
    """An empty sheet under its title, a pen for it, and the upper left corner of each of `count` cells."""
    columns = min(most_columns, max(1, count))
    size = (max(GAP + columns * cell[0], 2 * TILE + 3 * GAP), TITLE + -(-count // columns) * cell[1])
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 14), shortened(title, _font(20), sheet.width - 2 * GAP), fill=INK, font=_font(20))
    used = GAP + _font(20).getlength(title) + 16
    pen.text((used, 20), shortened(facts, _font(14), sheet.width - used - GAP), fill=MUTED, font=_font(14))
    corners = ((GAP + n % columns * cell[0], TITLE + n // columns * cell[1]) for n in range(count))
    return sheet, pen, corners


def _paste(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    manifest: Manifest,
    row: int,
    caption: str,
    *,
    draws_points: bool = True,
) -> None:
    """One image with its landmarks, `TILE` px square, its id and a caption below."""
    record, pixels = manifest.read_record(row), to_unit_range(manifest.decode(row))
    shrinks = pixels.shape[0] > TILE
    small = cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    tile = cv2.cvtColor(np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if draws_points and record.points is not None:
        points = (stored_points(record) + 0.5) * (TILE / manifest.stored_size) - 0.5
        for (x, y), colour in zip(points, hues(len(points))):
            centre = (round(float(x) * 16), round(float(y) * 16))  # 4 fractional bits: OpenCV draws between pixels
            cv2.circle(tile, centre, 4 * 16, (0, 0, 0), 3, cv2.LINE_AA, 4)  # a dark edge, seen on bone too
            cv2.circle(tile, centre, 4 * 16, colour, 1, cv2.LINE_AA, 4)
    sheet.paste(Image.fromarray(tile), corner)
    left, top = corner[0], corner[1] + TILE
    name = record.id.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")  # what Pillow's font can draw
    pen.text((left, top + 4), shortened(name, _font(13), TILE), fill=INK, font=_font(13))
    pen.text((left, top + 20), shortened(caption, _font(12), TILE), fill=MUTED, font=_font(12))


def hues(count: int) -> list[Rgb]:
    """RGB colours, as different as so many can be."""
    hsv = np.array([[[round(180 * index / count), 190, 255] for index in range(count)]], np.uint8)
    return [(int(r), int(g), int(b)) for r, g, b in cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]]


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or its end after three dots where it is too long: names differ at their ends."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


# --- charts

COLOURS = ("#0b66b0", "#d07300", "#2f9e44", "#7d4fa3", "#b3261e", "#00838f", "#6d4c41", "#5f6b78")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#1c2733",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5f6b78",
    "ytick.color": "#5f6b78",
    "legend.frameon": False,
}
_MEANS_A_ROW = 6


def statistics(samples: Sequence[DatasetSample]) -> bytes:
    """A PNG of native sizes, bit depths, spacings, intensities, and the mean image of each dataset."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = -(-len(samples) // _MEANS_A_ROW)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 3.4 + 2.5 * rows), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.4, 2.5 * rows])
        above, below = parts
        for draw, axes in zip((_sizes, _depths, _spacings, _intensities), above.subplots(1, 4)):
            draw(axes, [(sample, COLOURS[n % len(COLOURS)]) for n, sample in enumerate(samples)])
        places = below.subplots(rows, _MEANS_A_ROW, squeeze=False).ravel()
        for axes in places:
            axes.set_axis_off()
        for axes, sample in zip(places, samples):
            _mean(axes, sample)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


Coloured = list[tuple[DatasetSample, str]]


def _sizes(axes: Any, coloured: Coloured) -> None:
    for sample, colour in coloured:
        native, name = np.array([record.native_size for record in sample.records]), sample.manifest.dataset
        axes.scatter(native[:, 0], native[:, 1], s=14, alpha=0.45, linewidths=0, color=colour, label=name)
    axes.set(xlabel="width, px", ylabel="height, px", title="native size", xlim=(0, None), ylim=(0, None))
    for handle in axes.legend(fontsize=7.5, loc="best", handletextpad=0.2).legend_handles:
        handle.set_alpha(1)


def _depths(axes: Any, coloured: Coloured) -> None:
    """Stacked bars: images for each number of bits of their file."""
    counts = [Counter("?" if bits is None else str(bits) for bits in sample.source_bits) for sample, _ in coloured]
    kinds = sorted(set().union(*counts), key=lambda bits: (bits == "?", bits.zfill(2)))
    below = np.zeros(len(kinds))
    for (_, colour), count in zip(coloured, counts, strict=True):
        heights = np.array([count[bits] for bits in kinds])
        axes.bar(kinds, heights, bottom=below, width=0.55, color=colour)
        below += heights
    axes.set(xlabel="bits per pixel of the file (?: not noted)", ylabel="sampled images", title="bit depth")
    axes.margins(x=0.6 / len(kinds) + 0.1)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _spacings(axes: Any, coloured: Coloured) -> None:
    known = [sample.spacings for sample, _ in coloured]
    axes.set(title="pixel spacing", xlabel="mm per native px", ylabel="sampled images")
    if not any(known):
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes.text(0.5, 0.5, "unknown", ha="center", va="center", color="#5f6b78", transform=axes.transAxes)
        return
    everything = np.concatenate(known)
    low, high = everything.min(), everything.max()
    bins = np.linspace(low, high, 25) if high > low else np.linspace(0, 2 * high, 26)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.hist(known, bins=bins, stacked=True, color=[colour for _, colour in coloured])
    unknown = sum(len(sample.records) - len(sample.spacings) for sample, _ in coloured)
    if unknown:
        axes.text(0.98, 0.95, f"{unknown} unknown", ha="right", va="top", color="#5f6b78", transform=axes.transAxes)


def _intensities(axes: Any, coloured: Coloured) -> None:
    for sample, colour in coloured:
        axes.step((np.arange(BINS) + 0.5) / BINS, 100 * sample.histogram, where="mid", color=colour, linewidth=1.2)
    axes.set(xlabel="stored intensity, share of the range", ylabel="pixels, %", title="intensities", xlim=(0, 1))
    axes.set_ylim(0, None)


def _mean(axes: Any, sample: DatasetSample) -> None:
    """The mean image, and over it the mean shape with one standard deviation."""
    axes.imshow(sample.mean_image, cmap="gray", vmin=0)
    axes.set_title(f"mean of {sample.manifest.dataset}", fontsize=9, fontweight="normal")
    if len(sample.points):
        mean, spread = sample.points.mean(0), sample.points.std(0)
        for (x, y), (sx, sy), colour in zip(mean, spread, hues(len(mean))):
            shade = tuple(part / 255 for part in colour)
            axes.errorbar(x, y, yerr=sy, xerr=sx, fmt="o", ms=2.5, lw=1, color=shade)
