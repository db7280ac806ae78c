"""Without what only Linux has everything works, and the doctor says what is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from ddpm_lmk.system import limits, processes
from tests.cli.commands import SMOKE
from tests.faults.harness import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
LINUX_ONLY = re.compile(
    r"/proc\b|/sys/fs|\bprctl\b|sched_getaffinity|F_SETPIPE_SZ|setrlimit|unshare|waitid|cpu_count\("
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A path on which Python finds the removal of what only Linux has."""
    (tmp_path / "elsewhere").mkdir()
    source = Path(__file__).with_name("sitecustomize_elsewhere.py")
    (tmp_path / "elsewhere" / "sitecustomize.py").write_text(source.read_text())
    return os.pathsep.join([str(tmp_path / "elsewhere"), str(ROOT)])


@pytest.fixture
def elsewhere(path: str) -> Run:
    def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    return run


def test_only_the_package_system_calls_what_only_linux_has() -> None:
    package = ROOT / "ddpm_lmk"
    found = [
        f"{file.relative_to(package)}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        if file.parent.name != "system"
        for line in file.read_text().splitlines()
        if LINUX_ONLY.search(line)
    ]
    assert found == []


def test_packing_training_and_sweeping_work_and_the_doctor_says_what_is_missing(tmp_path: Path, elsewhere: Run) -> None:
    gone = "import os; os.sched_getaffinity(0)"
    assert "no attribute 'sched_getaffinity'" in elsewhere("-c", gone, code=1).stderr
    dice = np.random.default_rng(0)
    (tmp_path / "films").mkdir()
    for number in range(8):
        Image.fromarray(dice.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "films" / f"{number}.png")
    lmk = ("-m", "ddpm_lmk.cli")
    films, labelled = tmp_path / "pack", tmp_path / "labelled"
    said = elsewhere(*lmk, "shards", "pack", tmp_path / "films", "--kind", "folder", "--size", 32, "--out", films)
    assert "8 images (train 8), 0 refused" in said.stdout
    counts = ("--count", "train=2", "--count", "test=1")
    elsewhere(*lmk, "shards", "pack", "skull", "--kind", "phantom", "--size", 32, "--out", labelled, *counts)
    short = ("train.length=2 steps", "evaluate.samples=0")
    words = (SMOKE / "pretrain.yaml", f"data.path={films}", *short, "--cpu", 1, "--out", tmp_path / "run")
    elsewhere(*lmk, "pretrain", *words)
    assert (tmp_path / "run" / "results.json").is_file()
    sweep = {"run": str(SMOKE / "finetune.yaml"), "name": "s"}
    sweep |= {"grids": [{"shots": [1], "seeds": [0], "start": {"scratch": None}}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    words = (tmp_path / "sweep.yaml", f"data.path={labelled}", "train.length=2 steps", "--cpu", 1)
    elsewhere(*lmk, "sweep", *words, "--out", tmp_path / "sweep")
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 2
    findings = json.loads(elsewhere(*lmk, "doctor", "--json", "--out", tmp_path).stdout)
    missing = [finding["seen"] for finding in findings if finding["topic"] == "protection"]
    assert [text for text in missing if "no limit of memory for decoders" in text]
    assert [text for text in missing if "with the network in reach" in text]


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_train_there_too(tmp_path: Path, packed_phantoms: Path, elsewhere: Run) -> None:
    words = (SMOKE / "pretrain.yaml", f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", 2)
    elsewhere("-m", "ddpm_lmk.cli", "pretrain", *words, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hardware"]["processes"] == 2


CHILD = "import os, time; from ddpm_lmk.system.processes import die_with_parent\n"
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"


@pytest.mark.parametrize("is_linux", [True, False])
def test_a_process_without_its_parent_ends(path: str, is_linux: bool) -> None:
    """The parent is gone before the child asks, and after it has asked."""
    environment = os.environ | {"PYTHONPATH": str(ROOT) if is_linux else path}
    alone = subprocess.run([sys.executable, "-c", CHILD + "die_with_parent(1)"], env=environment, check=False)
    assert alone.returncode == processes.ORPHANED
    parent = PARENT.format(
        child=CHILD + "die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process.stdout as words:
        orphan = psutil.Process(int(words.readline()))
    process.kill()
    process.wait()
    psutil.wait_procs([orphan], timeout=60)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("has_waitid", [True, False])
def test_an_exit_code_is_told_and_the_child_left_to_its_owner(
    monkeypatch: pytest.MonkeyPatch, has_waitid: bool
) -> None:
    if not has_waitid:
        monkeypatch.delattr(os, "waitid", raising=False)
    for code, wanted in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM)):
        process = subprocess.Popen([sys.executable, "-c", code])
        while (found := processes.exit_code(process)) is None:
            time.sleep(0.01)
        assert (found, process.wait()) == (wanted, wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere some are")
def test_nothing_is_missing_on_linux() -> None:
    assert limits.absent() == []
