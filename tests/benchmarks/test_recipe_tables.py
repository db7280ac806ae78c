"""The table of what the recipe's parts give: single changes with the same seeds, and marks for one seed."""

from __future__ import annotations

import json
from pathlib import Path

import _tables
import _trial_tables
import pytest
from _trial_tables import Setting, flat, one_change, trials_table

from ddpm_lmk.bench import Result
from ddpm_lmk.config.load import load_run
from tests.benchmarks.scripts import ROOT
from tests.known_runs import put

RECIPE = ROOT / "configs" / "finetune" / "isbi_cpu.yaml"


def trial(labels: int, seed: int, mre: float, *words: str) -> dict:
    """A line of the result file."""
    tried = ("task.views", "train.ema", "optim.lr", "train.ema.decay")
    settings = {key: value for key, value in flat(load_run(RECIPE, list(words))).items() if key in tried}
    facts = {"labels": labels, "seed": seed, "weights": "random", "mre_mm": mre, "sdr_2mm_pct": 50.0, "cpu_s": 30.0}
    return {**facts, "settings": settings}


def test_single_changes_are_found_paired_by_seed_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_run(RECIPE)
    monkeypatch.setattr(_trial_tables, "_recipes", lambda: {5: flat(recipe), 10: flat(recipe)})
    one = "task.views=1"
    lines = [trial(5, seed, 2.0 + seed) for seed in (0, 1)]
    lines += [trial(5, seed, 2.5 + 1.02 * seed, one) for seed in (0, 1)]
    lines += [trial(5, 0, 2.05, "train.ema=null"), trial(5, 0, 9.0, one, "optim.lr=7e-3")]
    lines += [trial(10, 0, 2.0), trial(10, 1, 3.0, one)]  # no common seed: no pair
    source = tmp_path / "isbi_recipe" / "trials.jsonl"
    put(source, "".join(json.dumps(line) + "\n" for line in [{"versions": {}}, *lines]))
    rows = "".join(f"ours,{k},{seed},{mre}\n" for k in (5, 10) for seed, mre in ((0, 2.0), (1, 2.2), (2, 2.1)))
    put(tmp_path / "table2_small" / "results.csv", "start,shots,seed,original_mre\n" + rows)
    text = trials_table(source)
    assert "| views | 8 | 1 | 5 | 0, 1 | 2.50 → 3.01 | +0.51 (+0.38 to +0.64) | nothing else |" in text
    assert "| average of the weights | as the recipe | none | 5 | 0 | 2.00 → 2.05 | (+0.05), one seed: open |" in text
    assert f"| lr | {recipe.optim.lr:g} | 0.007 | 5 | 0 | 2.50 → 9.00 | +6.50, one seed | views 1 |" in text
    assert "| views | 8 | 1 | 10" not in text
    assert "| nothing: the recipe | random | 0, 1 | 2.50 (n=2) |" in text


def test_a_table_is_of_the_newest_result_that_left_nothing_out(tmp_path: Path) -> None:
    whole, cut = Result("sweep", settings={}), Result("sweep", settings={})
    path = whole.write(tmp_path, "a")
    cut.budget.leave_out("3 of 6 rounds")
    cut.write(tmp_path, "b")
    assert _tables.newest(tmp_path, "sweep") == path


def test_settings_that_belong_together_are_one_change() -> None:
    codec = ["task.codec.sigma_px=2", "task.codec.decode_radius_px=5"]
    recipe = flat(load_run(RECIPE, codec)) | {"weights": "random"}
    wide = (("task.codec.decode_radius_px", 9.0), ("task.codec.sigma_px", 3.0))
    groups = {Setting((), "random"): {0: {"mre_mm": 2.0}}, Setting(wide, "random"): {0: {"mre_mm": 3.0}}}
    (row,) = one_change(5, groups, recipe, 0.1)
    assert row[:3] == ["target: σ, read within (px)", "2, 5", "3, 9"]
    assert row[5:7] == ["2.00 → 3.00", "+1.00, one seed"]
