"""A task, a network and data so small that a run takes a moment; everything the engine touches is real.

Images are functions of their index, the order is the package's own, and the task's noise is keyed by position, so what
is learnt depends on nothing but the run file. Data are six images by default: groups reach over epochs, or end short.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import Batch, GlobalBatch
from ddpm_lmk.data.loading.bad_samples import Quarantine
from ddpm_lmk.data.loading.order import BatchPlan, SampleOrder, keyed_uniform
from ddpm_lmk.data.shards.index import ListedRows
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.loop import Loaders, fit
from ddpm_lmk.engine.optim import moments
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.models.weight_standardization import WeightStandardizedConv2d
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.tasks.task import Task

SIDE = 8


def config(**sections: Any) -> RunConfig:
    """A run file for the toy; the sections given overlay the defaults below."""
    train = {"duration": 8, "global_batch_size": 4, **sections.pop("train", {})}
    runtime = {"log_every": 1, "checkpoint_every": 100, **sections.pop("runtime", {})}
    optim = {"lr": 1e-2, **sections.pop("optim", {})}
    data = {"path": "toy", "image_size": 16, **sections.pop("data", {})}
    return RunConfig.model_validate(
        {
            "data": data,
            "task": {"kind": "denoise"},
            "train": train,
            "runtime": runtime,
            "optim": optim,
            "model": {"multipliers": [1]},
            **sections,
        }
    )


class ToyNet(nn.Module):
    """Trunk, a part no forward pass reaches, and an output layer; `ballast` floats that only make checkpoints large."""

    def __init__(self, ballast: int = 0, *, is_standardised: bool = False) -> None:
        super().__init__()
        self.stem = WeightStandardizedConv2d(1, 6) if is_standardised else nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.unreached = nn.Linear(3, 3)
        self.final_conv = nn.Conv2d(6, 1, 1)
        self.register_buffer("ballast", torch.arange(float(ballast)) if ballast else None)

    def forward(self, images: Tensor) -> Tensor:
        return self.final_conv(torch.nn.functional.silu(self.norm(self.stem(images))))


class ToyTask(Task):
    """Predict the inverted image from a noisy one; `bad_positions` have a loss that is not a number."""

    out_channels = 1

    def __init__(self, seed: int, bad_positions: frozenset[int] = frozenset()) -> None:
        self.seed, self.bad_positions = seed, bad_positions
        self.seen: list[dict[str, Any]] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        noise = pixels(self.seed, "noise", batch.positions.numpy())
        for position, real, image, drawn in zip(batch.positions.tolist(), batch.weight.tolist(), batch.images, noise):
            if real:
                self.seen.append({"position": position, "image": float(image.sum()), "noise": float(drawn.sum())})
        losses = (model(batch.images + 0.1 * noise) - (1 - batch.images)).square().mean((1, 2, 3))
        is_bad = torch.tensor([p in self.bad_positions for p in batch.positions.tolist()])
        return torch.where(is_bad, torch.nan, losses)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses = (model(batch.images) - (1 - batch.images)).square().mean((1, 2, 3))
        return {"loss": (losses * batch.weight).sum(), "count": batch.weight.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        return {"loss": loss, "score": loss}


def pixels(seed: int, stream: str, positions: np.ndarray) -> Tensor:
    """Keyed uniform images `[B, 1, SIDE, SIDE]`."""
    drawn = keyed_uniform(seed, stream, positions, SIDE * SIDE).astype(np.float32)
    return torch.from_numpy(drawn).reshape(-1, 1, SIDE, SIDE)


def make_batch(seed: int, rows: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> Batch:
    """Images of `rows` as a batch without labels."""
    count = len(rows)
    return Batch(
        images=pixels(seed, "image", rows).contiguous(memory_format=torch.channels_last),
        points=None,
        to_native=torch.eye(2, 3).repeat(count, 1, 1),
        native_size=torch.full((count, 2), float(SIDE)),
        mm_per_px=torch.full((count,), torch.nan),
        positions=torch.from_numpy(positions.copy()),
        weight=torch.from_numpy(weights),
        ids=tuple(str(row) for row in rows),
    )


class FailingTask(ToyTask):
    """A task whose evaluations of these numbers (0 is the first) meet an error."""

    def __init__(self, seed: int, errors: Mapping[int, Exception]) -> None:
        super().__init__(seed)
        self._errors, self._count = errors, 0

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self._count += 1
        if error := self._errors.get(self._count - 1):
            raise error
        return super().evaluate(model, batch)


class ToyTrain:
    """The training stream of one rank."""

    spec = SPECS["phantom-chest"]
    fingerprint = "toy"

    def __init__(self, cfg: RunConfig, *, rank: int = 0, world: int = 1, num_images: int = 6) -> None:
        self.cfg, self.rank, self.world, self.num_images = cfg, rank, world, num_images
        train = cfg.train
        self.plan = BatchPlan(
            num_images, train.global_batch_size, train.micro_batch, train.epoch_boundary, drop_last=False
        )
        self.quarantine = Quarantine([], 0.0)
        self.order = SampleOrder(cfg.seed, [ListedRows(np.arange(num_images), np.zeros(num_images, int))], None, 1)

    def global_batches(self, start_step: int) -> Iterator[GlobalBatch]:
        step = start_step
        while True:
            positions, weights, micro = self.plan.share(step, self.rank, self.world)
            rows = self.order.at(positions)[1]
            cuts = [slice(i, i + micro) for i in range(0, len(positions), micro)]
            batches = [make_batch(self.cfg.seed, rows[cut], positions[cut], weights[cut]) for cut in cuts]
            yield GlobalBatch(self.plan.size(step), batches, 0.0)
            step += 1

    def close(self) -> None:
        """Nothing runs in the background."""


class ToyValidation:
    """Five images the training stream does not hold, dealt out over the ranks, with padding."""

    num_images = 5

    def __init__(self, cfg: RunConfig, *, rank: int = 0, world: int = 1) -> None:
        self.seed, self.rank, self.world = cfg.seed, rank, world
        self.is_whole = cfg.train.exactness == "exact"  # then one batch for any number of ranks, as `EvalLoader` does

    def __iter__(self) -> Iterator[Batch]:
        share = self.num_images if self.is_whole else -(-self.num_images // self.world)
        rows = self.rank * share + np.arange(share)
        weights = (rows < self.num_images).astype(np.float32)
        yield make_batch(self.seed + 1, rows, rows, weights)


def fresh_state(cfg: RunConfig, *, ballast: int = 0, is_standardised: bool = False) -> TrainState:
    """Step 0, from the seed of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        model = ToyNet(ballast, is_standardised=is_standardised)
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return TrainState.fresh(cfg, model)


