"""Optional attributes of a DICOM file, any of which may be malformed beside good pixels.

What does not read is passed over by name, never guessed: a decimal comma could as well separate two values. Only names
of the standard are kept, no value of a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset


class Attributes:
    """The attributes of one file. `passed_over` names those that do not read, or leave nothing to see."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.passed_over: list[str] = []

    def remove_malformed(self, names: Iterable[str]) -> None:
        """Remove each attribute whose value cannot even be converted, so that no reader meets it later."""
        for name in names:
            try:
                self.dataset.get(name)
            except MemoryError:
                raise
            except Exception:  # pydicom converts when asked, and raises what the conversion raises
                del self.dataset[name]
                self.pass_over(name)

    def pass_over(self, name: str) -> None:
        if name not in self.passed_over:
            self.passed_over.append(name)

    def get(self, name: str) -> Any:
        return self.dataset.get(name)

    def code(self, name: str) -> str:
        """A code string in capitals; empty where it is absent."""
        return str(self.dataset.get(name) or "").strip().upper()

    def numbers(self, name: str) -> list[float]:
        """Values of a numeric attribute; none where it is absent. What is no finite number is NaN, and passed over."""
        value = self.dataset.get(name)
        if value is None or value == "":
            return []
        is_several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        numbers = [_finite(part) for part in (value if is_several else [value])]
        if any(math.isnan(number) for number in numbers):
            self.pass_over(name)
        return numbers

    def number(self, name: str) -> float | None:
        """The one value of a numeric attribute; None where it is absent, or passed over."""
        values = self.numbers(name)
        if len(values) > 1:
            self.pass_over(name)
        return values[0] if len(values) == 1 and not math.isnan(values[0]) else None


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan
