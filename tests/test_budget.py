"""What a sweep will cost: counts that can be worked out by hand, and hours only where something was measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ddpm_lmk.budget import budget_table, needs
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.models import model_cost
from ddpm_lmk.sweep import Sweep, cell_folder, load_sweep
from tests.known_runs import put

RUN = """
name: tiny
data: {{path: {data}, image_size: 32, validation_split: val}}
model: {{width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}}
task: {{kind: landmarks}}
train: {{length: 12 steps, group_size: 4, evaluate_every: 3 steps}}
"""
LEARN = (
    "name: learn\ndata: {{path: {data}, image_size: 32}}\ntask: {{kind: denoise}}\n"
    "train: {{length: 5 steps, group_size: 8}}\n"
)


@pytest.fixture
def sweep(tmp_path: Path, packed_phantoms: Path) -> Sweep:
    (tmp_path / "run.yaml").write_text(RUN.format(data=packed_phantoms))
    (tmp_path / "learn.yaml").write_text(LEARN.format(data=packed_phantoms))
    text = "name: s\nrun: run.yaml\nstages: {p: {run: learn.yaml}}\nshots: [1, 2]\nseeds: [0, 1]\n"
    (tmp_path / "sweep.yaml").write_text(text + "grids: [{start: {scratch: null, p: 'stage:p'}}]\n")
    return load_sweep(tmp_path / "sweep.yaml", out=tmp_path / "out")


def test_operations_are_those_of_training_validation_and_the_score(
    sweep: Sweep, tmp_path: Path, packed_phantoms: Path
) -> None:
    found = {need.what: need for need in needs(sweep, tmp_path / "out", "cpu", workers=2)}
    scratch, manifest = found["scratch"], Manifest.open(packed_phantoms)
    cfg = sweep.cells[0].cfg
    cost = model_cost(cfg.model, 32, manifest.spec.num_landmarks)
    val, test = (len(manifest.rows([split])) for split in ("val", "test"))
    wanted = 4 * (48 * cost.flops_train + (4 * val + test) * cost.flops_forward)
    assert (scratch.runs, scratch.images) == (4, 4 * 48)
    assert scratch.tflop == pytest.approx(wanted / 1e12)
    assert scratch.memory_gib > 0
    assert (found["stage p"].runs, found["stage p"].images) == (1, 40)


def test_recipes_of_a_start_have_rows_of_their_own_and_views_cost_a_pass_each(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    (tmp_path / "run.yaml").write_text(RUN.format(data=packed_phantoms))
    few, many = (
        "{start: {scratch: null}, shots: [1, 2]}",
        "{start: {scratch: null}, shots: [5], set: {task.views: 3}}",
    )
    (tmp_path / "sweep.yaml").write_text(f"name: s\nrun: run.yaml\nseeds: [0]\ngrids: [{few}, {many}]\n")
    found = {need.what: need for need in needs(load_sweep(tmp_path / "sweep.yaml"), tmp_path, "cpu", workers=1)}
    assert {what: need.runs for what, need in found.items()} == {"scratch, 1, 2 labels": 2, "scratch, 5 labels": 1}
    manifest = Manifest.open(packed_phantoms)
    cfg = load_sweep(tmp_path / "sweep.yaml").cells[0].cfg
    forward = model_cost(cfg.model, 32, manifest.spec.num_landmarks).flops_forward / 1e12
    more = len(manifest.rows(["test"])) * 2 * forward
    few, many = (found[what].tflop for what in ("scratch, 1, 2 labels", "scratch, 5 labels"))
    assert few is not None
    assert many is not None
    assert many - few / 2 == pytest.approx(more)


def test_hours_are_those_of_cells_that_are_done(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = next(cell for cell in sweep.cells if cell.start == "scratch")
    put(cell_folder(out, first.name) / "results.json", {"train": {"images": 48, "wall_s": 96.0}})
    monkeypatch.setattr("ddpm_lmk.budget.is_done", lambda folder, run: folder.name == first.name)
    monkeypatch.setattr("ddpm_lmk.budget.estimate_step", lambda *cfg, **more: None)
    found = {need.what: need for need in needs(sweep, out, "cpu", workers=2)}
    assert found["scratch"].hours == pytest.approx(3 * 96 / 3600)  # three cells are left, two seconds an image
    assert found["p"].hours is None
    console = Console(file=io.StringIO(), width=200)
    console.print(budget_table(sweep, out, "cpu", workers=2))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.04 h on 2 workers" in said
    assert "2 rows not known" in said
