"""Kill a sweep again and again, and compare its tables with those of the same sweep left in peace.

    python -m tests.faults.sweep_soak --kills 10 --out sweep_soak.json

Nine cells (three shots, three seeds). Every kill is a `kill -9` at a random moment, of the sweep or of its worker.
Compared are, byte for byte, `results.csv` and every cell's `predictions.csv`; and once a cell is done none of its files
may ever change. Ends with 0 where all is as it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system import machine
from tests.faults.harness import ROOT

FINE_TUNING: dict[str, Any] = {
    "name": "cell",
    "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
    "task": {"kind": "landmarks"},
    "evaluate": {"split": "test", "batch": 4},
}


def soak(
    folder: Path, *, kills: int, seed: int, shots: Sequence[int], seeds: Sequence[int], steps: int
) -> dict[str, Any]:
    """Do it; the result says what was done and whether the tables agree."""
    file = _write(folder, shots, seeds, steps)
    began = time.monotonic()
    assert _start(file, folder / "peaceful").wait(900) == 0
    finished: dict[str, str] = {}
    done = _hurt(file, folder / "hurt", random.Random(seed), kills, finished)
    _look(folder / "hurt", finished)
    wanted, found = _tables(folder / "peaceful"), _tables(folder / "hurt")
    return {
        "what": "tables of a sweep killed at random moments against those of the undisturbed one",
        "day": datetime.now(UTC).date().isoformat(),
        "equal": found == wanted,
        "finished_cells_unchanged": True,  # else `_look` has raised
        "cells": len(shots) * len(seeds),
        "kills": sum(done.values()),
        "kills_by_target": dict(done),
        "times_finished_max": max(_times_finished(folder / "hurt").values()),
        "wall_s": round(time.monotonic() - began, 1),
        "sha256": found,
        "seed": seed,
        "hardware": machine.hardware(),
        "versions": machine.versions("ddpm-lmk", "torch"),
    }


def _hurt(file: Path, out: Path, draw: random.Random, kills: int, finished: dict[str, str]) -> Counter[str]:
    done: Counter[str] = Counter()
    while True:
        process = _start(file, out)
        while sum(done.values()) < kills:
            _wait_for_a_step(process, out)
            time.sleep(draw.random() * 2.5)
            if process.poll() is not None:
                break
            target = draw.choice(("sweep", "worker"))
            children = psutil.Process(process.pid).children()
            victims = children[:1] if target == "worker" else [psutil.Process(process.pid)]
            if not victims:
                continue
            _look(out, finished)
            for victim in victims:
                victim.kill()
            done[target] += 1
            sys.stderr.write(f"kill {sum(done.values())}: {target}, {len(finished)} cells done\n")
            if target == "sweep":
                break
        code = process.wait(900)
        _, alive = psutil.wait_procs(_workers(out), timeout=5)
        assert not alive, "a worker has outlived its sweep"
        _look(out, finished)
        if code == 0:
            assert sum(done.values()) >= kills, f"it was over after {dict(done)}; give it more --steps"
            return done
        assert code in (-9, 1), f"the sweep ended with {code}"


def _look(out: Path, finished: dict[str, str]) -> None:
    """Remember every done cell with all its files; one that was done before must be as it was."""
    for folder in sorted((out / "cells").iterdir()) if (out / "cells").is_dir() else ():
        if not (folder / "done.json").is_file():
            continue
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "events.jsonl")
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
        stamp = f"{digest} {(folder / 'done.json').stat().st_mtime_ns}"
        assert finished.setdefault(folder.name, stamp) == stamp, f"{folder.name} was done, and has changed"


def _times_finished(out: Path) -> dict[str, int]:
    """How often each cell says that it finished; a kill in that moment can cost the line, never add one."""
    events = {path.parent.name: path.read_text() for path in (out / "cells").glob("*/events.jsonl")}
    return {name: text.count('"run.finished"') for name, text in events.items()}


def _tables(out: Path) -> dict[str, str]:
    files = [out / "results.csv", *sorted((out / "cells").glob("*/predictions.csv"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _wait_for_a_step(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until some cell has taken a step since now."""
    before = _written(out)
    while process.poll() is None and _written(out) <= before:
        time.sleep(0.02)


def _written(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("cells/*/metrics.jsonl"))


def _workers(out: Path) -> list[psutil.Process]:
    """Workers of any sweep in this folder: those that hold a log of it open."""
    log = str(out / "logs" / "worker-0.log")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ddpm_lmk.sweep.worker" in (process.info["cmdline"] or []):
            with_log = [path for path in _links(process.pid) if path == log]
            found += [process] if with_log else []
    return found


def _links(pid: int) -> list[str]:
    try:
        return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def _start(file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ddpm_lmk.cli", "sweep", str(file), "--cpu", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=out.parent, env=environment)


def _write(folder: Path, shots: Sequence[int], seeds: Sequence[int], steps: int) -> Path:
    data = folder / "data"
    pack("skull", data, PackSettings(kind="phantom", size=32, counts={"train": 4, "test": 4}, seed=7), workers=1)
    run = FINE_TUNING | {"data": {"path": str(data), "image_size": 32, "workers": 0}}
    run["train"] = {"length": f"{steps} steps", "group_size": 2, "log_every": "1 steps", "checkpoint_every": "5 steps"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    grid = {"shots": list(shots), "seeds": list(seeds), "start": {"scratch": None}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "soak", "run": "run.yaml", "grids": [grid]}))
    return folder / "sweep.yaml"


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="length of a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-soak-") as folder:
        result = soak(
            Path(folder), kills=given.kills, seed=given.seed, shots=(1, 2, 3), seeds=(0, 1, 2), steps=given.steps
        )
    text = json.dumps(result, indent=1) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    sys.stdout.write(text)
    return 0 if result["equal"] and result["times_finished_max"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
