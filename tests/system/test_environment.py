"""What schedulers and other launchers leave in the environment steers nothing here."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from torch import distributed

from ddpm_lmk import cli
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system import environment
from tests.cli.commands import SMOKE
from tests.faults.harness import ROOT

TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29843",
    "TORCHELASTIC_RUN_ID": "x",
    "ROLE_NAME": "default",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json",
}
KINDS: dict[str, dict[str, str]] = {
    "torchrun": TORCHRUN,
    "torchrun of one": TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    "operator": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"},
    "broken": {"WORLD_SIZE": "", "RANK": "none", "LOCAL_RANK": "x"},
    "openmpi": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    "mpich": {"PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"},
    "mvapich": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_LOCAL_RANK": "0"},
    "pmix": {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMI_SIZE": "2", "PMI_RANK": "0"},
    "accelerate": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
        "FSDP_VERSION": "9",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "2",
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "ACCELERATE_DYNAMO_BACKEND": "NOTHING",
        "FORK_LAUNCHED": "1",
    },
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that nobody has written into, and that is as before afterwards."""
    for name in [*environment.NAMES, *os.environ]:
        if name in environment.NAMES or name.startswith((*environment.PREFIXES, "SLURM_")):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_inherited", {})


def put(monkeypatch: pytest.MonkeyPatch, words: dict[str, str]) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kinds", list(itertools.combinations(KINDS, 2)), ids=" and ".join)
def test_nothing_of_another_launcher_stays(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str]) -> None:
    words = KINDS[kinds[0]] | KINDS[kinds[1]]
    put(monkeypatch, words)
    remarks = environment.stand_alone()
    assert not words.keys() & os.environ.keys()
    assert environment.stand_alone() == [], "it is said once"
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        steers = words.get(name, "") in ("2", "4", "true")
        assert any(re.search(rf"(^|, ){name}=", line) for line in remarks) == steers


def test_ranks_of_our_launcher_keep_theirs_and_others_that_say_so_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TORCHRUN | {environment.PARENT: str(os.getppid())})
    assert environment.stand_alone() == []
    assert os.environ["WORLD_SIZE"] == "2"
    monkeypatch.setenv(environment.PARENT, "1" if os.getppid() != 1 else "2")  # handed on from further up
    assert environment.stand_alone() != []
    assert "WORLD_SIZE" not in os.environ
    assert environment.PARENT not in os.environ


@pytest.mark.parametrize("wish", ["0", "-1", "many", "100000", ""])
def test_a_number_of_threads_that_is_none_is_told_and_taken_out(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wish)
    [line] = environment.stand_alone()
    assert f"OMP_NUM_THREADS={wish!r} is not used" in line
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("words", "nodes", "named"),
    [
        (TORCHRUN, 1, "WORLD_SIZE=2, RANK=0"),
        (TORCHRUN | {"RANK": "1"}, 1, "torchrun started"),
        (TORCHRUN, 2, None),
        (KINDS["torchrun of one"], 1, None),
        (KINDS["operator"], 1, None),
        (KINDS["operator"] | {"RANK": "1"}, 1, "WORLD_SIZE=2, RANK=1"),
        (KINDS["operator"] | {"RANK": "1"}, 2, None),
        (KINDS["openmpi"], 1, None),
        (KINDS["openmpi"] | {"OMPI_COMM_WORLD_RANK": "3"}, 1, "OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3"),
        (KINDS["mpich"] | {"PMI_RANK": "1"}, 4, None),
        (KINDS["mvapich"] | {"MV2_COMM_WORLD_RANK": "2"}, 2, "MV2_COMM_WORLD_RANK=2"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5"}, 1, "srun started"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 2, None),
        (KINDS["broken"], 1, None),
    ],
)
def test_copies_of_a_command_do_not_train_the_same_run(
    monkeypatch: pytest.MonkeyPatch, words: dict[str, str], nodes: int, named: str | None
) -> None:
    put(monkeypatch, words)
    environment.stand_alone()
    if named is None:
        environment.check_copies(nodes)
    else:
        with pytest.raises(LaunchError, match="start ddpm-lmk once") as error:
            environment.check_copies(nodes)
        assert named in str(error.value)


def test_a_torchrun_of_one_around_a_run_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of such a group now and then aborted the process at its end."""
    put(monkeypatch, KINDS["torchrun of one"])
    AcceleratorState._reset_state(reset_partial_state=True)
    parallel = Parallel("cpu")
    assert (parallel.world, parallel.rank) == (1, 0)
    assert not distributed.is_initialized()


def test_a_copy_is_refused_before_anything_is_written(
    tmp_path: Path, packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"})
    words = ["pretrain", SMOKE / "pretrain.yaml", f"data.path={packed_phantoms}", "--cpu", 1, "--out", tmp_path / "run"]
    assert cli.run([str(word) for word in words]) == 5
    assert "srun started (SLURM_NTASKS=2, SLURM_PROCID=1)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "count", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])], ids=["alone", "two ranks"]
)
def test_a_run_started_among_the_leavings_of_every_launcher_is_the_run_that_was_asked_for(
    tmp_path: Path, packed_phantoms: Path, count: int
) -> None:
    """Among them a configuration of Accelerate's own, and a torchrun of one around it: no group is made at all."""
    leavings = {name: value for kind in KINDS.values() for name, value in kind.items()} | KINDS["torchrun of one"]
    leavings |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "OMP_NUM_THREADS": "777", "HF_HOME": str(tmp_path / "hf")}
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    settings = "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 4\nmixed_precision: fp16\n"
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(settings)
    words = [SMOKE / "pretrain.yaml", f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", count]
    command = [sys.executable, "-m", "ddpm_lmk.cli", "pretrain", *map(str, words), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | leavings,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "OMP_NUM_THREADS='777' is not used" in done.stderr
    assert "OMPI_COMM_WORLD_SIZE=4" in done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["hardware"]["processes"] == count
    assert facts["hardware"]["threads"] <= facts["hardware"]["cpus"]
