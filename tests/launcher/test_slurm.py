"""The batch script for Slurm, run by bash with stand-ins for the four commands of a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_lmk import cli
from ddpm_lmk.config.load import load_run
from ddpm_lmk.launcher import slurm
from tests.cli.commands import SMOKE
from tests.faults.harness import ROOT, steps_done

Cluster = Callable[..., subprocess.Popen[str]]

# `srun` starts the task once per node, each with its number, passes USR1 on, and ends with the largest exit code.
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
pids=()
for node in $(seq 0 $(( SLURM_NNODES - 1 ))); do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"; again=1' USR1
worst=0
for pid in "${pids[@]}"; do
    again=1; while [ "$again" = 1 ]; do again=0; code=0; wait "$pid" || code=$?; done
    (( code > worst )) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$CALLS"
[ "$1" = show ] && printf 'node0\\nnode1\\n'
exit 0
"""
LMK = """#!/bin/bash
echo "ddpm-lmk $* grace=$DDPM_LMK_GRACE_S" >> "$CALLS"
if [ -n "$WAITS" ]; then trap 'exit 75' USR1; touch "$CALLS.ready"; while :; do sleep 0.05; done; fi
exit "$CODE"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Runs a script as Slurm would; calls of its commands are added to `calls`."""
    monkeypatch.setattr(slurm, "program", lambda: ("ddpm-lmk",))  # the stand-in below
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ddpm-lmk", LMK), ("sbatch", "#!/bin/bash\necho $*\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(script: Path, *, nodes: int = 1, **environment: str) -> subprocess.Popen[str]:
        job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": str(nodes)}
        job["SLURM_JOB_NAME"] = "smoke"
        facts = {"CALLS": str(tmp_path / "calls"), "PATH": f"{tools}:{os.environ['PATH']}", "WAITS": "", "CODE": "0"}
        whole = os.environ | facts | job | environment
        with (tmp_path / "said").open("a") as said:
            return subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=whole, text=True, stderr=said)

    return run


def write(tmp_path: Path, *words: object) -> Path:
    script = tmp_path / "run.sbatch"
    line = ["launch", "slurm", SMOKE / "pretrain.yaml", "data.path=x y", "--script", script, "--out", tmp_path / "out"]
    assert cli.run([str(word) for word in (*line, *words)]) == 0
    return script


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], tmp_path: Path) -> None:
    while not condition():
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)


