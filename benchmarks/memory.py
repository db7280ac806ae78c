"""Is the memory model right? Estimated and measured peaks of training, each in a process of its own.

    python benchmarks/memory.py [--device auto] [--out DIR]

The shapes differ in what fills the memory: maps or weights, 16 or 32 bits, some or all levels computed again, layers
that do not learn. A process trains a small network first, so that what PyTorch loads by itself does not count. On CUDA
it is the peak of what tensors hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

from _subject import CONFIGS, Subject, device_of, option_parser
from step import load_libraries, measure_memory, memory_of_training

from ddpm_lmk.bench import Result
from ddpm_lmk.system.console import say

PAPER = ("--model", "paper", "--size", "64", "model.width=32")
SMALL = ("--model", "small", "--size", "256", "--batch", "12")
TINY = ("--model", "tiny", "--size", "128", "--batch", "8")
TUNING = ("--run", str(CONFIGS / "finetune" / "isbi_cpu.yaml"), "--batch", "16")
AGAIN = "model.checkpointing=true"
CASES: dict[str, list[tuple[str, ...]]] = {
    "cpu": [
        (*PAPER, "--batch", "12", "--precision", "fp32"),
        (*PAPER, "--batch", "12", "--precision", "bf16"),
        (*PAPER, "--batch", "12", "--precision", "fp32", AGAIN),
        (*SMALL, "--precision", "fp32"),
        (*SMALL, "--precision", "fp32", AGAIN),
        (*SMALL, "--precision", "bf16"),
        (*TINY, "--precision", "bf16"),
        (*TINY, "--precision", "bf16", AGAIN),
        (*TUNING, "--precision", "bf16"),
    ],
    "cuda": [
        ("--model", "paper", "--size", "256", "--batch", "4"),
        ("--model", "paper", "--size", "256", "--batch", "32"),
        ("--model", "paper", "--size", "256", "--batch", "32", AGAIN),
        ("--model", "base", "--size", "256", "--batch", "32"),
        ("--model", "small", "--size", "256", "--batch", "32"),
    ],
}


def main() -> None:
    """Estimate, measure, and write the result file."""
    options = option_parser(__doc__).parse_intermixed_args()
    device = device_of(options)
    shown = [[word.removeprefix(f"{CONFIGS}/") for word in words] for words in CASES[device]]
    load_libraries(device, "bf16")
    result = Result("memory", settings={"cases": shown}, device=device)
    for words in CASES[device]:
        case = option_parser(None).parse_intermixed_args([*words, "--device", device])
        found = measure_memory(case) if device == "cuda" else in_a_child(case)
        result.add("training", conditions=conditions_of(case), figures=found)
        say(f"{' '.join(words)}: {found['estimate_over_measured']:.2f} of {found['peak_memory_gib']:.2f} GiB")
    say(f"wrote {result.write(Path(options.out), 'shapes')}")


def in_a_child(case: argparse.Namespace) -> dict[str, float]:
    """Measured in a copy of this process, which has everything loaded; a CUDA device has no such copies."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(memory_of_training(case)))
    child.start()
    found: dict[str, float] = here.recv()
    child.join()
    return found


def conditions_of(case: argparse.Namespace) -> dict[str, object]:
    """What the memory depends on."""
    subject = Subject(case)
    again = getattr(subject.cfg.model, "checkpointing", False)
    return {"name": subject.label, "checkpointing": again, **subject.conditions()}


if __name__ == "__main__":
    main()
