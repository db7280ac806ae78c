"""Pre-training an encoder, going on after a kill, and fine-tuning a detector from it: whole runs on phantoms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddpm_lmk.config import EncoderUNetConfig, RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models.encoder_unet import build_encoder
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from tests.tasks.test_encoder_tasks import KINDS

NETWORK = {"kind": "encoder_unet", "scale": 0.125, "blocks": [1, 1, 1, 1], "decoder": [8, 8, 8, 4, 4]}
VIEWS = [{"count": 2, "size": 32, "blur_sigma": [0.1, 0.5]}]


def pretraining(data: Path, kind: str) -> RunConfig:
    views = VIEWS if kind != "dino" else [*VIEWS, {"count": 2, "size": 64, "blur": 0}]
    return RunConfig.model_validate(
        {
            "data": {"path": str(data), "image_size": 64},
            "model": NETWORK,
            "task": {"kind": kind, **KINDS[kind], "views": views},
            "train": {"duration": 4, "global_batch_size": 4},
            "runtime": {"workers": 0, "log_every": 1, "checkpoint_every": 2},
        }
    )


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


@pytest.fixture(scope="module", params=["dino", "mocov3", pytest.param("simclrv2", marks=pytest.mark.slow)])
def pretrained(
    request: pytest.FixtureRequest,
    packed_phantoms: Path,
    tmp_path_factory: pytest.TempPathFactory,
    parallel: Parallel,
) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "run"
    execute(pretraining(packed_phantoms, request.param), out, parallel=parallel)
    return out


def test_it_learns_and_says_that_the_number_of_processes_matters(pretrained: Path) -> None:
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 for line in lines)
    assert json.loads((pretrained / "run.json").read_text())["exactness"] == "per_world"


def test_a_killed_run_goes_on_bit_by_bit(pretrained: Path, tmp_path: Path, parallel: Parallel) -> None:
    """From the checkpoint of step 2: weights, average, follower, centre, statistics and schedules."""
    killed = tmp_path / "killed"
    shutil.copytree(pretrained, killed)
    for name in ("results.json", "done.json"):
        (killed / name).unlink()
    shutil.rmtree(killed / "snapshots")
    for checkpoint in (killed / "checkpoints").glob("step-*"):
        if checkpoint.name != "step-00000002":
            shutil.rmtree(checkpoint)
    cfg = RunConfig.model_validate(json.loads(next(pretrained.glob("snapshots/*/meta.json")).read_text())["config"])
    execute(cfg, killed, parallel=parallel)
    for use in ("model", "ema"):
        wanted, found = load_weights(pretrained, use)[0], load_weights(killed, use)[0]
        assert set(found) == set(wanted)
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_finetuning_takes_the_encoder_and_nothing_else(pretrained: Path, tmp_path: Path, parallel: Parallel) -> None:
    data = json.loads(next(pretrained.glob("snapshots/*/meta.json")).read_text())["config"]["data"]
    sections: dict[str, Any] = {
        "data": {"path": data["path"], "image_size": 64, "shots": 2},
        "runtime": {"workers": 0},
        "model": NETWORK,
        "task": {"kind": "landmarks"},
        "init": {"weights": str(pretrained)},
        "optim": {"kind": "sgd", "lr": 1e-30},
        "train": {"duration": 1, "global_batch_size": 2, "ema": None},
    }
    results = execute(RunConfig.model_validate(sections), tmp_path / "tuned", parallel=parallel)
    assert results["kind"] == "landmarks"
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["parent"]["loaded"] == "encoder"
    source, found = load_weights(pretrained, "ema")[0], load_weights(tmp_path / "tuned", "model")[0]
    encoder = {name for name in found if name.startswith("encoder.") and "running_" not in name and "num_" not in name}
    assert encoder
    assert [name for name in encoder if not torch.equal(found[name], source[name])] == []
    assert any(name.startswith("decoder.") for name in found)
    wrong = RunConfig.model_validate(sections | {"model": NETWORK | {"blocks": [1, 2, 1, 1]}})
    with pytest.raises(CheckpointError, match=r"does not fit.*model\.blocks"):
        execute(wrong, tmp_path / "wrong", parallel=parallel)


def test_finetuning_takes_a_classifier_s_file(packed_phantoms: Path, tmp_path: Path, parallel: Parallel) -> None:
    """As ImageNet's come: torchvision's names, a stem for colour, a classifier; and an error that says where from."""
    torch.manual_seed(1)
    colour = build_encoder(EncoderUNetConfig.model_validate(NETWORK | {"in_channels": 3})).state_dict()
    save_file(colour | {"classifier.weight": torch.zeros(3, 3)}, tmp_path / "net.safetensors")
    sections: dict[str, Any] = {
        "data": {"path": str(packed_phantoms), "image_size": 32, "shots": 2},
        "runtime": {"workers": 0},
        "model": NETWORK,
        "task": {"kind": "landmarks"},
        "init": {"weights": str(tmp_path / "net.safetensors")},
        "optim": {"kind": "sgd", "lr": 1e-30},
        "train": {"duration": 1, "global_batch_size": 2, "ema": None},
    }
    execute(RunConfig.model_validate(sections), tmp_path / "tuned", parallel=parallel)
    found = load_weights(tmp_path / "tuned", "model")[0]
    assert torch.equal(found["encoder.features.conv0.weight"], colour["features.conv0.weight"].sum(1, keepdim=True))
    sections["init"] = {"weights": str(tmp_path / "nowhere.safetensors")}
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist.*download\.pytorch\.org"):
        execute(RunConfig.model_validate(sections), tmp_path / "none", parallel=parallel)
