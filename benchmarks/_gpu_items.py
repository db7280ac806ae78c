"""What `gpu_queue.sh` runs: three calls in order of worth, at full size on an H200, or at toy size on a CPU.

Seconds are estimates: operations of `models/cost.py` at half of the 790 TFLOP/s that a large matrix product reached on
such a GPU (a step of `paper` with 32 images is 310 TFLOP: 0.8 s; one of `base` 11 TFLOP: 0.03 s), 10 s to import torch,
once a call, 3 s for CUDA's libraries in every process, 8 s to make the 559 M weights of `paper`, and 60 to 120 s to
compile a network with 16 cores.

Left out, with what it would cost: steps of the widths between `base` and `paper` (4 x 40 s; the two bracket them),
`bench loader` (100 s; `train-torch` and `train-dali` say what a run waits), the released loop with its two files a step
(90 s of writing 9 GB, which a disk decides), compiled and graphed steps of `switches` (2 x 90 s; `step-base-compiled`
is the one that matters), peers of equal width (40 s; those of equal operations are the fair ones), a long pre-training
and a sweep on real x-rays (minutes, for an error that CPUs gave already).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        call: the call that has it on its list: 1, 2 or 3.
        words: what follows `python3` on its command line.
        about_s: seconds it takes on an H200, estimated; without so much time left it does not begin.
        limit_s: seconds after which it is ended.
        why: where the estimate is from.
        modules: Python modules without which it is skipped.
        makes: what later items read; where that is gone (another machine), the item is done again before them.
        needs: items whose product it reads.
        fills: a folder that is removed before, since an item that was ended may have left half of it.
    """

    name: str
    call: int
    words: tuple[str, ...]
    about_s: int
    limit_s: int
    why: str
    modules: tuple[str, ...] = ()
    makes: Path | None = None
    needs: tuple[str, ...] = ()
    fills: Path | None = None

    @property
    def is_benchmark(self) -> bool:
        """Does it take `--until`, and write a result file?"""
        return Path(self.words[0]).parent == HERE


