"""What a run says about itself: `metrics.jsonl`, a progress bar on a terminal, plain `key=value` lines elsewhere.

What is shown as left is all of the run: steps at the rate of the last lines, validations, and what follows the last
step as it was forecast. Where the run is a stage of a whole, it is all of that. Plain lines are rare: one per tenth of
the run, and one every few minutes.

Losses are those all ranks agreed on. Rates leave out validation, saving and compilation, and include waiting for
data, whose share is reported beside them. Every number is on the host when a line is due: the exchange that decides
about a step brings it, so a line costs the device nothing.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.gradients import StepOutcome
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import compile_cache
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.console import Whole, print_status, remaining
from ddpm_lmk.system.heartbeat import beat

if TYPE_CHECKING:
    from ddpm_lmk.engine.forecast import Forecast

PLAIN_LINE_EVERY_S = 180.0
RECENT = 10  # lines, whose steps say how long the next ones take
MOST_UNWRITTEN = 64  # lines; where more wait, the disk is slower than training, and training waits


class CompileClock:
    """Adds up the seconds this process compiles while the block lasts; rank 0 tells of each time.

    Attributes:
        seconds: so far.
    """

    def __init__(self, cfg: RunConfig, parallel: Parallel, run: RunDir) -> None:
        self.seconds = 0.0
        self._is_on, self._is_main, self._run = bool(cfg.train.compile), parallel.is_main, run
        self._began = 0.0

    def __enter__(self) -> CompileClock:
        if self._is_on:
            from torch._dynamo.callback import callback_handler  # seconds to import, and there already

            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, call: Any) -> None:
        beat("compile")  # takes longer than a step, and is no hang
        self._began = time.perf_counter()

    def _end(self, call: Any) -> None:
        taken = time.perf_counter() - self._began
        self.seconds += taken
        if self._is_main:
            folder = str(compile_cache())
            self._run.event("model.compiled", seconds=round(taken, 2), cache=folder)
            self._run.note(compile={"seconds": round(self.seconds, 2), "cache": folder})
            print_status(f"compiled in {taken:.1f} s, {self.seconds:.1f} s so far; kept in {folder}")


class TrainLogger:
    """Counts between two lines and writes them; only rank 0 writes.

    Lines are written by a thread of their own, in order, so that a slow file system does not hold up training; they are
    on the disk before a checkpoint is made, and when the loop is left in whatever way.

    Args:
        clock: what was spent on compilation, which is told elsewhere.
        write: takes one line of `metrics.jsonl` as a mapping.
        total: steps of the run.
        every: steps between lines.
        evaluate: steps between validations; None: only after the last.
        forecast: what is known before the first step.
        whole: what this run is a stage of.
    """

    def __init__(
        self,
        state: TrainState,
        parallel: Parallel,
        clock: CompileClock,
        *,
        write: Callable[[dict[str, Any]], None],
        total: int,
        every: int,
        evaluate: int | None = None,
        forecast: Forecast | None = None,
        whole: Whole | None = None,
    ) -> None:
        self._state, self._parallel, self._write, self._total, self._every = state, parallel, write, total, every
        self._forecast, self._whole, self._evaluate = forecast, whole, evaluate or total
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # steps and seconds of lines, pauses included
        self._evaluation_s = None if forecast is None or not forecast.evaluations else forecast.evaluation_s
        self._validated: dict[str, float] = {}  # the last validation, for the next plain line
        self._tenth = 10 * state.step // max(1, total)
        self._clock, self._compiled_s = clock, clock.seconds
        self._norm = 0.0
        self._tick = time.perf_counter()
        self._start_line()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._unwritten: deque[Future[None]] = deque()
        self._shown_at = -math.inf
        self._screen: Progress | None = None
        if parallel.is_main and sys.stderr.isatty():
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn())
            words = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
            self._screen = Progress(*columns, *words, console=Console(stderr=True))
            self._task = self._screen.add_task("", total=total, completed=state.step, left=self._words(self._left_s()))

    def __enter__(self) -> TrainLogger:
        if self._screen is not None:
            self._screen.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
        # Waits: lines of steps that were made are on the disk, whatever ended the loop.
        self._writer.shutdown()
        if self._screen is not None:
            self._screen.stop()
        if error is None:
            self._wait(most=0)

    @contextmanager
    def paused(self, *, validates: bool = False) -> Iterator[None]:
        """Time spent inside is no training time; lines of the steps before are on the disk when it begins."""
        begin = time.perf_counter()
        self._wait(most=0)
        yield
        taken = time.perf_counter() - begin
        self._paused_s += taken
        if validates:
            self._evaluation_s = taken
        else:
            self._saving_s += taken
        self._compiled_s = self._clock.seconds  # counted already

    def step(self, outcome: StepOutcome, *, size: int, is_skipped: bool, lr: float) -> None:
        """Take in one finished step.

        Args:
            size: images of the global batch.
        """
        now = time.perf_counter()
        self._state.seconds += now - self._tick
        self._tick = now
        # A pass that compiled was no training; what `paused` covers was taken off there.
        self._paused_s += self._clock.seconds - self._compiled_s
        self._compiled_s = self._clock.seconds
        self._steps += 1
        self._images += size
        self._wait_s += outcome.wait_s
        if not is_skipped:
            self._loss += outcome.loss
            self._norm = outcome.norm
            self._updated += size
        if self._state.step % self._every == 0 or self._state.step == self._total:
            self._line(lr)

    def validated(self, figures: dict[str, float]) -> None:
        """Take in one evaluation."""
        facts = {key: value for key, value in figures.items() if math.isfinite(value)}
        self._validated = {f"validation_{key}": value for key, value in facts.items()}
        line = {"step": self._state.step, "images": self._state.images, "validation": facts}
        is_last = self._state.step >= self._total
        self._submit(line, self._validated, is_due=is_last and self._screen is None)

    def _start_line(self) -> None:
        self._loss = 0.0
        self._steps = self._images = self._updated = 0
        self._wait_s = self._paused_s = self._saving_s = 0.0
        self._since = time.perf_counter()

    def _line(self, lr: float) -> None:
        # Never zero: a step of the toy takes less than the clock can tell.
        elapsed = max(time.perf_counter() - self._since - self._paused_s, 1e-9)
        line = {
            "step": self._state.step,
            "images": self._state.images,
            # Skipped updates have losses that are not numbers, or spikes; they count in `skipped`.
            "loss": self._loss / self._updated if self._updated else None,
            "lr": lr,
            "grad_norm": self._norm,
            "images_per_s": self._images / elapsed,
            "data_wait": min(1.0, self._wait_s / self._parallel.world / elapsed),
            "eta_s": (self._total - self._state.step) * elapsed / self._steps,
            "seconds": self._state.seconds,
            "skipped": self._state.divergence.skipped,
        }
        # With saving, which the steps to come will have too.
        self._recent.append((self._steps, elapsed + self._saving_s))
        tenth = 10 * self._state.step // self._total
        shown = {key: value for key, value in line.items() if key not in ("step", "eta_s", "seconds", "images")}
        self._submit(line, {**shown, **self._validated}, is_due=tenth > self._tenth)
        self._tenth = tenth
        self._start_line()

    def _left_s(self) -> float | None:
        """Seconds to the end of the run; None before anything is known."""
        steps, seconds = (sum(column) for column in zip(*self._recent)) if self._recent else (0, 0.0)
        if not steps and self._forecast is None:
            return None
        step_s = seconds / steps if self._forecast is None or steps else self._forecast.step_s
        # The last step is validated whether its interval ends there or not.
        evaluations = -(-self._total // self._evaluate) - self._state.step // self._evaluate
        conclude_s = 0.0 if self._forecast is None else self._forecast.conclude_s
        return (self._total - self._state.step) * step_s + evaluations * (self._evaluation_s or 0.0) + conclude_s

    def _words(self, left_s: float | None) -> str:
        return remaining(left_s) if left_s is None or self._whole is None else self._whole.words(left_s)

    def _submit(self, line: dict[str, Any], shown: dict[str, Any], *, is_due: bool) -> None:
        """Have a line written, and shown, while training goes on."""
        step, left_s = self._state.step, self._left_s()
        now = time.monotonic()  # the line may be shown later

        def write() -> None:
            self._write(line)
            self._show(step, shown, now, left_s=left_s, is_due=is_due)

        if self._parallel.is_main:
            self._unwritten.append(self._writer.submit(write))
            self._wait(most=MOST_UNWRITTEN)

    def _wait(self, *, most: int) -> None:
        """Wait until so many lines at most are not written; raises what writing one raised."""
        while self._unwritten and (len(self._unwritten) > most or self._unwritten[0].done()):
            self._unwritten.popleft().result()

    def _show(self, step: int, shown: dict[str, Any], now: float, *, left_s: float | None, is_due: bool) -> None:
        words = " ".join(f"{key}={f'{v:.4g}' if isinstance(v, float) else v}" for key, v in shown.items())
        left = self._words(left_s)
        if self._screen is not None:
            self._screen.update(self._task, completed=step, description=words, left=left)
            return
        text, place = None, f"step={step}/{self._total}"
        if self._whole is not None:
            text = None if left_s is None else self._whole.line(left_s, place, now=now)
        elif is_due or now - self._shown_at >= PLAIN_LINE_EVERY_S:
            text = f"{place} {words}{f', {left}' if left and step < self._total else ''}"
        if text is not None:
            self._shown_at = now
            print_status(text)
