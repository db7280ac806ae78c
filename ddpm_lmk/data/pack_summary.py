"""What came of a packing: counts, and why pictures were left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

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
