"""What a class demands of torch, what it leaves as it was, and what it cannot promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.gradients import build_updater
from ddpm_lmk.engine.loop import fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.rank_checks import class_kept, kernels
from ddpm_lmk.errors import ConfigError
from tests.engine.toy import ToyTask, ToyTrain, config, fresh_state, start


def test_exact_asks_for_deterministic_kernels_and_leaves_torch_as_it_was() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with kernels("exact", torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == 1
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_none_tries_kernels_out_and_ordered_changes_nothing() -> None:
    with kernels("ordered", torch.device("cpu")):
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cuda.matmul.allow_tf32
    with kernels("none", torch.device("cpu")):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_exact_needs_a_micro_batch_that_does_not_depend_on_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"exactness=exact needs train\.micro_batch"):
        config(train={"exactness": "exact"})
    with pytest.raises(ValueError, match=r"train\.compile=false"):
        config(train={"exactness": "exact", "micro_batch": 1, "compile": True})


def test_zero_refuses_what_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = Parallel("cpu")
    monkeypatch.setattr(parallel, "zero", 1)
    for train, told in (
        ({"exactness": "exact", "micro_batch": 1}, r"train\.exactness=exact cannot be kept with ZeRO"),
        ({"standardise": "step"}, r"train\.standardise=step cannot be kept with ZeRO"),
    ):
        cfg = config(train=train)
        with pytest.raises(ConfigError, match=told):
            build_updater(cfg, fresh_state(cfg), parallel)


def test_a_number_of_processes_that_does_not_divide_the_group_is_refused_with_those_that_do() -> None:
    cfg = config(train={"exactness": "exact", "group_size": 12, "micro_batch": 2})
    with pytest.raises(ConfigError, match="cannot be shared by 4 processes x micro_batch 2; use 1, 2, 3, 6 processes"):
        ToyTrain(cfg).plan.check_world(4)


def test_two_kinds_of_devices_keep_the_order_only() -> None:
    exact = config(train={"exactness": "exact", "micro_batch": 1})
    assert class_kept(exact, ["H100", "H100"]) == "exact"
    assert class_kept(exact, ["H100", "A100"]) == "ordered"
    assert class_kept(config(train={"exactness": "none"}), ["H100", "A100"]) == "none"


def test_images_that_influence_one_another_keep_what_a_number_of_processes_gives() -> None:
    network = {"data": {"image_size": 32}, "model": {"kind": "encoder_unet"}, "task": {"kind": "landmarks"}}
    assert class_kept(config(**network), ["H100"]) == "per_world"
    assert class_kept(config(**network, train={"exactness": "none"}), ["H100"]) == "none"


@pytest.mark.parametrize("exactness", ["exact", "ordered", "none"])
def test_the_class_is_told_at_the_start_and_kept_in_the_events(
    exactness: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg: RunConfig = config(train={"length": 1, "micro_batch": 2, "exactness": exactness})
    parallel = Parallel("cpu")
    state, loaders, run = start(cfg, tmp_path / "run", parallel)
    with run:
        fit(cfg, ToyTask(0), state, loaders, parallel, run)
    assert f"exactness={exactness} (" in capsys.readouterr().err
    lines = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    [started] = [line for line in lines if line["event"] == "train.started"]
    assert (started["exactness"], started["processes"], started["zero"]) == (exactness, 1, 0)
