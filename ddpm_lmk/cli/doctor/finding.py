"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and what to do where something is amiss."""

    level: Level
    topic: str
    seen: str
    advice: str = ""
