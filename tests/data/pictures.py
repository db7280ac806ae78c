"""Pictures of every container, colour type and bit depth, written byte by byte, with the grey that each must become.

The writers know nothing of the readers: they follow PNG (ISO 15948), TIFF 6.0 and the Windows bitmap header. Expected
greys follow from the pixels that were written and from those documents alone.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ddpm_lmk.data.images.decode import decode_image
from ddpm_lmk.data.images.image import RefusedImageError

HEIGHT, WIDTH = 40, 32
# What no library here reads as it is written, and which is therefore refused whoever sends it.
UNREAD = re.compile(
    r"tiff. (grey 12|float16|float64|LA 16|CMYK 16|RGB 16 in planes|.*int.* polarity 0)"
    r"|tiff> (grey 16 polarity 0|uint32)|bmp P 4 narrow"
)


@dataclass(frozen=True)
class Case:
    """A file, and the grey values it stands for; `grey` None: it may only be refused.

    `tolerance` is in grey levels: of lossy compression, and of mixing colours that differ.
    """

    name: str
    data: bytes
    grey: np.ndarray | None
    tolerance: float = 0.0

    def fault(self) -> str:
        """What is wrong with what the reader makes of it, or an empty text."""
        try:
            pixels = decode_image(self.data).pixels
        except RefusedImageError as error:
            may_be_refused = self.grey is None or UNREAD.search(self.name)
            return "" if may_be_refused and is_one_line(error) else f"{self.name}: refused, {error}"
        if self.grey is None:
            return f"{self.name}: taken, though nobody can know its greys"
        if pixels.shape != self.grey.shape:
            return f"{self.name}: {pixels.shape}, wanted {self.grey.shape}"
        off = np.abs(pixels.astype(np.float64) - self.grey).max()
        return "" if off <= self.tolerance else f"{self.name}: off by {off:g}"


def is_one_line(error: Exception) -> bool:
    return bool(str(error).strip()) and "\n" not in str(error)


def smooth(seed: int, bits: int) -> np.ndarray:
    """Grey `[HEIGHT, WIDTH]` that uses the whole range of `bits`, lower bits included; uint8, uint16 or uint32."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ramp = x / (WIDTH - 1) * 0.7 + y / (HEIGHT - 1) * 0.3 + rng.normal(0, 0.02, (HEIGHT, WIDTH))
    ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return np.rint(ramp * ((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Rows `[H, W]` of 1 to 16 bits, most significant first, each row padded to a byte."""
    if bits == 8:
        return values.astype(np.uint8).tobytes()
    if bits == 16:
        return values.astype(">u2").tobytes()
    planes = (values[..., None].astype(np.uint32) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


# --- PNG


def png(samples: np.ndarray, bits: int, colour: int, **chunks: bytes) -> bytes:
    """`samples` is `[H, W]` or `[H, W, C]`; `chunks` are PLTE, tRNS, eXIf."""
    height, width = samples.shape[:2]
    rows = packed_bits(samples.reshape(height, -1), bits)
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[begin : begin + stride] for begin in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *((name.encode(), value) for name, value in chunks.items()),
        (b"IDAT", zlib.compress(raw)),
    ]
    body = b"".join(_chunk(name, value) for name, value in [*parts, (b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(name: bytes, value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + name + value + struct.pack(">I", zlib.crc32(name + value))


def with_alpha(samples: np.ndarray, alpha: np.ndarray | int) -> np.ndarray:
    """Add a channel."""
    colours = samples[..., None] if samples.ndim == 2 else samples
    full = np.broadcast_to(np.asarray(alpha, samples.dtype), samples.shape[:2])
    return np.concatenate([colours, full[..., None]], axis=2)


def png_cases(seed: int) -> Iterator[Case]:
    """Every bit depth that PNG has, of every colour type."""
    for bits in (1, 2, 4, 8, 16):
        grey, top = smooth(seed, bits), (1 << bits) - 1
        scaled = grey if bits >= 8 else grey * (255 // top)  # a sample of fewer bits is a fraction of its maximum
        yield Case(f"png grey {bits}", png(grey, bits, 0), scaled if bits >= 4 else None)
    for bits in (8, 16):
        grey, top = smooth(seed, bits), (1 << bits) - 1
        alphas = {"opaque": top, "evenly transparent": top // 3, "transparent": 0}
        holes = np.where(grey > top // 2, top, 0)
        for name, alpha in alphas.items():
            yield Case(f"png LA {bits} {name}", png(with_alpha(grey, alpha), bits, 4), grey)
            yield Case(f"png RGBA {bits} {name}", png(with_alpha(np.stack([grey] * 3, 2), alpha), bits, 6), grey)
        yield Case(f"png LA {bits} with holes", png(with_alpha(grey, holes), bits, 4), None)
        yield Case(f"png RGBA {bits} with holes", png(with_alpha(np.stack([grey] * 3, 2), holes), bits, 6), None)
        yield Case(f"png RGB {bits}", png(np.stack([grey] * 3, 2), bits, 2), grey)
        colours = np.stack([grey, grey // 2, top - grey], 2)
        yield Case(f"png RGB {bits} of colours", png(colours, bits, 2), mixed(colours), 2.0)
    for bits in (4, 8):
        count = 1 << bits
        numbers, colour_table = (
            smooth(seed, bits),
            np.random.default_rng(seed).permutation(256)[:count].astype(np.uint8),
        )
        for name, table in {"inverted": np.linspace(255, 0, count).astype(np.uint8), "permuted": colour_table}.items():
            plte = np.repeat(table, 3).tobytes()
            for kind, trns in (("", None), (" opaque", b"\xff" * count), (" with holes", b"\0" + b"\xff" * 3)):
                chunks = {"PLTE": plte} | ({} if trns is None else {"tRNS": trns})
                is_seen = kind != " with holes"
                yield Case(
                    f"png P {bits} {name}{kind}", png(numbers, bits, 3, **chunks), table[numbers] if is_seen else None
                )


def mixed(colours: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma of `[H, W, 3]`."""
    return colours.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


# --- TIFF


def tiff(
    pages: Sequence[tuple[bytes, dict[int, Any]]] | bytes, tags: dict[int, Any] | None = None, *, order: str = "<"
) -> bytes:
    """Pixels and tags (values: int, a list of ints, or bytes), of one page or several; one uncompressed strip each."""
    if isinstance(pages, bytes):
        pages = [(pages, tags or {})]
    out = io.BytesIO()
    out.write(b"II*\0" if order == "<" else b"MM\0*")
    link = out.tell()
    out.write(b"\0" * 4)
    for pixels, given in pages:
        strips = given.get(273)
        begin = out.tell()
        out.write(pixels + b"\0" * (len(pixels) % 2))
        entries = {256: WIDTH, 257: HEIGHT, 259: 1, 278: HEIGHT, **given}
        if isinstance(strips, list):  # planes: their offsets from the first
            entries[273], entries[279] = (
                [begin + offset for offset in strips],
                [len(pixels) // len(strips)] * len(strips),
            )
        else:
            entries[273], entries[279] = begin, len(pixels)
        directory = out.tell() + out.tell() % 2
        out.seek(link)
        out.write(struct.pack(f"{order}I", directory))
        out.seek(directory)
        link = _directory(out, entries, order)
    return out.getvalue()


_LONGS = {256, 257, 273, 278, 279}


def _directory(out: io.BytesIO, entries: dict[int, Any], order: str) -> int:
    begin, extra = out.tell(), out.tell() + 2 + 12 * len(entries) + 4
    rows, tail = b"", b""
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        kind, letter = (4, "I") if tag in _LONGS else (3, "H")
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            place = struct.pack(f"{order}I", extra + len(tail))
            tail += content + b"\0" * (len(content) % 2)
        else:
            place = content.ljust(4, b"\0")
        rows += struct.pack(f"{order}HHI", tag, kind, len(values)) + place
    out.write(struct.pack(f"{order}H", len(entries)) + rows + b"\0" * 4 + tail)
    return begin + 2 + len(rows)


def tiff_cases(seed: int) -> Iterator[Case]:
    """Grey of every depth, sign and polarity; palettes; colours with and without more channels; pages."""
    for order in ("<", ">"):
        for bits in (1, 2, 4, 8, 12, 16):
            grey, top = smooth(seed, bits), (1 << bits) - 1
            pixels = packed_bits(grey, bits) if bits != 16 else grey.astype(f"{order}u2").tobytes()
            scaled = grey if bits >= 8 else grey * (255 // top)
            for polarity, seen in ((1, scaled), (0, np.max(scaled) - scaled)):
                data = tiff(pixels, {258: bits, 262: polarity, 277: 1}, order=order)
                yield Case(f"tiff{order} grey {bits} polarity {polarity}", data, seen if bits >= 4 else None)
        grey = smooth(seed, 12).astype(np.int64)
        for name, kind, numpy_type, values in _deep(grey):
            pixels = values.astype(f"{order}{numpy_type}").tobytes()
            for polarity in (1, 0):
                tags = {258: 8 * np.dtype(numpy_type).itemsize, 262: polarity, 277: 1, 339: kind}
                seen = values if polarity else values.max() + values.min() - values
                yield Case(f"tiff{order} {name} polarity {polarity}", tiff(pixels, tags, order=order), seen, 1e-3)
        yield from _tiff_colours(seed, order)
        yield from _tiff_palettes(seed, order)
    page = (smooth(seed, 8).tobytes(), {258: 8, 262: 1, 277: 1})
    yield Case("tiff of two pages", tiff([page, page]), None)


def _deep(grey: np.ndarray) -> list[tuple[str, int, str, np.ndarray]]:
    """Name, SampleFormat, type and values of samples that are signed, floats, or of 32 bits."""
    signed = grey - 2000
    return [
        ("int8", 2, "i1", (grey >> 4) - 128),
        ("int16", 2, "i2", signed),
        ("int32", 2, "i4", signed * 1000),
        ("uint32", 1, "u4", grey * 1000),
        ("uint32 above 2^31", 1, "u4", (grey << 12) + (3 << 30)),
        ("float16", 3, "f2", (grey >> 4) / 256),
        ("float32", 3, "f4", (signed / 7).astype(np.float32)),
        ("float64", 3, "f8", signed / 8),
    ]


def _tiff_colours(seed: int, order: str) -> Iterator[Case]:
    for bits in (8, 16):
        grey, top = smooth(seed, bits), (1 << bits) - 1
        kind = f"{order}u{bits // 8}"
        rgb = np.stack([grey] * 3, 2)
        colours = np.stack([grey, grey // 2, top - grey], 2)
        tags = {258: [bits] * 3, 262: 2, 277: 3, 284: 1}
        yield Case(f"tiff{order} RGB {bits}", tiff(rgb.astype(kind).tobytes(), tags, order=order), grey)
        data = tiff(colours.astype(kind).tobytes(), tags, order=order)
        yield Case(f"tiff{order} RGB {bits} of colours", data, mixed(colours), 2.0)
        planes = rgb.transpose(2, 0, 1).astype(kind).tobytes()
        planar = tags | {284: 2, 273: [0, len(planes) // 3, 2 * len(planes) // 3]}
        yield Case(f"tiff{order} RGB {bits} in planes", tiff(planes, planar, order=order), grey)
        holes = np.where(grey > top // 2, top, 0)
        for name, alpha, extra in (("unused", holes, 0), ("opaque", top, 2), ("with holes", holes, 2)):
            seen = None if name == "with holes" else grey
            four = {258: [bits] * 4, 262: 2, 277: 4, 338: extra}
            data = tiff(with_alpha(rgb, alpha).astype(kind).tobytes(), four, order=order)
            yield Case(f"tiff{order} RGBA {bits} {name}", data, seen)
            data = tiff(
                with_alpha(grey, alpha).astype(kind).tobytes(),
                {258: [bits] * 2, 262: 1, 277: 2, 338: extra},
                order=order,
            )
            yield Case(f"tiff{order} LA {bits} {name}", data, seen)
        inks = with_alpha(np.zeros_like(rgb), 0)
        inks[..., 3] = top - grey
        data = tiff(inks.astype(kind).tobytes(), {258: [bits] * 4, 262: 5, 277: 4}, order=order)
        yield Case(f"tiff{order} CMYK {bits}", data, grey, 1.0)


def _tiff_palettes(seed: int, order: str) -> Iterator[Case]:
    numbers = smooth(seed, 8)
    rng = np.random.default_rng(seed)
    narrow = np.sort(rng.choice(4096, 256, replace=False))  # 12-bit greys: all of their top byte would be 0 to 15
    for name, table, seen in (
        ("of 8 bits", (255 - np.arange(256)) * 257, 255 - np.arange(256)),
        ("of 16 bits", narrow[::-1], narrow[::-1]),
        ("written as 8 bits", 255 - np.arange(256), 255 - np.arange(256)),
    ):
        tags = {258: 8, 262: 3, 277: 1, 320: [int(entry) for entry in table] * 3}
        yield Case(f"tiff{order} P {name}", tiff(numbers.tobytes(), tags, order=order), seen[numbers])


# --- BMP


def bmp(rows: bytes, bits: int, *, palette: bytes = b"", is_top_down: bool = False) -> bytes:
    """`rows` are bottom to top unless `is_top_down`, padded to four bytes each."""
    begin = 54 + len(palette)
    height = -HEIGHT if is_top_down else HEIGHT
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, 0, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", begin + len(rows), 0, 0, begin) + header + palette + rows


def bmp_cases(seed: int) -> Iterator[Case]:
    """Palettes of greys in every order, and true colour with and without a fourth byte."""
    for bits in (1, 4, 8):
        count = 1 << bits
        numbers = smooth(seed, bits)
        even = np.linspace(0, 255, count).astype(np.uint8)
        tables = {"": even, " inverted": even[::-1], " narrow": np.arange(count, dtype=np.uint8)}
        tables[" permuted"] = np.random.default_rng(seed).permutation(256)[:count].astype(np.uint8)
        for name, table in tables.items():
            entries = np.zeros((count, 4), np.uint8)
            entries[:, :3] = table[:, None]
            data = bmp(packed_bits(numbers[::-1], bits), bits, palette=entries.tobytes())
            yield Case(f"bmp P {bits}{name}", data, table[numbers] if bits >= 4 else None)
    grey = smooth(seed, 8)
    rgb = np.stack([grey] * 3, 2)
    yield Case("bmp RGB", bmp(rgb[::-1].tobytes(), 24), grey)
    yield Case("bmp RGB top down", bmp(rgb.tobytes(), 24, is_top_down=True), grey)
    for name, fourth in (("0", 0), ("255", 255)):
        yield Case(f"bmp RGB with a fourth byte of {name}", bmp(with_alpha(rgb, fourth)[::-1].tobytes(), 32), grey)
    five = grey >> 3
    data = bmp((five.astype("<u2") * (1 + 32 + 1024))[::-1].tobytes(), 16)
    yield Case("bmp RGB of five bits", data, five * (255 / 31), 1.0)


# --- JPEG, and orientation


def jpeg_cases(seed: int) -> Iterator[Case]:
    """Baseline and progressive, grey, colour and inks."""
    grey = (smooth(seed, 8) // 4 * 3 + 20).astype(np.uint8)
    image = Image.fromarray(grey)
    for mode in ("L", "RGB", "CMYK"):
        for options in ({}, {"progressive": True}):
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, "JPEG", quality=98, subsampling=0, **options)
            yield Case(f"jpeg {mode}{' progressive' if options else ''}", buffer.getvalue(), grey, 6.0)


def oriented(grey: np.ndarray, orientation: int) -> np.ndarray:
    """How a picture of this EXIF orientation is to be seen (CIPA DC-008, 4.6.4)."""
    return {
        1: grey,
        2: grey[:, ::-1],
        3: grey[::-1, ::-1],
        4: grey[::-1],
        5: grey.T,
        6: grey.T[:, ::-1],
        7: grey.T[::-1, ::-1],
        8: grey.T[::-1],
    }[orientation]


def orientation_cases(seed: int) -> Iterator[Case]:
    """All eight of them, in every container that has one."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for bits in (8, 16):
            grey = smooth(seed, bits)
            seen, name = oriented(grey, orientation), f"{bits} orientation {orientation}"
            chunk = {"eXIf": exif.tobytes()[6:]}
            yield Case(f"png grey {name}", png(grey, bits, 0, **chunk), seen)
            yield Case(f"png RGB {name}", png(np.stack([grey] * 3, 2), bits, 2, **chunk), seen)
            tags = {258: bits, 262: 1, 277: 1, 274: orientation}
            yield Case(f"tiff grey {name}", tiff(grey.astype(f"<u{bits // 8}").tobytes(), tags), seen)
            tags = {258: [bits] * 3, 262: 2, 277: 3, 274: orientation}
            pixels = np.stack([grey] * 3, 2).astype(f"<u{bits // 8}").tobytes()
            yield Case(f"tiff RGB {name}", tiff(pixels, tags), seen)
        buffer = io.BytesIO()
        grey = (smooth(seed, 8) // 4 * 3 + 20).astype(np.uint8)
        Image.fromarray(grey).save(buffer, "JPEG", quality=98, exif=exif)
        yield Case(f"jpeg orientation {orientation}", buffer.getvalue(), oriented(grey, orientation), 6.0)


def picture_cases(seed: int = 0) -> list[Case]:
    """All of the above."""
    makers = (png_cases, tiff_cases, bmp_cases, jpeg_cases, orientation_cases)
    return [case for make in makers for case in make(seed)]
