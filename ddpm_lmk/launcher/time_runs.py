"""Timing steps of runs as they would be placed: in this process, or in processes of their own side by side.

A process of its own is `python -m ddpm_lmk.launcher.time_runs`, its job on standard input. Importing this does not
import torch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import Timing
from ddpm_lmk.engine.step_timing import BUDGET_S, time_steps
from ddpm_lmk.errors import LmkError
from ddpm_lmk.launcher import preflight
from ddpm_lmk.launcher.placement import Device, Placement, visible_gpus, worker_environment
from ddpm_lmk.system import signals
from ddpm_lmk.system.processes import die_with_parent

DAYS_S = 2 * 24 * 3600.0  # of one run: what the others take is no news then
NO_DEVICE = "its device is not on this machine"
AFTER_DAYS = "another run of it takes days"
TOO_SLOW = "this machine is too slow, or too busy, to time a step"
PATIENCE_S = 120.0  # for processes that time steps to start, beside what they may take


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
        found: Timing | str = time_here(share, spec, placement.device, budget_s=budget_s)
    else:
        place: dict[str, Any] = {"processes": placement.processes, "device": placement.device}
        [found] = time_apart([share], **place, specs=[spec], budget_s=budget_s)
    return found if isinstance(found, str) else replace(found, processes=world)


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
        specs: what the runs' data is.
        devices: GPUs that the processes share in turn; None: one each.
        steps: how long the runs are; where one of them takes days, those after it are not timed.

    Returns why instead, for a run that cannot be timed here.
    """
    if device == "cuda" and not visible_gpus():
        return [NO_DEVICE] * len(runs)
    each = [
        {"cfg": cfg.model_dump(mode="json"), "spec": spec.model_dump(mode="json"), "steps": length}
        for cfg, spec, length in zip(runs, specs, steps or [0] * len(runs), strict=True)
    ]
    facts = {"device": device, "processes": processes, "budget_s": budget_s, "parent": os.getpid()}
    job = json.dumps({"runs": each, **facts})
    began = time.monotonic()
    with ExitStack() as leaving:
        children = [
            leaving.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "ddpm_lmk.launcher.time_runs"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=worker_environment(device, slot, processes, devices=devices or processes),
                )
            )
            for slot in range(processes)
        ]
        leaving.callback(_end, children)
        overdue = threading.Timer(PATIENCE_S + 6 * budget_s * len(runs), _end, [children])
        leaving.callback(overdue.cancel)
        overdue.start()
        for child in children:
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(job)
        told = [list(map(json.loads, child.stdout or ())) for child in children]
    return [
        _together([lines[number] if len(lines) > number else TOO_SLOW for lines in told], began)
        for number in range(len(runs))
    ]


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        child.kill()


def _together(told: Sequence[dict[str, Any] | str], began: float) -> Timing | str:
    """The mean of what processes have seen of one run; nothing is known where one of them could not do it."""
    seen = [Timing(**facts) for facts in told if not isinstance(facts, str)]
    if why := next((each for each in told if isinstance(each, str)), ""):
        return why
    names = ("image_s", "update_s", "validate_s", "score_s", "draw_s", "start_s")
    mean: dict[str, Any] = {name: statistics.fmean(getattr(each, name) for each in seen) for name in names}
    return replace(seen[0], **mean | {"start_s": max(0.0, mean["start_s"] - began)})


def spec_of(cfg: RunConfig) -> DatasetSpec:
    """Facts of the run's data, together where it has several labelled sets."""
    return preflight.spec_of(cfg, [Manifest.open(path).spec for path in cfg.data.path])


def time_here(
    cfg: RunConfig, spec: DatasetSpec, device: Device, *, beside: int = 1, budget_s: float = BUDGET_S
) -> Timing:
    """Time steps of a run in this process, alone or `beside` others; raises `LmkError` where it cannot be done."""
    from ddpm_lmk.engine.device_fit import device_bytes, fit_to_device
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.engine.session import Workbench
    from ddpm_lmk.tasks import build_task

    task, parallel = build_task(cfg, spec), Parallel(device)
    room = device_bytes(parallel) // (beside if device == "cpu" else 1)
    fitted = fit_to_device(cfg, task.out_channels, parallel, steps=1, room=room)
    here, workbench = fitted.applied(cfg), Workbench()
    return time_steps(here, task, parallel, precision=fitted.precision, workbench=workbench, budget_s=budget_s)


def main() -> int:
    """Do the job on standard input: a line of JSON for each run."""
    job: dict[str, Any] = json.load(sys.stdin)
    die_with_parent(job["parent"])
    with signals.leaving_at_once():
        import ddpm_lmk.run  # noqa: F401  # as a worker does: what it takes to start is told too

        began = time.monotonic()  # the clock of all processes of a machine
        longest_s = 0.0
        for each in job["runs"]:
            cfg, spec = RunConfig.model_validate(each["cfg"]), DatasetSpec.model_validate(each["spec"])
            told: dict[str, Any] | str = AFTER_DAYS
            if longest_s < DAYS_S:
                try:
                    found = time_here(cfg, spec, job["device"], beside=job["processes"], budget_s=job["budget_s"])
                    told = asdict(replace(found, start_s=began))
                    longest_s = max(longest_s, each["steps"] * cfg.train.global_batch_size * found.image_s)
                except LmkError as error:
                    told = str(error)
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
