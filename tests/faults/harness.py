"""A run started as a user starts it, as a tree of processes that can be hurt and watched."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from ddpm_lmk.system import machine

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
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return sorted((child for child in children if _is_rank(child)), key=lambda rank: rank.pid)
        return []

    def wait(self, timeout: float = 240) -> int:
        """Its exit code; a tree that does not end in time is killed and the test fails."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"still running after {timeout} s:\n{self.said.read_text()}") from None

    def kill_everything(self) -> None:
        """End the tree, whatever state it is in."""
        for pid in [self.process.pid, *(rank.pid for rank in self.ranks())]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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


def tree_of(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty where it is gone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _is_rank(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "ddpm_lmk.launcher.rank" in process.cmdline()
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


def run_tool(
    description: str | None,
    work: Callable[[Path, argparse.Namespace], dict[str, Any]],
    verdict: str,
    **options: dict[str, Any],
) -> NoReturn:
    """The command line of a tool: does the work in a folder of its own, writes the result, exits with 0 where it is
    right.

    Args:
        verdict: key of the result that says whether all is as it should be.
        options: of the command line, as `argparse` takes them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--out", type=Path, help="result file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-", ignore_cleanup_errors=True) as folder:
        result = work(Path(folder), given)
    result |= {"day": datetime.now(UTC).date().isoformat(), "hardware": machine.hardware()}
    result["versions"] = machine.versions("ddpm-lmk", "torch")
    text = json.dumps(result, indent=1) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    sys.stdout.write(text)
    sys.exit(0 if result[verdict] else 1)
