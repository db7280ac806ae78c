"""What a benchmark measures: the network of a preset or of a run file, with its task, state and a batch on a device.

Pixels are random and already on the device. Everything else is what a run uses: the model as a session builds, places
and compiles it, the optimizer, the average and the updater of the engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lmk.bench import Budget
from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash, load_run, load_yaml
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.engine.device_fit import choose_precision
from ddpm_lmk.engine.forecast import random_batch
from ddpm_lmk.engine.loop import build_updater
from ddpm_lmk.engine.parallel import Parallel, Precision
from ddpm_lmk.engine.session import Session
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import LaunchError, LmkError
from ddpm_lmk.models import ModelCost
from ddpm_lmk.system.shipped import find
from ddpm_lmk.tasks import build_task

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
RESULTS = Path(__file__).resolve().parent / "results"


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """The words that benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help="settings that win over the file")
    parser.add_argument("--run", type=find, metavar="RUN.yaml", help="measure the network of this run file")
    parser.add_argument("--model", choices=PRESETS, help="measure a preset (default: tiny on a CPU, base on a GPU)")
    parser.add_argument("--size", type=int, help="image side, pixels (default: the run file's, else 128 or 256)")
    parser.add_argument("--batch", type=int, help="images at once (default: the run file's share, else 8 or 32)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: the run file's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds of each thing")
    add_budget(parser, 120.0)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the result file")
    return parser


def add_budget(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The words for how long a benchmark may take; `seconds` where nobody says."""
    parser.add_argument("--budget-s", type=float, default=seconds, help="seconds this may take")
    # of `ddpm-lmk bench`, so that starting and importing count too; a moment of time.monotonic
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)


def budget_of(options: argparse.Namespace) -> Budget:
    """The time that the command line gives, from now."""
    return Budget(options.budget_s, until=options.until)


def carried_out(main: Callable[[], None]) -> None:
    """Run a benchmark; what a user can mend ends it with one line and its exit code, as `ddpm-lmk` does."""
    try:
        main()
    except LmkError as error:
        sys.stderr.write(f"error[{type(error).__name__}]: {error}\n")
        sys.exit(error.exit_code)


def command_words(options: argparse.Namespace) -> list[str]:
    """The command line that says the same to another process, but for `--out` and its time."""
    names = ("run", "model", "size", "batch", "precision", "device", "rounds")
    given = {f"--{name}": getattr(options, name) for name in names}
    return [*options.settings, *(str(part) for pair in given.items() if pair[1] is not None for part in pair)]


def device_of(options: argparse.Namespace) -> str:
    """The device asked for, or the best there is; raises `LaunchError` where that is not here."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise LaunchError("--device cuda, but no CUDA device is visible; use --device cpu, or see `ddpm-lmk doctor`")
    if options.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return str(options.device)


def run_config(options: argparse.Namespace) -> RunConfig:
    """The run file, or one around the preset, with what the command line says."""
    named = {
        "data.image_size": options.size,
        "train.precision": options.precision,
        "train.global_batch_size": options.batch,
    }
    words = [f"{key}={value}" for key, value in named.items() if value is not None]
    words += ["train.micro_batch=null"] if options.batch is not None else []
    if options.run is not None:
        has_data = any(word.startswith("data.path=") for word in options.settings)
        return load_run(options.run, [*([] if has_data else ["data.path=."]), *options.settings, *words])
    is_cuda = device_of(options) == "cuda"
    preset = options.model or ("base" if is_cuda else "tiny")
    run: dict[str, Any] = {"name": preset, "data": {"path": "."}, "task": {"kind": "denoise"}}
    run |= {"train": {"global_batch_size": 32 if is_cuda else 8}, **load_yaml(CONFIGS / "model" / f"{preset}.yaml")}
    run["data"] |= {} if is_cuda else {"image_size": 128}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{preset}.yaml"
        file.write_text(json.dumps(run))  # JSON is YAML
        return load_run(file, [*words, *options.settings])


class Subject:
    """One network ready to train.

    Attributes:
        label: short name for files and tables.
        precision: that of the products, "auto" resolved.
    """

    def __init__(self, options: argparse.Namespace, *, cfg: RunConfig | None = None) -> None:
        self.cfg = cfg or run_config(options)
        self.label = self.cfg.name
        self.device = device_of(options)
        self.parallel = Parallel("cuda" if self.device == "cuda" else "cpu")
        self.parallel.auto_precision = self.precision
        self.task = build_task(self.cfg, spec_of(self.cfg))
        self.batch_images = (
            (self.cfg.train.given_micro_batch or self.cfg.train.global_batch_size)
            if options.batch is None
            else options.batch
        )
        model = Session().model(self.cfg, self.task, self.parallel.device)
        self.state = TrainState.fresh(self.cfg, model)
        self.model = model.train()
        self.updater = build_updater(self.cfg, self.state, self.parallel)
        self.batch = self.random_batch(seed=0)

    @property
    def precision(self) -> Precision:
        return choose_precision(self.cfg, self.device).name

    @property
    def cost(self) -> ModelCost:
        """Counts for one image."""
        return self.task.cost(self.cfg.model, self.cfg.data.image_size)

    def conditions(self) -> dict[str, Any]:
        """What a time of this network depends on, besides the machine."""
        return {
            "network": f"{self.cfg.model.kind} {config_hash(self.cfg.model)[:8]}",
            "task": self.cfg.task.kind,
            "image_size_px": self.cfg.data.image_size,
            "batch_images": self.batch_images,
            "precision": self.precision,
            "compile": self.cfg.train.compile,
            "threads": torch.get_num_threads(),
        }

    def random_batch(self, *, seed: int) -> Batch:
        """Random pixels, and random points where the task wants some."""
        batch = random_batch(self.cfg, self.task, self.batch_images, seed=seed)
        return batch.to(self.parallel.device)

    def loss(self) -> Tensor:
        """The summed loss of the batch, through the module the engine trains."""
        with self.parallel.autocast(self.cfg.train.precision):
            return self.task.loss(self.updater.net, self.batch).float().sum()

    def forward(self) -> None:
        """Loss without a graph."""
        with torch.no_grad():
            self.loss()

    def forward_backward(self) -> None:
        """Loss and gradient, which stays."""
        self.updater.clear()
        with self.updater.micro_batch(0, of=1):
            self.updater.add(self.loss(), self.batch_images)

    def update(self) -> None:
        """Reduce, clip, move the weights and their average, with the gradient that is there."""
        self.state.step += 1
        self.updater.finish(0.0)
        self.updater.apply(self.cfg.optim.clip)
        self.state.ema.update(self.state.step)

    def step(self) -> None:
        """A whole optimizer step of one micro-batch."""
        self.forward_backward()
        self.update()


def spec_of(cfg: RunConfig) -> DatasetSpec:
    """Facts of the run's data where it is there; else of some set, whose number of landmarks is used."""
    for path in cfg.data.path:
        if (Path(path) / "manifest.json").is_file():
            return Manifest.open(path).spec
    return next(spec for spec in SPECS.values() if spec.num_landmarks)
