"""Runs the items of `_gpu_items` one after the other, each within its limit, and remembers what is done.

    benchmarks/gpu_queue.sh [--out DIR] [--state DIR] [--carried DIR] [--budget-s 560] [--only NAME ...]
                            [--redo NAME ...] [--cpu-smoke] [--list]

Needs nothing but Python's own library, so that it can say what is missing. A call takes `--budget-s` at most; the next
one, with the same `--state`, goes on with what is not done. What Python lacks comes as wheels in `--carried`
(`benchmarks/carry.sh` fills it); a wheel in parts is joined once the last part came, in whatever call. On a machine
that begins bare again, `gpu_queue.tar.gz` of the last call in `--carried` says what is done. An item that needs what is
not there is named and skipped. Exit code 0: all that could run passed; 1: something failed; 5: a package that
everything needs is missing; 75: call again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from _gpu_items import REPO, Item, items

WANTED = (
    *("torch", "accelerate", "cv2", "matplotlib", "numpy", "PIL", "psutil", "pydantic", "rich", "safetensors"),
    *("torchmetrics", "typer", "webdataset", "yaml"),
)
FEWEST_S = 15.0  # with less left in a call, no item begins
SMOKE_PATIENCE = 5  # a smoke run is for any machine, however busy
LAST_LINES = 4
ARCHIVE, KEPT = "gpu_queue.tar.gz", ("results", "logs", "done")
AGAIN = 75


class Queue:
    """The state of the queue, in a folder that outlives a call."""

    def __init__(self, state: Path, carried: Path, *, is_smoke: bool) -> None:
        self.state, self.carried, self.is_smoke = state.resolve(), carried.resolve(), is_smoke
        names = ("results", "logs", "done", "site", "wheels", "packs", "runs")
        self.results, self.logs, self.done, self.site, self.wheels, self.packs, self.runs = (
            self.state / name for name in names
        )
        for name in names:
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.items = list(items(results=self.results, packs=self.packs, runs=self.runs, is_smoke=is_smoke))
        self.open: dict[str, str] = {}  # item -> why it is not done
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPO), str(self.site)]),
            "PYTHONUNBUFFERED": "1",
            **({"LMK_GPU_TESTS_ON": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if is_smoke else {}),
        }

    def take(self) -> None:
        """Take over what was carried: wheels, parts of wheels, packed x-rays, the archive of an earlier machine."""
        if (self.carried / ARCHIVE).is_file():
            self._take_over(self.carried / ARCHIVE)
        for file in sorted(self.carried.glob("*.whl*")) if self.carried.is_dir() else []:
            shutil.copy2(file, self.wheels)
        for sums in sorted(self.wheels.glob("*.whl.sha256")):
            self._join(sums.with_suffix(""), sums.read_text().split()[0])
        for pack in sorted((self.carried / "packs").glob("*/manifest.json")):
            shutil.copytree(pack.parent, self.packs / pack.parent.name, dirs_exist_ok=True)
        for wheel in sorted(self.wheels.glob("*.whl")):
            self._install(wheel)

    def _take_over(self, path: Path) -> None:
        """What an earlier machine did need not be done again; what this one did stays."""
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                parts = PurePosixPath(member.name).parts
                content = archive.extractfile(member) if member.isfile() else None
                target = self.state / member.name
                if content is None or parts[0] not in KEPT or ".." in parts or target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as out:
                    shutil.copyfileobj(content, out)

    def _join(self, wheel: Path, digest: str) -> None:
        parts = sorted(wheel.parent.glob(f"{wheel.name}.part-*"))
        if wheel.exists() or not parts:
            return
        joined = wheel.with_suffix(".joined")
        with joined.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
        if hashlib.sha256(joined.read_bytes()).hexdigest() == digest:
            joined.rename(wheel)
            for part in parts:
                part.unlink()
        else:
            joined.unlink()
            tell(f"{wheel.name}: {len(parts)} parts are here, which are not all of it")

    def _install(self, wheel: Path) -> None:
        note = self.site / f".took-{wheel.name}"
        if note.exists():
            return
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        done = subprocess.run(
            [*pip, "--target", str(self.site), str(wheel)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            tell(f"{wheel.name}: left out, {said}")
        else:
            note.touch()

    def has(self, module: str) -> bool:
        """Can the items import it?"""
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        run = [sys.executable, "-c", code, module]
        return subprocess.run(run, env=self.environment, capture_output=True, check=False).returncode == 0

    def pack_phantoms(self) -> None:
        """Synthetic films for the items that train and load, made here."""
        out, size, count = self.packs / "phantoms", 32 if self.is_smoke else 256, 12 if self.is_smoke else 64
        if (out / "manifest.json").exists():
            return
        code = (
            "import sys; from ddpm_lmk.data.pack_settings import PackSettings\n"
            "from ddpm_lmk.data.shards.pack import pack\n"
            "if __name__ == '__main__':\n    counts = {'train': int(sys.argv[3]), 'val': 4, 'test': 8}\n"
            "    settings = PackSettings(kind='phantom', size=int(sys.argv[2]), counts=counts)\n"
            "    pack('skull', sys.argv[1], settings, workers=1)\n"
        )
        (self.state / "pack_phantoms.py").write_text(code)
        command = [sys.executable, str(self.state / "pack_phantoms.py"), str(out), str(size), str(count)]
        if subprocess.run(command, env=self.environment, check=False).returncode:
            tell("phantoms could not be packed; items that need them will say so")

    def run(self, item: Item, left_s: float) -> None:
        """Do an item, or note why not."""
        missing = [module for module in item.modules if not self.has(module)]
        missing += (
            [f"packed {item.pack}"] if item.pack and not (self.packs / item.pack / "manifest.json").exists() else []
        )
        if missing:
            self.open[item.name] = f"skipped: no {', no '.join(missing)} here"
            return
        if left_s < FEWEST_S or (left_s < item.limit_s / 2 and not item.goes_on):
            self.open[item.name] = "later: no time left in this call"
            return
        wanted_s = item.limit_s * (SMOKE_PATIENCE if self.is_smoke else 1)
        limit_s = min(float(wanted_s), left_s)
        tell(f"== {item.name}, at most {limit_s:.0f} s")
        begun, log = time.monotonic(), self.logs / f"{item.name}.log"
        with log.open("w") as out:
            code = self._commands(item.commands, out.fileno(), begun + limit_s)
        took_s = time.monotonic() - begun
        for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]:
            tell(f"   {line[:160]}")
        if code is None and left_s < wanted_s:
            self.open[item.name] = f"later: cut off after {took_s:.0f} s by the end of this call"
            return
        outcome = "passed" if code == 0 else "failed: over its limit" if code is None else f"failed: exit code {code}"
        (self.done / f"{item.name}.json").write_text(json.dumps({"outcome": outcome, "seconds": round(took_s, 1)}))

    def _commands(self, commands: Sequence[Sequence[str]], out: int, until: float) -> int | None:
        """Exit code of the first that fails, else 0; None where time ran out. Leaves no process behind."""
        for command in commands:
            process = subprocess.Popen(
                command, cwd=REPO, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if code != 0:
                return code
        return 0

    def table(self) -> list[tuple[str, str, str]]:
        """Item, outcome, seconds."""
        rows = []
        for item in self.items:
            file = self.done / f"{item.name}.json"
            if file.exists():
                facts = json.loads(file.read_text())
                rows.append((item.name, facts["outcome"], f"{facts['seconds']:.0f}"))
            else:
                rows.append((item.name, self.open.get(item.name, "later: not asked for"), ""))
        return rows

    def bundle(self, out: Path, table: str) -> None:
        """One archive with all results and logs so far, and the table beside it."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_queue.txt").write_text(table)
        for run in (self.runs / "pretrain", self.runs / "sweep"):
            for file in run.glob("*.json*"):
                shutil.copy2(file, self.results / f"films-{run.name}-{file.name}")
        with tarfile.open(out / ARCHIVE, "w:gz") as archive:
            for name in KEPT:
                archive.add(self.state / name, name)


