"""Two "nodes" on one machine: two launchers that meet over loopback, of which one is lost and comes back."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import Started, digests, events, newest_checkpoint, steps_done, write_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(run_file: Path, out: Path, *more: str, node: int, rdzv: str, prefix: Sequence[str] = ()) -> Started:
    words = [run_file, "--cpu", 1, "--nodes", 2, "--node-rank", node, "--rdzv", rdzv, *more]
    return Started(words, out, prefix=prefix)


def with_processor(name: str, folder: Path) -> list[str]:
    """Words before a command that give it a name of the processor of its own, in a mount namespace."""
    text = re.sub(r"(?m)^(model name\s*): .*$", rf"\1: {name}", Path("/proc/cpuinfo").read_text())
    (folder / "cpuinfo").write_text(text)
    shell = f'mount --bind {folder / "cpuinfo"} /proc/cpuinfo && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", shell, "sh"]
    seen = subprocess.run([*prefix, "cat", "/proc/cpuinfo"], capture_output=True, text=True, check=False)
    if seen.returncode or name not in seen.stdout:
        pytest.skip("no rights to give a process another /proc/cpuinfo, or a kernel that names no model")
    return prefix


def test_a_node_is_lost_and_comes_back_and_the_weights_are_those_of_one_process(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    settings = {"exactness": "exact", "micro_batch": 1, "duration": "120 steps"}
    run_file = write_run(tmp_path, packed_phantoms, **settings)
    alone = Started([run_file, "--cpu", 1], tmp_path / "alone")
    assert alone.wait() == 0
    out, rdzv = tmp_path / "run", f"127.0.0.1:{free_port()}"
    first, second = (start(run_file, out, node=node, rdzv=rdzv) for node in (0, 1))
    first.until(lambda: newest_checkpoint(out))
    ranks = second.ranks()
    second.process.kill()
    second.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive, "a rank has outlived its launcher"
    first.until(lambda: events(out, "ranks.lost"))
    reached = steps_done(out)
    again = start(run_file, out, node=1, rdzv=rdzv)
    first.until(lambda: steps_done(out) > reached)
    assert first.wait() == 0
    assert again.wait() == 0
    assert len(events(out, "run.continued")) == 1
    assert digests(out) == digests(tmp_path / "alone")


def test_a_request_to_one_node_stops_both_and_a_port_that_is_taken_is_named(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    run_file = write_run(tmp_path, packed_phantoms, duration="100000 steps")
    out, rdzv = tmp_path / "run", f"127.0.0.1:{free_port()}"
    nodes = [start(run_file, out, node=node, rdzv=rdzv) for node in (0, 1)]
    nodes[0].until(lambda: steps_done(out) > 2)
    late = start(run_file, tmp_path / "other", node=0, rdzv=rdzv)
    assert late.wait(60) == 5
    assert f"of --rdzv {rdzv} cannot be used" in late.said.read_text()
    nodes[1].process.send_signal(signal.SIGUSR1)
    assert [node.wait(30) for node in nodes] == [75, 75]
    saved = newest_checkpoint(out)
    assert saved is not None
    assert int(saved.name.removeprefix("step-")) >= steps_done(out)


def test_nodes_of_two_kinds_weaken_the_class_or_are_refused(tmp_path: Path, packed_phantoms: Path) -> None:
    prefix = with_processor("Another Processor", tmp_path)
    settings = {"exactness": "exact", "micro_batch": 1, "duration": "4 steps"}
    run_file = write_run(tmp_path, packed_phantoms, **settings)
    out = tmp_path / "run"
    for words, code in (["--strict"], 5), ([], 0):
        rdzv = f"127.0.0.1:{free_port()}"
        nodes = [start(run_file, out, *words, node=n, rdzv=rdzv, prefix=prefix if n else ()) for n in (0, 1)]
        assert [node.wait() for node in nodes] == [code, code], nodes[0].said.read_text()
        assert "rank 1 has Another Processor, rank 0 " in nodes[0].said.read_text()
        assert code == 0 or not (out / "run.json").exists()
    facts = json.loads((out / "run.json").read_text())
    assert facts["exactness"] == "ordered"
    assert "Another Processor" in facts["devices"]
    assert [line["exactness"] for line in events(out, "train.started")] == ["ordered"]
    longer = [run_file, "--cpu", 1, "train.duration=6 steps", "--strict"]
    alone = Started(longer, out)
    assert alone.wait() == 5, "a session on one kind does not undo what another one did"
    assert "Another Processor" in alone.said.read_text()
