"""Starting toy workers the way torchelastic does: one process per rank, told its place by the environment.

They are forked from a process that has paid for its imports (`tests.faults.forge`), so ranks cost what they compute.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

from tests.faults.forge import Forge, Worker


def launch(
    forge: Forge,
    folder: Path,
    jobs: list[dict[str, Any]],
    *,
    world: int,
    threads: int = 1,
    module: str = "tests.engine.worker",
) -> list[Worker]:
    """Start `world` workers on `jobs`, each with so many threads; they run until they are waited for."""
    number = len(list(folder.glob("jobs-*.json")))
    file = folder / f"jobs-{number}.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}
    workers = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
        environment = {**address, **{name: str(value) for name, value in place.items()}}
        log = folder / f"jobs-{number}-rank{rank}.log"
        workers.append(forge.start(module, file, log, threads=threads, environment=environment))
    return workers


def wait(workers: list[Worker], timeout: float = 600) -> tuple[list[int], str]:
    """Exit codes by rank, and everything they said; ranks that hang are killed."""
    limit = threading.Timer(timeout, lambda: [worker.kill() for worker in workers])
    limit.daemon = True
    limit.start()
    codes = [worker.wait() for worker in workers]
    limit.cancel()
    return codes, "\n".join(worker.log.read_text() for worker in workers)


def run(forge: Forge, folder: Path, jobs: list[dict[str, Any]], *, world: int, **more: Any) -> None:
    """Run jobs to their end, all of them well."""
    codes, said = wait(launch(forge, folder, jobs, world=world, **more))
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
