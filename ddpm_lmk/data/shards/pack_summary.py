"""What came of a packing: counts, why pictures were left out, and what was passed over in those that were taken."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_lmk.data.images.dicom_spacing import AT_DETECTOR, UNKNOWN

_SHOWN = 1000  # refusals kept in memory; all of them are in the file


@dataclass
class PackSummary:
    """What was packed. `refused` are the first lines of refused.jsonl, `reasons` counts all of them by their code."""

    out: Path
    packed: int = 0
    per_split: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    resumed_at: int = 0  # images that an interrupted packing had done before
    seconds: float = 0.0
    image_bytes: int = 0

    @property
    def num_refused(self) -> int:
        """How many pictures were left out."""
        return self.reasons.total()

    def count(self, split: str, images: int, image_bytes: int) -> None:
        """Count packed samples."""
        if images:
            self.packed += images
            self.image_bytes += image_bytes
            self.per_split[split] = self.per_split.get(split, 0) + images

    def refuse(self, line: dict[str, str]) -> None:
        """Count a picture that was left out."""
        self.reasons[line["code"]] += 1
        if len(self.refused) < _SHOWN:
            self.refused.append(line)


class FileNotes:
    """Counts what the files of packed pictures said that their reader should know; `state` outlives an interruption."""

    def __init__(self) -> None:
        self._passed_over: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._at_detector = 0

    def add(self, facts: dict[str, Any] | None) -> None:
        """Count the facts of one picture."""
        facts = facts or {}
        self._passed_over.update(facts.get("passed_over") or ())
        spacing = facts.get("spacing") or ""
        self._unknown.update([spacing] if spacing.startswith(UNKNOWN) else ())
        self._at_detector += spacing.endswith(AT_DETECTOR)

    def state(self) -> dict[str, Any]:
        """What was counted so far."""
        counts = {"passed_over": dict(self._passed_over), "unknown": dict(self._unknown)}
        return {**counts, "at_detector": self._at_detector}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._passed_over, self._unknown = Counter(state["passed_over"]), Counter(state["unknown"])
        self._at_detector = state["at_detector"]

    def sentences(self) -> list[str]:
        """One for each kind of note."""
        found = []
        if self._passed_over:
            named = ", ".join(f"{name} of {count} images" for name, count in sorted(self._passed_over.items()))
            found.append(f"DICOM attributes that do not read, or leave nothing to see, were passed over: {named}")
        for reason, count in sorted(self._unknown.items()):
            found.append(f"the spacing of {count} images is {reason}")
        if self._at_detector:
            found.append(
                f"{self._at_detector} images state their spacing at the detector only, so their millimetres are too "
                "long by the magnification, 5 to 30 % for most films"
            )
        return found
