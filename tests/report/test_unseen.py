"""Scores without the films that have copies among the training films, as far as a pre-training run lists them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.report import unseen
from ddpm_lmk.report.collect import Study, collect
from tests.known_runs import put, write_run


@pytest.fixture
def study(tmp_path: Path, packed_phantoms: Path) -> Study:
    """A run that is off by 10, 20, 30, ... px on the phantoms of split test, the first of them copied in training."""
    manifest = Manifest.open(packed_phantoms)
    rows = [int(row) for row in manifest.rows(["test"])]
    facts = [manifest.read_record(row) for row in rows]
    truth = {each.id: (np.array(each.points), each.native_size, 0.1) for each in facts}
    parent = tmp_path / "parent"
    errors = 10.0 * np.arange(1, len(rows) + 1)
    results = write_run(tmp_path / "run", errors_px=errors, weights=str(parent), truth=truth, spec=manifest.spec)
    put(tmp_path / "run" / "results.json", results | {"dataset": manifest.dataset})
    put(parent / "metrics.jsonl", "")
    pack = {"dataset": manifest.dataset, "path": str(packed_phantoms), "splits": ["test"]}
    first = min(range(len(rows)), key=lambda index: facts[index].id)
    copy = {"kind": "near copy", "film": {"dataset": manifest.dataset, "row": 0}}
    copy |= {"of": {"dataset": manifest.dataset, "row": rows[first]}}
    record = {"protected": [pack | {"fingerprint": manifest.fingerprint}], "leaks": {"near copy": 1}}
    put(parent / "leakage.json", record | {"listed": {"leaks": [copy]}})
    (found,) = collect([tmp_path / "run"])
    return found


def test_copied_films_are_left_out_of_the_mean(study: Study) -> None:
    films = unseen.copied_films(study)
    names = sorted(study.runs[0].predictions)
    assert films == {names[0]}
    errors = study.runs[0].image_errors()
    assert unseen.without(study.runs[0], films) == pytest.approx(np.mean([errors[name] for name in names[1:]]))
    page = unseen.table(study)
    assert f"MRE on the {len(names) - 1} scored films without a copy" in page
    assert f"all films: {np.mean(list(errors.values())):.2f}" in page


@pytest.mark.parametrize("change", ["fingerprint", "not all listed"])
def test_a_record_that_does_not_tell_all_tells_nothing(study: Study, tmp_path: Path, change: str) -> None:
    path = tmp_path / "parent" / "leakage.json"
    text = path.read_text()
    fingerprint = text.split('"fingerprint": "')[1].split('"')[0]
    changed = text.replace(fingerprint, "0" * 64) if change == "fingerprint" else text.replace('copy": 1', 'copy": 2')
    assert changed != text
    path.write_text(changed)
    assert unseen.copied_films(study) == set()
    assert unseen.table(study) == ""
