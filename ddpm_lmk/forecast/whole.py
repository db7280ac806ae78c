"""How long a step takes by a whole step that was measured: of the same network, or of one of its kind.

Operations are scaled, and the update with the weights. For the network that was measured that is a change of batch, of
recomputed levels or of outputs; for another size of its kind it takes operations for equally fast. What several small
micro-batches lose to one large is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.forecast.rates import read_rates, threads_of, whole_step
from ddpm_lmk.measure import Stored
from ddpm_lmk.tasks import Task


@dataclass(frozen=True)
class WholeStep:
    """Scales one step result; `device` has the rates of its machine."""

    step: Stored
    device: Stored

    def step_s(
        self, cfg: RunConfig, task: Task, precision: str, *, images: int, processes: int = 1, threads: int = 1
    ) -> float:
        """Seconds of one optimizer step of a process that has `images` of the group."""
        whole, own = whole_step(self.step), threads_of(self.step)
        update = next(row for row in self.step.rows if row.what == "update")
        update_s = median(update.busy_s) / own
        cost = task.cost(cfg.model, cfg.data.image_size)
        passes_s = (median(whole.busy_s) / own - update_s) * self._operations(cfg, task, images)
        update_s *= cost.params / update.figures["parameters"]
        return passes_s * self._slower(precision, processes, threads) + update_s

    def _operations(self, cfg: RunConfig, task: Task, images: int) -> float:
        """Those of the passes over those that were measured."""
        flops = task.cost(cfg.model, cfg.data.image_size).flops_train * images
        return float(flops / (1e9 * whole_step(self.step).figures["executed_gflop"]))

    def _slower(self, precision: str, processes: int, threads: int) -> float:
        """What sharing the device costs, half of it arithmetic and half bandwidth, and what another precision does."""
        own = whole_step(self.step).conditions["precision"]
        measured = read_rates(self.device, own).share(1, threads_of(self.step))
        if self.step.facts["hardware"]["device"] == "cuda":
            processes, threads = 1, 1
        found = read_rates(self.device, own).share(processes, threads)
        shared = (measured[0] / found[0] + measured[1] / found[1]) / 2
        faster = read_rates(self.device, precision).share(1, 1)[0] / read_rates(self.device, own).share(1, 1)[0]
        return shared / faster


def is_same_network(step: Stored, cfg: RunConfig) -> bool:
    """Was the network of this run measured, at its task and size? What is recomputed does not matter."""
    settings = step.facts["settings"]
    return (
        settings["task"]["kind"] == cfg.task.kind
        and settings["data"]["image_size"] == cfg.data.image_size
        and _shape(settings["model"]) == _shape(cfg.model.model_dump(mode="json"))
    )


def is_same_kind(step: Stored, cfg: RunConfig) -> bool:
    """Is it at least the same kind of network and of task?"""
    settings = step.facts["settings"]
    return bool(settings["task"]["kind"] == cfg.task.kind and settings["model"]["kind"] == cfg.model.kind)


def _shape(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "checkpointing"}
