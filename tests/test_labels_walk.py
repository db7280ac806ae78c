"""From 20 films in labelme and a folder of DICOM files to corrected predictions and back, as docs/labels.md says.

The page is run as it stands where documents are; here its commands are run in one process, and what is packed at the
end is compared with what the clinician left in labelme.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.data.shards.manifest import Manifest
from tests.cli.commands import run_command
from tests.data.labelme_films import ALL, LABELLED, MOVED_PX, correct, draw

PAGE = Path(__file__).resolve().parent.parent / "docs" / "labels.md"
WALK = re.search(r"\n## 20 films in labelme.*?\n(.*?)\n## ", PAGE.read_text(), re.DOTALL)


def test_five_commands_lead_from_labelme_to_corrected_predictions_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WALK is not None
    commands = re.findall(r"^ddpm-lmk (.*)$", WALK[1].replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 5
    draw(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if command.startswith("shards pack found"):
            drafts = {path.stem: shapes(path) for path in Path("found/labelme").glob("*.json")}
            correct(Path("found/labelme"))
        result = run_command(*shlex.split(command))
        assert result.code == 0, f"{command}: {result.err}"
    films = Manifest.open("shards/films")
    records = [films.read_record(row) for row in range(len(films))]
    assert sorted(record.id for record in records) == [f"film-{index:02}" for index in range(ALL)]
    labelled = [record for record in records if record.points is not None]
    assert len(labelled) == LABELLED
    assert {record.split for record in labelled} == {"train", "val"}
    for record in labelled:
        written = shapes(Path(f"films/{record.id}.json"))
        np.testing.assert_allclose(record.points, written - 0.5, atol=0.01)  # labelme counts from the corner
    assert films.spec.unit == "mm"
    corrected = Manifest.open("shards/corrected")
    assert corrected.spec.landmark_names == films.spec.landmark_names
    again = {record.id: record for record in map(corrected.read_record, range(len(corrected)))}
    assert len(again) == ALL
    moved = np.zeros((6, 2))
    moved[0] = MOVED_PX
    for record in records:
        np.testing.assert_allclose(again[record.id].points, drafts[record.id] + moved - 0.5, atol=0.01)
        assert again[record.id].mm_per_px == record.mm_per_px is not None
        assert again[record.id].source == record.source  # the DICOM file, not its copy


def shapes(path: Path) -> np.ndarray:
    """The points of a file of labelme, as it counts."""
    return np.array([shape["points"][0] for shape in json.loads(path.read_text())["shapes"]])
