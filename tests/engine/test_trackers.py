"""Trackers, by the files they write: each step once whatever happened to the run, and nothing that names anybody."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.engine import requirements, trackers
from ddpm_lmk.engine.trackers import Tracker, Trackers, figures_of, public_settings, results_of
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import read_lines
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.sweep.run import run_sweep
from tests.sweep.sweeps import quiet, write_sweep

extra = pytest.mark.extra("trackers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow does with SQLAlchemy


@pytest.fixture(autouse=True)
def _outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own for mlflow.db, no settings of this machine, and a machine that may be busy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "LAST_S", 600.0)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if "mlflow" in sys.modules:  # it keeps the store of the first run of a process
        sys.modules["mlflow"].set_tracking_uri("")


def config(*names: str, **sections: Any) -> RunConfig:
    runtime = {"trackers": list(names), **sections.pop("runtime", {})}
    data = {"path": "shards", **sections.pop("data", {})}
    return RunConfig.model_validate({"task": {"kind": "denoise"}, "data": data, "runtime": runtime, **sections})


def trained(step: int) -> dict[str, Any]:
    return {"step": step, "images": 4 * step, "loss": 1 / step, "lr": 1e-4, "eta_s": 9.0, "skipped": 0}


def follow(run: RunDir, cfg: RunConfig, lines: list[dict[str, Any]], results: dict[str, Any] | None = None) -> None:
    """One session of a run that makes these lines."""
    with Trackers(cfg, run, group="table") as following:
        following.start()
        for line in lines:
            run.metrics(line)
        if results is not None:
            following.conclude(results)


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records_of_wandb(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: protobuf in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def of_wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What `wandb sync` would send: the files of a run in the order of their times."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in records_of_wandb(path):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for key in items.keys() - {"_step", "_timestamp", "_runtime", "samples"}:
                    found.setdefault(key, []).append((items["_step"], items[key]))
    return found


def of_mlflow(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with sqlite3.connect(path) as store:
        for key, step, value in store.execute("select key, step, value from metrics order by timestamp, step"):
            found.setdefault(key, []).append((step, value))
    return found


@extra
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_every_step_is_there_once_in_a_run_that_was_stopped_and_killed(name: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", writes=True)
    run.path.mkdir()
    cfg = config(name)
    follow(run, cfg, [trained(1), trained(2), {"step": 2, "validation": {"score": 0.5}}])  # stopped, and saved
    follow(run, cfg, [trained(3), trained(4), trained(5)])  # killed: the last checkpoint is of step 3
    if name == "wandb":
        notes = json.loads((run.path / "wandb/run.json").read_text())
        killed = {**notes, "sessions": notes["sessions"][:1], "held": {"train": 2, "validation": 2}}
        (run.path / "wandb/run.json").write_text(json.dumps(killed))
        time.sleep(1.1)  # sessions are named after the second they begin in
    run.log.rewind_metrics(3)
    follow(run, cfg, [trained(4), trained(5), {"step": 5, "validation": {"score": 0.25}}, trained(6)])

    read = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": lambda _: of_mlflow(tmp_path / "mlflow.db")}
    found = read[name](run.path / "tensorboard" if name == "tensorboard" else run.path)
    assert found["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert found["validation/score"] == [(2, 0.5), (5, 0.25)]
    assert "train/eta_s" not in found


@extra
def test_scores_samples_settings_and_the_group_are_there_and_nothing_that_names_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "mueller")
    monkeypatch.setattr("sys.argv", ["/home/mueller/ddpm-lmk", "data.path=/home/mueller/films"])
    private = {"path": "s3://bucket/mueller/films?key=mueller"}
    cfg = config(
        *("tensorboard", "wandb", "mlflow"),
        name="cell-1",
        task={"kind": "landmarks"},
        data={**private, "draw": "listed", "shots": 2, "images": ["mueller_1960", "mueller_1961"]},
        init={"weights": "/home/mueller/runs/base"},
        runtime={"cache_dir": "C:\\mueller\\cache"},
    )
    run = RunDir(tmp_path / "run", writes=True)
    run.path.mkdir()
    cv2.imwrite(str(run.path / "samples.png"), np.full((8, 8), 77, np.uint8))
    protocol = {"unit": "mm", "mre": 1.5, "sdr": {"2": 80.0}, "per_landmark": [{"name": "sella", "mre": 9.0}]}
    follow(run, cfg, [trained(1)], {"split": "test", "train": {"steps": 1}, "protocols": {"original": protocol}})
    scores = {"test/original/mre": [(1, 1.5)], "test/original/sdr.2": [(1, 80.0)]}

    found = of_tensorboard(run.path / "tensorboard")
    assert {key: found[key] for key in scores} == scores
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    (image,) = events.Images("samples")
    assert cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_GRAYSCALE).mean() == 77
    assert b"data.path:\n- films\n" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    assert "_hparams_/experiment" in events.summary_metadata

    found = of_wandb(run.path)
    assert {key: found[key] for key in scores} == scores
    (session,) = (run.path / "wandb").glob("offline-run-*")
    (about,) = (
        one.run for one in records_of_wandb(next(session.glob("*.wandb"))) if one.WhichOneof("record_type") == "run"
    )
    assert (about.display_name, about.run_group, about.job_type, about.project) == (
        "cell-1",
        "table",
        "landmarks",
        "ddpm-lmk",
    )
    assert about.host == ""
    settings = {item.key or item.nested_key[0]: item.value_json for item in about.config.update}
    assert settings["data.path"] == '["films"]'
    assert settings["data.images"] == '"2 listed"'
    (picture,) = session.glob("files/media/images/*.png")
    assert cv2.imread(str(picture), cv2.IMREAD_GRAYSCALE).mean() == 77

    found = of_mlflow(tmp_path / "mlflow.db")
    assert {key: found[key] for key in scores} == scores
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert ("table",) in store.execute("select name from experiments").fetchall()
        assert ("runtime.cache_dir", "cache") in store.execute("select key, value from params").fetchall()
        assert ("mlflow.runName", "cell-1") in store.execute("select key, value from tags").fetchall()
    assert [path.read_bytes() for path in tmp_path.rglob("mlruns/**/samples.png")] == [
        (run.path / "samples.png").read_bytes()
    ]

    written = [
        *run.path.glob("tensorboard/*"),
        *session.glob("*.wandb"),
        *session.glob("files/**/*"),
        tmp_path / "mlflow.db",
    ]
    for path in written:
        assert path.is_dir() or b"mueller" not in path.read_bytes(), path


@extra
def test_a_tracker_named_later_gets_the_whole_curve(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", writes=True)
    run.path.mkdir()
    follow(run, config(), [trained(1), trained(2)])
    follow(run, config("tensorboard"), [trained(3)])
    assert [step for step, _ in of_tensorboard(run.path / "tensorboard")["train/loss"]] == [1, 2, 3]


class Broken(Tracker):
    name = "broken"

    def open(self) -> dict[str, int]:
        raise ConnectionError("no route\nto host")


class Slow(Tracker):
    name = "slow"

    def open(self) -> dict[str, int]:
        time.sleep(30)
        raise AssertionError("nobody waits so long")


@pytest.mark.parametrize(
    ("tracker", "told"), [(Broken, "failed (ConnectionError: no route to host)"), (Slow, "too slow")]
)
def test_a_tracker_that_fails_or_hangs_is_a_warning_and_an_event(
    tracker: type[Tracker], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", tracker)
    monkeypatch.setattr(trackers, "LAST_S", 0.2)
    run = RunDir(tmp_path / "run", writes=True)
    run.path.mkdir()
    with caplog.at_level(logging.WARNING):
        follow(run, config("tensorboard"), [trained(1), trained(2)])
    (warning,) = caplog.messages
    assert told in warning
    assert "metrics.jsonl has everything" in warning
    (event,) = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["tracker"]) == ("tracker.failed", tracker.name)


def test_other_ranks_follow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    follow(RunDir(tmp_path, writes=False), config("tensorboard"), [trained(1)])
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"names wandb, .* pip install 'ddpm-lmk\[trackers\]'"):
        requirements.check_trackers(config("wandb"))
    requirements.check_trackers(config())


def test_a_run_without_trackers_is_the_run_it_was() -> None:
    assert "trackers" not in config().model_dump()["runtime"]
    assert config_hash(config()) != config_hash(config("tensorboard"))


def test_a_line_becomes_figures_by_kind() -> None:
    assert figures_of(trained(4) | {"loss": None}) == (
        *("train", 4),
        {"train/images": 16, "train/lr": 1e-4, "train/skipped": 0},
    )
    assert figures_of({"step": 4, "images": 16, "validation": {"mre": 2.0}}) == (
        "validation",
        4,
        {"validation/mre": 2.0},
    )


def test_scores_of_a_mixture_are_named_after_its_datasets() -> None:
    part = {"dataset": "hand", "split": "test", "protocols": {"paper": {"unit": "px", "mre": 2.0, "failed": 0}}}
    assert results_of({"parts": [part]}) == {"hand/test/paper/mre": 2.0, "hand/test/paper/failed": 0}


def test_no_setting_names_a_folder() -> None:
    settings = public_settings(config(data={"path": ["/a/films/", "gs://b/c/pool#part"]}, name="mine"))
    assert settings["data.path"] == ["films", "pool"]
    assert settings["name"] == "mine"
    assert not [value for value in settings.values() if "/" in str(value)]


AT_ONCE = """
import sys
from pathlib import Path
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.trackers import MLflow
from tests.engine.test_trackers import config
Parallel("cpu")
tracker, folder = MLflow(config("mlflow"), Path(sys.argv[1]), "table"), Path(sys.argv[1])
folder.mkdir()
held = tracker.open()
tracker.log({"train/loss": float(sys.argv[1])}, 1)
tracker.close(held)
"""


@extra
def test_cells_that_begin_at_once_make_the_tables_once(tmp_path: Path) -> None:
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    cells = [subprocess.Popen([sys.executable, "-c", AT_ONCE, cell], cwd=tmp_path, env=here) for cell in ("1", "2")]
    assert [cell.wait(300) for cell in cells] == [0, 0]
    assert sorted(of_mlflow(tmp_path / "mlflow.db")["train/loss"]) == [(1, 1.0), (1, 2.0)]


@extra
def test_cells_of_a_sweep_are_a_group(tmp_path: Path, packed_phantoms: Path) -> None:
    keys = {"runtime.trackers": ["tensorboard", "wandb"]}
    sweep = write_sweep(tmp_path, packed_phantoms, shots=[1, 2], seeds=[0], set=keys)
    assert run_sweep(load_sweep(sweep, out=tmp_path / "out"), console=quiet()) == 0
    cells = sorted((tmp_path / "out" / "cells").glob("*/"))
    assert [cell.name for cell in cells] == ["scratch-k1-s0", "scratch-k2-s0"]
    for cell in cells:
        (path,) = cell.glob("wandb/offline-run-*/run-*.wandb")
        (about,) = (record.run for record in records_of_wandb(path) if record.WhichOneof("record_type") == "run")
        assert (about.run_group, about.display_name) == ("table", cell.name)
        lines = [line for line in read_lines(cell / "metrics.jsonl") if "loss" in line]
        for found in (of_wandb(cell), of_tensorboard(cell / "tensorboard")):
            assert found["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
            assert "test/original/mre" in found


def test_a_password_in_a_url_is_no_setting() -> None:
    shown = public_settings(config(data={"path": ["https://name:secret@host", "https://name:secret@host/films"]}))
    assert shown["data.path"] == ["host", "films"]
