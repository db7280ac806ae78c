"""What a run writes line by line: `events.jsonl` for what happened, `metrics.jsonl` for what was measured,
`quarantine.jsonl` for samples that cannot be read.

A line is written whole or not at all, also by two threads at once. A full disk costs lines and never the run: lost ones
are counted, and told in the next line that fits.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm_lmk.system import files

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"


class RunLog:
    """The files of lines in the run directory `folder`; one that does not write ignores what it is given."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._num_lost = 0
        self._writing = threading.Lock()

    def event(self, name: str, **facts: Any) -> None:
        """Add a line to `events.jsonl`."""
        self._append(EVENTS, {"time": now(), "event": name, **facts})

    def metrics(self, line: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        self._append(METRICS, line)

    def quarantine(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add a line to `quarantine.jsonl` for each sample."""
        for entry in entries:
            self._append(QUARANTINE, entry)

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after `step`, which a resumed run will write again, and a torn last line."""
        self._rewind(METRICS, step)

    def rewind_quarantine(self, step: int) -> list[dict[str, Any]]:
        """The same for bad samples; returns those that stay."""
        return self._rewind(QUARANTINE, step)

    def last_metrics(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The last line about training and the last about validation; empty where there is none."""
        newest_first = read_lines(self._folder / METRICS)[::-1]
        trained: dict[str, Any] = next((line for line in newest_first if "loss" in line), {})
        validated: dict[str, Any] = next((line for line in newest_first if "validation" in line), {})
        return trained, validated

    def _rewind(self, name: str, step: int) -> list[dict[str, Any]]:
        path = self._folder / name
        if not self._writes or not path.is_file():
            return []
        lines = [line for line in read_lines(path) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self._writes:
            return
        # Training, the writer of checkpoints and the logger have a thread each.
        with self._writing:
            try:
                # Not before an event, which is the more important line where little room is left.
                if self._num_lost and name != EVENTS:
                    lost = {"time": now(), "event": "lines.lost", "count": self._num_lost}
                    _append_line(self._folder / EVENTS, lost)
                    self._num_lost = 0
                _append_line(self._folder / name, line)
            except OSError:
                self._num_lost += 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    if not path.is_file():
        return []
    # A line that was cut off, or written by an older version, may not be whole UTF-8: the others are still read.
    lines = [parse_line(text) for text in path.read_text("utf-8", "replace").split("\n")]
    return [line for line in lines if line is not None]


def parse_line(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def now() -> str:
    """Wall-clock time for people; nothing is ever decided by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append_line(path: Path, line: dict[str, Any]) -> None:
    text = files.to_utf8(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, files.file_mode())
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, text) != len(text):  # a full disk takes a part of a line
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)
