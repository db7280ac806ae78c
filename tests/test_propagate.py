"""Runs with pseudo-labels on phantoms: what teachers find, what is learnt from it, and what must never be."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.loading import bad_samples
from ddpm_lmk.data.loading.corpus import Corpus, training_corpora, unlabelled_corpora
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.data.spec import DatasetSpec, unlabelled
from ddpm_lmk.engine.forecast import Work
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.rank_checks import kernels
from ddpm_lmk.engine.requirements import check_exclusions
from ddpm_lmk.engine.session import Session
from ddpm_lmk.errors import ConfigError, DataError, LmkError, RunConflictError, StoppedError
from ddpm_lmk.inference import pseudo_labels
from ddpm_lmk.inference.evaluate import evaluate_run, predict_split
from ddpm_lmk.inference.load import open_run
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.tasks import build_task
from tests.data.dot_packs import corrupt

SIZE, FINE = 32, 64
AGREE = 0.2
STAGES = ("", "teacher", "teacher/teacher")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skulls of 64 pixels: 8 for training, 3 for testing."""
    out = tmp_path_factory.mktemp("packs") / "skulls"
    settings = PackSettings(kind="phantom", size=FINE, counts={"train": 8, "val": 2, "test": 3}, seed=7)
    pack("skull", out, settings, workers=1)
    return out


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def config(packed: Path, *, propagate: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """Two shots, two rounds; the network is too small to be right, so both looks agree by chance."""
    data = {"path": str(packed), "image_size": SIZE, "fine_size": FINE, "shots": 2, "draw": "random"}
    data |= {"augment": {"probability": 1, "rotate_deg": 8, "scale": 0.1}}
    data |= {"propagate": {"agree": AGREE, **(propagate or {})}} | sections.pop("data", {})
    train = {"duration": 4, "global_batch_size": 4, "micro_batch": 2, "exactness": "exact", **sections.pop("train", {})}
    values = {
        "name": "pool",
        "data": data,
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "task": {"kind": "landmarks", "refine": {"crop": 0.5}},
        "optim": {"lr": 1e-3},
        "train": train,
        "runtime": {"workers": 0, "log_every": 1, "checkpoint_every": 2},
        "evaluate": {"split": "test", "batch": 3},
    }
    return RunConfig.model_validate({**values, **sections})


@pytest.fixture(scope="module")
def finished(packed: Path, parallel: Parallel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pool"
    execute(config(packed), out, parallel=parallel)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def bits(run: Path) -> bytes:
    """What was learnt, and what was found with it."""
    files = sorted(run.glob("snapshots/*/*.safetensors")) + sorted(run.glob("*.csv"))
    assert len(files) >= 2
    return b"".join(path.read_bytes() for path in files)


def copied(packed: Path, out: Path, keep: Callable[[int], tuple[np.ndarray | None, str] | None], **header: Any) -> Path:
    """The same pictures in another dataset; `keep` gives the points and the split of a row, or leaves it out."""
    manifest = Manifest.open(packed)
    facts: dict[str, Any] = {"dataset": manifest.dataset, "spec": manifest.spec, "splits": manifest.splits}
    facts |= {"bits": manifest.bits, "encoding": manifest.encoding, "settings": manifest.settings}
    facts |= {"stored_size": manifest.stored_size, "aspect": manifest.aspect, "shard_bytes": 2**20} | header
    with ShardWriter(out, **facts) as writer:
        for row in range(len(manifest)):
            if (kept := keep(row)) is not None:
                record = manifest.read_record(row)
                changes = {"points": kept[0], "split": kept[1], "dataset": facts["dataset"]}
                writer.add(replace(record, **changes), manifest.read_bytes(row))
    return out


# What a run with pseudo-labels is


def test_every_teacher_is_a_run_like_any_other_with_one_round_less(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    cfg = config(packed)
    assert [each.data.propagate and each.data.propagate.rounds for each in (cfg, *cfg.teachers)] == [2, 1, None]
    assert {each.evaluate.split for each in cfg.teachers} == {None}
    for number, teacher in enumerate(cfg.teachers, 1):
        execute(teacher, tmp_path / "alone", parallel=parallel)
        assert bits(tmp_path / "alone") == bits(finished / STAGES[number])
        shutil.rmtree(tmp_path / "alone")
    assert len({bits(finished / stage) for stage in STAGES}) == 3, "every round learns something else"
    for stage in STAGES[1:]:
        assert "protocols" not in read(finished / stage / "results.json"), "no test image on the way"
        assert not (finished / stage / "predictions.csv").exists()


def test_pseudo_labels_are_what_the_teacher_finds_where_both_looks_agree(
    finished: Path, packed: Path, parallel: Parallel
) -> None:
    cfg, teacher = config(packed), open_run(finished / "teacher", device="cpu")
    corpora = unlabelled_corpora(cfg)
    with kernels("exact", parallel.device):
        found = predict_split(cfg, teacher.task, teacher.model, parallel, corpora=corpora)  # type: ignore[arg-type]
    rows = read_csv(finished / "pseudo_labels.csv")
    assert len(rows) == 6 * 19
    assert len({row["image"] for row in rows}) == 6
    for row in rows:
        film, index = found[row["image"]], int(row["landmark_index"])
        assert film.coarse is not None
        assert float(row["x"]) == pytest.approx(film.points[index, 0], abs=1e-3)
        assert float(row["y"]) == pytest.approx(film.points[index, 1], abs=1e-3)
        assert float(row["spread_px"]) == pytest.approx(film.spread_px[index], rel=1e-3)
        size = corpora[0].facts(int(row["image"].rpartition(":")[2])).native_size
        offset = (film.points[index] - film.coarse.points[index]) / np.array(size)  # shares of a squeezed picture
        assert float(row["distance"]) == pytest.approx(np.linalg.norm(offset), abs=1e-5)
        assert row["accepted"] == str(int(0 < float(row["distance"]) <= AGREE))
    assert 0 < sum(row["accepted"] == "1" for row in rows) < len(rows), "else this shows little"


def test_results_count_the_pool_and_what_the_teachers_cost(finished: Path) -> None:
    results = [read(finished / stage / "results.json") for stage in STAGES]
    for stage, result in zip(STAGES[:2], results[:2], strict=True):
        rows = read_csv(finished / stage / "pseudo_labels.csv")
        accepted = [row["image"] for row in rows if row["accepted"] == "1"]
        pool = result["pool"]
        assert (pool["images"], pool["offered"], pool["points"], pool["of"]) == (
            *(len(set(accepted)), 6, len(accepted)),
            *(6 * 19,),
        )
    assert "pool" not in results[2]
    assert results[0]["labels"] == {"training": 2, "validation": 0}
    assert results[0]["train"]["steps"] == 4
    assert [result["train"]["images"] for result in results] == [48, 32, 16]
    assert results[0]["train"]["tflop"] == pytest.approx(3 * results[2]["train"]["tflop"])
    teachers = results[0]["pool"]["teachers"]
    assert (teachers["runs"], teachers["steps"], teachers["images"]) == (2, 8, 32)
    assert results[0]["train"]["wall_s"] >= teachers["wall_s"] == results[1]["train"]["wall_s"]
    assert results[0]["leakage"]["pool"] == {"status": "clean", "images": 0, "kinds": {}}


def test_a_student_begins_with_the_weights_of_its_run_file_and_sees_shots_and_pool(
    finished: Path, packed: Path, parallel: Parallel
) -> None:
    """The first loss, from the loader, the seed and the file of pseudo-labels."""
    cfg = config(packed)
    corpora, pool = training_corpora(cfg), unlabelled_corpora(cfg)
    for corpus, points in zip(pool, pseudo_labels.read(finished, pool), strict=True):
        corpus.use(points)
    task = build_task(cfg, corpora[0].manifest.spec)
    loader = open_loader(cfg, stage="train", corpora=corpora, pseudo_labelled=pool)
    model = Session().model(cfg, task, torch.device("cpu"))
    first = next(loader.global_batches())
    assert first.size == 4
    with kernels("exact", parallel.device):
        losses = torch.cat([task.loss(model, batch) for batch in first.micro_batches])
    line = read_csv_lines(finished / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    loader.close()


def read_csv_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_true_labels_of_the_pool_are_never_read(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    cfg, manifest = config(packed), Manifest.open(packed)
    shots = set(training_corpora(cfg)[0].rows.tolist())
    rng = np.random.default_rng(0)

    def plant(row: int) -> tuple[np.ndarray | None, str]:
        record = manifest.read_record(row)
        assert record.points is not None
        is_pool = record.split == "train" and row not in shots
        return (rng.uniform(0, 60, record.points.shape) if is_pool else record.points), record.split

    wrong = copied(packed, tmp_path / "wrong", plant)
    assert not np.array_equal(read_labels(wrong), read_labels(packed))
    execute(config(wrong), tmp_path / "run", parallel=parallel)
    # the two sets differ in their labels, so in the digest that pseudo-labels are kept under; in nothing else
    digest, digest_of_wrong = (Manifest.open(path).fingerprint[:16].encode() for path in (packed, wrong))
    for stage in STAGES:
        assert bits(tmp_path / "run" / stage).replace(digest_of_wrong, digest) == bits(finished / stage), stage


def read_labels(path: Path) -> np.ndarray:
    manifest = Manifest.open(path)
    return np.stack([np.asarray(manifest.read_record(row).points) for row in range(len(manifest))])


# Interrupted, repeated, in a sweep


def rewound(stage: Path, *, to: int | None) -> None:
    """A run as it was when killed after the checkpoint `to`; None: before its own first step."""
    for name in ("done.json", "results.json", "predictions.csv", "snapshots"):
        drop(stage / name)
    for path in stage.glob("checkpoints/*"):
        if to is None or int(path.name.removeprefix("step-")) > to:
            shutil.rmtree(path)
    for name in ("run.json", "pseudo_labels.csv", "checkpoints") if to is None else ():
        drop(stage / name)


def drop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("stage", "to"),
    [("teacher/teacher", 2), ("teacher", None), ("teacher", 2), ("", None), ("", 2)],
    ids=["in the first round", "before its labels", "in the second round", "after it", "in the last"],
)
def test_a_killed_run_ends_with_the_same_bits(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path, stage: str, to: int | None
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    rewound(out / stage, to=to)
    for outer in STAGES[: STAGES.index(stage)]:  # what waited for it
        rewound(out / outer, to=None)
    done = [(out / inner / "done.json").stat().st_mtime_ns for inner in STAGES[STAGES.index(stage) + 1 :]]
    execute(config(packed), out, parallel=parallel)
    assert [bits(out / each) for each in STAGES] == [bits(finished / each) for each in STAGES]
    assert [(out / inner / "done.json").stat().st_mtime_ns for inner in STAGES[STAGES.index(stage) + 1 :]] == done


def test_once_it_has_begun_a_run_needs_its_teacher_no_more(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    rewound(out, to=2)
    shutil.rmtree(out / "teacher")
    results = execute(config(packed), out, parallel=parallel)
    assert bits(out) == bits(finished)
    assert results["pool"] == read(finished / "results.json")["pool"]
    assert not (out / "teacher").exists()


def test_a_finished_teacher_of_images_that_were_packed_anew_is_refused(parallel: Parallel, tmp_path: Path) -> None:
    for seed in (7, 8):
        shutil.rmtree(tmp_path / "skulls", ignore_errors=True)
        settings = PackSettings(kind="phantom", size=FINE, counts={"train": 8, "val": 2, "test": 3}, seed=seed)
        pack("skull", tmp_path / "skulls", settings, workers=1)
        if seed == 7:
            execute(config(tmp_path / "skulls", propagate={"rounds": 1}), tmp_path / "run", parallel=parallel)
            rewound(tmp_path / "run", to=None)  # killed after its teacher had finished
    with pytest.raises(DataError, match=r"dataset changed since .*/run/teacher was started"):
        execute(config(tmp_path / "skulls", propagate={"rounds": 1}), tmp_path / "run", parallel=parallel)


def test_a_run_in_a_warm_session_has_the_bits_of_one_alone(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    session = Session()
    execute(config(packed, seed=1), tmp_path / "other", parallel=parallel, session=session)
    execute(config(packed), tmp_path / "run", parallel=parallel, session=session)
    assert bits(tmp_path / "run") == bits(finished)


def test_a_longer_run_would_have_had_other_teachers(packed: Path, parallel: Parallel, tmp_path: Path) -> None:
    short = config(packed, optim={"lr": 1e-3, "schedule": "constant"})
    with RunDir.lock(tmp_path / "run", short) as run:
        run.claim(short)
    longer = config(packed, optim={"lr": 1e-3, "schedule": "constant"}, train={"duration": 5})
    with pytest.raises(RunConflictError, match=r"train.duration: there '4 steps', here '5 steps'"):
        execute(longer, tmp_path / "run", parallel=parallel)


def test_labels_that_were_changed_by_hand_are_refused(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    rewound(out, to=2)
    text = (out / "pseudo_labels.csv").read_text()
    (out / "pseudo_labels.csv").write_text(text.replace(",0\n", ",1\n", 1))
    with pytest.raises(DataError, match=r"pseudo-labels of .* have changed since it was started"):
        execute(config(packed), out, parallel=parallel)


def test_the_directory_is_this_run_s_from_its_teacher_s_first_step_on(
    packed: Path, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*unused: Any, **more: Any) -> None:
        raise DataError("stopped here")

    monkeypatch.setattr("ddpm_lmk.run.fit", refuse)
    with pytest.raises(DataError, match="stopped here"):
        execute(config(packed), tmp_path / "run", parallel=parallel)
    assert (tmp_path / "run" / "teacher" / "teacher" / "config.yaml").is_file()
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(RunConflictError, match=r"data.propagate.agree: there 0.2, here 0.1"):
        execute(config(packed, propagate={"agree": 0.1}), tmp_path / "run", parallel=parallel)
    with (
        RunDir.lock(tmp_path / "run", config(packed)),
        pytest.raises(RunConflictError, match="is in use"),
    ):
        execute(config(packed), tmp_path / "run", parallel=parallel)


def test_what_is_left_to_do_counts_every_round(finished: Path, packed: Path, tmp_path: Path) -> None:
    cfg, out = config(packed), tmp_path / "run"
    work = Work.left(cfg, out)
    assert (work.steps, work.scored) == (12, 3 + 2 * 6)
    shutil.copytree(finished, out)
    rewound(out, to=None)
    assert (Work.left(cfg, out).steps, Work.left(cfg, out).scored) == (4, 3 + 6)
    rewound(out / "teacher", to=2)
    assert (Work.left(cfg, out).steps, Work.left(cfg, out).scored) == (4 + 2, 3 + 6)
    rewound(out / "teacher", to=None)
    assert (Work.left(cfg, out).steps, Work.left(cfg, out).scored) == (4 + 4, 3 + 6 + 6)
    fold = config(packed, data={"shots": 5, "hold_out": {"fold": 1, "of": 2}}, evaluate={"split": "held_out"})
    assert Work.of(fold).scored == 2


def test_the_first_round_tells_how_long_all_of_them_take(
    packed: Path, parallel: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(config(packed, train={"duration": 2}), tmp_path / "run", parallel=parallel, is_foretold=True)
    said = capsys.readouterr().err
    assert "pool-teacher-teacher: " in said
    assert "with the 2 runs that learn from it" in said
    assert "with the run that learns from it" in said
    assert "finding pseudo-labels in 6 images" in said


# Images of the pool that cannot be read


def damaged(packed: Path, out: Path) -> tuple[Path, int]:
    """The same set with a changed byte in an image of the pool, and its row."""
    shutil.copytree(packed, out)
    row = int(unlabelled_corpora(config(packed))[0].rows[2])
    corrupt(out, [row])
    return out, row


def before_labels(finished: Path, out: Path) -> Path:
    """A run whose first teacher is done and has not been asked."""
    shutil.copytree(finished, out)
    for stage in STAGES[:2]:
        rewound(out / stage, to=None)
    return out


def stop(*unused: Any, **more: Any) -> None:
    raise DataError("stopped here")


def test_an_image_that_cannot_be_read_is_left_out_of_the_pool_and_listed(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, row = damaged(packed, tmp_path / "damaged")
    cfg, out = config(data), before_labels(finished, tmp_path / "run")
    manifest = Manifest.open(data)
    image, digest = f"{manifest.dataset}:{row}", manifest.index[row]["sha256"].tobytes().hex()
    results = execute(cfg, out, parallel=parallel)
    assert (results["pool"]["offered"], results["pool"]["unreadable"], results["pool"]["of"]) == (6, 1, 6 * 19)
    assert read(finished / "results.json")["pool"]["unreadable"] == 0
    rows, whole = (read_csv(run / "teacher" / "pseudo_labels.csv") for run in (out, finished))
    assert [each for each in rows if each["image"] != image] == [each for each in whole if each["image"] != image]
    lost = [each for each in rows if each["image"] == image]
    assert [each["landmark_index"] for each in lost] == [str(index) for index in range(19)]
    assert {tuple(each[key] for key in ("x", "y", "spread_px", "distance", "accepted")) for each in lost} == {
        ("", "", "", "", "0")
    }
    for stage in STAGES[:2]:  # a student that drew it would list it at a step
        [entry] = read_csv_lines(out / stage / "quarantine.jsonl")
        assert (entry["step"], entry["row"], entry["id"]) == (0, row, digest)
        assert row not in pseudo_labels.read(out / stage, unlabelled_corpora(cfg))[0]
    assert digest in caplog.text
    ended = bits(out)
    rewound(out, to=2)
    assert execute(cfg, out, parallel=parallel)["pool"] == results["pool"]
    assert bits(out) == ended
    assert len(read_csv_lines(out / "quarantine.jsonl")) == 1


def test_too_many_of_them_end_the_run_until_they_are_restored(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, row = damaged(packed, tmp_path / "damaged")
    out = before_labels(finished, tmp_path / "run")
    monkeypatch.setattr("ddpm_lmk.run.fit", stop)
    with monkeypatch.context() as patch:
        patch.setattr(bad_samples, "BUDGET_FLOOR", 0)
        with pytest.raises(DataError, match="1 of 6 samples cannot be read") as caught:
            execute(config(data), out, parallel=parallel)
    assert caught.value.exit_code == 3
    labels = "teacher/pseudo_labels.csv"
    assert not (out / labels).exists()
    corrupt(data, [row])  # the byte is flipped back
    with pytest.raises(DataError, match="stopped here"):
        execute(config(data), out, parallel=parallel)
    assert (out / labels).read_bytes() == (finished / labels).read_bytes()


def test_a_file_system_that_fails_makes_no_image_unreadable(
    finished: Path, packed: Path, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, row = before_labels(finished, tmp_path / "run"), int(unlabelled_corpora(config(packed))[0].rows[2])
    monkeypatch.setattr("ddpm_lmk.run.fit", stop)
    decode = Corpus.decode

    def stall(self: Corpus, asked: int) -> tuple[np.ndarray, ...]:
        if asked == row:
            raise StoppedError("the file system does not answer")
        return decode(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "decode", stall)
        with pytest.raises(StoppedError, match="does not answer"):
            execute(config(packed), out, parallel=parallel)
    labels = "teacher/pseudo_labels.csv"
    assert not (out / labels).exists()
    with pytest.raises(DataError, match="stopped here"):
        execute(config(packed), out, parallel=parallel)
    assert (out / labels).read_bytes() == (finished / labels).read_bytes()


# Which images, and which of them are trained on


def films(packed: Path, out: Path, rows: Sequence[int]) -> Path:
    """Some pictures of a set without their labels, in a set of their own."""

    def keep(row: int) -> tuple[None, str] | None:
        return (None, "all") if row in rows else None

    facts = {"dataset": out.name, "spec": unlabelled(out.name), "splits": ("all",)}
    return copied(packed, out, keep, **facts)


def names(cfg: RunConfig) -> list[str]:
    return sorted(
        corpus.manifest.read_record(row).id for corpus in unlabelled_corpora(cfg) for row in corpus.rows.tolist()
    )


def ids(packed: Path, split: str) -> list[str]:
    manifest = Manifest.open(packed)
    return [manifest.read_record(row).id for row in manifest.rows([split])]


def test_shots_and_what_is_held_out_of_them_are_not_in_the_pool(packed: Path) -> None:
    cfg = config(packed, data={"shots": 5, "hold_out": {"fold": 1, "of": 2}})
    manifest = Manifest.open(packed)
    all_shots = training_corpora(config(packed, data={"shots": 5}))[0].rows
    shots = [manifest.read_record(row).id for row in all_shots.tolist()]
    assert len(shots) == 5
    assert names(cfg) == sorted(set(ids(packed, "train")) - set(shots))
    assert len(training_corpora(cfg)[0].rows) == 3


def test_copies_of_images_that_are_scored_held_out_or_labelled_stay_out_of_the_pool(
    packed: Path, tmp_path: Path
) -> None:
    everything = films(packed, tmp_path / "films", range(13))
    pool = {"path": str(everything), "splits": "all"}
    shots = {Manifest.open(packed).read_record(row).id for row in training_corpora(config(packed))[0].rows.tolist()}
    assert names(config(packed, propagate=pool)) == sorted(set(ids(packed, "train")) - shots)
    # A shot that is held out is protected with its copies, as it is where it is trained on.
    held = config(packed, propagate=pool, data={"hold_out": {"fold": 0, "of": 2}})
    assert names(held) == names(config(packed, propagate=pool))
    guarded = config(films_of(packed, tmp_path), propagate=pool, data={"protect": [str(packed)], "shots": 1})
    assert set(names(guarded)).isdisjoint(ids(packed, "test"))


def films_of(packed: Path, tmp_path: Path) -> Path:
    """A labelled set of two images for training and one for testing."""
    manifest = Manifest.open(packed)
    train, test = manifest.rows(["train"])[:2].tolist(), int(manifest.rows(["val"])[0])

    def keep(row: int) -> tuple[np.ndarray | None, str] | None:
        if row not in (*train, test):
            return None
        return manifest.read_record(row).points, "test" if row == test else "train"

    return copied(packed, tmp_path / "few", keep, dataset="few", splits=("train", "test"))


def test_a_set_without_landmarks_takes_those_of_the_labelled_one(
    packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    pool = films(packed, tmp_path / "films", Manifest.open(packed).rows(["train"]).tolist())
    cfg = config(packed, propagate={"path": str(pool), "splits": "all", "rounds": 1})
    results = execute(cfg, tmp_path / "run", parallel=parallel)
    assert results["pool"]["datasets"] == ["films"]
    assert {row["image"].partition(":")[0] for row in read_csv(tmp_path / "run" / "pseudo_labels.csv")} == {"films"}
    # The data may move, and the run is the same one.
    moved = tmp_path / "elsewhere"
    shutil.copytree(pool, moved)
    rewound(tmp_path / "run", to=2)
    there = config(packed, propagate={"path": str(moved), "splits": "all", "rounds": 1})
    before = read(tmp_path / "run" / "run.json")
    assert execute(there, tmp_path / "run", parallel=parallel)["pool"] == results["pool"]
    assert read(tmp_path / "run" / "run.json")["packs"] == before["packs"]


def test_a_score_on_images_of_the_pool_is_marked(finished: Path, packed: Path, tmp_path: Path) -> None:
    results = evaluate_run(finished, data=packed, split="train", out=tmp_path / "again", device="cpu")
    assert (results["leakage"]["pool"]["status"], results["leakage"]["pool"]["images"]) == ("overlap", 6)
    assert results["pool"] == read(finished / "results.json")["pool"]


def test_batches_take_their_share_of_the_pool_and_its_points_move_with_it(packed: Path) -> None:
    cfg = config(packed, train={"global_batch_size": 64, "micro_batch": 64})
    corpora, [pool] = training_corpora(cfg), unlabelled_corpora(cfg)
    rng = np.random.default_rng(3)
    planted = {row: rng.uniform(5, 50, (19, 2)) for row in pool.rows.tolist()[1:]}
    for points in planted.values():
        points[rng.integers(19)] = np.nan
    left_out = f"{pool.manifest.dataset}:{pool.rows[0]}"
    pool.use(planted)
    loader = open_loader(cfg, stage="train", corpora=corpora, pseudo_labelled=[pool])
    assert (loader.num_images, loader.plan.num_images, len(loader.records)) == (2, 2, 2)
    seen = []
    batches = loader.global_batches()
    for _ in range(8):
        [batch] = next(batches).micro_batches
        assert batch.points is not None
        native = batch.points @ batch.to_native[:, :, :2].mT + batch.to_native[:, None, :, 2]
        for name, points in zip(batch.ids, native.numpy(), strict=True):
            seen.append(":" in name)
            if ":" in name:
                np.testing.assert_allclose(points, planted[int(name.rpartition(":")[2])], atol=1e-3)
        assert left_out not in batch.ids
    assert sum(seen) / len(seen) == pytest.approx(0.625, abs=0.01)
    batches.close()
    loader.close()
    shots_alone = open_loader(cfg, stage="train", corpora=corpora)
    [batch] = next(shots_alone.global_batches()).micro_batches
    assert not any(":" in name for name in batch.ids)
    shots_alone.close()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"shots": 8}}, DataError, "finds no image without a label"),
        (
            {"propagate": {"splits": ["train", "test"]}},
            ConfigError,
            "evaluate.split=test is also in data.propagate",
        ),
        ({"propagate": {"splits": "unknown"}}, DataError, "there is no split 'unknown'"),
        ({"propagate": {"path": "nowhere"}}, DataError, "nowhere"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_before_training(
    packed: Path, changes: dict[str, Any], error: type[LmkError], words: str
) -> None:
    with pytest.raises(error, match=words):
        unlabelled_corpora(config(packed, **changes))


def test_two_sets_of_one_name_are_refused(packed: Path, tmp_path: Path) -> None:
    films(packed, tmp_path / "a" / "films", [0, 1])
    films(packed, tmp_path / "b" / "films", [2, 3])
    paths = [str(tmp_path / name / "films") for name in "ab"]
    with pytest.raises(ConfigError, match="two sets of one name"):
        unlabelled_corpora(config(packed, propagate={"path": paths, "splits": "all"}))


def test_settings_that_make_no_sense_are_refused_and_a_run_without_is_what_it_was(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"set task.refine"):
        config(packed, data={"fine_size": None, "propagate": {}}, task={"kind": "landmarks"})
    with pytest.raises(ValueError, match=r"is for one labelled set, data.path has 2"):
        config(packed, data={"path": [str(packed), "other"], "propagate": {}})
    with pytest.raises(ValueError, match=r"data.protect is for images without labels"):
        config(packed, data={"propagate": None, "protect": "other"})
    with pytest.raises(ConfigError, match="use a launch file without zero"):
        check_exclusions(config(packed, train={"exactness": "ordered"}), world=2, zero=1)
    plain = config(packed, data={"propagate": None})
    assert "propagate" not in plain.model_dump(mode="json")["data"]
    assert config_hash(plain) != config_hash(config(packed))
    longest = config(packed, name="n" * 80).teacher
    assert longest is not None
    assert len(longest.name) == 80


def test_a_teacher_without_a_single_point_ends_the_run_in_words(
    packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="in none of 6 images both looks agree on a point"):
        execute(config(packed, propagate={"agree": 1e-9}), tmp_path / "run", parallel=parallel)


def test_the_spec_of_the_pool_does_not_matter(packed: Path) -> None:
    """A pool keeps the domain of its labelled set: there is one set of landmarks."""
    cfg = config(packed)
    corpora, [pool] = training_corpora(cfg), unlabelled_corpora(cfg)
    pool.manifest.spec = DatasetSpec(name="another", landmark_names=("one",))
    pool.use({int(pool.rows[0]): np.ones((19, 2))})
    loader = open_loader(cfg, stage="train", corpora=corpora, pseudo_labelled=[pool])
    assert loader.spec == corpora[0].manifest.spec
    for batch in next(loader.global_batches()).micro_batches:
        assert batch.domain is None
        assert batch.points is not None
        assert batch.points.shape == (2, 19, 2)
    loader.close()
