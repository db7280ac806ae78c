"""Spreadsheets saved as CSV, as they come: one row for each landmark, or one for each image with two columns for each.

How the text may be written (separators, decimal commas, encodings) is decided in `sources.csv_file`. What a column is
follows from its name, or is said by whoever packs: `image=Datei`, `x=X-Wert`, `sella.x=S_X`. Pixels count from the
centre of the top-left one unless the caller knows that they do not.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ddpm_lmk.data.annotations.image import AnnotatedImage, Annotations, Marks, Origin, Point
from ddpm_lmk.data.sources.csv_file import CsvFile, header_of, read_csv
from ddpm_lmk.data.sources.ids import is_nobody
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.system import files as atomic

ORIGIN: Origin = "centre"

_IMAGE, _LANDMARK, _X, _Y = "image", "landmark", "x", "y"
# Names under which columns are known without being told, in lower case; the role first, as it is given to be told.
_KNOWN: dict[str, tuple[str, ...]] = {
    _IMAGE: ("image", "image_id", "file", "file_name", "filename", "image_name", "imagename", "img", "bild", "datei"),
    _LANDMARK: ("landmark", "landmark_name", "label", "point", "keypoint", "bodypart", "punkt"),
    _X: ("x", "x_px", "x [px]", "x (px)", "x-koordinate", "x coordinate"),
    _Y: ("y", "y_px", "y [px]", "y (px)", "y-koordinate", "y coordinate"),
    "mm_per_px": ("mm_per_px", "mm_per_pixel", "pixel_spacing"),
    "split": ("split", "subset"),
    "patient": ("patient_id", "patient"),
    "width": ("orig_width", "width"),
    "height": ("orig_height", "height"),
    "annotator": ("annotator", "reader", "rater"),
}
_ROLES = tuple(_KNOWN)
_OF_IMAGE = ("mm_per_px", "split", "patient", "width", "height")
_UNIT = r"(?:\s*[\[(]?(?:px|pixels?)[\])]?)?"
# `sella_x`, `sella.x`, `sella x [px]`, `sella (x)`; `x_sella`, `X sella`; `sellaX`; `x1`
_PAIRED = (
    re.compile(rf"(?P<name>.+?)[\s_.\-:]+[\[(]?(?P<axis>[xy])[\])]?{_UNIT}", re.IGNORECASE),
    re.compile(rf"(?P<name>.+?)\s*[\[(](?P<axis>[xy])[\])]{_UNIT}", re.IGNORECASE),
    re.compile(rf"(?P<axis>[xy])[\s_.\-:]+[\[(]?(?P<name>.+?)[\])]?{_UNIT}", re.IGNORECASE),
    re.compile(r"(?P<name>.*[a-z0-9])(?P<axis>[XY])"),
    re.compile(r"(?P<axis>[xy])(?P<name>[0-9]+)", re.IGNORECASE),
)
_PLACEHOLDERS = frozenset({"", "-", "?", ".", "nan", "na", "n/a", "#n/a", "null", "none", "unknown"})


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """Roles and names of columns: from words `ROLE=NAME`, or files of such lines. Raises ConfigError for others."""
    found: dict[str, str] = {}
    for word in words:
        lines: Iterable[str] = (word,)
        if "=" not in word:
            try:
                lines = Path(word).read_text("utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise ConfigError(f"--column {word!r}: no ROLE=NAME, and no readable file of such lines") from error
        for line in filter(None, (line.strip() for line in lines)):
            role, equals, name = (part.strip() for part in line.partition("="))
            if not equals or not role or not name:
                raise ConfigError(f"--column {line!r}; wanted ROLE=NAME, e.g. image=Datei or sella.x=S_X")
            if role not in _ROLES and not role.endswith((".x", ".y")):
                raise ConfigError(f"--column {role}=...: wanted {', '.join(_ROLES)}, or LANDMARK.x and LANDMARK.y")
            found[role] = name
    return found


def read_spreadsheet(files: Sequence[Path], columns: Mapping[str, str]) -> Annotations:
    """Read one file; `columns` say by their role which column is what, where its name does not."""
    if len(files) != 1:
        raise DataError(f"{len(files)} CSV files ({', '.join(path.name for path in files[:3])}); give one of them")
    (path,) = files
    header = header_of(path)
    roles = _roles(header, columns, path)
    pairs = _pairs(header, columns, roles, path)
    if _IMAGE not in roles:
        raise DataError(f"{path}: which column names the image? It has {', '.join(header)}; give --column image=NAME")
    is_long = all(role in roles for role in (_LANDMARK, _X, _Y))
    if not is_long and not pairs:
        raise DataError(
            f"{path}: no columns of coordinates found among {', '.join(header)}; wanted pairs like sella_x, sella_y, "
            "or columns landmark, x and y; give --column for others"
        )
    if is_long:
        numbers: list[str] = [roles[_X], roles[_Y]]
    else:
        numbers = [column for pair in pairs.values() for column in pair]
    numbers += [roles[role] for role in ("mm_per_px", "width", "height") if role in roles]
    wanted = [roles[_IMAGE], *([roles[_LANDMARK]] if is_long else []), *numbers]
    table = read_csv(path, wanted, numbers=numbers)
    found = Annotations(warnings=list(table.warnings), landmarks=() if is_long else tuple(pairs))
    rows: dict[tuple[str, str], _Row] = {}
    for where, cells in table.rows():
        name, annotator = cells[roles[_IMAGE]], cells.get(roles.get("annotator", ""), "")
        if not name:
            raise DataError(f"{where}: no name of an image")
        row = _Row(table, cells, roles, where)
        first = rows.setdefault((name, annotator), row)
        if is_long:
            first.join(row)
            first.marks.put(cells[roles[_LANDMARK]], row.place(roles[_X], roles[_Y]))
        elif first is not row:
            raise DataError(f"{where}: image {name!r:.200} is there twice; remove one of the rows")
        else:
            for landmark, (x, y) in pairs.items():
                row.marks.put(landmark, row.place(x, y))
    found.images = [row.image(name, annotator) for (name, annotator), row in rows.items()]
    return found


class _Row:
    """A row, and what is known of its image."""

    def __init__(self, table: CsvFile, cells: dict[str, str], roles: Mapping[str, str], where: str) -> None:
        self._table, self._cells, self._roles, self._where = table, cells, roles, where
        self.marks = Marks(where)

    def place(self, x: str, y: str) -> Point | str:
        """The point of two columns, or why there is none."""
        texts = self._cells[x], self._cells[y]
        if any(text.lower() in _PLACEHOLDERS for text in texts):
            return f"has no coordinates (line {self._where.rpartition(' line ')[2]})"
        values = tuple(self._table.number(text, self._where) for text in texts)
        if values[0] == values[1] and (values[0] == 0 or values[0] <= -1):
            return f"is at ({values[0]:g}, {values[1]:g}), which tables write for not seen"
        return values[0], values[1]

    def join(self, row: _Row) -> None:
        """Take what another row says of the same image; raises DataError where it says something else."""
        for role in _OF_IMAGE:
            told, before = row._text(role), self._text(role)
            if told is not None and before not in (None, told):
                raise DataError(f"{row._where}: {role} is {told!r:.80} here and {before!r:.80} before; correct one")
            if told is not None:
                self._cells[self._roles[role]] = told

    def _text(self, role: str) -> str | None:
        text = self._cells.get(self._roles.get(role, ""), "")
        # one "unknown" patient would tie the images of all of them to one another
        is_told = text.lower() not in _PLACEHOLDERS and not (role == "patient" and is_nobody(text))
        return text if is_told else None

    def _positive(self, role: str) -> float | None:
        text = self._text(role)
        if text is None:
            return None
        value = self._table.number(text, f"{self._where}, {role}")
        if value <= 0:
            raise DataError(f"{self._where}: {role}={text}, wanted more than 0; leave it empty where it is unknown")
        return value

    def image(self, name: str, annotator: str) -> AnnotatedImage:
        """What all rows of the image say."""
        width, height = self._positive("width"), self._positive("height")
        size = None if width is None or height is None else (round(width), round(height))
        spacing, split, patient = self._positive("mm_per_px"), self._text("split"), self._text("patient")
        return AnnotatedImage(name.replace("\\", "/"), dict(self.marks), size, spacing, split, patient, annotator)


def _roles(header: Sequence[str], columns: Mapping[str, str], path: Path) -> dict[str, str]:
    """Which column has which role: as told, or by its name."""
    known = [column.lower() for column in header]
    roles = {role: name for role, names in _KNOWN.items() for name in reversed(names) if name in known}
    roles |= {role: name.lower() for role, name in columns.items() if role in _ROLES}
    for role, name in roles.items():
        if name not in known:
            raise DataError(f"{path}: --column {role}={columns[role]}: it has {', '.join(header)}")
    return roles


def _pairs(
    header: Sequence[str], columns: Mapping[str, str], roles: Mapping[str, str], path: Path
) -> dict[str, tuple[str, str]]:
    """The two columns of each landmark, in order of the file; with pairs told, those alone."""
    found: dict[str, dict[str, str]] = {}
    free = [column for column in header if column.lower() not in roles.values()]
    for role, name in columns.items():
        if role not in _ROLES:
            landmark, _, axis = role.rpartition(".")
            if name.lower() not in map(str.lower, header):
                raise DataError(f"{path}: --column {role}={name}: it has {', '.join(header)}")
            found.setdefault(landmark, {})[axis] = name.lower()
    for column in free if not found else ():
        for pattern in _PAIRED:
            if match := pattern.fullmatch(column):
                name, axis = match["name"].strip(" _.-:"), match["axis"].lower()
                if (other := found.setdefault(name, {}).setdefault(axis, column.lower())) != column.lower():
                    raise DataError(f"{path}: columns {other} and {column} both name {axis} of {name}; give --column")
                break
    lonely = [name for name, pair in found.items() if len(pair) == 1]
    if lonely and len(lonely) < len(found):
        raise DataError(f"{path}: landmark {lonely[0]!r} has one column of two; give --column {lonely[0]}.x=... and .y")
    return {name: (pair["x"], pair["y"]) for name, pair in found.items() if len(pair) == 2}


def write_spreadsheet(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write `landmarks.csv`, one row for each image: UTF-8 with its mark, without which Excel misreads letters."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    axes = [f"{name}_{axis}" for name in landmarks for axis in "xy"]
    writer.writerow(["image", "width", "height", "mm_per_px", *axes])
    for image in images:
        places = [image.points[name] for name in landmarks]
        cells = [cell for place in places for cell in (("", "") if isinstance(place, str) else map(_cell, place))]
        spacing = "" if image.mm_per_px is None else f"{image.mm_per_px:.10g}"
        writer.writerow([image.name, *(image.size or ("", "")), spacing, *cells])
    atomic.write_text(folder / "landmarks.csv", "\ufeff" + text.getvalue())


def _cell(value: float) -> str:
    return f"{value:.4f}"
