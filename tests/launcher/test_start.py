"""Where a run happens: placement, launch files, and real processes under torchelastic."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.errors import ConfigError, LaunchError
from ddpm_lmk.launcher import Placement, launch, place, run_ranks, visible_gpus

RANK = """\
import json, os, pathlib, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
facts = {name: os.environ[name] for name in names}
(pathlib.Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(facts | {"total": total.item()}))
dist.destroy_process_group()
sys.exit(int(sys.argv[2]) if facts["RANK"] == "1" else 0)
"""


@pytest.mark.distributed
def test_two_processes_meet_and_the_failing_rank_gives_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler, script = signal.getsignal(signal.SIGINT), tmp_path / "rank.py"
    script.write_text(RANK)
    assert run_ranks([str(script), str(tmp_path), "3"], Placement("cpu", 2)) == 3
    facts = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["total"] for fact in facts] == [3.0, 3.0]
    assert [fact["RANK"] for fact in facts] == ["0", "1"]
    assert {fact["WORLD_SIZE"] for fact in facts} == {"2"}
    assert {fact["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] for fact in facts} == {"1"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler


def test_more_gpus_than_visible_is_refused_with_both_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(LaunchError, match=r"asked for 64 GPUs, visible 0 \(CUDA_VISIBLE_DEVICES: "):
        place(gpus=64)
    with pytest.raises(LaunchError, match="asked for 64 GPUs"):
        launch({"out": "run"}, Placement("cuda", 64))


@pytest.mark.parametrize(
    ("file", "words", "placement"),
    [
        (None, {}, Placement("cuda" if visible_gpus() else "cpu", 1)),
        ("device: cpu", {}, Placement("cpu", 1)),
        ("{device: cpu, processes: 3, zero: 2}", {}, Placement("cpu", 3, zero=2)),
        ("{device: cpu, processes: 3, zero: 2}", {"cpu": 2}, Placement("cpu", 2, zero=2)),
        ("{device: cpu, nodes: 2, stall_s: 7}", {"rdzv": "a:1"}, Placement("cpu", 1, 2, rdzv="a:1", stall_s=7)),
        ("{device: cpu, nodes: 2}", {"nodes": 1, "cpu": 1}, Placement("cpu", 1)),
    ],
)
def test_the_command_line_wins_over_the_launch_file(
    tmp_path: Path, file: str | None, words: dict[str, Any], placement: Placement
) -> None:
    path = None if file is None else tmp_path / "launch.yaml"
    if path is not None:
        path.write_text(file or "")
    assert place(launch_file=path, **words) == placement


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("{device: cpu, seed: 3}", "unknown key seed"),  # of a run file
        ("device: tpu", "device='tpu'"),
        ("{device: cpu, zero: 3}", "no moving average of them can be kept; use 2"),
    ],
)
def test_a_launch_file_that_cannot_be_honoured_is_refused(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "launch.yaml").write_text(file)
    with pytest.raises(ConfigError, match=message):
        place(launch_file=tmp_path / "launch.yaml")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"gpus": 1, "cpu": 1}, "contradict"),
        ({"cpu": 0}, "at least 1 process"),
        ({"cpu": 1, "nodes": 2}, "--rdzv HOST:PORT"),
        ({"cpu": 1, "nodes": 2, "node_rank": 2, "rdzv": "a:1"}, "must be in 0..1"),
    ],
)
def test_contradictory_wishes_are_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(**wishes)


def test_rendezvous_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} .* cannot be used"):
            run_ranks(["-c", "pass"], Placement("cpu", 1, nodes=2, rdzv=f"localhost:{port}"))
    with pytest.raises(ConfigError, match="wanted HOST:PORT"):
        run_ranks(["-c", "pass"], Placement("cpu", 1, nodes=2, rdzv="localhost"))


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Placement("cpu", 1), "1 CPU process"),
        (Placement("cpu", 2, zero=2), "2 CPU processes, ZeRO-2"),
        (Placement("cuda", 8, nodes=2), "8 GPUs on each of 2 nodes"),
    ],
)
def test_placement_reads_as_a_sentence(placement: Placement, words: str) -> None:
    assert str(placement) == words
