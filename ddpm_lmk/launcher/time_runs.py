"""Timing steps of runs as they would be placed: in this process, or in child processes side by side.

The child is `python -m ddpm_lmk.launcher.time_runs`. Importing this does not import torch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading import corpus
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import BUDGET_S, Timing, time_steps
from ddpm_lmk.errors import LmkError
from ddpm_lmk.launcher.placement import Device, Placement, visible_gpus, worker_environment
from ddpm_lmk.system.children import child_job, collect_output, start_child

DAYS_S = 2 * 24 * 3600.0  # a run that takes so long decides, and the others need not be timed
NO_DEVICE = "its device is not on this machine"
AFTER_DAYS = "another run of it takes days"
TOO_SLOW = "this machine is too slow, or too busy, to time a step"
START_LIMIT_S = 120.0  # for children to start, beside what timing may take


def time_run(
    cfg: RunConfig, spec: DatasetSpec, placement: Placement, *, budget_s: float = BUDGET_S, is_apart: bool = False
) -> Timing | str:
    """Time steps of a run as it would be placed; or why that cannot be done.

    Args:
        is_apart: never in this process, which would hold a GPU from then on.
    """
    world = placement.processes * placement.nodes
    share = cfg.model_copy(
        update={"train": cfg.train.model_copy(update={"global_batch_size": cfg.train.global_batch_size // world})}
    )
    if not is_apart and placement.processes == 1 and (placement.device == "cpu" or visible_gpus()):
        return replace(time_here(share, spec, placement.device, budget_s=budget_s), processes=world)
    place: dict[str, Any] = {"processes": placement.processes, "device": placement.device}
    [timing] = time_apart([share], **place, specs=[spec], budget_s=budget_s)
    return timing if isinstance(timing, str) else replace(timing, processes=world)


def time_apart(
    runs: Sequence[RunConfig],
    *,
    processes: int,
    device: Device,
    specs: Sequence[DatasetSpec],
    devices: int | None = None,
    budget_s: float = BUDGET_S,
    steps: Sequence[int] | None = None,
) -> list[Timing | str]:
    """Time steps of each of `runs` in `processes` processes side by side, each as if it were alone with its batch.

    Args:
        specs: facts of the runs' data.
        devices: GPUs that the processes share in turn; None: one each.
        steps: how long the runs are; where one of them takes days, those after it are not timed.

    Returns:
        For each run its timing, or the reason why there is none.
    """
    if device == "cuda" and not visible_gpus():
        return [NO_DEVICE] * len(runs)
    told = zip(runs, specs, steps or [0] * len(runs), strict=True)
    job = {
        "runs": [
            {"cfg": cfg.model_dump(mode="json"), "spec": spec.model_dump(mode="json"), "steps": length}
            for cfg, spec, length in told
        ],
        "device": device,
        "processes": processes,
        "budget_s": budget_s,
    }
    began = time.monotonic()
    children = [
        start_child(
            "ddpm_lmk.launcher.time_runs",
            job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            environment=worker_environment(device, slot, processes, devices=devices or processes),
        )
        for slot in range(processes)
    ]
    # Steps, validation, scoring and sampling each stay near the budget; more than that is a machine too slow to say.
    outputs = collect_output(children, within_s=START_LIMIT_S + 6 * budget_s * len(runs))
    answers = [list(map(json.loads, output.splitlines())) for output in outputs]
    return [
        _together([lines[number] if len(lines) > number else TOO_SLOW for lines in answers], began)
        for number in range(len(runs))
    ]


def _together(answers: Sequence[dict[str, Any] | str], began: float) -> Timing | str:
    """The mean of the timings of one run; a reason where one of the processes has one instead."""
    if reason := next((answer for answer in answers if isinstance(answer, str)), ""):
        return reason
    timings = [Timing(**answer) for answer in answers if not isinstance(answer, str)]
    names = ("image_s", "update_s", "validate_s", "score_s", "draw_s", "start_s")
    mean: dict[str, Any] = {name: statistics.fmean(getattr(each, name) for each in timings) for name in names}
    return replace(timings[0], **mean | {"start_s": max(0.0, mean["start_s"] - began)})


def spec_of(cfg: RunConfig) -> DatasetSpec:
    """Facts of the run's data, together where it has several labelled sets."""
    return corpus.spec_of(cfg, [dataset.spec for dataset in open_datasets(cfg)])


def time_here(
    cfg: RunConfig, spec: DatasetSpec, device: Device, *, beside: int = 1, budget_s: float = BUDGET_S
) -> Timing:
    """Time steps of a run in this process, alone or `beside` others; raises `LmkError` where it cannot be done."""
    from ddpm_lmk.engine.device_fit import fit_to_device
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.engine.session import Session
    from ddpm_lmk.system import accelerator
    from ddpm_lmk.tasks import build_task

    task, parallel = build_task(cfg, spec), Parallel(device)
    room = accelerator.total_bytes(parallel.device, processes=beside)
    fitted = fit_to_device(cfg, task, parallel, steps=1, room=room)
    here, session = fitted.applied(cfg), Session()
    return time_steps(here, task, parallel, precision=fitted.precision, session=session, budget_s=budget_s)


def main() -> int:
    """Do the job on standard input: a line of JSON for each run."""
    with child_job() as job:
        import ddpm_lmk.run  # noqa: F401  # as a worker does: it belongs to the time a run takes to start

        began = time.monotonic()  # the clock of all processes of a machine
        longest_s = 0.0
        for each in job["runs"]:
            cfg, spec = RunConfig.model_validate(each["cfg"]), DatasetSpec.model_validate(each["spec"])
            answer: dict[str, Any] | str = AFTER_DAYS
            if longest_s < DAYS_S:
                try:
                    timing = time_here(cfg, spec, job["device"], beside=job["processes"], budget_s=job["budget_s"])
                    answer = asdict(replace(timing, start_s=began))
                    longest_s = max(longest_s, each["steps"] * cfg.train.global_batch_size * timing.image_s)
                except LmkError as error:
                    answer = str(error)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