def test_every_node_gets_its_place_its_cores_and_paths_that_hold_anywhere(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script = write(tmp_path, "--gpus", 8, "--nodes", 2, "--time", "04:00:00", "--partition", "gpu")
    text = script.read_text()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=B:USR1@150", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    process = cluster(script, nodes=2)
    assert process.wait(60) == 0
    started = sorted(call for call in calls(tmp_path) if call.startswith("ddpm-lmk pretrain"))
    assert len(started) == 2
    for rank, call in enumerate(started):
        assert f"--nodes 2 --node-rank {rank} --rdzv node0:20077 grace=120" in call
        assert f'data.path=["{tmp_path}/here/x y"] --out {tmp_path}/out' in call
        assert "data.path=x y" not in call
    assert any(call.startswith("srun ") and "--cpus-per-task=8 " in call for call in calls(tmp_path))
    assert not any("requeue" in call for call in calls(tmp_path))


def test_a_job_starts_the_program_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ddpm-lmk").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert f"exec {tmp_path}/bin/ddpm-lmk pretrain" in write(tmp_path, "--cpu", 1).read_text()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert f"exec {tmp_path}/python -m ddpm_lmk.cli pretrain" in write(tmp_path, "--cpu", 1).read_text()


@pytest.mark.parametrize(("code", "is_queued"), [(75, True), (76, False), (3, False)])
def test_only_a_run_that_can_continue_is_queued_again(
    tmp_path: Path, cluster: Cluster, code: int, is_queued: bool
) -> None:
    assert cluster(write(tmp_path, "--cpu", 2), CODE=str(code)).wait(60) == code
    assert ("requeue 77" in calls(tmp_path)) == is_queued


def test_a_job_that_ends_three_times_at_the_same_checkpoint_is_not_queued_again(
    tmp_path: Path, cluster: Cluster
) -> None:
    script = write(tmp_path, "--cpu", 2)

    codes = []
    for step in (0, 0, 10, 10, 20, 20, 20):
        (tmp_path / "out" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        codes.append(cluster(script, CODE="75").wait(60))
    assert codes == [*[75] * 6, 76]
    assert calls(tmp_path).count("requeue 77") == 6


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preemption_is_passed_on_and_the_job_queued_again(
    tmp_path: Path, cluster: Cluster, number: signal.Signals
) -> None:
    process = cluster(write(tmp_path, "--gpus", 1), WAITS="1")
    wait_until((tmp_path / "calls.ready").exists, process, tmp_path)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert calls(tmp_path)[-1] == "requeue 77"


@pytest.mark.parametrize("where", ["word", "run file"])
def test_a_job_has_the_shots_that_a_file_listed_when_it_was_written(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "here" / "next").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("next/suggestions.csv").write_text("image_id,rank\ntrain 2,1\n0007,2\n")
    listed = "data: {images: next/suggestions.csv}\n" if where == "run file" else ""
    Path("run.yaml").write_text(f"extends: {SMOKE / 'finetune.yaml'}\n{listed}")
    words = ["data.path=x", "data.draw=listed", "data.shots=1"]
    words += ["data.images=next/suggestions.csv"] if where == "word" else []
    assert cli.run(["launch", "slurm", "run.yaml", *words, "--cpu", "1", "--script", "s.sbatch", "--out", "out"]) == 0
    script = Path("s.sbatch").resolve()
    Path("next/suggestions.csv").write_text("image_id\nother\n")

    assert cluster(script).wait(60) == 0
    [call] = [call for call in calls(tmp_path) if call.startswith("ddpm-lmk finetune")]
    assert 'data.images=["train 2", "0007"] ' in call
    assert "suggestions.csv" not in call
    # What the job gives is read over the run file's own: ids stay text, whatever they look like.
    again = load_run("run.yaml", [*words, 'data.images=["train 2", "0007"]'])
    assert again.data.images == ("train 2", "0007")


def test_a_launch_file_says_what_nodes_have(tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text("{device: cuda, processes: 4, nodes: 3}")
    text = write(tmp_path, "--launch", tmp_path / "launch.yaml").read_text()
    assert "--nodes=3" in text
    assert "--gpus-per-node=4" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --gpus N, --cpu N and --launch FILE"),
        (["--cpu", "1", "--time", "a day"], "wanted MINUTES, HH:MM:SS"),
        (["--cpu", "1", "--partition", "a b"], "wanted a word without spaces"),
    ],
)
def test_what_slurm_would_not_understand_is_refused(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["launch", "slurm", str(SMOKE / "pretrain.yaml"), "data.path=x", "--script", str(tmp_path / "s"), *words]
    assert cli.run(line) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_what_a_job_could_not_keep_with_zero_is_refused_before_it_is_queued(
    tmp_path: Path, packed_phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.yaml").write_text("{device: cuda, processes: 2, zero: 1}")
    words = [
        f"data.path={packed_phantoms}",
        "train.weight_standardization=step",
        "--launch",
        str(tmp_path / "zero.yaml"),
    ]
    assert cli.run(["launch", "slurm", str(SMOKE / "pretrain.yaml"), *words, "--script", str(tmp_path / "s")]) == 2
    assert "train.weight_standardization=step cannot be kept with ZeRO" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_real_run_is_preempted_queued_again_and_done(tmp_path: Path, packed_phantoms: Path, cluster: Cluster) -> None:
    script = write(
        tmp_path, f"data.path={packed_phantoms}", "train.duration=60 steps", "evaluate.samples=0", "--cpu", 2
    )
    real = tmp_path / "bin" / "ddpm-lmk"
    real.write_text(f'#!/bin/bash\nexec {sys.executable} -m ddpm_lmk.cli "$@"\n')
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = cluster(script, **environment)
    wait_until(lambda: steps_done(tmp_path / "out") >= 3, first, tmp_path)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(60) == 75
    assert calls(tmp_path)[-1] == "requeue 77"
    assert cluster(script, **environment).wait(120) == 0
    assert (tmp_path / "out" / "done.json").is_file()
