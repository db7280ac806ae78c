"""Result files of benchmarks: one form for all of them, which later runs are compared with.

A file holds rows. A row says what was measured, under which conditions (only rows with equal conditions are ever
compared), every repeated value of every clock, and figures that follow. Units are the ends of keys. Around the rows:
the whole settings, versions, hardware, load before and after, and the anchor, a piece of work that is the same in every
file: what two files of one kind of machine disagree about it is noise between their runs.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ddpm_lmk.bench.budget import Budget
from ddpm_lmk.bench.ratio import Timings, alternate, environment
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system import files
from ddpm_lmk.system.machine import code_digest, hardware, versions

FORMAT = "ddpm-lmk bench 1"
PACKAGES = ("ddpm-lmk", "torch", "numpy")
ANCHOR_SIDE, ANCHOR_ROUNDS = 512, 7  # a few milliseconds a round: seven rounds cost nothing
DIGITS = 6  # clocks are not better, and files stay small


@dataclass
class Row:
    """One thing that was measured.

    Attributes:
        samples: by clock or figure (`wall_s`, `cpu_s`, `images_per_s`, ...), the value of every round.
        figures: single numbers that belong to it, their unit at the end of the key.
    """

    what: str
    conditions: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    warm_up: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Rows of two files with the same key may be compared."""
        return self.what, json.dumps(self.conditions, sort_keys=True)

    @property
    def busy_s(self) -> list[float]:
        """Values of the clock that other programs disturb least; empty where none was read."""
        return next((self.samples[clock] for clock in ("device_s", "cpu_s", "wall_s") if clock in self.samples), [])

    def facts(self) -> dict[str, Any]:
        """What a file keeps."""
        return {
            "what": self.what,
            "conditions": self.conditions,
            "warm_up": self.warm_up,
            "measured": max(map(len, self.samples.values()), default=1),
            "median": {clock: _short(median(values)) for clock, values in self.samples.items()},
            "quartiles": {clock: [_short(q) for q in quartiles(values)] for clock, values in self.samples.items()},
            "figures": {key: _short(value) for key, value in self.figures.items()},
            "samples": {clock: [_short(value) for value in values] for clock, values in self.samples.items()},
        }


class Result:
    """What one benchmark found on one machine.

    Attributes:
        ratios: comparisons inside the run, as `Comparison.facts` with what was compared.
        budget: that of the run, whose omissions the file names.
    """

    def __init__(
        self, benchmark: str, *, settings: dict[str, Any], device: str = "cpu", budget: Budget | None = None
    ) -> None:
        """Begin: note the load, and do the anchor's work for the first time."""
        self.budget = Budget(math.inf) if budget is None else budget
        self.benchmark, self.settings, self.device = benchmark, settings, device
        self.rows: list[Row] = []
        self.ratios: list[dict[str, Any]] = []
        # other programs: a comparison by the clock is refused where there was more load than cores
        self._load = [round(os.getloadavg()[0], 2)]
        self._anchor = measure_anchor(device)

    def add(
        self,
        what: str,
        timings: Timings | dict[str, list[float]] | None = None,
        *,
        conditions: dict[str, Any] | None = None,
        figures: dict[str, Any] | None = None,
    ) -> Row:
        """Add a row, and return it."""
        samples, warm_up = (timings.samples(), timings.warm_up) if isinstance(timings, Timings) else (timings or {}, 0)
        self.rows.append(Row(what, conditions or {}, samples, figures or {}, warm_up))
        return self.rows[-1]

    def facts(self) -> dict[str, Any]:
        """The content of the file."""
        anchor = [*self._anchor, *measure_anchor(self.device)]  # before and after: a machine that slows down shows
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self.settings,
            "hardware": {**hardware(), "machine": platform.machine(), **environment(self.device)},
            "versions": versions(*PACKAGES),
            "code": code_digest(),
            "load_1_min_before_and_after": [*self._load, round(os.getloadavg()[0], 2)],
            "anchor_s": [_short(value) for value in anchor],
            "budget": self.budget.facts(),
            "ratios": self.ratios,
            "rows": [row.facts() for row in self.rows],
        }

    def write(self, folder: Path, label: str) -> Path:
        """Write `BENCHMARK-LABEL-DEVICE-TIME.json` into `folder`; earlier files stay."""
        facts = self.facts()
        device = _slug(facts["hardware"]["device_name"] or facts["hardware"]["device"])
        moment = re.sub(r"\D", "", facts["date"][:19])
        path = Path(folder) / f"{self.benchmark}-{_slug(label)}-{device}-{moment[:8]}-{moment[8:]}.json"
        files.write_json(path, facts)
        return path


@dataclass(frozen=True, eq=False)
class Stored:
    """A result file that was read."""

    path: Path
    facts: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.facts["benchmark"])

    @property
    def date(self) -> str:
        return str(self.facts["date"])

    @property
    def machine(self) -> str:
        """The kind of device the figures are of."""
        hardware = self.facts["hardware"]
        threads = hardware["threads"]
        return f"{hardware['device_name'] or hardware['cpu']}, {threads} thread{'' if threads == 1 else 's'}"

    @property
    def rows(self) -> list[Row]:
        fields = ("what", "conditions", "samples", "figures", "warm_up")
        return [Row(**{name: row[name] for name in fields}) for row in self.facts["rows"]]


def read_result(path: Path) -> Stored:
    """Read one file; raises `ConfigError` where it is no result of this form."""
    try:
        facts = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as a result of `ddpm-lmk bench` ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ConfigError(f"{path} is no result of `ddpm-lmk bench` of the form {FORMAT!r}; measure again with bench")
    return Stored(Path(path), facts)


def read_results(folder: Path, benchmark: str = "*") -> list[Stored]:
    """All results of a benchmark (default: of all) in a folder, oldest first; other files are passed over."""
    results = []
    for path in sorted(Path(folder).glob(f"{benchmark}-*.json")):
        with suppress(ConfigError):  # another kind of file, which has its own reader
            results.append(read_result(path))
    return sorted((result for result in results if benchmark in ("*", result.benchmark)), key=lambda each: each.date)


def measure_anchor(device: str) -> list[float]:
    """Busy seconds of the piece of work that is the same in every file: a matrix product and a copy."""
    import torch

    is_cuda = device.startswith("cuda")
    # of a smaller product a GPU would mostly measure how long kernels take to launch
    matrix = torch.ones(ANCHOR_SIDE * (8 if is_cuda else 1), ANCHOR_SIDE, device=device)

    def work() -> None:
        torch.mm(matrix.mT, matrix)  # bound by arithmetic
        matrix.repeat(8, 1)  # bound by memory

    return alternate({"anchor": work}, rounds=ANCHOR_ROUNDS, device=device)["anchor"].busy_s


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile; of a single value, that value twice."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = quantiles(values, method="inclusive")
    return [low, high]


def _short(value: Any) -> Any:
    """Numbers as a file keeps them: six digits."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_")
