"""Contact sheets: films in a grid under the name of their pack, and pairs of films that repeat one another."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_lmk.data.duplicates.leakage import Finding, Leakage
from ddpm_lmk.data.preview.samples import evenly, stored_points, unit
from ddpm_lmk.data.shards.manifest import Manifest

TILE = 208
GAP = 12
CAPTION = 40
TITLE = 52
COLUMNS = 6
PAIR_COLUMNS = 3
MOST_PAIRS = 18
INK, MUTED, PAPER = (236, 240, 244), (150, 161, 173), (17, 21, 26)
ALARM = (240, 128, 110)


def contact_sheet(manifests: Sequence[Manifest], count: int) -> bytes:
    """A PNG with `count` films of each pack, landmarks drawn in, captioned with id, split and native size."""
    parts = [_pack_sheet(manifest, evenly(len(manifest), count)) for manifest in manifests]
    return _stacked(parts)


def _pack_sheet(manifest: Manifest, rows: np.ndarray) -> Image.Image:
    columns = min(COLUMNS, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    sheet, pen = _blank(GAP + columns * (TILE + GAP), TITLE + lines * (TILE + CAPTION + GAP))
    facts = f"{len(manifest):,} images, {manifest.stored_size} px {manifest.bits} bit; {len(rows)} of them"
    _title(pen, sheet.width, manifest.dataset, facts)
    for number, row in enumerate(rows.tolist()):
        left = GAP + number % columns * (TILE + GAP)
        top = TITLE + number // columns * (TILE + CAPTION + GAP)
        record = manifest.read_record(row)
        sheet.paste(tile(manifest, row), (left, top))
        native = f"{record.split}  ·  {record.native_size[0]} x {record.native_size[1]}"
        _caption(pen, left, top + TILE, record.id, native)
    return sheet


def pair_sheet(found: Leakage) -> bytes:
    """A PNG with the first leaks and copies: each film, in the frame beside it the one it repeats."""
    chosen = [(each, True) for each in found.leaks[: MOST_PAIRS // 2]]
    chosen += [(each, False) for each in found.copies[: MOST_PAIRS - len(chosen)]]
    width = 2 * TILE + 2
    columns = min(PAIR_COLUMNS, len(chosen))
    lines = -(-len(chosen) // columns)
    sheet, pen = _blank(GAP + columns * (width + 2 * GAP), TITLE + lines * (TILE + CAPTION + 16 + GAP))
    facts = f"{len(found.leaks)} films also in a protected split, {len(found.copies)} copies; {len(chosen)} of them"
    _title(pen, sheet.width, "Repeated films", facts)
    for number, (finding, is_leak) in enumerate(chosen):
        left = GAP + number % columns * (width + 2 * GAP)
        top = TITLE + number // columns * (TILE + CAPTION + 16 + GAP)
        _pair(sheet, pen, (left, top), found, finding, is_leak=is_leak)
    return _stacked([sheet])


def _pair(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    found: Leakage,
    finding: Finding,
    *,
    is_leak: bool,
) -> None:
    left, top = corner
    sources = [*found.trained, *found.protected]
    for side, (source, row) in enumerate((finding.image, finding.of)):
        manifest = sources[source].manifest
        record = manifest.read_record(row)
        x = left + side * (TILE + 2)
        sheet.paste(tile(manifest, row), (x, top))
        _caption(pen, x, top + TILE, record.id, f"{manifest.dataset}  ·  {record.split}")
    words = f"{finding.kind}, in a protected split" if is_leak else finding.kind
    pen.text((left, top + TILE + CAPTION - 2), words, fill=ALARM if is_leak else INK, font=_font(13))


def tile(manifest: Manifest, row: int) -> Image.Image:
    """One film with its landmarks, `TILE` px square."""
    record, pixels = manifest.read_record(row), unit(manifest.decode(row))
    shrinks = pixels.shape[0] > TILE
    small = cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    film = cv2.cvtColor(np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if record.points is not None:
        _draw_points(film, (stored_points(record) + 0.5) * (TILE / manifest.stored_size) - 0.5)
    return Image.fromarray(film)


def _draw_points(film: np.ndarray, points: np.ndarray) -> None:
    """Rings with a thin dark edge, one hue per landmark; sub-pixel positions through OpenCV's fixed point."""
    for (x, y), colour in zip(points, hues(len(points))):
        centre = (round(float(x) * 16), round(float(y) * 16))
        cv2.circle(film, centre, 4 * 16, (0, 0, 0), 3, cv2.LINE_AA, 4)
        cv2.circle(film, centre, 4 * 16, colour, 1, cv2.LINE_AA, 4)


def hues(count: int) -> list[tuple[int, int, int]]:
    """RGB colours, as different as so many can be."""
    hsv = np.array([[[round(180 * index / count), 190, 255] for index in range(count)]], np.uint8)
    return [(int(r), int(g), int(b)) for r, g, b in cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]]


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (max(width, 2 * TILE + 3 * GAP), height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _title(pen: ImageDraw.ImageDraw, width: int, name: str, facts: str) -> None:
    pen.text((GAP, 14), fitted(name, _font(20), width - 2 * GAP), fill=INK, font=_font(20))
    used = GAP + _font(20).getlength(name) + 16
    pen.text((used, 20), fitted(facts, _font(14), width - used - GAP), fill=MUTED, font=_font(14))


def _caption(pen: ImageDraw.ImageDraw, left: int, top: int, name: str, facts: str) -> None:
    plain = name.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    pen.text((left, top + 4), fitted(plain, _font(13), TILE), fill=INK, font=_font(13))
    pen.text((left, top + 20), fitted(facts, _font(12), TILE), fill=MUTED, font=_font(12))


def fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or its end after three dots where it is too long: names differ at their ends."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _stacked(parts: Sequence[Image.Image]) -> bytes:
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
