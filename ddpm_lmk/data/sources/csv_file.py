"""CSV files as people save them: encodings, separators, decimal signs, and what spreadsheets leave behind.

UTF-8, or UTF-16 and UTF-32 by their mark; what is none of them is read as cp1252, which Windows writes, with a warning.
The separator is the one under which the wanted columns are there. What cannot be told for sure is refused; what the
columns mean is decided in `table`.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_lmk.data.sources.base import parse_decimal
from ddpm_lmk.errors import DataError

# UTF-32 before UTF-16, whose little-endian mark begins its own.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods; .xls
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_COMMA_NUMBER = re.compile(r"[+-]?[0-9]*,[0-9]+")
_MAY_BE_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")


@dataclass
class CsvFile:
    """The lines of a file: the number of each and its cells, which are stripped but for those of `verbatim` columns."""

    path: Path
    encoding: str
    columns: tuple[str, ...]
    lines: list[tuple[int, list[str]]] = field(default_factory=list)
    has_decimal_commas: bool = False
    warnings: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every line as a dictionary, with `file line n`; made when asked for, because there may be millions."""
        for number, cells in self.lines:
            yield f"{self.path} line {number}", dict(zip(self.columns, cells))

    def number(self, text: str, where: str) -> float:
        """A finite decimal number, with the decimal sign of this file. Raises DataError that names `where`."""
        return parse_decimal(text.replace(",", ".") if self.has_decimal_commas else text, where)


def read_csv(path: Path, wanted: Sequence[str], *, numbers: Sequence[str], verbatim: Sequence[str] = ()) -> CsvFile:
    """Read a whole file.

    Args:
        wanted: columns that must be there; case does not matter.
        numbers: columns that hold numbers, whose decimal sign is found out.
        verbatim: columns whose cells keep their blanks.

    Raises:
        DataError: no CSV text, a wanted column is missing or comes twice, or a row has too few or too many cells.
    """
    text, encoding, warnings = _decoded(path)
    separator, first, text = _separator(path, text, wanted)
    lines = _numbered(text, separator, path, first)
    header = _header(lines)
    table = CsvFile(path, encoding, tuple(header), warnings=warnings)
    missing = [column for column in wanted if column not in header]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(filter(None, header)) or 'nothing'}")
    twice = [column for column in filter(None, header) if header.count(column) > 1]
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} comes twice; remove one of them")
    is_verbatim = [name in verbatim for name in header]
    for number, cells in lines:
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()  # a separator at the end of the line
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(f"{path} line {number}: {len(cells)} fields, the header has {len(header)}")
        table.lines.append((number, [cell if keep else cell.strip() for cell, keep in zip(cells, is_verbatim)]))
    if separator != ",":
        _find_decimal_commas(table, separator, [column for column in numbers if column in header])
    return table


def header_of(path: Path) -> tuple[str, ...]:
    """Names of the columns as they are written, by the separator that makes most of them; raises as `read_csv`."""
    named, first, text = _separator(path, _decoded(path)[0], ())
    candidates = [named] if first > 1 else [*_SEPARATORS]
    headers = (next(_numbered(text, each, path, first, strict=False), (0, []))[1] for each in candidates)
    return tuple(filter(None, (cell.strip() for cell in max(headers, key=len))))


def _decoded(path: Path) -> tuple[str, str, list[str]]:
    """Text, encoding and warnings."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); wanted a CSV file") from error
    if content.startswith(_WORKBOOKS):
        raise DataError(f"{path} is a workbook of a spreadsheet, not text; save it as CSV UTF-8")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    warnings = []
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(
                f"{path} begins as {encoding} and is damaged at byte {error.start}; save it again"
            ) from None
        text, encoding = _as_cp1252(path, content, error.start), "cp1252"
        line = text[: error.start].count("\n") + 1  # one byte is one letter in cp1252, so places are the same
        shown = text.splitlines()[line - 1].strip()[:60]
        warnings.append(
            f"{path} is not UTF-8 and was read as cp1252 (Windows), e.g. line {line}: {shown!r}; "
            "if that is misspelt, save it as UTF-8 and pack again"
        )
    if "\0" in text:  # UTF-16 without a mark decodes as UTF-8 with a NUL in every letter
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path} line {line}: a NUL, which no CSV text holds; save it as CSV UTF-8")
    return text, encoding, warnings


def _as_cp1252(path: Path, content: bytes, start: int) -> str:
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError as error:
        line = content[: min(start, error.start)].count(b"\n") + 1
        raise DataError(f"{path} line {line}: neither UTF-8 nor cp1252 text; save it as CSV UTF-8") from None


def _separator(path: Path, text: str, wanted: Sequence[str]) -> tuple[str, int, str]:
    """The separator, the number of the first line, and the text without the line that named it (`sep=;` of Excel)."""
    named = re.match(r"\"?sep=(.)\"?\r?\n", text, re.IGNORECASE)
    if named:
        return named[1], 2, text[named.end() :]

    def num_found(separator: str) -> int:
        # Not strict: under a wrong separator the quotes of a good file stand in wrong places.
        header = _header(_numbered(text, separator, path, 1, strict=False))
        return sum(column in header for column in wanted)

    return max(_SEPARATORS, key=num_found), 1, text  # the first of the best: commas where none finds a column


def _numbered(
    text: str, separator: str, path: Path, first: int, *, strict: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Lines with their numbers in the file: a cell in quotes may run over several."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict)
    try:
        for cells in reader:
            yield reader.line_num + first - 1, cells
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})") from error


def _header(lines: Iterator[tuple[int, list[str]]]) -> list[str]:
    return [cell.strip().lower() for cell in next(lines, (0, []))[1]]


def _find_decimal_commas(table: CsvFile, separator: str, columns: Sequence[str]) -> None:
    """Where commas do not separate they may be decimal signs: if all of them can be, and one can be nothing else."""
    cells = [(where, row[column]) for where, row in table.rows() for column in columns]
    with_comma = [(where, cell) for where, cell in cells if "," in cell]
    if not with_comma or any("." in cell for _, cell in cells):
        return
    if not all(_COMMA_NUMBER.fullmatch(cell) for _, cell in with_comma):
        return
    plain = [cell for _, cell in with_comma if not _MAY_BE_THOUSANDS.fullmatch(cell)]
    if not plain:
        where, cell = with_comma[0]
        whole, decimal = cell.replace(",", ""), cell.replace(",", ".")
        raise DataError(f"{where}: {cell!r} may be {whole} or {decimal}; write numbers with a point, without thousands")
    table.has_decimal_commas = True
    table.warnings.append(
        f"{table.path}: separated by {_SEPARATORS.get(separator, separator)}, with decimal commas: {plain[0]!r} is "
        f"{plain[0].replace(',', '.')}"
    )