def items(*, results: Path, packs: Path, runs: Path, is_smoke: bool) -> Iterator[Item]:
    """The queue, in order."""
    device = ("--device", "cpu" if is_smoke else "cuda")
    smoke = str(REPO / "configs" / "smoke" / "pretrain.yaml")
    one = ("--cpu", "1") if is_smoke else ("--gpus", "1")

    def lmk(*words: str) -> tuple[str, ...]:
        return ("-m", "ddpm_lmk.cli", *words)

    def bench(name: str, *words: str) -> tuple[str, ...]:
        return (str(HERE / f"{name}.py"), "--out", str(results), *device, *words)

    def step(preset: str, sustained_s: int, *words: str) -> tuple[str, ...]:
        if is_smoke:
            return bench("step", "--run", smoke, "--rounds", "6", "--sustained-s", "1", *words)
        size = ("--model", preset, "--size", "256", "--batch", "32", "--precision", "bf16", "--halve")
        return bench("step", *size, "--rounds", "6", "--sustained-s", str(sustained_s), *words)

    def tests(*words: str) -> tuple[str, ...]:
        ours = ("-p", "no:cacheprovider", "-o", "minversion=0", "-o", "faulthandler_timeout=60", "-W", "default", "-v")
        return ("-m", "pytest", *ours, "--rootdir", str(REPO), *words)

    def phantoms(name: str, size: int, count: int, *words: str) -> tuple[str, ...]:
        size, count = (32, 12) if is_smoke else (size, count)
        counts = ("--count", f"train={count}", "--count", "val=4", "--count", "test=8")
        where = ("--size", str(size), "--workers", "1" if is_smoke else "16", "--out", str(packs / name))
        return lmk("shards", "pack", "skull", "--kind", "phantom", *counts, *where, *words)

    def run(command: str, *words: str) -> tuple[str, ...]:
        """A run as its run file is, on phantoms, with a few steps."""
        file = REPO / "configs" / ("smoke" if is_smoke else command) / (f"{command}.yaml" if is_smoke else "base.yaml")
        return lmk(command, str(file), "--out", str(runs / command), *one, f"data.path={packs / 'fine'}", *words)

    def peers(*words: str) -> tuple[str, ...]:
        toy = ("--width", "16", "--multipliers", "1", "--size", "16", "--batch", "2", "--rounds", "6")
        real = ("--multipliers", "1", "2", "4", "8", "--size", "256", "--batch", "4", "--precision", "bf16")
        return bench("peers", *words, *(toy if is_smoke else real))

    def train(loader: str) -> tuple[str, ...]:
        network = (
            ("--run", smoke, "--steps", "9") if is_smoke else ("--model", "base", "--size", "256", "--steps", "60")
        )
        fed = (f"data.path={packs / 'jpeg'}", "runtime.cache_pixels=stream", f"runtime.loader={loader}")
        return bench("train", *network, *fed)

    # Call 1: is it right?
    yield Item("doctor", 1, lmk("doctor"), 5, 60, "what is there; 10 s of imports come on top, once a call")
    fine = packs / "fine"
    yield Item(
        "phantoms",
        1,
        phantoms("fine", 1024, 64),
        8,
        60,
        "76 of 1024 px, 0.15 s of a core each, 16 processes to start",
        makes=fine / "manifest.json",
        fills=fine,
    )
    beside = ("-n", "6", "--dist", "worksteal") if find_spec("xdist") and not is_smoke else ()
    yield Item(
        "correctness",
        1,
        tests(*beside, *(("-m", "not slow") if is_smoke else ()), str(REPO / "tests" / "gpu")),
        90,
        130,
        "6 processes side by side; the longest compiles two small networks, twice 35 s",
        ("pytest",),
    )
    short = "2" if is_smoke else "40"
    yield Item(
        "pretrain",
        1,
        run("pretrain", f"train.duration={short} steps", "runtime.checkpoint_every=20 steps", "train.compile=false"),
        30,
        70,
        "a launcher and a rank, 20 s to begin; 40 steps of 0.05 s; two checkpoints of 1.3 GB",
        makes=runs / "pretrain" / "run.json",
        needs=("phantoms",),
        fills=runs / "pretrain",
    )
    onward = () if is_smoke else (f"init.weights={runs / 'pretrain'}",)
    yield Item(
        "finetune",
        1,
        run("finetune", f"train.duration={short} steps", "train.compile=false", *onward),
        30,
        70,
        "20 s to begin; 40 steps at 256 px and 40 of the second look, 0.05 s each; 8 images scored",
        needs=("phantoms", "pretrain"),
        fills=runs / "finetune",
    )
    small = ("--run", smoke) if is_smoke else ("--model", "base", "--size", "256", "--batch", "8")
    yield Item(
        "switches",
        1,
        bench("switches", *small, "--rounds", "6", "--eager"),
        30,
        60,
        "7 networks of 80 M weights, 1.5 s each to make; 9 rounds of 7 steps, 0.15 s each",
    )

    # Call 2: how fast is a step?
    rounds = ("--run", smoke) if is_smoke else ("--model", "base", "--size", "256", "--batch", "32")
    yield Item(
        "device",
        2,
        bench("device", *rounds, "--precision", "auto" if is_smoke else "bf16", "--rounds", "6"),
        15,
        40,
        "40 calls of a few ms, 8 times; cuDNN looks for algorithms",
    )
    yield Item(
        "step-paper",
        2,
        step("paper", 25),
        65,
        100,
        "8 s of weights, 25 s at it, 8 rounds of 2.1 s (forward 0.27, with backward 0.8, step 0.85, peaks), levels 7 s",
    )
    yield Item(
        "step-base", 2, step("base", 15), 30, 50, "2 s of weights, 15 s at it, 8 rounds of 0.2 s, levels 2 s, libraries"
    )
    yield Item(
        "peers",
        2,
        peers("--groups", "matched", *(() if is_smoke else ("--width", "128", "--rounds", "9"))),
        40,
        80,
        "counting and matching 15 s, 7 processes start at once in 15 s, 11 rounds of 0.4 s",
    )
    yield Item(
        "papers-way",
        2,
        peers(
            "--groups",
            "way",
            "--micro-batches",
            "2" if is_smoke else "4",
            *(() if is_smoke else ("--width", "256", "--rounds", "6")),
        ),
        35,
        60,
        "2 processes of 559 M weights, 20 s; 8 rounds of 16 images: ours 0.4 s, the released loop 1.3 s",
    )

    # Call 3: how fast is a run, and with what memory?
    yield Item(
        "jpeg",
        3,
        phantoms("jpeg", 256, 256, "--encoding", "jpeg"),
        8,
        40,
        "268 of 256 px, 0.05 s of a core each; 16 processes to start",
        makes=packs / "jpeg" / "manifest.json",
        fills=packs / "jpeg",
    )
    yield Item(
        "train-torch",
        3,
        train("torch"),
        20,
        60,
        "the run and both loops that take turns, 63 steps of 0.04 s each; two networks of 80 M weights",
        needs=("jpeg",),
    )
    parity = () if is_smoke else (str(REPO / "tests" / "parity"),)
    yield Item(
        "dali",
        3,
        tests(str(REPO / "tests" / "gpu" / "test_loading.py"), *parity),
        20,
        60,
        "3 packs of 12 images on the GPU, nvJPEG among them, and what needs no GPU; 5 s to import DALI",
        ("pytest", "nvidia.dali"),
    )
    yield Item(
        "train-dali",
        3,
        train("dali"),
        25,
        60,
        "as train-torch, and 5 s to import DALI",
        ("nvidia.dali",),
        needs=("jpeg",),
    )
    alone = ("--only-sustained",)
    compiled = () if is_smoke else ("train.compile=true",)
    yield Item(
        "step-base-compiled", 3, step("base", 15, *alone, *compiled), 100, 130, "60 to 90 s to compile, 15 s at it"
    )
    yield Item(
        "memory",
        3,
        step("paper", 5, *alone, "model.checkpointing=true"),
        25,
        50,
        "8 s of weights, 3 steps and 5 s of 1.1 s each: the most that is held beside the estimate",
    )
