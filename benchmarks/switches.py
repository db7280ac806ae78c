"""What each switch of the training step gains or costs, in turn with the step that has none of them.

    python benchmarks/switches.py [--model PRESET] [--size S] [--batch B] [--rounds N] [--eager] [--out DIR]

A step is four micro-batches of random images and an update of AdamW and the average. The plain step standardises in
every pass, computes norms with PyTorch's operations in fp32, and recomputes nothing. Beside the time stands what a
micro-batch keeps between its forward and backward pass; parameters and what stays between micro-batches aside.
On CUDA the compiler and CUDA graphs follow, in steps of one micro-batch, since graphs cannot add gradients up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _subject import Subject, budget_of, carried_out, option_parser, run_config
from torch import Tensor

from ddpm_lmk.bench import Result, compare_paired
from ddpm_lmk.system.console import progress

MICRO_BATCHES = 4
WARM_UP = 3  # a graph is recorded in the second pass, and replayed from the third on
PLAIN = "plain"
TRAIN: dict[str, Any] = {"weight_standardization": "pass", "group_norm": "native", "precision": "fp32"}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "train.weight_standardization=step": {"weight_standardization": "step"},
    "train.group_norm=fused": {"group_norm": "fused"},
    "train.precision=bf16": {"precision": "bf16"},
    "all three": {"weight_standardization": "step", "group_norm": "fused", "precision": "bf16"},
    "model.checkpointing=[true, false, ...]": {"checkpointing": "first"},
    "model.checkpointing=true": {"checkpointing": True},
}
FAST: dict[str, Any] = {"weight_standardization": "step", "precision": "bf16"}
LAUNCHES: dict[str, dict[str, Any]] = {
    "one micro-batch": {**FAST, "group_norm": "fused"},
    "train.compile=true": {**FAST, "compile": True},
    "train.cuda_graphs=true": {**FAST, "compile": True, "cuda_graphs": True},
}


def main() -> None:
    """Measure and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--eager", action="store_true", help="on CUDA without the compiler, which takes minutes")
    options = parser.parse_intermixed_args()
    budget = budget_of(options)
    first = variant(options, {})
    result = Result("switches", settings=first.cfg.model_dump(mode="json"), device=first.device, budget=budget)
    has_launches = first.device == "cuda" and not options.eager
    eager = partial(measure, result, options, VARIANTS, micro_batches=MICRO_BATCHES)
    budget.run("switches", eager, parts=2 if has_launches else 1)
    if has_launches:
        budget.run("launches", partial(measure, result, options, LAUNCHES, micro_batches=1))
    print(f"wrote {result.write(Path(options.out), first.label)}")


def measure(result: Result, options: Any, variants: dict[str, dict[str, Any]], *, micro_batches: int) -> None:
    """A step with each of these, in turn; the first is what the others are compared with."""
    subjects = {name: variant(options, fields) for name, fields in variants.items()}
    plain, *others = subjects
    calls = {name: stepper(subject, micro_batches) for name, subject in subjects.items()}
    with progress("bench switches", lines=False) as tell:
        device = subjects[plain].device
        settings = {"rounds": options.rounds, "warm_up": WARM_UP, "device": device}
        found = result.budget.alternate(calls, needs_all=False, tell=tell, **settings)
    for name, subject in ((name, subjects[name]) for name in found):
        conditions = {"switch": name, "micro_batches": micro_batches, **subject.conditions()}
        kept = {} if subject.cfg.train.compile else {"kept_mib": kept_mib(subject)}
        result.add("train step", found[name], conditions=conditions, figures=kept)
    for name in (name for name in others if name in found):
        ratio = compare_paired(found[name].busy_s, found[plain].busy_s)
        result.ratios.append({"what": f"{name} over {plain}", "clock": "busy_s", **ratio.facts()})
        print(f"{name}: {ratio}")


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


def stepper(subject: Subject, micro_batches: int) -> Callable[[], object]:
    """One optimizer step over so many times the batch."""

    def step() -> None:
        subject.updater.clear()
        for number in range(micro_batches):
            with subject.updater.micro_batch(number, of=micro_batches):
                subject.updater.add(subject.loss(), micro_batches * subject.batch_images)
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
    carried_out(main)
