"""What each switch of the training step gains or costs, in turn with the step that has none of them.

    python benchmarks/switches.py [--model PRESET] [--size S] [--batch B] [--rounds N] [--out DIR]

A step is four micro-batches of random images and an update of AdamW and the average. The plain step standardises in
every pass, computes norms with PyTorch's operations in fp32, and recomputes nothing. Beside the time stands what a
micro-batch keeps between its forward and backward pass; parameters and what stays between micro-batches aside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _subject import Subject, option_parser, run_config
from torch import Tensor

from ddpm_lmk.console import progress
from ddpm_lmk.measure import Result, alternate, compare_paired

MICRO_BATCHES = 4
PLAIN = "plain"
TRAIN: dict[str, Any] = {"standardise": "pass", "group_norm": "native", "precision": "fp32"}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "train.standardise=step": {"standardise": "step"},
    "train.group_norm=fused": {"group_norm": "fused"},
    "train.precision=bf16": {"precision": "bf16"},
    "all three": {"standardise": "step", "group_norm": "fused", "precision": "bf16"},
    "model.checkpointing=[true, false, ...]": {"checkpointing": "first"},
    "model.checkpointing=true": {"checkpointing": True},
}


def main() -> None:
    """Measure and write the result file."""
    options = option_parser(__doc__).parse_intermixed_args()
    subjects = {name: variant(options, fields) for name, fields in VARIANTS.items()}
    first = subjects[PLAIN]
    result = Result("switches", settings=first.cfg.model_dump(mode="json"), device=first.device)
    calls: dict[str, Callable[[], object]] = {name: stepper(subject) for name, subject in subjects.items()}
    with progress("bench switches", lines=False) as tell:
        found = alternate(calls, rounds=options.rounds, warm_up=1, device=first.device, tell=tell)
    for name, subject in subjects.items():
        conditions = {"switch": name, "micro_batches": MICRO_BATCHES, **subject.conditions()}
        result.add("train step", found[name], conditions=conditions, figures={"kept_mib": kept_mib(subject)})
        if name != PLAIN:
            ratio = compare_paired(found[name].busy_s, found[PLAIN].busy_s)
            result.ratios.append({"what": f"{name} over plain", "clock": "busy_s", **ratio.facts()})
            print(f"{name}: {ratio}")
    print(f"wrote {result.write(Path(options.out), first.label)}")


def variant(options: Any, fields: dict[str, Any]) -> Subject:
    """The network of the options with some switches set."""
    cfg = run_config(options)
    again = fields.get("checkpointing", False)
    if again == "first":
        levels = len(cfg.model.multipliers)  # type: ignore[union-attr]
        again = tuple(level == 0 for level in range(levels))
    train = {**TRAIN, **{key: value for key, value in fields.items() if key != "checkpointing"}}
    cfg = cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update={"checkpointing": again}),
            "train": cfg.train.model_copy(update=train),
        }
    )
    return Subject(options, cfg=cfg)


def stepper(subject: Subject) -> Callable[[], None]:
    """One optimizer step over `MICRO_BATCHES` times the batch."""

    def step() -> None:
        subject.updater.clear()
        for number in range(MICRO_BATCHES):
            with subject.updater.micro_batch(number, of=MICRO_BATCHES):
                subject.updater.add(subject.loss(), MICRO_BATCHES * subject.batch_images)
        subject.updater.finish(0.0)
        subject.updater.apply(None)
        subject.state.ema.update(1)

    return step


def kept_mib(subject: Subject) -> float:
    """What autograd keeps of one micro-batch, parameters aside; each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in subject.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    subject.updater.clear()
    with subject.updater.micro_batch(0, of=1), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.loss()
    subject.updater.close()
    return round(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20, 1)


if __name__ == "__main__":
    main()
