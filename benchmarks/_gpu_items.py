"""What `gpu_queue.sh` runs, in order of worth: at full size on a GPU, or at toy size to see that the queue works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        commands: one after the other, until one fails.
        limit_s: seconds for all of them.
        modules: Python modules without which it is skipped.
        pack: a carried set of packed x-rays without which it is skipped.
        goes_on: it takes up what the call before left unfinished; others begin only with half of their limit left.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: int
    modules: tuple[str, ...] = ()
    pack: str | None = None
    goes_on: bool = False


def items(*, results: Path, packs: Path, runs: Path, is_smoke: bool) -> Iterator[Item]:
    """The queue."""
    device = ("--device", "cpu" if is_smoke else "cuda")
    smoke = str(REPO / "configs" / "smoke" / "pretrain.yaml")
    phantoms = f"data.path={packs / 'phantoms'}"

    def lmk(*words: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "ddpm_lmk.cli", *words)

    def bench(name: str, *words: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / f"{name}.py"), "--out", str(results), *words)

    def step(preset: str, *words: str) -> tuple[str, ...]:
        if is_smoke:
            return bench("step", *device, "--run", smoke, "--rounds", "6", "--budget-s", "1", *words)
        return bench("step", *device, "--model", preset, "--size", "256", "--batch", "32", "--halve", *words)

    def tests(*words: str) -> tuple[str, ...]:
        ours = ("-p", "no:cacheprovider", "-o", "minversion=0", "-W", "default", "-q", "--rootdir", str(REPO))
        return (sys.executable, "-m", "pytest", *ours, *words)

    def peers(group: str, width: int, *words: str) -> tuple[str, ...]:
        if is_smoke:
            toy = ("--width", "16", "--multipliers", "1", "--size", "16", "--batch", "2", "--rounds", "6")
            return bench("peers", *device, "--groups", group, *toy, *words[:2], "--micro-batches", "2")
        real = ("--width", str(width), "--multipliers", "1", "2", "4", "8", "--size", "256", "--batch", "4")
        return bench("peers", *device, "--groups", group, *real, *words)

    yield Item("doctor", (lmk("doctor"),), 60)
    gpu, norm = str(REPO / "tests" / "gpu"), str(REPO / "tests" / "models" / "test_group_norm.py")
    yield Item("correctness", (tests("-m", "not slow", gpu, *([] if is_smoke else [norm])),), 240, ("pytest",))
    yield Item("device", (bench("device", *device, *(("--run", smoke, "--rounds", "6") if is_smoke else ())),), 90)
    yield Item("step-paper", (step("paper"),), 150)
    yield Item("step-base", (step("base"),), 90)
    for width in (64, 96, 128, 256):
        yield Item(f"step-width-{width}", (step("paper", f"model.width={width // 8 if is_smoke else width}"),), 90)
    small = ("--run", smoke, "--rounds", "6") if is_smoke else ("--model", "small", "--size", "256", "--batch", "8")
    yield Item("switches", (bench("switches", *device, *small),), 240)
    # Every network is started three times, and takes about ten seconds each time; so one memory layout an item.
    lasting = ("--layouts", "channels-last", "--precision", "bf16")
    yield Item("peers", (peers("width", 128, *lasting, "--rounds", "12"),), 280)
    yield Item("papers-way", (peers("way", 256, *lasting, "--rounds", "6", "--save"),), 320)
    yield Item("peers-matched", (peers("matched", 128, *lasting, "--rounds", "12"),), 240)
    yield Item("memory", (step("paper", "model.checkpointing=true"),), 120)
    seconds = "0.2" if is_smoke else "2"
    loader = bench("loader", *device, "--data", str(packs / "phantoms"), "--seconds", seconds)
    yield Item("loader", (loader,), 150)
    dali = tests(str(REPO / "tests" / "gpu" / "test_loading.py"), *([] if is_smoke else [str(REPO / "tests/parity")]))
    yield Item("dali", (dali,), 120, ("pytest", "nvidia.dali"))
    training = ("--run", smoke, "--rounds", "6") if is_smoke else ("--model", "base", "--size", "256")
    yield Item("train", (bench("train", *device, *training, phantoms),), 120)
    yield Item("compiled", (tests("-m", "slow", gpu),), 200, ("pytest",))
    nchw = ("--layouts", "nchw", "--precision", "bf16")
    yield Item("peers-nchw", (peers("width", 128, *nchw, "--rounds", "12"),), 240)
    yield _films(packs, runs, lmk("pretrain"), lmk("sweep"), is_smoke=is_smoke)


def _films(packs: Path, runs: Path, pretrain: tuple[str, ...], sweep: tuple[str, ...], *, is_smoke: bool) -> Item:
    """Pre-training, and a sweep from it and from scratch; real films at 256 pixels.

    Longer than a call may be: both go on where they were cut off.
    """
    configs, pack = REPO / "configs", "phantoms" if is_smoke else "isbi256"
    data, one = f"data.path={packs / pack}", ("--cpu", "1") if is_smoke else ("--gpus", "1")
    more: tuple[str, ...] = ()
    if is_smoke:
        files, lengths = (configs / "smoke" / "pretrain.yaml", configs / "smoke" / "sweep.yaml"), ("2", "1")
    else:
        files = (configs / "pretrain" / "base.yaml", configs / "sweep" / "base.yaml")
        lengths, more = ("600", "60"), (f"start.pretrained={runs / 'pretrain'}",)
    first = (
        *pretrain,
        str(files[0]),
        "--out",
        str(runs / "pretrain"),
        *one,
        data,
        f"train.duration={lengths[0]} steps",
        "runtime.checkpoint_every=100 steps",
    )
    then = (
        *sweep,
        str(files[1]),
        "--out",
        str(runs / "sweep"),
        *one,
        data,
        f"train.duration={lengths[1]} steps",
        *more,
    )
    return Item("films", (first, then), 900, pack=pack, goes_on=True)
