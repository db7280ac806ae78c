"""Text for people: tables, durations, progress. The command line and the demo write through these functions.

Results go to standard output, messages to standard error. On a terminal there are colours and bars; elsewhere plain
lines, complete tables and a line per tenth of the way.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"problem": "bold red", "note": "yellow", "ok": "green"}
PLAIN_WIDTH = 200  # of tables in a file or a pipe
PAGE_WIDTH = 100
LEAST_S = 0.95  # below, "1 s" would be too much
SPELT = {"×": "x", "±": "+/-", "–": "-", "−": "-", "²": "^2", "³": "^3", "…": "...", "µ": "u", "→": "->"}


def accept_any_encoding() -> None:
    """Let standard output and error take every character: those that their encoding lacks are spelt out."""
    codecs.register_error("spelt", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelt")


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(SPELT.get(a) or a.encode("ascii", "backslashreplace").decode() for a in letters), error.end


def print_status(text: str) -> None:
    """One line on standard error."""
    from rich.console import Console

    with suppress(OSError):  # a full disk or a closed pipe must not end a run
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that no cell is cut off."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=PLAIN_WIDTH)


def reader_width() -> int:
    """`COLUMNS`, or the width of the terminal, also behind a pager; a page of text where there is none."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    for descriptor in (1, 2, 0):
        with suppress(OSError):
            return os.get_terminal_size(descriptor).columns or PAGE_WIDTH
    return PAGE_WIDTH


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; cells that are a level (ok, note, problem) are coloured."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=any(headings), box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else escape(cell) for cell in row))
    console().print(table)


@dataclass
class Whole:
    """Several stages of which one is running, so that each can show what is left of all of them.

    Attributes:
        name: of all of them.
        began: when the first began, on the monotonic clock, which all processes of a machine share.
        then_s: seconds of the stages after the running one.
        shown: the last tenth that was shown.
    """

    name: str
    began: float
    then_s: float
    shown: int | None = None

    def words(self, left_s: float) -> str:
        """What is left, given what is left of the running stage."""
        return f"{remaining(left_s + self.then_s)} of {self.name}"

    def line(self, left_s: float, what: str = "", *, now: float | None = None) -> str | None:
        """A line where another tenth is reached, given what is left of the running stage; else None.

        Args:
            now: on the monotonic clock, where the line is about a moment before.
        """
        left_s += self.then_s
        spent = (time.monotonic() if now is None else now) - self.began
        tenth = int(10 * spent / max(spent + left_s, 1e-9))
        is_new = self.shown is not None and tenth > self.shown
        self.shown = max(tenth, self.shown or 0)
        doing = f", {what}" if what else ""
        return f"{self.name}: {10 * tenth} %{doing}, {remaining(left_s)}" if is_new else None


def remaining(seconds: float | None) -> str:
    """What is left, in words; nothing where it is not known."""
    return "" if seconds is None else f"{about(seconds)} left"


def about(seconds: float) -> str:
    """An estimate in words."""
    return ("" if seconds < LEAST_S else "about ") + duration(seconds)


def duration(seconds: float) -> str:
    """Seconds in words: two units at most, never more digits than an estimate has."""
    if seconds < LEAST_S:
        return "less than a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 10:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 72 else f"{hours / 24:,.0f} days"


@contextmanager
def progress(title: str, *, lines: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line per tenth, or no `lines` at all. Yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    target = Console(stderr=True)
    if not target.is_terminal:
        yield _line_per_tenth(title) if lines else lambda done, total: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=target
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _line_per_tenth(title: str) -> Callable[[int, int], None]:
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(1, total)
        if tenth > shown:
            shown = tenth
            print_status(f"{title}: {done} of {total}")

    return show
