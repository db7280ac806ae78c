"""Temperatures and reliability against plain references; a run that fits, keeps and uses them."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lmk.config import ContourCodecConfig, RunConfig
from ddpm_lmk.config.load import dump_run, load_run
from ddpm_lmk.data.loading.corpus import evaluation_corpora, training_corpora
from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.inference import calibration
from ddpm_lmk.inference.calibration import GRID, Likelihoods, calibration_error, reliability
from ddpm_lmk.inference.load import open_run
from ddpm_lmk.report.page import write_report
from ddpm_lmk.run import execute
from ddpm_lmk.tasks.codecs import ContourCodec, Frame
from tests.cli.commands import SMOKE, run_command

SIDE = 12
FITTED = "task.codec={kind: contour, temperatures: fitted, folds: 3}"  # `folds` is in run files of earlier versions


def frame(count: int) -> Frame:
    return Frame(SIDE, torch.full((count, 2), float(SIDE)), torch.eye(2, 3).expand(count, 2, 3))


def likelihoods(maps: torch.Tensor, points: torch.Tensor, weight: torch.Tensor | None = None) -> Likelihoods:
    weight = torch.ones(len(maps)) if weight is None else weight
    sums, counts = calibration._of_batch(ContourCodec(ContourCodecConfig()), maps, points, weight, frame(len(maps)))
    return Likelihoods(sums.double().numpy(), counts.double().numpy())


def slow_temperature(maps: np.ndarray, pixels: list[tuple[int, int]]) -> float:
    """Golden section on the likelihood in double precision, one image after the other."""

    def surprise(log_t: float) -> float:
        total = 0.0
        for logits, (x, y) in zip(maps, pixels):
            scaled = logits / math.exp(log_t)
            total += math.log(np.exp(scaled - scaled.max()).sum()) + scaled.max() - scaled[y, x]
        return total

    low, high, ratio = math.log(0.1), math.log(10.0), (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if surprise(a) < surprise(b) else (a, high)
    return math.exp((low + high) / 2)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_most_likely_one(sharpness: float) -> None:
    """Pixels drawn from softmax(logits), which are then made too sharp or too flat."""
    generator = torch.Generator().manual_seed(2)
    truth = 2 * torch.randn(40, 1, SIDE, SIDE, generator=generator)
    drawn = torch.multinomial(truth.flatten(1).softmax(-1), 1, generator=generator)[:, 0]
    pixels = [(int(i) % SIDE, int(i) // SIDE) for i in drawn]
    points = torch.tensor(pixels, dtype=torch.float32)[:, None]
    found = likelihoods(sharpness * truth, points).temperatures()[0]
    assert found == pytest.approx(slow_temperature((sharpness * truth[:, 0]).double().numpy(), pixels), rel=5e-3)
    assert found == pytest.approx(sharpness, rel=0.3)


def test_batches_add_up_and_padding_and_missing_labels_do_not_count() -> None:
    maps = torch.randn(6, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    points = torch.full((6, 2, 2), 5.0)
    points[1, 0] = float("nan")
    whole = likelihoods(maps, points)
    parts = Likelihoods() + likelihoods(maps[:4], points[:4]) + likelihoods(maps[4:], points[4:])
    np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-5)
    assert whole.counts.tolist() == [5, 6]
    padded = likelihoods(maps, points, torch.tensor([1.0, 1, 1, 1, 0, 0]))
    np.testing.assert_allclose(padded.sums, likelihoods(maps[:4], points[:4]).sums, rtol=1e-5)


def test_no_label_means_no_temperature_and_the_grid_is_the_limit() -> None:
    sums = np.stack([GRID**0, GRID, -GRID])  # flat, best at the lowest, best at the highest
    found = Likelihoods(sums, np.array([0.0, 3.0, 3.0])).temperatures()
    assert found.tolist() == [1.0, pytest.approx(GRID[0]), pytest.approx(GRID[-1])]


def test_reliability_of_an_honest_and_of_a_sure_model() -> None:
    error = np.linspace(1, 50, 500)
    honest = reliability(error, error)
    assert honest["gap"] == pytest.approx(0)
    assert honest["correlation"] == pytest.approx(1)
    assert [each["count"] for each in honest["bins"]] == [50] * 10
    sure = reliability(np.zeros(500), error)
    assert sure["correlation"] is None
    assert sure["gap"] == pytest.approx(error.mean())
    shuffled = np.random.default_rng(0).permutation(error)
    ranks = [np.argsort(np.argsort(values)) for values in (shuffled, error)]
    assert reliability(shuffled, error)["correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_calibration_error_is_that_of_ten_bins_and_an_open_last_one() -> None:
    confidence = np.array([0.01, 0.012, 0.02, 0.14, 0.5, 0.9])
    is_right = np.array([0, 1, 0, 1, 1, 0], bool)
    found = calibration_error(confidence, is_right)
    bins = [np.array([0, 1]), np.array([2]), np.array([3, 4, 5])]
    gaps = [len(part) * abs(confidence[part].mean() - is_right[part].mean()) for part in bins]
    assert [each["count"] for each in found["peaks"]] == [2, 1, 3]
    assert found["ece_pct"] == pytest.approx(100 * sum(gaps) / 6)
    rng = np.random.default_rng(0)
    honest = rng.uniform(0.005, 0.145, 200_000)
    assert calibration_error(honest, rng.random(honest.size) < honest)["ece_pct"] < 0.2
    assert calibration_error(np.full(100, 0.1), np.ones(100, bool))["ece_pct"] == pytest.approx(90)


def settings(data: Path, *words: str) -> RunConfig:
    return load_run(SMOKE / "finetune.yaml", [f"data.path={data}", FITTED, "train.length=1 steps", *words])


def finetuned(data: Path, out: Path, *words: str) -> dict:
    return execute(settings(data, *words), out, device="cpu")


def test_a_run_fits_on_its_validation_split_keeps_uses_and_shows_it(packed_phantoms: Path, tmp_path: Path) -> None:
    results = finetuned(packed_phantoms, tmp_path / "run", "data.validation_split=val")
    kept = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert results["calibration"]["learnt_on"] == "validation split val"
    assert kept["labels"] == 4 * 19
    assert kept["surprise_after"] <= kept["surprise_before"]
    loaded = open_run(tmp_path / "run", device="cpu")
    assert loaded.task.codec.temperatures.tolist() == pytest.approx(kept["temperatures"])  # type: ignore[attr-defined]
    assert loaded.task.export()["temperatures"] == pytest.approx(kept["temperatures"])
    with Image.open(tmp_path / "run" / "calibration.png") as picture:
        assert picture.size[0] > 800
    assert sum(each["count"] for each in results["reliability"]["bins"]) == 6 * 19
    peaks = results["reliability"]["peaks"]
    assert sum(each["count"] for each in peaks) == 6 * 19
    assert all(0 < each["confidence"] < 1 for each in peaks)
    done = run_command("evaluate", tmp_path / "run", "--data", packed_phantoms, "--split", "test")
    again = json.loads((tmp_path / "run" / "evaluate-test" / "results.json").read_text())
    assert done.code == 0
    assert again["reliability"] == results["reliability"]
    for folder in (tmp_path / "run", tmp_path / "run" / "evaluate-test"):
        page = write_report([folder], tmp_path / "report.html")[0].read_text()
        assert "<h2>Calibration</h2>" in page
        assert base64.b64encode((folder / "calibration.png").read_bytes()).decode() in page
        assert f"sella {kept['temperatures'][0]:.2f}" in page
        assert f"{results['reliability']['ece_pct']:.2f}" in page

    kept["temperatures"] = kept["temperatures"][1:]
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match="does not hold 19 temperatures"):
        open_run(tmp_path / "run")


def test_without_validation_labels_a_part_of_the_shots_is_kept_for_them(packed_phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_split, which is null; .*data\.hold_out=.*or set task"):
        finetuned(packed_phantoms, tmp_path / "run", "data.shots=4")
    part = ("data.hold_out={fold: 0, of: 2}", "data.validation_split=held_out")
    results = finetuned(packed_phantoms, tmp_path / "run", "data.shots=4", *part)
    assert results["calibration"]["learnt_on"] == "validation split held_out"
    assert results["calibration"]["labels"] == 2 * 19
    assert results["num_images"] == 2


def test_a_run_that_fitted_them_on_folds_before_training_goes_on_with_them(
    packed_phantoms: Path, tmp_path: Path
) -> None:
    """Versions before this one wrote calibration.json first, under the weights of runs of their own."""
    facts = {"temperatures": [2.0] * 19, "landmarks": [], "learnt_on": "3 folds of the 4 shots", "labels": 76}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(facts))
    (tmp_path / "run" / "config.yaml").write_text(dump_run(settings(packed_phantoms, "data.shots=4")))
    results = finetuned(packed_phantoms, tmp_path / "run", "data.shots=4")
    assert results["calibration"]["learnt_on"] == "3 folds of the 4 shots"


def run_file(packed: Path, *words: str) -> RunConfig:
    return load_run(SMOKE / "finetune.yaml", [f"data.path={packed}", *words])


def test_folds_of_the_shots_are_disjoint_and_complete(packed_phantoms: Path) -> None:
    seen: list[int] = []
    for fold in range(3):
        cfg = run_file(packed_phantoms, "data.shots=7", f"data.hold_out={{fold: {fold}, of: 3}}")
        learnt = training_corpora(cfg)[0].rows.tolist()
        held = evaluation_corpora(cfg, "held_out")[0].rows.tolist()
        assert not set(learnt) & set(held)
        assert len(learnt) + len(held) == 7
        seen += held
    assert sorted(seen) == sorted(training_corpora(run_file(packed_phantoms, "data.shots=7"))[0].rows.tolist())


def test_folds_that_cannot_be_are_refused(packed_phantoms: Path) -> None:
    with pytest.raises(ConfigError, match="there are 2 shots; use at most as many parts"):
        training_corpora(run_file(packed_phantoms, "data.shots=2", "data.hold_out.of=3"))
    with pytest.raises(ConfigError, match="fold=3 is none of 3 parts"):
        run_file(packed_phantoms, "data.hold_out={fold: 3, of: 3}")
    with pytest.raises(ConfigError, match="for task landmarks"):
        load_run(SMOKE / "pretrain.yaml", [f"data.path={packed_phantoms}", "data.hold_out.of=3"])
    with pytest.raises(ConfigError, match="a mixture goes without"):
        run_file(packed_phantoms, FITTED, "data.path=[a, b]")
