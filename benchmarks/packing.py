"""What packing costs per film, what isolation adds to it, and how little memory a large tree needs.

    python -m benchmarks.packing --source table:TABLE_DIR [--source folder:DIR] [--source dicom:DIR] [--name NAME]

`isolated` is packing as it is, with one decoding process; `in this process` does the same jobs without one, which no
command does. Processor seconds are of both processes together, so they hold on a busy machine too. `source MB` are the
files' own bytes. The tree is hard links to a hundred small pictures: growth of the packing process' memory between two
sizes of it, per file. Writes `packing_NAME.json` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.images.sandbox import Isolation
from ddpm_lmk.data.images.sandbox_worker import answer
from ddpm_lmk.system.machine import hardware, versions

SIZE_PX = 256
STORE = {"size": SIZE_PX, "aspect": "squeeze", "filter": "area", "bits": 8, "encoding": "raw", "quality": 95}
TREES = (10_000, 40_000)
REPEATS = 3
MEASURE = """
import sys
from pathlib import Path
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
pack(sys.argv[1], sys.argv[2], PackSettings(kind="folder", size=16), workers=1)
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def main() -> None:
    """Measure every source and the trees, and write the result file."""
    options = _options()
    cv2.setNumThreads(1)
    rows = [measure(*source.split(":", 1)) for source in options.source]
    result = {
        "benchmark": "packing",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "stored_size_px": SIZE_PX,
        "rows": rows,
        "tree": tree(*TREES),
        "hardware": hardware(),
        "versions": versions("numpy", "opencv-python-headless", "pillow", "pydicom"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"packing_{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(rows)}\n{json.dumps(result['tree'])}\n{path}\n")


def measure(kind: str, where: str) -> dict[str, Any]:
    """One source, decoded and stored three times each way; the fastest counts."""
    files = sorted(
        path for path in Path(where).rglob("*") if path.is_file() and path.suffix not in (".csv", ".txt", ".md")
    )
    options = {"frame": None, "voi": kind == "dicom", "allow_burned_in": False, "only_dicom": kind == "dicom"}
    store = {**STORE, "window": "voi" if kind == "dicom" else "percentile"}
    jobs = [{"path": str(path), "options": options, "native_size": None, "store": store} for path in files]
    source_bytes = sum(path.stat().st_size for path in files)
    here = min((_timed(map(answer, jobs)) for _ in range(REPEATS)), key=lambda times: times["cpu_s"])
    isolated = min((_isolated(jobs) for _ in range(REPEATS)), key=lambda times: times["cpu_s"])
    films = int(isolated.pop("films"))
    here.pop("films")
    return {
        "kind": kind,
        "dataset": Path(where).name,
        "films": films,
        "refused": len(files) - films,
        "source_bytes": source_bytes,
        "isolated_films_per_cpu_s": round(films / isolated["cpu_s"], 1),
        "isolated_source_mb_per_cpu_s": round(source_bytes / 1e6 / isolated["cpu_s"], 2),
        "isolated_films_per_s": round(films / isolated["wall_s"], 1),
        "in_this_process_films_per_cpu_s": round(films / here["cpu_s"], 1),
        "isolation_ms_per_film": round(1000 * (isolated["cpu_s"] - here["cpu_s"]) / len(files), 3),
        "start_of_a_process_cpu_s": round(_start_cpu_s(), 3),
    }


def _isolated(jobs: list[dict[str, Any]]) -> dict[str, float]:
    """As `_timed`, without the start of the process."""
    with Isolation(1) as isolation:
        list(isolation.answers(jobs[:1]))
        before = _children_cpu_s()
        times = _timed(isolation.answers(jobs))
        times["cpu_s"] += _children_cpu_s() - before
    return times


def _timed(answers: Iterator[tuple[dict[str, Any], bytes]]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    films = sum("refused" not in said for said, _ in answers)
    return {"films": films, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _children_cpu_s() -> float:
    """Of the running children; `os.times` knows only of those that ended."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def _start_cpu_s() -> float:
    begun = os.times()
    with Isolation(1) as isolation:
        list(isolation.answers([{"path": os.devnull, "options": {}}]))
    ended = os.times()
    return ended.children_user + ended.children_system - begun.children_user - begun.children_system


def tree(small: int, large: int) -> dict[str, Any]:
    """Memory of the packing process for two trees of tiny files."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for number in range(100):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
            cv2.imwrite(str(seeds / f"{number}.png"), noise)
        for count in (small, large):
            root = Path(folder) / f"tree-{count}"
            for number in range(count):
                place = root / f"folder-{number // 1000:05}"
                place.mkdir(parents=True, exist_ok=True)
                os.link(seeds / f"{number % 100}.png", place / f"film-of-a-patient-{number:08}.png")
            command = [sys.executable, "-c", MEASURE, str(root), str(Path(folder) / f"out-{count}")]
            peaks[count] = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {
        "files": [small, large],
        "peak_rss_bytes": [peaks[small], peaks[large]],
        "bytes_per_file": round((peaks[large] - peaks[small]) / (large - small), 1),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", required=True, metavar="KIND:WHERE", help="repeatable")
    parser.add_argument("--name", default="real", help="the result is packing_NAME.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
