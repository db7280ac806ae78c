"""Where a run happens: placement, launch files, and real processes under torchelastic."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

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


@pytest.fixture
def rank_script(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


@pytest.mark.distributed
def test_two_processes_meet_and_the_failing_rank_gives_the_exit_code(
    rank_script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler = signal.getsignal(signal.SIGINT)
    assert run_ranks([str(rank_script), str(tmp_path), "3"], Placement("cpu", 2)) == 3
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


def test_without_wishes_one_gpu_or_one_cpu_process_is_used() -> None:
    assert place() == Placement("cuda" if visible_gpus() else "cpu", 1)


def test_launch_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("device: cpu\nprocesses: 3\n")
    assert place(launch_file=path) == Placement("cpu", 3)
    assert place(launch_file=path, cpu=2) == Placement("cpu", 2)


def test_a_launch_file_shares_out_the_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("device: cpu\nprocesses: 2\nzero: 2\n")
    assert place(launch_file=path, cpu=4) == Placement("cpu", 4, zero=2)
    assert str(place(launch_file=path)) == "2 CPU processes, ZeRO-2"
    path.write_text("device: cpu\nzero: 3\n")
    with pytest.raises(ConfigError, match="no moving average of them can be kept; use 2"):
        place(launch_file=path)


def test_launch_file_holds_nothing_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("device: cpu\nseed: 3\n")
    with pytest.raises(ConfigError, match="unknown key seed"):
        place(launch_file=path)
    path.write_text("device: tpu\n")
    with pytest.raises(ConfigError, match="device='tpu'"):
        place(launch_file=path)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"gpus": 1, "cpu": 1}, "contradict"),
        ({"cpu": 0}, "at least 1 process"),
        ({"cpu": 1, "nodes": 2}, "--rdzv HOST:PORT"),
        ({"cpu": 1, "nodes": 2, "node_rank": 2, "rdzv": "a:1"}, "must be in 0..1"),
    ],
)
def test_contradictory_wishes_are_refused(wishes: dict, message: str) -> None:
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


def test_placement_reads_as_a_sentence() -> None:
    assert [str(p) for p in (Placement("cpu", 1), Placement("cpu", 2), Placement("cuda", 8, nodes=2))] == [
        "1 CPU process",
        "2 CPU processes",
        "8 GPUs on each of 2 nodes",
    ]
