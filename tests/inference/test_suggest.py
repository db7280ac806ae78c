"""`suggest` on real runs: what is ranked, what counts as labelled, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.preview.pictures import CAPTION, COLUMNS, GAP, TILE, TITLE
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.inference.suggest import suggest_images
from ddpm_lmk.run import execute
from tests.cli.commands import SMOKE, run_command
from tests.conftest import NETWORK
from tests.data.dot_packs import corrupt, pack_dots


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images without labels to choose from, and five of another split."""
    return pack_dots(tmp_path_factory.mktemp("pool") / "pool", {"train": 30, "rest": 5}, size=32, labels=False)


@pytest.fixture(scope="module")
def denoise_run(dots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training."""
    return _run(tmp_path_factory.mktemp("runs") / "denoise", dots, {"kind": "denoise", "num_timesteps": 20})


@pytest.fixture(scope="module")
def labelled_dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool again, with labels: the same pixels under the same names."""
    return pack_dots(tmp_path_factory.mktemp("labelled") / "set", {"train": 30, "rest": 5}, size=32)


@pytest.fixture(scope="module")
def landmark_run(labelled_dots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two looks on four of the images, one of which it holds out."""
    data = {"shots": 4, "draw": "random", "hold_out": {"fold": 0, "of": 4}, "fine_size": 64}
    task = {"kind": "landmarks", "refine": {}}
    return _run(tmp_path_factory.mktemp("runs") / "landmarks", labelled_dots, task, **data)


def _run(out: Path, packed: Path, task: dict[str, Any], **data: Any) -> Path:
    settings = {
        "task": task,
        "data": {"path": str(packed), "image_size": 32, **data},
        "model": NETWORK,
        "train": {"duration": 2, "global_batch_size": 4},
        "runtime": {"workers": 0},
        "evaluate": {"split": None, "batch": 4, "samples": 0},
    }
    execute(RunConfig.model_validate(settings), out, device="cpu")
    return out


def names(out: Path) -> list[str]:
    with (out / "suggestions.csv").open() as file:
        return [row["image_id"] for row in csv.DictReader(file)]


def test_the_list_is_the_same_every_time_and_a_shorter_one_begins_a_longer_one(
    denoise_run: Path, dots: Path, tmp_path: Path
) -> None:
    for folder, count in (("a", 6), ("b", 6), ("c", 3)):
        suggest_images(denoise_run, data=dots, out=tmp_path / folder, count=count, device="cpu")
    for name in ("suggestions.csv", "suggestions.json", "suggestions.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(set(names(tmp_path / "a"))) == 6
    assert names(tmp_path / "c") == names(tmp_path / "a")[:3]
    assert all(name.startswith("train-") for name in names(tmp_path / "a"))


def test_every_row_says_where_the_image_is_and_what_it_adds(denoise_run: Path, dots: Path, tmp_path: Path) -> None:
    summary = suggest_images(denoise_run, data=dots, out=tmp_path, count=4, device="cpu")
    written = json.loads((tmp_path / "suggestions.json").read_text())["suggestions"]
    manifest = Manifest.open(dots)
    assert [row["rank"] for row in written] == [1, 2, 3, 4]
    for row, each in zip(written, summary.suggestions, strict=True):
        assert manifest.read_record(row["row"]).id == row["image_id"] == each.image_id
        assert (row["dataset"], row["split"]) == ("pool", "train")
    coverage = [row["coverage"] for row in written]
    assert np.diff([0, *coverage]) == pytest.approx([row["gain"] for row in written], abs=2e-6)
    assert coverage == sorted(coverage)
    assert [row["nearest_labelled"] for row in written][:2] == [None, written[0]["image_id"]]


def test_images_of_the_other_split_are_suggested_where_they_are_asked_for(
    denoise_run: Path, dots: Path, tmp_path: Path
) -> None:
    suggest_images(denoise_run, data=dots, out=tmp_path / "one", splits=("rest",), count=5, device="cpu")
    assert sorted(names(tmp_path / "one")) == [f"rest-{n:03}" for n in range(5)]
    both = suggest_images(denoise_run, data=dots, out=tmp_path, splits=("train", "rest"), count=35, device="cpu")
    assert both.num_images == len(set(names(tmp_path))) == 35
    assert both.suggestions[-1].coverage == pytest.approx(1)


def test_labelled_images_named_by_id_or_file_are_not_suggested_again(
    denoise_run: Path, dots: Path, tmp_path: Path
) -> None:
    def suggest(folder: str, *labelled: str, count: int = 3) -> list[str]:
        out = tmp_path / folder
        suggest_images(denoise_run, data=dots, out=out, count=count, labelled=labelled, device="cpu")
        return names(out)

    five = suggest("five", count=5)
    assert suggest("ids", *five[:2]) == five[2:5]
    assert suggest("file", str(tmp_path / "five" / "suggestions.csv"), count=25)[0] not in five
    assert len(suggest("rest", *five, count=25)) == 25


def test_the_shots_of_a_landmark_run_are_known_by_their_pixels_also_those_held_out(
    landmark_run: Path, labelled_dots: Path, dots: Path, tmp_path: Path
) -> None:
    cfg = load_run(landmark_run / "config.yaml", ["data.hold_out=null"])
    [shots] = training_corpora(cfg)
    labelled = {shots.facts(int(row)).id for row in shots.rows}
    for number, data in enumerate((labelled_dots, dots)):
        out = tmp_path / str(number)
        summary = suggest_images(landmark_run, data=data, out=out, count=26, device="cpu")
        assert summary.labelled == summary.named == 4
        assert set(json.loads((out / "suggestions.json").read_text())["labelled"]) == labelled
        assert set(names(out)) == {f"train-{n:03}" for n in range(30)} - labelled


def test_an_image_that_cannot_be_read_is_left_out_and_listed_by_its_digest(denoise_run: Path, tmp_path: Path) -> None:
    pool = pack_dots(tmp_path / "pool", {"train": 12}, size=32, labels=False)
    whole = suggest_images(denoise_run, data=pool, out=tmp_path / "whole", count=12, device="cpu")
    bad = [each.row for each in whole.suggestions[:2]]
    corrupt(pool, bad)
    summary = suggest_images(denoise_run, data=pool, out=tmp_path / "rest", count=10, device="cpu")
    assert sorted(each.row for each in summary.suggestions) == sorted(set(range(12)) - set(bad))
    assert summary.num_images == 10
    listed = json.loads((tmp_path / "rest" / "suggestions.json").read_text())["bad"]
    assert sorted(entry["row"] for entry in listed) == sorted(bad)
    assert all(len(entry["id"]) == 32 and "sha256" in entry["reason"] for entry in listed)
    assert not [name for name in names(tmp_path / "whole")[:2] if name in json.dumps(listed)]


def test_a_pool_with_too_many_unreadable_images_is_refused(denoise_run: Path, tmp_path: Path) -> None:
    pool = pack_dots(tmp_path / "pool", {"train": 24}, size=32, labels=False)
    corrupt(pool, list(range(0, 22, 2)))
    with pytest.raises(DataError, match="11 of 24 samples cannot be read"):
        suggest_images(denoise_run, data=pool, out=tmp_path / "out", count=3, device="cpu")


def test_the_most_typical_of_shifted_images_comes_first_and_the_ends_follow(
    denoise_run: Path, dots: Path, tmp_path: Path
) -> None:
    # One picture at nine places along a line: descriptors that say what is where put it in order.
    pool = pack_dots(tmp_path / "line", {"train": 9}, size=32, labels=False, noise=0)
    _overwrite(pool, [np.roll(_blob(), 2 * shift, axis=1) for shift in range(-4, 5)])
    summary = suggest_images(denoise_run, data=pool, out=tmp_path / "out", count=3, device="cpu")
    first, *ends = (each.row for each in summary.suggestions)
    assert first in (3, 4, 5)
    assert min(ends) < first < max(ends)


def _blob() -> np.ndarray:
    y, x = np.mgrid[:32, :32]
    return np.round(255 * np.exp(-((x - 16) ** 2 + (y - 16) ** 2) / 18)).astype(np.uint8)


def _overwrite(pool: Path, images: list[np.ndarray]) -> None:
    """Pack these images in place of those of a folder of nine."""
    from ddpm_lmk.data.images.resize import encode
    from ddpm_lmk.data.shards.writer import ShardWriter

    old = Manifest.open(pool)
    records = [old.read_record(row) for row in range(len(old))]
    for path in pool.iterdir():
        path.unlink()
    settings: dict[str, Any] = {"dataset": old.dataset, "spec": old.spec, "splits": old.splits, "settings": {}}
    with ShardWriter(pool, **settings, encoding="raw", bits=8, stored_size=32, aspect="squeeze") as writer:
        for record, image in zip(records, images, strict=True):
            writer.add(record, encode(image, "raw", 90))


def test_the_sheet_shows_the_images_in_order_and_a_curve(denoise_run: Path, dots: Path, tmp_path: Path) -> None:
    summary = suggest_images(denoise_run, data=dots, out=tmp_path, count=7, device="cpu")
    sheet = cv2.imread(str(tmp_path / "suggestions.png"))
    assert sheet.shape == (TITLE + 2 * (TILE + CAPTION + GAP), GAP + COLUMNS * (TILE + GAP), 3)
    manifest = Manifest.open(dots)
    for place, each in enumerate(summary.suggestions):
        top, left = TITLE + place // COLUMNS * (TILE + CAPTION + GAP), GAP + place % COLUMNS * (TILE + GAP)
        tile = sheet[top + 30 : top + TILE, left : left + TILE, 0].astype(float)  # below the rank
        pixels = cv2.resize(manifest.decode(each.row), (TILE, TILE), interpolation=cv2.INTER_CUBIC)[30:]
        assert np.corrcoef(tile.ravel(), pixels.ravel())[0, 1] > 0.98
    curve = sheet[TITLE + TILE + CAPTION + GAP :, GAP + TILE + GAP : GAP + 2 * TILE + GAP]
    assert (curve.max(-1) > 200).sum() > 200


def test_a_wide_network_gives_descriptors_of_the_same_length(dots: Path, tmp_path: Path) -> None:
    from ddpm_lmk.inference import suggest

    lengths = []
    for width in (8, 32):
        torch.manual_seed(0)
        settings = {
            "task": {"kind": "denoise", "num_timesteps": 20},
            "data": {"path": str(dots), "image_size": 32},
            "model": NETWORK | {"width": width},
            "train": {"duration": 1, "global_batch_size": 2},
            "runtime": {"workers": 0},
            "evaluate": {"samples": 0, "batch": 7},
        }
        cfg = RunConfig.model_validate(settings)
        execute(cfg, tmp_path / str(width), device="cpu")
        loaded = suggest.open_run(tmp_path / str(width), device="cpu")
        pool, _ = suggest._describe(loaded, suggest._level(loaded), cfg, suggest.evaluation_corpora(cfg, "train"))
        lengths.append(pool.points.shape)
        assert np.isfinite(pool.points).all()
    assert lengths == [(30, 1024)] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 31}, r"--count=31: .* has 30 readable images without a label; use 1\.\.30"),
        ({"labelled": ["train-001", "train-002"], "count": 29}, r"has 28 readable images without a label"),
        ({"labelled": ["nobody"]}, "--labelled names nobody: not in .*, whose ids are like train-000"),
        ({"labelled": ["nowhere.csv"]}, "--labelled: nowhere.csv cannot be read"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    denoise_run: Path, dots: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        suggest_images(denoise_run, data=dots, out=tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out" / "suggestions.csv").exists()


def test_a_run_of_another_network_is_refused(dots: Path, tmp_path: Path) -> None:
    settings = {
        "task": {"kind": "simclrv2", "views": [{"count": 2, "size": 32, "blur_sigma": [0.1, 0.5]}]},
        "data": {"path": str(dots), "image_size": 32},
        "model": {"kind": "encoder_unet", "scale": 0.125, "blocks": [1, 1, 1, 1], "decoder": [8, 8, 8, 4, 4]},
        "train": {"duration": 1, "global_batch_size": 4},
        "runtime": {"workers": 0},
    }
    execute(RunConfig.model_validate(settings), tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match=r"task simclrv2 with model\.kind=encoder_unet; wanted a pre-training"):
        suggest_images(tmp_path / "run", data=dots, out=tmp_path / "out", device="cpu")


def test_one_trains_on_what_was_suggested(denoise_run: Path, packed_phantoms: Path, tmp_path: Path) -> None:
    where = ("--data", packed_phantoms, "--count", 3, "--out")
    done = run_command("suggest", denoise_run, *where, tmp_path / "next")
    assert done.code == 0, done.err
    suggested = names(tmp_path / "next")
    assert all(name in done.out for name in suggested)
    assert f"12 images, 0 labelled; {tmp_path / 'next' / 'suggestions.csv'}" in done.out
    words = [f"data.path={packed_phantoms}", "data.draw=listed", "data.shots=2", f"init.weights={denoise_run}"]
    words += [f"data.images={tmp_path / 'next' / 'suggestions.csv'}"]
    words += [f"model.{key}={value}" for key, value in NETWORK.items()]
    done = run_command("finetune", SMOKE / "finetune.yaml", *words, "--cpu", 1, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["draw"], results["shots"]) == ("listed", 2)
    [shots] = training_corpora(load_run(tmp_path / "run" / "config.yaml"))
    assert [shots.facts(int(row)).id for row in shots.rows] == suggested[:2]
    again = run_command("suggest", tmp_path / "run", *where, tmp_path / "more")
    assert again.code == 0, again.err
    assert not set(names(tmp_path / "more")) & set(suggested[:2])
    assert "12 images, 2 labelled" in again.out
