"""What many tests need: the real x-rays where they are there, and a small packed set of phantoms."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from tests import extras
from tests.faults.forge import Forge

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a parent like nohup hands on that it is ignored; runs honour that

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests whose extra is not installed are skipped by name."""
    for item in items:
        extras.skip_without(item)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: every run ends with a collection of garbage, which would walk through it all."""
    if len(session.items) > 50:
        importlib.import_module("torch._dynamo")  # which the first optimizer imports, and is half of what there is
        gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out for want of an extra, a line for each."""
    missing = extras.by_extra(terminalreporter.stats.get("skipped", []))
    if missing:
        terminalreporter.section("left out: extras that are not installed", sep="-")
        for names, tests in missing.items():
            terminalreporter.write_line(f"{names}: {' '.join(tests)}")
        wanted = ",".join(sorted({name for names in missing for name in names.split(", ")}))
        terminalreporter.write_line(f"to run them alone: make test-extras EXTRAS=dev,{wanted}")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A folder of real x-rays by name; the test is skipped, and says so, where it is absent."""
    root = Path(os.environ.get("LMK_DATA") or ROOT.parent / "shared" / "data")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no real x-rays {name} in {root}; set LMK_DATA")
        return root / name

    return folder


@pytest.fixture(scope="session")
def packed_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed skulls of 32 pixels: 12 for training, 4 for validation, 6 for testing. Do not write into it."""
    from ddpm_lmk.data.pack_settings import PackSettings
    from ddpm_lmk.data.shards.pack import pack

    out = tmp_path_factory.mktemp("phantoms") / "skulls"
    pack(
        "skull",
        out,
        PackSettings(kind="phantom", size=32, counts={"train": 12, "val": 4, "test": 6}, seed=7),
        workers=1,
    )
    return out


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """A process that has imported all that a run imports, and forks one at once."""
    with Forge() as forge:
        yield forge


@pytest.fixture(scope="session")
def pretraining(packed_phantoms: Path) -> Callable[..., RunConfig]:
    """Makes the run file of a tiny pre-training; sections given overlay its own."""

    def make(**sections: Any) -> RunConfig:
        train = {"length": 3, "group_size": 4, "log_every": 1, "checkpoint_every": 2, **sections.pop("train", {})}
        data = {"path": str(packed_phantoms), "image_size": 32, "workers": 0, **sections.pop("data", {})}
        task = {"kind": "denoise", "num_timesteps": 20}
        return RunConfig.model_validate({"data": data, "model": NETWORK, "task": task, "train": train, **sections})

    return make