def put_all(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights)


def start(
    cfg: RunConfig, path: Path, parallel: Parallel, *, ballast: int = 0, is_standardised: bool = False, **loader: Any
) -> tuple[TrainState, Loaders, RunDir]:
    """What `fit` wants beside a task: state (continued if the directory holds one), loaders and the directory."""
    run = RunDir.lock(path, cfg) if parallel.is_main else RunDir(path, writes=False)
    newest = parallel.on_main(run.load_latest)
    state = fresh_state(cfg, ballast=ballast, is_standardised=is_standardised)
    if newest is not None:
        state.load(newest, load_all=put_all)
    if parallel.is_main:
        run.begin(cfg, {"fingerprint": "toy"})
    run.log.rewind_metrics(state.step)
    place = {"rank": parallel.rank, "world": parallel.world}
    validation = ToyValidation(cfg, **place) if cfg.data.validation_split else None
    return state, Loaders(ToyTrain(cfg, **place, **loader), validation), run


def train(
    cfg: RunConfig,
    path: Path,
    parallel: Parallel,
    *,
    task: ToyTask | None = None,
    is_strict: bool = False,
    **loader: Any,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Run to the end, or continue; the state and the lines of metrics.jsonl."""
    state, loaders, run = start(cfg, path, parallel, **loader)
    with run:
        fit(cfg, task or ToyTask(cfg.seed), state, loaders, parallel, run, is_strict=is_strict)
    return state, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Weights, average and moments by name, to compare bit by bit."""
    files = state.tensors(moments(state.optimizer, state.model))
    return {f"{file}/{name}": value for file, group in files.items() for name, value in group.items()}
