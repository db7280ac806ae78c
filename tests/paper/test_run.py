"""The paper's fine-tuning run file, made small, from a packed set to scores under both protocols."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.inference import scoring
from tests.cli.commands import CONFIGS, run_command

FINETUNE = CONFIGS / "paper" / "finetune_cephalometric.yaml"
SMALL = ("model.width=8", "model.multipliers=[1, 2]", "data.image_size=32", "train.length=2 epochs", "data.workers=0")


@pytest.fixture(scope="module")
def skulls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skulls resized as the released fine-tuning does it: blurred first."""
    out = tmp_path_factory.mktemp("paper") / "skulls"
    pack(
        "skull",
        out,
        PackSettings(kind="phantom", size=32, filter="gaussian", counts={"train": 5, "val": 3, "test": 4}, seed=7),
        workers=1,
    )
    return out


def test_the_shots_of_a_run_are_the_first_names(skulls: Path) -> None:
    cfg = load_run(FINETUNE, [f"data.path={skulls}", "data.shots=3", *SMALL])
    corpus = training_corpora(cfg)[0]
    names = sorted(record.id for record in corpus.records.values())
    assert [corpus.records[row].id for row in corpus.rows.tolist()] == names[:3]


def test_the_protocol_runs_and_is_scored_both_ways(skulls: Path, tmp_path: Path) -> None:
    words = (f"data.path={skulls}", "data.shots=3", *SMALL)
    done = run_command("finetune", FINETUNE, "--cpu", 1, "--out", tmp_path / "run", *words)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["labels"] == {"training": 3, "validation": 3}
    assert results["train"]["steps"] == 2  # one short window each epoch
    assert results["protocols"]["paper"]["grid"] == 256
    assert results["protocols"]["original"]["mre"] > 0
    assert set(results["mean_shape"]) == {"original", "paper"}


def test_a_pack_with_another_filter_is_refused(packed_phantoms: Path) -> None:
    def opened(*words: str) -> None:
        training_corpora(load_run(FINETUNE, [f"data.path={packed_phantoms}", "data.shots=3", *SMALL, *words]))

    opened("data.packed.filter=area")
    opened("data.packed.filter=null")
    with pytest.raises(ConfigError, match=r"data\.packed\.filter=gaussian, but .* was packed with filter=area"):
        opened()
    with pytest.raises(ConfigError, match="packs have no such setting; they have allow_burned_in"):
        opened("data.packed.filter=area", "data.packed.colour=1")


def test_a_failed_landmark_is_scored_at_the_corner_of_the_grid() -> None:
    """paper.md, section 3, Decoding: failure is (0, 0), and counts as if it were found there."""
    size = np.array([[1935.0, 2400.0]])
    true = np.full((1, 6, 2), 100.0) / 256 * size
    predicted = true.copy()
    predicted[0, 2] = 0.0
    failed = np.zeros((1, 6), bool)
    failed[0, 2] = True
    scores = scoring.score_paper(predicted, size, true, SPECS["chest"], failed=failed)
    assert scores["failed"] == 1
    assert scores["mre"] == pytest.approx(np.hypot(100, 100) / 6)
