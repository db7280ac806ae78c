"""The tables of what the recipe's parts give: single changes with the same seeds, marks for one seed, ablations."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import _trial_tables
import pytest
from _ablation_tables import ablations_table
from _trial_tables import Setting, one_change, trials_table
from trials import flat

from ddpm_lmk.config.load import dump_run, load_run
from tests.benchmarks.scripts import BENCHMARKS, ROOT
from tests.known_runs import put

RECIPE = ROOT / "configs" / "finetune" / "isbi_cpu.yaml"


def trial(folder: Path, name: str, labels: int, seed: int, mre: float, *words: str) -> dict:
    """A line of a log, and the run directory it is about."""
    cfg = load_run(RECIPE, [f"data.shots={labels}", f"seed={seed}", *words])
    put(folder / f"{name}-k{labels}-s{seed}" / "config.yaml", dump_run(cfg))
    rates = {"2": 50.0, "2.5": 60.0, "3": 70.0, "4": 80.0}
    return {
        "name": name,
        "shots": labels,
        "seed": seed,
        "size": 128,
        "mre": mre,
        "sdr": rates,
        "cpu": 30.0,
        "wall": 31.0,
    }


def collected(tmp_path: Path, lines: list[dict], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result file that trials.py makes of a log."""
    put(tmp_path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "results" / "isbi_recipe" / "trials.jsonl"
    words = [str(tmp_path / "log.jsonl"), str(tmp_path / "runs"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "trials.py"), *words])
    runpy.run_path(str(BENCHMARKS / "trials.py"), run_name="__main__")
    errors = ((0, 2.0), (1, 2.2), (2, 2.1))
    rows = "".join(f"ours,{labels},{seed},{mre}\n" for labels in (5, 10) for seed, mre in errors)
    put(tmp_path / "results" / "table2_small" / "results.csv", "start,shots,seed,original_mre\n" + rows)
    return out


def test_single_changes_are_found_paired_by_seed_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_run(RECIPE)
    monkeypatch.setattr(_trial_tables, "_recipes", lambda: {5: flat(recipe), 10: flat(recipe)})
    runs, one = tmp_path / "runs", "task.views=1"
    lines = [trial(runs, "usual", 5, seed, 2.0 + seed) for seed in (0, 1)]
    lines += [trial(runs, "one", 5, seed, 2.5 + 1.02 * seed, one) for seed in (0, 1)]
    lines += [trial(runs, "raw", 5, 0, 2.05, "train.ema=null"), trial(runs, "both", 5, 0, 9.0, one, "optim.lr=7e-3")]
    lines += [trial(runs, "usual", 10, 0, 2.0), trial(runs, "one", 10, 1, 3.0, one)]  # no common seed: no pair
    gone = {**lines[0], "name": "gone"}
    source = collected(tmp_path, [*lines, gone], monkeypatch)
    stored = [json.loads(line) for line in source.read_text().splitlines()]
    assert len(stored) == 1 + len(lines)
    assert str(tmp_path) not in source.read_text()
    text = trials_table(source)
    assert "| views | 8 | 1 | 5 | 0, 1 | 2.50 → 3.01 | +0.51 (+0.38 to +0.64) | nothing else |" in text
    assert "| average of the weights | as the recipe | none | 5 | 0 | 2.00 → 2.05 | (+0.05), one seed: open |" in text
    assert f"| lr | {recipe.optim.lr:g} | 0.007 | 5 | 0 | 2.50 → 9.00 | +6.50, one seed | views 1 |" in text
    assert "| views | 8 | 1 | 10" not in text
    assert "| nothing: the recipe | random | 0, 1 | 2.50 (n=2) |" in text


def test_settings_that_belong_together_are_one_change() -> None:
    codec = ["task.codec.sigma_px=2", "task.codec.decode_radius_px=5"]
    recipe = flat(load_run(RECIPE, codec)) | {"weights": "random"}
    wide = (("task.codec.decode_radius_px", 9.0), ("task.codec.sigma_px", 3.0))
    groups = {Setting((), "random"): {0: {"mre_mm": 2.0}}, Setting(wide, "random"): {0: {"mre_mm": 3.0}}}
    (row,) = one_change(5, groups, recipe, 0.1)
    assert row[:3] == ["target: σ, read within (px)", "2, 5", "3, 9"]
    assert row[5:7] == ["2.00 → 3.00", "+1.00, one seed"]


def test_ablations_are_told_apart_from_chance(tmp_path: Path) -> None:
    errors = {"ours": (2.0, 3.0, 2.5), "frozen": (3.0, 4.1, 3.4), "raw": (2.1, 2.9, 2.6)}
    rows = [f"{start},10,{seed},{mre},50,80\n" for start, values in errors.items() for seed, mre in enumerate(values)]
    put(tmp_path / "results.csv", "start,shots,seed,original_mre,original_sdr_2,original_sdr_4\n" + "".join(rows))
    titles = {"frozen": {"title": "trunk frozen"}, "ours": {"title": "our recipe"}, "raw": {}}
    put(tmp_path / "sweep.json", {"rows": titles})
    lines = ablations_table(tmp_path / "results.csv").splitlines()
    assert lines[2] == "| our recipe | 3 | 2.50 ± 0.50 |  |  |  | 50.0 / 80.0 |"
    assert lines[3] == "| trunk frozen | 3 | 3.50 ± 0.56 | +1.00 | +0.75 to +1.25 | worse | 50.0 / 80.0 |"
    assert lines[4].startswith("| raw | 3 | 2.53 ± 0.40 | +0.03 |")
    assert "no clear difference" in lines[4]
