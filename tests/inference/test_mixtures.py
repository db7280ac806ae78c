"""Several labelled datasets with different landmarks in one run: each keeps its own columns, unit and score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_lmk.config import Duration, EvaluateConfig, RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.spec import SPECS, mixture
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.inference.evaluate import evaluate_run
from ddpm_lmk.inference.load import open_run
from ddpm_lmk.inference.predict import predict_images
from ddpm_lmk.report.collect import collect
from ddpm_lmk.run import execute

SIZE = 32
CHESTS, HANDS = 6, 37  # landmarks


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Chests in pixels and hands in millimetres, 6 and 37 landmarks."""
    folder = tmp_path_factory.mktemp("packs")
    for kind, seed in (("chest", 1), ("hand", 2)):
        pack(
            kind,
            folder / kind,
            PackSettings(kind="phantom", size=SIZE, counts={"train": 6, "test": 3}, seed=seed),
            workers=1,
        )
    return [str(folder / kind) for kind in ("chest", "hand")]


def config(packs: list[str], **model: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "both",
            "data": {"path": packs, "shots": 4, "image_size": SIZE},
            "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 4, **model},
            "task": {"kind": "landmarks"},
            "train": {"duration": 3, "global_batch_size": 8, "micro_batch": 4},
            "runtime": {"cache_pixels": "ram", "workers": 0, "checkpoint_every": 2, "log_every": 1},
            "evaluate": {"split": "test", "batch": 2},
        }
    )


@pytest.fixture(scope="module")
def finished(packs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "both"
    execute(config(packs), out)
    return out


def test_each_dataset_has_its_own_columns_and_shots(packs: list[str]) -> None:
    loader = open_loader(config(packs), stage="train")
    assert loader.num_images == 8  # four of each
    assert loader.spec.num_landmarks == CHESTS + HANDS
    group = next(loader.global_batches())
    seen = set()
    for batch in group.micro_batches:
        assert batch.points is not None
        assert batch.domain is not None
        for points, domain, name in zip(batch.points, batch.domain.tolist(), batch.ids, strict=True):
            own, other = (slice(0, CHESTS), slice(CHESTS, None))[:: 1 if domain == 0 else -1]
            assert points[own].isfinite().all()
            assert points[other].isnan().all()
            seen.add((domain, name))
    loader.close()
    assert {domain for domain, _ in seen} == {0, 1}


def test_sets_with_one_spec_share_their_landmarks_and_two_meanings_of_a_name_are_refused() -> None:
    chest, hand = SPECS["chest"], SPECS["hand"]
    assert mixture([chest, chest]) == chest
    both = mixture([chest, hand, chest])
    assert [part.name for part in both.domains] == ["chest", "hand"]
    assert both.landmark_names[both.columns(1)][0] == "hand.ulna_outer_corner"
    with pytest.raises(ConfigError, match="two sets called chest"):
        mixture([chest, chest.model_copy(update={"sdr_thresholds": (1.0,)})])


@pytest.fixture(scope="module")
def universal(packs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of GU2Net over both."""
    fields = config(packs).model_dump(mode="json")
    fields |= {"name": "universal", "model": {"kind": "gu2net", "width": 4}}
    cfg = RunConfig.model_validate(fields | {"task": {"kind": "landmarks", "codec": {"kind": "gaussian"}}})
    out = tmp_path_factory.mktemp("runs") / "universal"
    execute(cfg, out)
    return cfg, out


def test_gu2net_learns_all_datasets_with_layers_of_their_own(universal: tuple[RunConfig, Path]) -> None:
    _, out = universal
    loaded = open_run(out)
    assert loaded.model.landmarks == (CHESTS, HANDS)
    counts = [int(norm.num_batches_tracked) for norm in loaded.model.local_net.enter.first.norm]  # type: ignore[union-attr]
    assert all(counts)
    assert {part["spec"] for part in json.loads((out / "results.json").read_text())["parts"]} == {
        "phantom-chest",
        "phantom-hand",
    }


def test_a_run_that_is_not_scored_ends_all_the_same(packs: list[str], tmp_path: Path) -> None:
    cfg = config(packs)
    results = execute(cfg.model_copy(update={"evaluate": EvaluateConfig(split=None)}), tmp_path / "run")
    assert results["train"]["steps"] == 3
    assert results["leakage"] is None


def test_a_killed_run_of_gu2net_ends_with_the_same_weights(universal: tuple[RunConfig, Path], tmp_path: Path) -> None:
    cfg, out = universal
    longer = cfg.model_copy(update={"train": cfg.train.model_copy(update={"duration": Duration(2)})})
    execute(longer, tmp_path / "run")
    execute(cfg, tmp_path / "run")  # resumes from the checkpoint of step 2
    for name in ("model", "ema"):
        weights = [
            load_file(folder / "snapshots" / "step-00000003" / f"{name}.safetensors")
            for folder in (out, tmp_path / "run")
        ]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_each_dataset_is_scored_by_itself(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["kind"] == "mixture"
    chest, hand = results["parts"]
    assert (chest["spec"], chest["protocols"]["original"]["unit"]) == ("phantom-chest", "px")
    assert (hand["spec"], hand["protocols"]["original"]["unit"]) == ("phantom-hand", "mm")
    assert chest["labels"]["training"] == hand["labels"]["training"] == 4
    assert len(hand["protocols"]["original"]["per_landmark"]) == HANDS
    for part in (chest, hand):
        rows = (finished / part["folder"] / "predictions.csv").read_text().splitlines()
        assert len(rows) == 1 + 3 * len(part["protocols"]["original"]["per_landmark"])


def test_a_report_shows_one_study_per_dataset(finished: Path) -> None:
    studies = {study.spec: study for study in collect([finished])}
    assert set(studies) == {"phantom-chest", "phantom-hand"}
    assert [len(errors) for errors in studies["phantom-hand"].runs[0].errors.values()] == [HANDS] * 3


def test_a_finished_run_scores_and_predicts_the_dataset_it_is_given(
    finished: Path, packs: list[str], tmp_path: Path
) -> None:
    again = evaluate_run(finished, data=packs[1], split="test", out=tmp_path / "hands")
    first = json.loads((finished / "results.json").read_text())["parts"][1]
    assert again["protocols"] == first["protocols"]
    wanted = first["mean_shape"]["original"]["mre"]  # from points that the results keep with six digits
    assert again["mean_shape"]["original"]["mre"] == pytest.approx(wanted, rel=1e-4)

    picture = tmp_path / "film.png"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 40), np.uint8)).save(picture)
    with pytest.raises(ConfigError, match="has learnt phantom-chest, phantom-hand, asked for none of them"):
        predict_images(finished, [picture], tmp_path / "none")
    summary = predict_images(finished, [picture], tmp_path / "chest", dataset="phantom-chest")
    assert summary.predicted == 1
    assert len((tmp_path / "chest" / "predictions.csv").read_text().splitlines()) == 1 + CHESTS


def test_a_run_of_its_own_gives_the_same_points_as_its_view_in_the_mixture(finished: Path, packs: list[str]) -> None:
    """The view of a dataset reads its columns of the maps and nothing else."""
    loaded = open_run(finished)
    view = loaded.for_dataset("phantom-hand")
    batch = next(iter(open_loader(config(packs[1:]), stage="evaluate", split="test")))
    with torch.inference_mode():
        whole, part = loaded.task.predict(loaded.model, batch), view.task.predict(loaded.model, batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(part.points, whole.points[:, CHESTS:])
