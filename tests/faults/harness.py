"""A run started as a user starts it, as a tree of processes that can be hurt and watched."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke"
STARTED: list[Started] = []  # by this process; the tests look after those that still run


class Started:
    """`ddpm-lmk pretrain` in a process group of its own.

    Args:
        words: command line after `pretrain`.
        out: the run directory.
        launch: content of a launch file; None: none.
        prefix: words before the command, of a program that runs it.
    """

    def __init__(
        self,
        words: Sequence[object],
        out: Path,
        *,
        launch: dict[str, Any] | None = None,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.out = out
        self.tree: list[psutil.Process] = []
        self.said = out.with_name(f"{out.name}-said-{time.monotonic_ns()}.txt")
        if launch is not None:
            file = self.said.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(launch))
            words = [*words, "--launch", file]
        command = [*prefix, sys.executable, "-m", "ddpm_lmk.cli", "pretrain", *map(str, words), "--out", str(out)]
        with self.said.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=out.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
                start_new_session=True,
            )
        STARTED.append(self)

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks that have set themselves up, by process number."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        found = [child for child in children if _is_rank(child)]
        return sorted(found, key=lambda child: child.pid)

    def wait(self, timeout: float = 240) -> int:
        """Its exit code; a tree that does not end in time is killed and the test fails."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"still running after {timeout} s:\n{self.said.read_text()}") from None

    def kill_everything(self) -> None:
        """End the tree, whatever state it is in."""
        tree = [self.process.pid, *(rank.pid for rank in self.ranks())]
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)

    def until(self, condition: Callable[[], Any], *, timeout: float = 120) -> None:
        """Wait for something to become true."""
        began = time.monotonic()
        while not condition():
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.said.read_text()}")
            if time.monotonic() - began > timeout:
                self.kill_everything()
                raise AssertionError(f"nothing happened within {timeout} s:\n{self.said.read_text()}")
            time.sleep(0.02)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "ddpm_lmk.launcher.rank" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def events(out: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Events of a run, in order; only those of one name."""
    path = out / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if name in (None, line["event"])]


def steps_done(out: Path) -> int:
    """The last step in metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def newest_checkpoint(out: Path) -> Path | None:
    """The directory of the newest checkpoint."""
    return max((out / "checkpoints").glob("step-*"), default=None)


def digests(out: Path) -> dict[str, str]:
    """sha256 of weights, average and optimizer state in the newest checkpoint."""
    newest = newest_checkpoint(out)
    assert newest is not None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.glob("*.safetensors"))}


def are_gone(pids: Sequence[int]) -> bool:
    """Has none of these processes been left, not even stopped?"""
    alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    return not alive


def write_run(
    folder: Path, data: Path, *, checkpoint_every: str = "5 steps", log_every: str = "1 steps", **train: Any
) -> Path:
    """The smallest run file: a checkpoint every few steps, and nothing to do at the end."""
    content = {
        "extends": str(SMOKE / "pretrain.yaml"),
        "name": "faults",
        "data": {"path": str(data)},
        "train": {"duration": "60 steps", "ema": {"decay": 0.5}, **train},
        "runtime": {"checkpoint_every": checkpoint_every, "log_every": log_every},
        "evaluate": {"samples": 0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
