"""Scores on films that pre-training saw: found from what the run wrote, not shown unless acknowledged, then stamped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.cli.app import run
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.leakage import exclusion
from ddpm_lmk.data.loading.corpus import evaluation_corpora, training_corpora
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import DataError
from ddpm_lmk.report.page import write_report
from ddpm_lmk.run import execute
from tests.data.test_leaks import HEAD, chests, save


@pytest.fixture(scope="module")
def skulls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("leakage") / "skulls"
    pack("skull", out, PackSettings(kind="phantom", size=32, counts={"train": 6, "test": 4}), workers=1)
    return out


def config(packed: Path, kind: str, **data: Any) -> RunConfig:
    task = {"kind": kind, "num_timesteps": 20} if kind == "denoise" else {"kind": kind}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"path": str(packed), "image_size": 32, "workers": 0, **data},
            "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
            "task": task,
            "train": {"length": "1 steps", "group_size": 4},
            "evaluate": {"split": None if kind == "denoise" else "test", "samples": 0},
        }
    )


@pytest.fixture(scope="module")
def runs(skulls: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tuned from weights that saw the test films ("leaky"), and from weights that did not ("clean")."""
    root = tmp_path_factory.mktemp("runs")
    for name, splits in (("leaky", ["train", "test"]), ("clean", ["train"])):
        execute(config(skulls, "denoise", splits=splits), root / f"{name}-pretrain", device="cpu")
        fine = config(skulls, "landmarks").model_dump() | {"init": {"weights": str(root / f"{name}-pretrain")}}
        execute(RunConfig.model_validate(fine), root / name, device="cpu")
    return {name: root / name for name in ("leaky", "clean")}


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["leakage"]


def test_a_run_writes_what_it_protects_and_leaves_out(runs: dict[str, Path], skulls: Path) -> None:
    folder = runs["clean"].with_name("clean-pretrain")
    record = json.loads((folder / report.FILE_NAME).read_text())
    assert [(facts["splits"], facts["images"]) for facts in record["trained_on"]] == [(["train"], 6)]
    assert [(facts["splits"], facts["images"]) for facts in record["protected"]] == [(["test"], 4)]
    assert found(folder) == {"leaks": 0, "copies": 0, "left_out": 0, "overlap": 0}
    assert "data.compared" in (folder / "events.jsonl").read_text()


def test_a_score_knows_whether_its_films_were_seen(runs: dict[str, Path]) -> None:
    assert found(runs["leaky"])["pretraining"] == {"status": "overlap", "images": 4, "kinds": {"same pixels": 4}}
    assert found(runs["clean"])["pretraining"] == {"status": "clean", "images": 0, "kinds": {}}
    assert found(runs["clean"])["training"]["status"] == "clean"


def test_evaluating_shows_no_score_of_seen_films_unless_it_is_acknowledged(
    runs: dict[str, Path], skulls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(runs["leaky"]), "--data", str(skulls), "--out", str(tmp_path), "--device", "cpu"]
    assert run(words) == 3
    shown = capsys.readouterr()
    assert "MRE" not in shown.out
    assert "4 of the 4 scored images were seen in pre-training" in shown.err
    assert "--acknowledge-leakage" in shown.err
    assert run([*words, "--acknowledge-leakage"]) == 0
    shown = capsys.readouterr()
    assert shown.out.index("seen in pre-training") < shown.out.index("MRE")


def test_a_report_is_refused_or_stamped(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 of the 4 scored images.*--acknowledge-leakage"):
        write_report([runs["leaky"]], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    page, _, text = write_report([runs["leaky"]], tmp_path / "report.html", acknowledge_leakage=True)
    assert '<p class="stamp">Leakage: up to 4 of the 4' in page.read_text()
    assert "Leakage: up to 4 of the 4" in text.read_text()
    clean = write_report([runs["clean"]], tmp_path / "clean.html")[0].read_text()
    assert 'class="stamp"' not in clean
    assert "left out 0 of 6 images: 0 were found in protected splits, 0 repeat another one" in clean


def test_where_the_packs_are_gone_the_record_is_believed(runs: dict[str, Path], skulls: Path, tmp_path: Path) -> None:
    fine = config(skulls, "landmarks")
    tested = evaluation_corpora(fine, "test")[0]
    folder = tmp_path / "run"
    shutil.copytree(runs["clean"].with_name("clean-pretrain"), folder)
    record = json.loads((folder / report.FILE_NAME).read_text())
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace(str(skulls), str(tmp_path / "gone")))

    def verdict(**changes: Any) -> str:
        (folder / report.FILE_NAME).write_text(json.dumps(record | changes))
        return report.of_score(str(folder), tested, None)["pretraining"]["status"]

    assert verdict() == "clean"
    assert verdict(overlap=3) == "overlap"
    assert verdict(protected=[]) == "unknown"
    assert report.of_score(str(tmp_path / "weights.safetensors"), tested, None)["pretraining"]["status"] == "unknown"
    assert report.of_score(None, tested, None)["pretraining"] == {"status": "none"}


def test_labelled_films_that_are_test_films_too_are_counted(tmp_path: Path) -> None:
    """As in ISBI 2015, whose published test set repeats training films under other names."""
    film, other = chests(2)
    save(tmp_path / "raw" / "a", film)
    save(tmp_path / "raw" / "b", film, "jpeg")
    save(tmp_path / "raw" / "c", other)
    (tmp_path / "raw" / "images.csv").write_text(HEAD + "a,a.png,train,\nb,b.jpg,test,\nc,c.png,test,\n")
    rows = [f"{name},0,p,30,{20 + number}\n" for number, name in enumerate("abc")]
    (tmp_path / "raw" / "landmarks.csv").write_text("image_id,landmark_index,landmark_name,x,y\n" + "".join(rows))
    pack(tmp_path / "raw", tmp_path / "packed", PackSettings(kind="table", size=32, unit="px"), workers=1)
    cfg = config(tmp_path / "packed", "landmarks")
    score = report.of_score(None, evaluation_corpora(cfg, "test")[0], training_corpora(cfg)[0])
    assert score["training"] == {"status": "overlap", "images": 1, "kinds": {"near copy": 1}}
    results = [{"leakage": score, "num_images": 2}]
    assert report.refuse_seen(results, acknowledged=False) == [
        "Leakage: up to 1 of the 2 scored images were among the labelled training images (1 of 1 runs)."
    ]


def test_what_is_left_out_is_found_once_per_process(skulls: Path) -> None:
    data = config(skulls, "denoise").data
    assert exclusion([Manifest.open(skulls)], data) is exclusion([Manifest.open(skulls)], data)
