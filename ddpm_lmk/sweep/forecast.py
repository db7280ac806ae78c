"""How long a sweep takes here, and how many workers should share a device; both are measured before it starts.

Runs that differ in name, shots, seed, datasets and starting weights only take as long for an image, so one of them is
timed, with as many others beside it as the sweep will have workers. `--per-device auto` trains the longest cell for
some steps in one, two and four workers: a small network leaves much of a large GPU idle, and how much only the device
knows. Each trial is a sweep of its own in a temporary folder, so what is measured is what runs.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import BUDGET_S, Forecast, Timing, Work
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.launcher import Device, Placement
from ddpm_lmk.launcher.time_runs import AFTER_DAYS, DAYS_S, spec_of, time_apart, time_run
from ddpm_lmk.sweep.expand import Cell, Sweep, SweepRun, cell_folder, recipe_key
from ddpm_lmk.sweep.progress import listed_shots, span_s
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.console import about, duration
from ddpm_lmk.system.signals import check_stopped

MOST_S = 30.0  # for the timed steps of a sweep, about, however many networks it has
WORKERS_TRIED = (1, 2, 4)
TRIAL_STEPS = 24  # the second half counts: the first warms up, and waits for the others to start
LEAST_GAIN = 1.05  # of the rate, below which more workers are not worth their memory


def forecast_run(
    cfg: RunConfig, out: Path, placement: Placement, *, steps: int | None = None, budget_s: float = BUDGET_S
) -> Forecast | str:
    """What is left of one run in `out`, from steps timed as it would be placed; or why that is not known.

    Args:
        steps: all of the run, where more is known of them than its run file and manifests say.
    """
    timing = time_run(cfg, spec_of(cfg), placement, budget_s=budget_s)
    if isinstance(timing, str):
        return timing
    return timing.forecast(Work.left(cfg, out, steps=steps))


@dataclass(frozen=True)
class SweepForecast:
    """What is left of a sweep.

    Attributes:
        runs: by key, the forecast of every run that is not done; or why there is none.
        start_s: until a worker has begun.
    """

    sweep: Sweep
    workers: int
    device: Device
    runs: Mapping[str, Forecast | str] = field(default_factory=dict)
    start_s: float = 0.0

    def seconds(self) -> dict[str, float]:
        """Of every run that has a forecast, by key."""
        return {key: each.total_s for key, each in self.runs.items() if isinstance(each, Forecast)}

    @property
    def unknown(self) -> str:
        """Why a run has no forecast; empty where all have one."""
        return next((each for each in self.runs.values() if isinstance(each, str)), "")

    @property
    def total_s(self) -> float:
        """From the start of the stages to the end of the last cell, as far as it is known."""
        seconds = self.seconds()
        total = 0.0
        for runs, at_once in (
            (self.sweep.stages, self.workers if self.device == "cpu" else 1),
            (self.sweep.cells, self.workers),
        ):
            jobs = [seconds[run.key] for run in runs if run.key in seconds]
            total += span_s(jobs, at_once) + self.start_s if jobs else 0.0
        return total

    def __str__(self) -> str:
        if not self.runs:
            return "nothing is left to do"
        if not self.seconds():
            return f"how long it takes is not known: {self.unknown}"
        cells = sum(cell.key in self.runs for cell in self.sweep.cells)
        parts = [(len(self.runs) - cells, "stage"), (cells, "cell")]
        what = " and ".join(_counted(count, word) for count, word in parts if count)
        how_long = f"more than {duration(self.total_s)}" if self.unknown else about(self.total_s)
        more = f"; not all of them: {self.unknown}" if self.unknown else ""
        return f"{how_long} here: {what} on {_counted(self.workers, 'worker')} (from steps timed here{more})"

    def rows(self) -> list[Sequence[str]]:
        """By stage, and by start and recipe: what, how many runs, the time of one, and of all on one worker."""
        groups: list[tuple[str, Sequence[SweepRun]]] = [(stage.key, [stage]) for stage in self.sweep.stages]
        groups += [(f"{cells[0].start}, {listed_shots(cells)} labels", cells) for cells in self.sweep.recipes()]
        rows: list[Sequence[str]] = []
        for what, runs in groups:
            left = [self.runs[run.key] for run in runs if run.key in self.runs]
            seconds = [each.total_s for each in left if isinstance(each, Forecast)]
            each = " to ".join(dict.fromkeys(map(duration, (min(seconds), max(seconds))))) if seconds else "not known"
            if left:
                rows.append([what, str(len(left)), each, duration(sum(seconds)) if seconds else "not known"])
        return rows


@dataclass(frozen=True)
class _Left:
    """A run that is not done; `kind` is equal for runs that take as long for an image."""

    run: SweepRun
    work: Work
    spec: DatasetSpec
    kind: tuple[str, int]

    @classmethod
    def of(cls, run: SweepRun) -> _Left:
        cfg, spec = run.cfg, spec_of(run.cfg)
        without_length = cfg.model_copy(update={"train": cfg.train.model_copy(update={"duration": 1})})
        kind = (recipe_key(without_length), spec.num_landmarks)
        return cls(run, Work.left(cfg, run.folder), spec, kind)


def forecast_sweep(
    sweep: Sweep,
    device: Device,
    *,
    workers: int,
    devices: int | None = None,
    budget_s: float = BUDGET_S,
) -> SweepForecast:
    """Time one run of each kind that is left; raises what opening the datasets raises.

    Args:
        devices: GPUs that the workers share in turn; None: one each.
        budget_s: for the timed steps of one kind.
    """
    stages, cells = ([_Left.of(run) for run in runs if not run.is_done()] for runs in (sweep.stages, sweep.cells))
    # Many networks share the time there is for timing.
    budget_s = min(budget_s, MOST_S / max(1, len({each.kind for each in (*stages, *cells)})))
    runs: dict[str, Forecast | str] = {}
    start_s = 0.0
    for left in (stages, cells):
        kinds: dict[tuple[str, int], _Left] = {}
        for each in left:
            kinds.setdefault(each.kind, each)
        firsts, timings = list(kinds.values()), list[Timing | str]()
        if any(isinstance(each, Forecast) and each.total_s > DAYS_S for each in runs.values()):
            timings = [AFTER_DAYS] * len(kinds)  # no answer changes what the user has to do about a stage of days
        elif left is stages and device == "cuda":  # one after the other, each on all GPUs
            # Apart: a process that has used a GPU holds its context, and this one lasts as long as the sweep.
            place = Placement(device, devices or workers)
            timings = [time_run(each.run.cfg, each.spec, place, budget_s=budget_s, is_apart=True) for each in firsts]
        elif kinds:
            timings = time_apart(
                [each.run.cfg for each in firsts],
                processes=min(workers, len(left)),  # memory bandwidth and caches are shared with the others
                device=device,
                devices=devices,
                specs=[each.spec for each in firsts],
                budget_s=budget_s,
                steps=[each.work.steps for each in firsts],
            )
        of_kind = dict(zip(kinds, timings, strict=True))
        # Workers start side by side, so the slowest start counts.
        start_s = max([start_s, *(timing.start_s for timing in timings if isinstance(timing, Timing))])
        for each in left:
            timing = of_kind[each.kind]
            runs[each.run.key] = timing if isinstance(timing, str) else timing.forecast(each.work)
    return SweepForecast(sweep, workers, device, runs, start_s)


def workers_per_device(wanted: str, sweep: Sweep, *, device: Device, say: Callable[[str], None]) -> int:
    """What `--per-device` asks for: a number, or `auto` for the one with the highest rate."""
    if wanted != "auto":
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ConfigError(f"--per-device {wanted}: wanted a number of workers, or auto")
        return int(wanted)
    best, best_rate = 1, 0.0
    for count in WORKERS_TRIED:
        rate = measure_rate(sweep.cells[0], count, device=device)
        if rate is None:
            say(f"trial: {count} workers do not fit on one device")
            break
        say(f"trial: {_counted(count, 'worker')} on one device, {rate:.1f} images/s")
        if rate < LEAST_GAIN * best_rate:
            break
        best, best_rate = count, rate
    return best


def measure_rate(cell: Cell, count: int, *, device: Device) -> float | None:
    """Images per second of `count` workers together; None where not all of them could train."""
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-trial-") as folder:
        names = [f"trial-{number}" for number in range(count)]
        cells = [replace(cell, name=name, cfg=_shortened(cell.cfg, name)) for name in names]
        cells = [replace(cell, folder=cell_folder(Path(folder), cell.name)) for cell in cells]
        trial, silent = Sweep("trial", Path(folder), tuple(cells)), Console(file=io.StringIO())
        code = run_sweep(trial, per_device=count, device=device, console=silent)
        check_stopped(code)
        return None if code else sum(_rate(cell.folder) for cell in cells)


def _shortened(cfg: RunConfig, name: str) -> RunConfig:
    """The same training for some steps from random weights, nothing validated, scored or saved on the way."""
    fields = cfg.model_dump(mode="json")
    fields |= {"name": name}
    fields["train"] |= {"duration": TRIAL_STEPS}
    fields["runtime"] |= {"log_every": 1, "checkpoint_every": TRIAL_STEPS + 1}
    fields["train"] |= {"snapshot_every": None, "evaluate_every": None, "patience": None, "select": "last"}
    fields["data"] |= {"validation_split": None, "propagate": None}
    fields["optim"] |= {"plateau": None}
    fields["init"] |= {"weights": None}
    fields["evaluate"] |= {"split": None}
    return RunConfig.model_validate(fields)


def _rate(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The median: a worker that starts late, or a pause of the machine, touches a few steps only.
    return statistics.median(line["images_per_s"] for line in lines[len(lines) // 2 :])


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count > 1 else ''}"
