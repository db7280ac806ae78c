"""Sweeps: what a file expands to, and what running, failing, stopping and starting again leave behind."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.models import build_model
from ddpm_lmk.rundir.checkpoint import save_snapshot
from ddpm_lmk.sweep import Sweep, cell_folder, is_done, load_sweep, plan_table, state_of
from ddpm_lmk.sweep.progress import last_step, to_csv
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.locks import locked

RUN = """
name: tiny
data: {{path: {data}, image_size: 32, workers: 0}}
model: {{width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}}
task: {{kind: landmarks}}
train: {{length: {length}, group_size: 2, log_every: 1 steps, checkpoint_every: 2 steps}}
evaluate: {{split: test, batch: 4}}
"""


def write_sweep(folder: Path, data: Path | str = "nowhere", length: str = "3 steps", **keys: Any) -> Path:
    """A run file and a sweep file beside it; `keys` replace those of the only grid."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(RUN.format(data=data, length=length))
    grid = {"shots": [1, 2], "seeds": [0, 1], "start": {"scratch": None}} | keys
    (folder / "sweep.yaml").write_text(json.dumps({"name": "table", "run": "run.yaml", "grids": [grid]}))
    return folder / "sweep.yaml"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for one another take many times as long on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def quiet() -> Console:
    """A console that is no terminal and can be read."""
    return Console(file=io.StringIO(), width=200)


def names(sweep: Sweep) -> list[str]:
    return [cell.name for cell in sweep.cells]


def test_a_sweep_is_every_combination_of_its_grids_longest_first(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, length="30 epochs", shots=[1, 10, 100], seeds=[0, 7], start={"a": None, "b": "runs/p"})
    sweep = load_sweep(file)
    assert len(sweep.cells) == 12
    assert {cell.name for cell in sweep.cells[:4]} == {"a-k100-s0", "a-k100-s7", "b-k100-s0", "b-k100-s7"}
    cell = next(cell for cell in sweep.cells if cell.name == "b-k10-s7")
    assert (cell.cfg.data.shots, cell.cfg.seed, cell.cfg.init.weights, cell.cfg.name) == (10, 7, "runs/p", "b-k10-s7")
    assert (cell.steps, cell.images) == (150, 300)  # 30 epochs of 10 images in groups of 2
    assert sweep.starts() == {"a": None, "b": "runs/p"}


def test_what_is_set_grows_more_specific_towards_the_command_line(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, set={"optim.lr": 0.01, "train.precision": "fp32"}, draw="random")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"set": {"optim.lr": 0.1, "optim.weight_decay": 0.5}}))
    cfg = load_sweep(file).cells[0].cfg
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.train.precision, cfg.data.draw) == (0.01, 0.5, "fp32", "random")
    assert load_sweep(file, ["optim.lr=1e-5"]).cells[0].cfg.optim.lr == 1e-5


