"""How long a sweep takes: what is left of it, shared out over its workers, and corrected by what runs really took."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import Timing
from ddpm_lmk.launcher import Placement
from ddpm_lmk.sweep import Sweep, load_sweep
from ddpm_lmk.sweep import forecast as budgets
from ddpm_lmk.sweep.forecast import budget, budget_table
from ddpm_lmk.sweep.progress import Remaining, span_s

RUN = """
name: tiny
data: {{path: {data}, image_size: 32}}
model: {{width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}}
task: {{kind: landmarks}}
train: {{duration: 10 steps, global_batch_size: 4}}
evaluate: {{split: null}}
"""
LEARN = RUN.replace("landmarks", "denoise").replace("tiny", "learn").replace("10 steps", "50 steps")
SECONDS = {"landmarks": 2.0, "denoise": 1.0}  # of an image


@pytest.fixture
def sweep(tmp_path: Path, packed_phantoms: Path) -> Sweep:
    (tmp_path / "run.yaml").write_text(RUN.format(data=packed_phantoms))
    (tmp_path / "learn.yaml").write_text(LEARN.format(data=packed_phantoms))
    text = "name: s\nrun: run.yaml\nstages: {p: {run: learn.yaml}}\nshots: [1, 2]\nseeds: [0, 1]\n"
    (tmp_path / "sweep.yaml").write_text(text + "grids: [{start: {scratch: null, p: 'stage:p'}}]\n")
    return load_sweep(tmp_path / "sweep.yaml", out=tmp_path / "out")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Every call that times steps: the kinds of runs, and how many processes side by side."""
    calls: list[tuple[list[str], int]] = []

    def time_apart(runs: Sequence[RunConfig], *, processes: int, **more: Any) -> list[Timing | str]:
        calls.append(([cfg.task.kind for cfg in runs], processes))
        return [Timing(SECONDS[cfg.task.kind], 0.0, images=4, of=4, steps=3, start_s=5.0) for cfg in runs]

    monkeypatch.setattr(budgets, "time_apart", time_apart)
    return calls


def test_one_run_of_each_kind_is_timed_beside_the_others_there_will_be(
    sweep: Sweep, tmp_path: Path, timed: list[tuple[list[str], int]]
) -> None:
    found = budget(sweep, tmp_path / "out", "cpu", workers=3)

    assert timed == [(["denoise"], 1), (["landmarks"], 3)]  # one stage, eight cells of one kind
    assert len(found.runs) == 9
    assert found.seconds()["stage p"] == 50 * 4 * 1.0
    assert found.seconds()["scratch-k1-s0"] == 10 * 4 * 2.0
    assert found.total_s == (5 + 200) + (5 + 3 * 80)  # eight cells on three workers are three in a row
    assert str(found) == "about 8 min here: 1 stage and 8 cells on 3 workers (from steps timed here)"


def test_workers_that_share_gpus_are_timed_on_those_they_share(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def time_apart(runs: Sequence[RunConfig], *, processes: int, devices: int, **more: Any) -> list[Timing | str]:
        asked.append((processes, devices))
        return ["not now"] * len(runs)

    def time_run(cfg: RunConfig, spec: DatasetSpec, placement: Placement, **more: Any) -> Timing | str:
        assert (placement, more["is_apart"]) == (Placement("cuda", 2), True)
        return Timing(1.0, 0.0, images=2, of=2, steps=3, processes=2)

    monkeypatch.setattr(budgets, "time_apart", time_apart)
    monkeypatch.setattr(budgets, "time_run", time_run)
    found = budget(sweep, tmp_path / "out", "cuda", workers=4, devices=2)

    assert asked == [(4, 2)]
    assert found.seconds() == {"stage p": 50 * 4 / 2}  # a stage is shared out over both GPUs


def test_what_is_done_is_not_counted_and_what_was_begun_counts_from_its_checkpoint(
    sweep: Sweep, tmp_path: Path, timed: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(budgets, "is_done", lambda folder, run: folder.name.startswith("scratch"))
    (out / "stages" / "p" / "checkpoints" / "step-00000030").mkdir(parents=True)
    found = budget(sweep, out, "cpu", workers=2)

    assert found.seconds() == {"stage p": 20 * 4.0, **{f"p-k{k}-s{s}": 80.0 for k in (1, 2) for s in (0, 1)}}
    console = Console(file=io.StringIO(), width=200)
    console.print(budget_table(found))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "scratch" not in said
    assert "80 s" in said
    assert "5 min" in said  # of all four cells


def test_where_the_device_is_not_here_nothing_is_known(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "time_apart", lambda runs, **more: ["no such device"] * len(runs))
    monkeypatch.setattr(budgets, "time_run", lambda cfg, spec, place, **more: "no such device")
    found = budget(sweep, tmp_path / "out", "cuda", workers=2)

    assert not found.is_known
    assert str(found) == "how long it takes is not known: no such device"
    budget_table(found)


def test_where_a_stage_takes_days_its_cells_are_not_timed(
    sweep: Sweep, tmp_path: Path, timed: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, "denoise", 3600.0)
    found = budget(sweep, tmp_path / "out", "cpu", workers=2)

    assert timed == [(["denoise"], 1)]
    assert not found.is_known
    assert str(found).startswith("more than 8 days here: 1 stage and 8 cells on 2 workers (from steps timed here; not")


def test_jobs_go_to_whoever_is_free_first() -> None:
    assert span_s([3, 3, 2, 2, 2], 2) == 7
    assert span_s([4.0], 2, busy=[1.0, 3.0]) == 5
    assert span_s([], 2, busy=[1.0]) == 1


def test_what_runs_took_corrects_what_is_left(sweep: Sweep) -> None:
    seconds = {"stage p": 100.0, **{cell.name: 10.0 for cell in sweep.cells}}
    left = Remaining(sweep, seconds, workers=2, stages_at_once=2)
    assert left.seconds() == 100 + 4 * 10
    left.start("stage p")
    left.advance("stage p", 0.75)
    assert left.seconds() == 25 + 40

    left.end("stage p", 300.0)  # three times as long, against one forecast of 100 s that was right: twice
    assert left.seconds() == 80
    for name in ("scratch-k1-s0", "scratch-k1-s1"):
        left.start(name)
        left.advance(name, 0.5)
    assert left.seconds() == 10 + 3 * 20
    left.skip("scratch-k1-s0")  # failed
    assert left.seconds() == 70  # six wait for two workers, of which one is free at once and one in ten seconds


def test_without_a_forecast_the_first_cell_that_ends_tells_by_its_images(sweep: Sweep) -> None:
    left = Remaining(sweep, {}, workers=1, stages_at_once=1)
    left.skip("stage p")
    assert left.seconds() is None
    left.end("scratch-k1-s0", 30.0)
    assert left.seconds() == 7 * 30
