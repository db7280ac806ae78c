"""Are the forecasts of `--dry-run` right? Predicted and measured step times and memory, of networks never measured.

    ddpm-lmk bench forecast [--results DIR] [--device auto] [--precision P] [--out DIR]

Forecasts come by levels from the newest `bench device` and `bench step` results of `--results` (default: `--out`) in
this precision, which are of one network at one size. Measured are others, other sizes and batches, and a batch shared
by two processes. On a CPU the measure is processor time per process, since a forecast is of an idle machine. Memory is
that of a new process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from _subject import CONFIGS, RESULTS, Subject, carried_out, device_of, option_parser
from scaling import run_on
from step import measure_memory

from ddpm_lmk.console import say
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.forecast import Results
from ddpm_lmk.forecast.levels import Forecast, fit
from ddpm_lmk.forecast.rates import whole_step
from ddpm_lmk.measure import Result, alternate
from ddpm_lmk.measure.verdict import conclude

CASES: dict[str, list[tuple[str, ...]]] = {
    "cpu": [
        ("--model", "tiny", "--size", "128", "--batch", "8"),
        ("--model", "tiny", "--size", "64", "--batch", "8"),
        ("--model", "small", "--size", "128", "--batch", "8"),
        ("--model", "small", "--size", "256", "--batch", "4"),
        ("--run", str(CONFIGS / "pretrain" / "isbi_cpu.yaml")),
        ("--run", str(CONFIGS / "finetune" / "isbi_cpu.yaml")),
    ],
    "cuda": [
        ("--model", "base", "--size", "256", "--batch", "32"),
        ("--model", "base", "--size", "128", "--batch", "32"),
        ("--model", "paper", "--size", "256", "--batch", "4"),
        ("--model", "small", "--size", "256", "--batch", "32"),
    ],
}
SHARED = {"cpu": (0, 2, 4), "cuda": (0,)}  # cases that two processes share


def main() -> None:
    """Predict, measure, and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--results", type=Path, help="folder with the device and the step result (default: --out)")
    options = parser.parse_intermixed_args()
    device = device_of(options)
    cases = [_options_of(words, device, options.precision or "fp32") for words in CASES[device]]
    subjects = [Subject(case) for case in cases]
    forecast = newest_forecast(device, subjects[0].precision, options.results or options.out)
    source = {"step": forecast.step.path.name, "device": forecast.device.path.name, "times": list(forecast.times)}
    shown = [[word.removeprefix(f"{CONFIGS}/") for word in words] for words in CASES[device]]
    result = Result("forecast", settings={**source, "cases": shown}, device=device)
    calls: dict[str, Callable[[], object]] = {_name(subject): subject.step for subject in subjects}
    found = alternate(calls, rounds=options.rounds, device=device, budget_s=options.budget_s / 2)
    for case, subject in zip(cases, subjects):
        memory = measure_memory(case)
        predicted = forecast.step_s(subject.cfg, subject.task, images=subject.batch_images)
        row = result.add("one process", found[_name(subject)], conditions=subject.conditions())
        row.figures |= {**_check(predicted, median(found[_name(subject)].busy_s)), **memory}
    for number in SHARED[device]:
        check_shared(result, cases[number], subjects[number], forecast, options)
    for row in result.rows:
        say(f"{row.what}, {_words(row.conditions)}: {row.figures['error_pct']:+.1f} %")
    conclude(result, options.out, f"checks-{subjects[0].precision}", earlier=[RESULTS])


def newest_forecast(device: str, precision: str, folder: Path) -> Forecast:
    """By the levels of the newest step of a ddpm_unet in the folder."""
    found = Results.here(device, [folder])
    steps = [step for step in found.steps if step.facts["settings"]["model"]["kind"] == "ddpm_unet"]
    steps = [step for step in steps if whole_step(step).conditions["precision"] == precision]
    if not steps or not found.devices:
        raise ConfigError(f"{folder} has no {precision} results of this machine; run bench device and bench step")
    return fit(steps[0], found.devices[0])


def check_shared(
    result: Result, case: argparse.Namespace, subject: Subject, forecast: Forecast, options: argparse.Namespace
) -> None:
    """A batch shared by two processes."""
    device, half = subject.device, subject.batch_images // 2
    case.rounds = options.rounds
    found = run_on(2, case, device, budget_s=options.budget_s / 6, ways=["strong"])
    samples = found["ways"]["strong"]
    measured = median(samples["wall_s" if device == "cuda" else "cpu_s"])
    predicted = forecast.step_s(subject.cfg, subject.task, images=half, processes=2)
    conditions = {**subject.conditions(), "batch_images": half}
    result.add("two processes", samples, conditions=conditions, figures=_check(predicted, measured))


def _options_of(words: tuple[str, ...], device: str, precision: str) -> argparse.Namespace:
    return option_parser(None).parse_intermixed_args([*words, "--device", device, "--precision", precision])


def _check(predicted_s: float, measured_s: float) -> dict[str, float]:
    error = 100 * (predicted_s / measured_s - 1)
    return {"predicted_ms": 1e3 * predicted_s, "measured_ms": 1e3 * measured_s, "error_pct": error}


def _name(subject: Subject) -> str:
    return f"{subject.label} {subject.cfg.task.kind} {subject.cfg.data.image_size} {subject.batch_images}"


def _words(conditions: dict[str, Any]) -> str:
    return f"{conditions['network']}, {conditions['image_size_px']} px, {conditions['batch_images']} images"


if __name__ == "__main__":
    carried_out(main)
