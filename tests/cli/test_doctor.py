"""What the doctor says about a machine, and the versions nobody may go below."""

from __future__ import annotations

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk import cli
from ddpm_lmk.cli import doctor
from ddpm_lmk.config.load import load_run
from ddpm_lmk.system import machine
from ddpm_lmk.system.machine import release
from tests.cli.commands import SMOKE, Lmk, run_command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_everything_is_looked_at_and_what_would_be_used_is_said(lmk: Lmk, tmp_path: Path) -> None:
    result = lmk("doctor", "--out", tmp_path / "runs")
    assert result.code in (0, 5)
    assert (result.code == 5) == ("problem" in result.out)
    topics = ("python", "torch", "cpu", "gpu", "disk", "/dev/shm", "open files", "extra dali", "protection")
    assert [topic for topic in topics if topic not in result.out] == []
    assert "would use 1 " in result.out
    assert list(tmp_path.iterdir()) == []


def test_findings_come_as_json_with_the_room_a_run_needs(tmp_path: Path) -> None:
    result = run_command("doctor", "--out", tmp_path, "--run", SMOKE / "pretrain.yaml", "--json")
    findings: list[dict[str, Any]] = json.loads(result.out)
    assert result.code == (5 if any(finding["level"] == "problem" for finding in findings) else 0)
    seen = {finding["topic"]: finding["seen"] for finding in findings}
    assert {"open files", "processes", "disk", "cpu", "torch"} <= seen.keys()
    assert "3 checkpoints and one being written" in seen["checkpoints of smoke-pretrain"]
    assert all(finding["advice"] for finding in findings if finding["level"] != "ok")


@pytest.mark.parametrize(("share", "level"), [(0.9, "problem"), (1.1, "ok")])
def test_a_disk_too_small_for_the_checkpoints_of_a_run_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, level: str
) -> None:
    cfg = load_run(SMOKE / "pretrain.yaml", ["data.path=.", "model.width=64"])
    needed = doctor.checkpoint_gib(cfg) * (3 + 1.5) * 2**30
    usage = shutil.disk_usage(tmp_path)._replace(free=int(needed * share))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = {finding.topic: finding for finding in doctor.check_disk(tmp_path, cfg)}
    assert found["disk"].level == level
    assert ("3 checkpoints" in found["disk"].advice) == (level == "problem")


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_it_is_said(tmp_path: Path, packed_phantoms: Path) -> None:
    out = tmp_path / "run"
    words = (SMOKE / "pretrain.yaml", f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", 1, "--out", out)
    assert run_command("pretrain", *words).code == 0
    [newest] = sorted((out / "checkpoints").iterdir())[-1:]
    size = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    said = doctor.checkpoint_gib(load_run(SMOKE / "pretrain.yaml", ["data.path=."])) * 2**30
    assert said == pytest.approx(size, rel=0.2)  # the headers of a network this small count


def test_two_nodes_meet_and_one_alone_is_told_what_to_do() -> None:
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(doctor.check_rendezvous, address, nodes=2, node_rank=rank, timeout_s=20) for rank in (1, 0)
        ]
    assert [call.result().level for call in calls] == ["ok", "ok"]
    assert "2 nodes met" in calls[0].result().seen
    alone = doctor.check_rendezvous(f"127.0.0.1:{free_port()}", nodes=2, node_rank=0, timeout_s=1)
    assert alone.level == "problem"
    assert "start the same command on every node" in alone.advice


@pytest.mark.parametrize(("name", "old"), [("torch", "2.9.1"), ("pydicom", "3.0.1"), ("pillow", "11.2.1")])
def test_packages_below_the_floor_are_refused_and_named_by_the_doctor(
    name: str, old: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = machine.version
    monkeypatch.setattr(machine, "version", lambda package: old if package == name else known(package))
    assert cli.run(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 5
    said = capsys.readouterr().err
    assert f"error[LaunchError]: {name} {old} is open to crafted files" in said
    assert "pip install" in said
    assert [finding.topic for finding in doctor.check_versions() if finding.level == "problem"] == [name]


def test_versions_compare_by_their_numbers() -> None:
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("2.9.1") < (2, 10) < (*release("2.10.0rc1.dev0"), 0)


def test_a_lock_that_a_killed_build_left_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    [finding] = [finding for finding in doctor.check_extras() if finding.topic == "compiled parts"]
    assert finding.level == "note"
    assert str(lock) in finding.seen
