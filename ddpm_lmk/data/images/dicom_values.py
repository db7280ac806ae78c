"""Optional attributes of DICOM files, any of which may be malformed beside good pixels.

What does not read is passed over by name, never guessed: a decimal comma could as well separate two values. Only names
of the standard are kept, no value of a file. Reading files is `dicom`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset


def pass_over_malformed(dataset: Dataset, names: Iterable[str], passed_over: list[str]) -> None:
    """Remove each of the attributes `names` whose value cannot even be converted, so that no reader meets it later."""
    for name in names:
        try:
            dataset.get(name)
        except MemoryError:
            raise
        except Exception:  # pydicom converts when asked, and raises what the conversion raises
            del dataset[name]
            pass_over(name, passed_over)


def numbers(dataset: Dataset, name: str, passed_over: list[str]) -> list[float]:
    """Values of a numeric attribute; none where it is absent or empty. What is no finite number is NaN, and named."""
    found = dataset.get(name)
    if found is None or found == "":
        return []
    is_several = isinstance(found, Sequence) and not isinstance(found, str | bytes)
    values = [_number(value) for value in (found if is_several else [found])]
    if any(math.isnan(value) for value in values):
        pass_over(name, passed_over)
    return values


def number(dataset: Dataset, name: str, passed_over: list[str]) -> float | None:
    """The one value of a numeric attribute; None where it is absent, or passed over."""
    values = numbers(dataset, name, passed_over)
    if len(values) > 1:
        pass_over(name, passed_over)
    return values[0] if len(values) == 1 and not math.isnan(values[0]) else None


def code(dataset: Dataset, name: str) -> str:
    """A code string in capitals; empty where it is absent."""
    return str(dataset.get(name) or "").strip().upper()


def pass_over(name: str, passed_over: list[str]) -> None:
    """Name an attribute once as one that does not read."""
    if name not in passed_over:
        passed_over.append(name)


def _number(value: object) -> float:
    try:
        read = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return read if math.isfinite(read) else math.nan
