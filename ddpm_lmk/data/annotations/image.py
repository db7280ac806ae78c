"""What label files of other tools say, in one shape for all of them, and how such a file is read at all."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from ddpm_lmk.errors import DataError

# Where (0, 0) is: the centre of the top-left pixel, as everywhere here, or its outer corner, half a pixel before that.
Origin = Literal["centre", "corner"]
Point = tuple[float, float]

CORNER_PX = 0.5  # what a tool that counts from the corner says more than we do
MAX_BYTES = 256 << 20  # of one label file; labelme puts whole pictures into its own
MAX_XML_BYTES = 64 << 20  # a tree in memory takes ten times as much
_PART = 64 << 10
_LARGEST = 1e9


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of a label file. Points are pixels of the image as it is seen, as the tool counts them (`Origin`)."""

    name: str  # of the picture, as the file names it
    points: dict[str, Point | str]  # by landmark: a place, or why there is none
    size: tuple[int, int] | None = None  # width and height that were annotated
    mm_per_px: float | None = None
    split: str | None = None
    patient: str | None = None
    annotator: str = ""
    num_hidden: int = 0  # points that are said to be hidden behind something


@dataclass
class Annotations:
    """What label files say together.

    Attributes:
        landmarks: their names in order, where the tool keeps a list of them; empty: it has none.
        passed_over: counts what was no landmark, by its kind.
    """

    images: list[AnnotatedImage] = field(default_factory=list)
    landmarks: tuple[str, ...] = ()
    passed_over: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


class Marks(dict[str, Point | str]):
    """The landmarks of one image while they are read; raises DataError for one that is there twice."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def put(self, name: Any, place: Point | str) -> None:
        """Add a landmark."""
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{self._where}: a landmark without a name; give it one")
        if name in self:
            raise DataError(f"{self._where}: landmark {name!r} is there twice; remove one of them")
        self[name] = place


def as_point(x: Any, y: Any, where: str) -> Point | str:
    """Two numbers of a file, or that there are none; raises DataError for anything else."""
    for value in (x, y):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "has no coordinates"
        if not _is_number(value):
            raise DataError(f"{where}: {value!r:.40} is not a coordinate; wanted a number")
    return float(x), float(y)


def _is_number(value: Any) -> bool:
    """A number of a size that images have; comparing leaves out NaN, infinity, and integers too long for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def as_size(width: Any, height: Any, where: str) -> tuple[int, int] | None:
    """Width and height of a file, or None where it does not say them; raises DataError for anything else."""
    if not width and not height:
        return None
    if any(not _is_number(side) or side < 1 for side in (width, height)):
        raise DataError(f"{where}: size {width!r:.40} x {height!r:.40}; wanted two numbers of pixels")
    return round(width), round(height)


def as_spacing(value: Any, where: str) -> float | None:
    """A `mm_per_px` that we wrote, or None; raises DataError for anything else."""
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise DataError(f"{where}: mm_per_px={value!r:.40}, wanted more than 0")
    return float(value)


def read_bytes(path: Path) -> bytes:
    """The content of a label file; raises DataError where it is not there, no file, or too large."""
    try:
        if not path.is_file():
            raise DataError(f"{path} is not there, or no plain file; wanted a file of labels")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has over {MAX_BYTES >> 20} MiB, which no label file here may have; split it")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises DataError where it is none."""
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start}; wanted JSON") from None
    except (ValueError, RecursionError) as error:
        shown = f"{error}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DataError(f"{path} is not whole JSON ({shown}); export or save it again") from None


class _PlainTree(ElementTree.TreeBuilder):
    """A tree without a document type, and so without entities, which can expand to any size."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("has a document type, which may define entities; the tools here write none")


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file; raises DataError where it is none, or defines entities."""
    data = read_bytes(path)
    if len(data) > MAX_XML_BYTES:
        raise DataError(f"{path} has over {MAX_XML_BYTES >> 20} MiB; export it in parts")
    parser = ElementTree.XMLParser(target=_PlainTree())
    try:
        for begin in range(0, len(data), _PART):  # in parts: what raises stops the parser only at the end of one
            parser.feed(data[begin : begin + _PART])
        return parser.close()
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise DataError(f"{path} is not whole XML ({error}); export it again") from None


def objects(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """A list of objects, empty where it is not there; raises DataError for anything else."""
    listed = require(content.get(key) or [], list, f"{where}: {key}", "a list")
    return [require(each, dict, f"{where}: {key}", "objects") for each in listed]


def mapping(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object, empty where it is not there; raises DataError for anything else."""
    found: dict[str, Any] = require(content.get(key) or {}, dict, f"{where}: {key}", "an object")
    return found


def require(content: Any, kind: type | tuple[type, ...], where: str, what: str) -> Any:
    """`content` if it is of this JSON type; raises DataError that says what was wanted there."""
    if not isinstance(content, kind):
        raise DataError(f"{where}: wanted {what}, found {type(content).__name__}")
    return content
