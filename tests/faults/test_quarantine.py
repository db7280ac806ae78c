"""Bad samples in real runs of one, two and four ranks: listed once, the same after a kill, the end when too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DataError
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.run import execute
from tests.data.dot_packs import corrupt, pack_dots
from tests.faults import breaking
from tests.faults.breaking import Break
from tests.faults.harness import events

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MODEL = {"width": 8, "multipliers": [1, 2], "patch": 4, "heads": 2, "head_dim": 4}
EXACT = {"exactness": "exact", "micro_batch": 2}


def config(pack: Path, *, steps: int, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"path": str(pack), "image_size": 32, "residency": "stream"},
            "model": MODEL,
            "task": {"kind": "denoise"},
            "train": {"group_size": 8, "length": steps, "checkpoint_every": 2, **train},
        }
    )


def launched(cfg: RunConfig, out: Path, processes: int) -> int:
    job = {"config": cfg.model_dump(mode="json"), "out": str(out)}
    return launch(job, Placement("cpu", processes))


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (max((run / "snapshots").iterdir()) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """48 images, 3 of them bad."""
    out = pack_dots(tmp_path_factory.mktemp("bad") / "dots", {"train": 48}, size=32, labels=False, noise=1.0)
    bad = Manifest.open(out).rows(["train"])[[5, 20, 41]].tolist()
    corrupt(out, bad)
    return out, bad


def test_a_continued_run_lists_and_learns_what_one_that_was_never_stopped_does(pack, tmp_path, parallel):
    data, bad = pack
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    execute(config(data, steps=9), whole, parallel=parallel)
    execute(config(data, steps=4), halved, parallel=parallel)
    with (halved / "quarantine.jsonl").open("a") as file:  # what a run that was killed later had met already
        file.write(json.dumps({"step": 6, "pack": 0, "dataset": "dots", "row": bad[0], "id": "", "reason": ""}) + "\n")
    execute(config(data, steps=9), halved, parallel=parallel)
    assert sorted(entry["row"] for entry in listed(whole)) == bad
    assert listed(halved) == listed(whole)
    assert weights(halved) == weights(whole)


def test_a_run_saves_and_stops_when_too_many_are_bad_and_goes_on_when_they_are_restored(tmp_path, parallel):
    data = pack_dots(tmp_path / "dots", {"train": 48}, size=32, labels=False, noise=1.0)
    good = {path: path.read_bytes() for path in data.glob("*.tar")}
    corrupt(data, Manifest.open(data).rows(["train"])[::4].tolist())
    with pytest.raises(DataError, match=r"1[12] of 48 samples cannot be read.*trained to step \d+, saved in") as caught:
        execute(config(data, steps=9), tmp_path / "run", parallel=parallel)
    assert caught.value.exit_code == 3
    assert len(listed(tmp_path / "run")) >= 11
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    for path, content in good.items():
        path.write_bytes(content)
    assert execute(config(data, steps=9), tmp_path / "run", parallel=parallel)["train"]["steps"] == 9


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_that_are_killed_go_on_with_the_same_list(pack, tmp_path, parallel, monkeypatch, processes):
    data, bad = pack
    cfg = config(data, steps=9, **EXACT)
    execute(cfg, tmp_path / "one", parallel=parallel)
    at_second_save: Break = {"call": "ddpm_lmk.rundir.retention.retain", "at": 2, "how": "kill"}
    for name, value in breaking.environment(at_second_save).items():
        monkeypatch.setenv(name, value)
    assert launched(cfg, tmp_path / "killed", processes) == 0
    assert len(events(tmp_path / "killed", "ranks.lost")) > 1
    assert sorted(entry["row"] for entry in listed(tmp_path / "killed")) == bad
    assert listed(tmp_path / "killed") == listed(tmp_path / "one")
    assert weights(tmp_path / "killed") == weights(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_agree_when_it_is_too_much(tmp_path, parallel, processes):
    data = pack_dots(tmp_path / "dots", {"train": 48}, size=32, labels=False, noise=1.0)
    corrupt(data, Manifest.open(data).rows(["train"])[::4].tolist())
    cfg = config(data, steps=9, **EXACT)
    with pytest.raises(DataError, match=r"1[12] of 48 samples"):
        execute(cfg, tmp_path / "one", parallel=parallel)
    assert launched(cfg, tmp_path / "several", processes) == 3
    assert listed(tmp_path / "several") == listed(tmp_path / "one")


def test_the_recorded_campaign_lost_no_sample_and_accused_none() -> None:
    result = json.loads((RESULTS / "quarantine.json").read_text())
    assert result["is_as_wanted"]
    cases = {(row["damaged_pct"], row["processes"]) for row in result["rows"]}
    assert cases >= {(0.5, 2), (5.0, 2), (0.5, 4), (5.0, 4)}
    stopped = result["too_small_a_budget_by_processes"]
    assert stopped["1"] == stopped["2"] == stopped["4"]
    assert stopped["1"]["exit_code"] == 3
