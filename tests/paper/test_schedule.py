"""Windows, passes and gradients of the released loops (docs/method.md, sections 2 and 3)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.engine.loop import fit
from ddpm_lmk.engine.parallel import Parallel
from tests.cli.commands import CONFIGS
from tests.engine.toy import ToyTask, ToyTrain, config, fresh_state, start

PAPER = CONFIGS / "paper"


def plan(run_file: str, num_images: int, *, drop_last: bool) -> tuple[BatchPlan, int]:
    """Groups of a run file on so many images, and the steps of its length."""
    train = load_run(PAPER / run_file, ["data.path=shards"]).train
    groups = BatchPlan(
        num_images, train.global_batch_size, train.micro_batch, train.epoch_boundary, drop_last=drop_last
    )
    return groups, train.duration.steps(train.global_batch_size, num_images, groups.steps_per_epoch)


@pytest.mark.parametrize(
    ("name", "images", "per_epoch", "last", "passes"),
    [("chest", 229, 8, 4, 171_000), ("cephalometric", 150, 5, 20, 236_800), ("hand", 609, 19, 32, 256_000)],
)
def test_image_passes_of_the_run_files(name: str, images: int, per_epoch: int, last: int, passes: int) -> None:
    """docs/method.md, section 2: steps per epoch, images of the last window, image passes."""
    groups, steps = plan(f"pretrain_{name}.yaml", images, drop_last=True)
    assert groups.steps_per_epoch == per_epoch
    assert groups.size(per_epoch - 1) == last
    assert sum(groups.size(step) for step in range(steps)) == passes
    assert groups.images(steps) == passes, "what --dry-run says"


@pytest.mark.parametrize(
    ("shots", "per_epoch", "most"), [(1, 1, 200), (5, 1, 200), (10, 1, 200), (25, 2, 400), (50, 4, 800)]
)
def test_steps_per_epoch_of_few_shots(shots: int, per_epoch: int, most: int) -> None:
    """docs/method.md, section 3, Optimisation."""
    groups, steps = plan("finetune_chest.yaml", shots, drop_last=False)
    assert (groups.steps_per_epoch, steps) == (per_epoch, most)
    assert sum(groups.size(step) for step in range(per_epoch)) == shots


@pytest.mark.parametrize(
    ("gradient", "limit"), [("sum", 0.02), ("nominal", None)], ids=["pre-training (2)", "fine-tuning (3)"]
)
def test_accumulation_is_the_released_loops(tmp_path: Path, gradient: str, limit: float | None) -> None:
    """Seven images, micro-batches of 2, groups of 4: the last window has one full and one short micro-batch.

    The reference is the released loop in plain PyTorch: mean loss of a micro-batch, backward (of the loss over the
    number of micro-batches in fine-tuning, before that division in pre-training), a step at full windows and at the
    end of the epoch, `clip_grad_value_` on what has gathered.
    """
    sections: dict[str, Any] = {
        "optim": {"kind": "sgd", "lr": 0.1, "clip": None if limit is None else {"kind": "value", "limit": limit}},
        "train": {
            "duration": 4,
            "global_batch_size": 4,
            "micro_batch": 2,
            "epoch_boundary": "epoch",
            "gradient": gradient,
        },
    }
    sections["train"] |= {"ema": None, "spikes": None}
    cfg = config(**sections)
    parallel = Parallel("cpu")
    state, loaders, run = start(cfg, tmp_path / "run", parallel, num_images=7)
    model = copy.deepcopy(fresh_state(cfg).model)
    with run:
        fit(cfg, ToyTask(cfg.seed), state, loaders, parallel, run)

    task, stream = ToyTask(cfg.seed), ToyTrain(cfg, num_images=7).global_batches(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        sizes = []
        for batch in next(stream).micro_batches:
            real = int(batch.weight.sum())
            sizes.append(real)
            loss = task.loss(model, batch)[:real].mean()
            (loss / 2 if gradient == "nominal" else loss).backward()
        if limit is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    assert sizes == [2, 1]
    for found, wanted in zip(state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
