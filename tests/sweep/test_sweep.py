"""What running, failing, stopping and starting a sweep again leave behind."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_lmk.config.load import config_hash, load_run
from ddpm_lmk.sweep import cell_folder, load_sweep, plan_table
from ddpm_lmk.sweep.progress import last_step, to_csv
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system import locks
from ddpm_lmk.system.files import read_json
from tests.sweep.sweeps import quiet, text_of, torn_weights, write_content, write_run, write_sweep


def test_cells_that_fail_are_recorded_and_finished_ones_are_never_touched_again(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    out = tmp_path / "out"
    torn = torn_weights(tmp_path / "parent", load_sweep(write_sweep(tmp_path)).cells[0].cfg)
    file = write_sweep(tmp_path, packed_phantoms, shots=[2], start={"scratch": None, "torn": str(torn)})
    console = quiet()
    assert run_sweep(load_sweep(file, out=out), console=console) == 1
    said = text_of(console)
    assert said.count(" MRE ") == 2, said
    assert "torn-k2-s0 FAILED: " in said
    assert "2 of 4 cells done, 2 failed" in said
    check_summaries(out)
    failure = read_json(out / "cells" / "torn-k2-s1.error.json")
    assert failure is not None
    assert failure["exit_code"] == 4
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}
    mended = load_sweep(file, ["without=[torn]"], out=out)
    assert run_sweep(mended, processes=2, console=quiet()) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "2 cells, 2 done" in str(plan_table(mended).title)


def check_summaries(out: Path) -> None:
    """results.csv has the finished cells, sweep.json all of them."""
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    seen = [(row["shots"], row["seed"], row["labels_training"], row["images"]) for row in rows]
    assert seen == [("2", "0", "2", "6"), ("2", "1", "2", "6")]
    results = read_json(cell_folder(out, "scratch-k2-s0") / "results.json")
    assert results is not None
    assert float(rows[0]["original_mre"]) == pytest.approx(results["protocols"]["original"]["mre"], rel=1e-5)
    assert float(rows[0]["original_mean_shape_mre"]) > 0
    summary = read_json(out / "sweep.json")
    assert summary is not None
    status = {(cell["start"], cell["seed"]): cell["status"] for cell in summary["cells"]}
    assert status == {
        (start, seed): what for start, what in (("scratch", "done"), ("torn", "failed")) for seed in (0, 1)
    }


def test_one_command_pre_trains_what_is_missing_and_a_failed_stage_fails_its_own_cells_only(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    out = tmp_path / "out"
    write_run(tmp_path / "tune.yaml", packed_phantoms)
    write_run(tmp_path / "learn.yaml", packed_phantoms, kind="denoise", duration="4 steps")
    torn = torn_weights(tmp_path / "torn", load_run(tmp_path / "learn.yaml"))
    rows = {"disc": {"title": "Discs", "paper": "Our method"}}
    stages = {
        "ddpm": {"run": "learn.yaml", "set": {"train.snapshot_every": "2 steps"}},
        "torn": {"run": "learn.yaml", "set": {"init.weights": str(torn)}},
    }
    grid = {"shots": [2], "seeds": [0], "start": {"early": "stage:ddpm@2", "disc": "stage:torn"}}
    content = {"name": "table", "run": "tune.yaml", "stages": stages, "grids": [grid], "rows": rows}
    file = write_content(tmp_path, content)
    sweep, console = load_sweep(file, out=out), quiet()
    assert run_sweep(sweep, console=console) == 1
    said = text_of(console)
    assert "stage ddpm done" in said, said
    assert "disc-k2-s0: stage torn ended with exit code 4" in said, said
    results = read_json(out / "cells" / "early-k2-s0" / "results.json")
    assert results is not None
    assert results["start"]["weights"] == str(out / "stages" / "ddpm" / "snapshots" / "step-00000002")
    summary = read_json(out / "sweep.json")
    assert summary is not None
    assert summary["rows"] == rows
    assert {cell["cell"]: cell["status"] for cell in summary["cells"]} == {
        "early-k2-s0": "done",
        "disc-k2-s0": "failed",
    }
    again = quiet()
    assert run_sweep(load_sweep(file, ["only=[early]"], out=out), console=again) == 0
    assert "stage" not in text_of(again)
    assert plan_table(sweep).row_count == 4


def start_sweep(file: Path, out: Path) -> subprocess.Popen[str]:
    """The same sweep in a process of its own, which can be killed."""
    code = (
        "import sys; from pathlib import Path; from ddpm_lmk.sweep import load_sweep\n"
        "from ddpm_lmk.sweep.run import run_sweep\n"
        "sys.exit(run_sweep(load_sweep(sys.argv[1], out=Path(sys.argv[2]))))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(file), str(out)], stderr=subprocess.PIPE, text=True)


def events(out: Path, cell: str) -> list[str]:
    """What happened to a cell, in order."""
    return [json.loads(line)["event"] for line in (cell_folder(out, cell) / "events.jsonl").read_text().splitlines()]


def wait_until(condition: Callable[[], bool], *, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def test_a_sweep_stopped_by_a_scheduler_and_then_killed_is_finished_by_two_that_share_its_cells(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    out = tmp_path / "out"
    file = write_sweep(tmp_path, packed_phantoms, duration="40 steps", shots=[1])
    first = cell_folder(out, "scratch-k1-s0")

    def is_free() -> bool:
        with locks.locked(first.with_name("scratch-k1-s0.lock")) as is_mine:
            return is_mine

    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        steps_before = last_step(first / "metrics.jsonl")
        process = start_sweep(file, out)
        wait_until(lambda known=steps_before: last_step(first / "metrics.jsonl") > known + 4)  # type: ignore[misc]
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == code, said
        wait_until(is_free)  # the worker has ended by itself
        assert not (first / "done.json").exists(), "it was over before it was stopped"
    processes = [start_sweep(file, out) for _ in range(2)]
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode in (0, 75), said
    assert [cell.state() for cell in load_sweep(file, out=out).cells] == ["done", "done"]
    for name, times in (("scratch-k1-s0", 2), ("scratch-k1-s1", 0)):
        assert (events(out, name).count("run.started"), events(out, name).count("run.continued")) == (1, times)


def test_a_done_file_of_another_configuration_or_other_results_does_not_count(tmp_path: Path) -> None:
    cell = load_sweep(write_sweep(tmp_path), out=tmp_path).cells[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "results.json").write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of {}
    for config, results, is_done in (
        (config_hash(cell.cfg), digest, True),
        ("0" * 16, digest, False),
        (config_hash(cell.cfg), "0" * 64, False),
    ):
        (cell.folder / "done.json").write_text(json.dumps({"config_hash": config, "results_sha256": results}))
        assert cell.is_done() is is_done


def test_the_last_whole_line_of_a_metrics_file_says_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 3}\n{"step": 4, "validation": {}}\n{"step": 5, "lo')
    assert last_step(path) == 4


def test_tables_of_unlike_rows_keep_every_column() -> None:
    assert to_csv([{"a": 1}, {"a": 2.0, "b": None}]) == "a,b\n1,\n2,\n"