def test_shots_seeds_and_starts_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    sweep = load_sweep(file, ["shots=[null, 3]", "seeds=5", "start.scratch=runs/other", "name=mine"])
    assert (sweep.name, sorted(names(sweep))) == ("mine", ["scratch-k3-s5", "scratch-kall-s5"])
    assert sweep.starts() == {"scratch": "runs/other"}


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"shots": [0]}, [], "grids.0.shots.0=0"),
        ({"seeds": None}, [], "grids.0 has no seeds, and the sweep has none"),
        ({"start": {"a": "stage:ddpm"}}, [], "ddpm is used, but stages has only: nothing"),
        ({"pack": "ceph"}, [], "ceph is used, but packs has only: nothing"),
        ({"run": "gone.yaml"}, [], "run=gone.yaml: there is no file"),
        ({}, ["only=[other]"], "only: other is no start; known: scratch"),
        ({}, ["without=scratch"], "leave no cell"),
        ({}, ["stage.ddpm=runs/x"], "there is no such stage"),
        ({"shot": [1]}, [], "unknown key grids.0.shot; did you mean"),
        ({"start": {"a b": None}}, [], "start"),
        ({"seeds": [1, 1]}, [], "two grids make the cell scratch-k1-s1"),
        ({"set": {"optim.learning_rate": 1}}, [], "unknown key optim.learning_rate"),
        ({}, ["start.isbi=runs/x"], "no grid has a start of that label; known: scratch"),
        ({}, ["run=elsewhere.yaml"], "there is no file"),
        ({}, ["data.shots=3"], "override shots="),
        ({}, ["task.kind=denoise", "data.shots=null"], "a sweep needs a fine-tuning run"),
    ],
)
def test_mistakes_in_a_sweep_are_one_line(
    tmp_path: Path, change: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write_sweep(tmp_path, **change), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_starting_weights_are_found_before_anything_runs(tmp_path: Path, packed_phantoms: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, packed_phantoms, start={"isbi": str(tmp_path / "gone")}))
    told = r"gone does not exist; .* \(isbi-k1-s0 and 3 more\); start\.LABEL=PATH names other weights"
    with pytest.raises(CheckpointError, match=told):
        run_sweep(sweep, tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_to_do_without_torch(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    code = (
        "import sys; from pathlib import Path; from ddpm_lmk.sweep import load_sweep, plan_table\n"
        "from rich.console import Console\n"
        "Console(width=160).print(plan_table(load_sweep(Path(sys.argv[1])), None)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    for words in ("4 cells, 0 done", "scratch-k2-s1", "12 steps", "24 images", "pending"):
        assert words in done.stdout, done.stdout


def torn_weights(folder: Path, cfg: RunConfig) -> Path:
    """A snapshot whose header is right and whose weights are not: what only loading them finds."""
    state = build_model(cfg.model, out_channels=19).state_dict()
    path = save_snapshot(folder / "snapshots", {"model": state, "ema": state}, {"step": 1})
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "ema.safetensors").write_bytes(content)
    return path


def test_cells_that_fail_are_recorded_and_finished_ones_are_never_touched_again(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    torn = torn_weights(tmp_path / "parent", load_sweep(write_sweep(tmp_path)).cells[0].cfg)
    file = write_sweep(tmp_path, packed_phantoms, shots=[2], start={"scratch": None, "torn": str(torn)})
    out = tmp_path / "out"
    console = quiet()
    assert run_sweep(load_sweep(file), out, processes=1, console=console) == 1
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count(" MRE ") == 2, said
    assert "torn-k2-s0 FAILED: " in said
    assert "2 of 4 cells done, 2 failed" in said
    check_summaries(out)
    failure = read_json(out / "cells" / "torn-k2-s1.error.json")
    assert failure is not None
    assert failure["exit_code"] == 4
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}
    mended = load_sweep(file, ["without=[torn]"])
    assert run_sweep(mended, out, processes=2, console=quiet()) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "2 cells, 2 done" in str(plan_table(mended, out).title)


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
        ("scratch", 0): "done",
        ("scratch", 1): "done",
        ("torn", 0): "failed",
        ("torn", 1): "failed",
    }


def start_sweep(file: Path, out: Path, processes: int = 1) -> subprocess.Popen[str]:
    """The same sweep in a process of its own, which can be killed."""
    code = (
        "import sys; from pathlib import Path; from ddpm_lmk.sweep import load_sweep\n"
        "from ddpm_lmk.sweep.run import run_sweep\n"
        "sys.exit(run_sweep(load_sweep(sys.argv[1]), Path(sys.argv[2]), processes=int(sys.argv[3])))"
    )
    words = [sys.executable, "-c", code, str(file), str(out), str(processes)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def events(out: Path, cell: str) -> list[str]:
    """What happened to a cell, in order."""
    return [json.loads(line)["event"] for line in (cell_folder(out, cell) / "events.jsonl").read_text().splitlines()]


def wait_until(condition: Any, *, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def test_a_sweep_stopped_by_a_scheduler_and_then_killed_is_finished_by_two_that_share_its_cells(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    file = write_sweep(tmp_path, packed_phantoms, length="40 steps", shots=[1])
    out = tmp_path / "out"
    steps_before = 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        process = start_sweep(file, out)
        wait_until(lambda known=steps_before: steps_of(out) > known + 4)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == code, said
        wait_until(lambda: _is_free(out / "cells" / "scratch-k1-s0.lock"))  # the worker has ended by itself
        steps_before = steps_of(out)
        assert not (cell_folder(out, "scratch-k1-s0") / "done.json").exists(), "it was over before it was stopped"
    processes = [start_sweep(file, out) for _ in range(2)]
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode in (0, 75), said
    sweep = load_sweep(file)
    assert all(is_done(cell_folder(out, cell.name), cell) for cell in sweep.cells)
    assert [state_of(out, cell) for cell in sweep.cells] == ["done", "done"]
    for name, times in (("scratch-k1-s0", 2), ("scratch-k1-s1", 0)):
        assert (events(out, name).count("run.started"), events(out, name).count("run.continued")) == (1, times)


def steps_of(out: Path) -> int:
    return last_step(cell_folder(out, "scratch-k1-s0") / "metrics.jsonl")


def _is_free(path: Path) -> bool:
    with locked(path) as is_mine:
        return is_mine


def test_a_done_file_of_another_configuration_or_other_results_does_not_count(tmp_path: Path) -> None:
    cell = load_sweep(write_sweep(tmp_path)).cells[0]
    folder = cell_folder(tmp_path, cell.name)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of {}
    for config, results, wanted in (
        (config_hash(cell.cfg), digest, True),
        ("0" * 16, digest, False),
        (config_hash(cell.cfg), "0" * 64, False),
    ):
        (folder / "done.json").write_text(json.dumps({"config_hash": config, "results_sha256": results}))
        assert is_done(folder, cell) is wanted


def test_the_last_whole_line_of_a_metrics_file_says_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 3}\n{"step": 4, "validation": {}}\n{"step": 5, "lo')
    assert last_step(path) == 4


def test_tables_of_unlike_rows_keep_every_column() -> None:
    assert to_csv([{"a": 1}, {"a": 2.0, "b": None}]) == "a,b\n1,\n2,\n"