def main() -> int:
    """One call."""
    options = _options()
    until = time.monotonic() + options.budget_s
    queue = Queue(options.state, options.carried, is_smoke=options.cpu_smoke)
    if options.list:
        for item in queue.items:
            tell(f"{item.name:18} {item.limit_s:4} s   " + " && ".join(" ".join(c) for c in item.commands))
        return 0
    queue.take()
    missing = [module for module in WANTED if not queue.has(module)]
    tell(f"Python {sys.version.split()[0]} at {sys.executable}; missing: {', '.join(missing) or 'nothing'}")
    if missing:
        tell("carry these as wheels for this Python: benchmarks/carry.sh --python X.Y")
        return 5
    queue.pack_phantoms()
    for item in queue.items:
        if options.only and item.name not in options.only:
            continue
        if item.name in options.redo:
            (queue.done / f"{item.name}.json").unlink(missing_ok=True)
        if not (queue.done / f"{item.name}.json").exists():
            queue.run(item, until - time.monotonic())
    rows = queue.table()
    table = "\n".join(
        f"{name:18} {seconds:>5} s  {outcome}" if seconds else f"{name:18} {'':>7}  {outcome}"
        for name, outcome, seconds in rows
    )
    queue.bundle(options.out, table + "\n")
    tell(f"\n{table}\n{options.out / ARCHIVE} has results and logs")
    if any(outcome.startswith("failed") for _, outcome, _ in rows):
        return 1
    return AGAIN if any(outcome.startswith("later") for _, outcome, _ in rows) and not options.only else 0


def tell(text: str) -> None:
    """Say it now."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-queue-results")))
    parser.add_argument("--state", type=Path, default=Path("/tmp/ddpm-lmk-gpu-queue"))
    parser.add_argument("--carried", type=Path, default=REPO / ".carry", help="wheels, parts of wheels, packs/NAME")
    parser.add_argument("--budget-s", type=float, default=560.0, help="seconds a call may take")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--redo", nargs="+", default=[], metavar="NAME", help="forget that these are done")
    parser.add_argument("--cpu-smoke", action="store_true", help="everything at toy size on a CPU")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
