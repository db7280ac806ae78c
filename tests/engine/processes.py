"""Starting toy workers the way torchelastic does: one process per rank, told its place by the environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ddpm_lmk.system.environment import PARENT

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path, jobs: list[dict[str, Any]], *, world: int, threads: int = 1, module: str = "tests.engine.worker"
) -> list[subprocess.Popen[str]]:
    """Start `world` workers on `jobs`, each with so many threads; they run until they are waited for."""
    file = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", PARENT: str(os.getpid())}
    workers = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        elastic = {**{k: str(v) for k, v in place.items()}, **address} if world > 1 else {}
        environment = {**os.environ, **shared, **elastic}
        command = [sys.executable, "-W", "error::UserWarning", "-m", module, str(file)]
        workers.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return workers


def wait(workers: list[subprocess.Popen[str]], timeout: float = 600) -> tuple[list[int], str]:
    """Exit codes by rank, and everything they said to standard error; a rank that hangs is killed."""
    said = []
    try:
        for worker in workers:
            said.append(worker.communicate(timeout=timeout)[1])
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], "\n".join(said)


def run(folder: Path, jobs: list[dict[str, Any]], *, world: int, **more: Any) -> None:
    """Run jobs to their end, all of them well."""
    codes, said = wait(launch(folder, jobs, world=world, **more))
    assert codes == [0] * world, said


def facts(out: Path, rank: int = 0) -> dict[str, Any]:
    """What a worker wrote about a finished job."""
    return json.loads(out.with_name(f"{out.name}-rank{rank}.json").read_text())


def losses(out: Path) -> list[float]:
    """The losses of a run, by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def scores(out: Path) -> list[dict[str, float]]:
    """The evaluations of a run, in order."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["validation"] for line in lines if "validation" in line]


def events(out: Path) -> list[str]:
    """Names of a run's events, in order."""
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
