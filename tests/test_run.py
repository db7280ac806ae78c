"""Runs on phantoms, from a run file to results: real data, real tasks, real network, all of it small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from ddpm_lmk import run as runs
from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.errors import CheckpointError, DataError, ResourceError, RunConflictError
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.rundir.directory import RunDir

ROOT = Path(__file__).parents[1]
Maker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


@pytest.fixture(scope="module")
def tuning(pretraining: Maker) -> Maker:
    def make(**sections: Any) -> RunConfig:
        fields = pretraining(**sections).model_dump(mode="json") | {"task": {"kind": "landmarks"}}
        fields["data"] |= {"shots": 2} | sections.get("data", {})
        return RunConfig.model_validate(fields)

    return make


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, pretraining: Maker, parallel: Parallel) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    cfg = pretraining(data={"validation_split": "val"}, evaluate={"samples": 3, "batch": 2})
    execute(cfg, out, parallel=parallel)
    return out


def events(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]


def test_pretraining_ends_with_losses_weights_and_samples(pretrained: Path) -> None:
    results = json.loads((pretrained / "results.json").read_text())
    assert results["kind"] == "denoise"
    assert results["train"]["steps"] == 3
    assert results["train"]["images"] == 12
    assert 0 < results["validation"]["loss"] < 10
    assert results["train"]["images_per_s"] > 0
    sheet = cv2.imread(str(pretrained / "samples.png"), cv2.IMREAD_UNCHANGED)
    assert sheet is not None
    assert sheet.shape == (66, 66)
    assert pretrained.stat().st_mode & 0o777 == 0o700


def test_the_run_file_written_back_is_the_run(pretrained: Path, parallel: Parallel) -> None:
    before = (pretrained / "results.json").stat().st_mtime_ns
    again = execute(load_run(pretrained / "config.yaml"), pretrained, parallel=parallel)
    assert again["train"]["steps"] == 3
    assert (pretrained / "results.json").stat().st_mtime_ns == before, "a finished run is not run again"


def test_run_json_says_what_made_the_run(pretrained: Path) -> None:
    facts = json.loads((pretrained / "run.json").read_text())
    assert facts["seed"] == 0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["processes"] == 1
    assert facts["parent"] is None
    assert len(facts["fingerprint"]) >= 16


def test_ranks_compare_code_run_file_data_and_start(
    tmp_path: Path, pretraining: Maker, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they do when one differs is tried with real ranks in `distributed/test_worlds`."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(runs, "check_same_facts", lambda mine, parallel: seen.append(mine))
    for length in (1, 2):
        execute(pretraining(train={"length": length, "checkpoint_every": 1}), tmp_path / "run", parallel=parallel)
    first, second = seen
    assert first.keys() == {"code", "torch", "run file", "data", "start"}
    assert first["start"].startswith("step 0, weights ")
    assert second["start"].startswith("step 1, weights ")
    assert (first["code"], first["data"]) == (second["code"], second["data"])
    assert first["run file"] != second["run file"]


def test_finetuning_takes_the_trunk_and_leaves_the_output_layer_to_the_seed(
    tmp_path: Path, pretrained: Path, tuning: Maker, parallel: Parallel
) -> None:
    cfg = tuning(init={"weights": str(pretrained)}, train={"length": 0, "ema": None})
    results = execute(cfg, tmp_path / "run", parallel=parallel)
    found, _ = load_weights(tmp_path / "run", "model")
    parent, _ = load_weights(pretrained, "ema")
    scratch = Session().model(cfg, build(cfg), torch.device("cpu")).state_dict()
    for name, value in found.items():
        wanted = scratch[name] if name.startswith("final_conv") else parent[name]
        assert torch.equal(value, wanted), name
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parent"]["loaded"] == "trunk"
    assert results["protocols"]["original"]["mre"] > 0
    assert results["labels"] == {"training": 2, "validation": 0}


def build(cfg: RunConfig) -> Any:
    from ddpm_lmk.data import open_loader
    from ddpm_lmk.tasks import build_task

    return build_task(cfg, open_loader(cfg, stage="train").spec)


def test_the_same_task_continues_with_all_weights(
    tmp_path: Path, pretrained: Path, pretraining: Maker, parallel: Parallel
) -> None:
    cfg = pretraining(init={"weights": str(pretrained), "use": "model"}, train={"length": 0, "ema": None})
    execute(cfg, tmp_path / "run", parallel=parallel)
    found, parent = load_weights(tmp_path / "run", "model")[0], load_weights(pretrained, "model")[0]
    assert all(torch.equal(found[name], value) for name, value in parent.items())


def test_a_network_of_another_shape_is_refused_with_the_differences(
    tmp_path: Path, pretrained: Path, pretraining: Maker, tuning: Maker, parallel: Parallel
) -> None:
    cfg = tuning(init={"weights": str(pretrained)}, model=pretraining().model.model_dump() | {"width": 16})
    with pytest.raises(CheckpointError) as error:
        execute(cfg, tmp_path / "run", parallel=parallel)
    assert error.value.exit_code == 4


def test_a_warm_workbench_gives_the_same_weights_as_a_cold_one(
    tmp_path: Path, pretrained: Path, tuning: Maker, parallel: Parallel
) -> None:
    session = Session()
    first = tuning(init={"weights": str(pretrained)})
    second = tuning(seed=3, train={"micro_batch": 2})
    execute(first, tmp_path / "warm-first", parallel=parallel, session=session)
    execute(second, tmp_path / "warm-second", parallel=parallel, session=session)
    execute(second, tmp_path / "cold", parallel=parallel)
    warm, cold = (load_weights(tmp_path / name, "ema")[0] for name in ("warm-second", "cold"))
    assert all(torch.equal(warm[name], value) for name, value in cold.items())
    rows = [(tmp_path / name / "predictions.csv").read_text() for name in ("warm-second", "cold")]
    assert rows[0] == rows[1]
    assert session.cache or first.data.residency == "stream"


def test_a_longer_run_continues_and_ends_as_if_it_had_been_long_from_the_start(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    execute(pretraining(), tmp_path / "grown", parallel=parallel)
    execute(pretraining(train={"length": 5}), tmp_path / "grown", parallel=parallel)
    execute(pretraining(train={"length": 5}), tmp_path / "long", parallel=parallel)
    grown, long = (load_weights(tmp_path / name, "ema") for name in ("grown", "long"))
    assert grown[1]["step"] == 5
    assert all(torch.equal(grown[0][name], value) for name, value in long[0].items())
    assert events(tmp_path / "grown").count("run.continued") == 1


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    out = tmp_path / "run"
    execute(pretraining(train={"checkpoint_every": 1}), out, parallel=parallel)
    newest = out / "checkpoints" / "step-00000003"
    os.truncate(newest / "optim.safetensors", 100)
    execute(pretraining(train={"checkpoint_every": 1, "length": 4}), out, parallel=parallel)
    execute(pretraining(train={"length": 4}), tmp_path / "plain", parallel=parallel)
    found, wanted = load_weights(out, "ema")[0], load_weights(tmp_path / "plain", "ema")[0]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert "checkpoint.bad" in events(out)


def test_another_run_in_the_same_place_is_refused_key_by_key(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    execute(pretraining(), tmp_path / "run", parallel=parallel)
    other = pretraining(seed=1, optim={"lr": 0.5}, data={"workers": 1}, train={"log_every": 2})
    with pytest.raises(RunConflictError) as error:
        execute(other, tmp_path / "run", parallel=parallel)
    assert "seed: there 0, here 1" in str(error.value)
    assert "optim.lr: there 0.0001, here 0.5" in str(error.value)
    assert "workers" not in str(error.value)
    assert "log_every" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"length": 2}, {"length": "9 epochs"}, {"keep_checkpoints": 3, "length": 1}],
    ids=["shorter", "unit", "both"],
)
def test_only_a_longer_length_may_change(tmp_path: Path, pretraining: Maker, changes: dict[str, Any]) -> None:
    with RunDir.lock(tmp_path / "run", pretraining()) as run:
        run.begin(pretraining(), {"fingerprint": "x"})
    with pytest.raises(RunConflictError, match=r"train\.length"):
        RunDir.lock(tmp_path / "run", pretraining(train=changes))


def test_a_schedule_that_depends_on_the_length_forbids_another_length(tmp_path: Path, pretraining: Maker) -> None:
    cosine = {"schedule": "cosine"}
    with RunDir.lock(tmp_path / "run", pretraining(optim=cosine)) as run:
        run.begin(pretraining(optim=cosine), {"fingerprint": "x"})
    with pytest.raises(RunConflictError, match=r"train\.length"):
        RunDir.lock(tmp_path / "run", pretraining(optim=cosine, train={"length": 9}))


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path, pretraining: Maker) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(RunConflictError, match=r"is not a run \(it holds thesis.txt\)"):
        RunDir.lock(tmp_path, pretraining())
    assert (tmp_path / "thesis.txt").read_text() == "chapter 1"


def test_an_empty_directory_is_fine(tmp_path: Path, pretraining: Maker) -> None:
    with RunDir.lock(tmp_path, pretraining()):
        pass
    with RunDir.lock(tmp_path, pretraining()):
        pass


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, pretraining: Maker) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "cannot write"),
        (Path("/proc/run"), "cannot write"),
    ):
        with pytest.raises(ResourceError, match=said):
            RunDir.lock(path, pretraining())


def test_two_runs_do_not_share_a_directory(tmp_path: Path, pretraining: Maker) -> None:
    in_use = pytest.raises(RunConflictError, match=f"in use by process {os.getpid()} on ")
    with RunDir.lock(tmp_path / "run", pretraining()), in_use:
        RunDir.lock(tmp_path / "run", pretraining())
    with RunDir.lock(tmp_path / "run", pretraining()):
        pass


def test_changed_data_is_refused(tmp_path: Path, pretraining: Maker) -> None:
    with RunDir.lock(tmp_path / "run", pretraining()) as run:
        run.begin(pretraining(), {"fingerprint": "before"})
    with RunDir.lock(tmp_path / "run", pretraining()) as run, pytest.raises(DataError, match="was before, now after"):
        run.begin(pretraining(), {"fingerprint": "after"})


def test_tampered_results_are_made_again(tmp_path: Path, pretrained: Path, parallel: Parallel) -> None:
    out = tmp_path / "copy"
    shutil.copytree(pretrained, out)
    (out / "results.json").write_text("{}")
    results = execute(load_run(out / "config.yaml"), out, parallel=parallel)
    assert results["train"]["steps"] == 3
    assert events(out)[-1] == "run.finished"


def worker(folder: Path, cfg: RunConfig, out: Path, *, rank: int = 0) -> subprocess.CompletedProcess[str]:
    job = folder / "job.json"
    job.write_text(json.dumps({"config": cfg.model_dump(mode="json"), "out": str(out), "device": "cpu"}))
    command = [sys.executable, "-W", "error::UserWarning", "-m", "ddpm_lmk.launcher.rank", str(job)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_worker_process_runs_a_job_and_tells_an_error_in_one_line(tmp_path: Path, pretraining: Maker) -> None:
    done = worker(tmp_path, pretraining(train={"length": 1}), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "step=1/1 loss=" in done.stderr
    refused = worker(tmp_path, pretraining(seed=4), tmp_path / "run")
    assert refused.returncode == 7
    assert refused.stderr.startswith("error[")
    assert refused.stderr.count("\n") == 1
