"""Runs a call of the items of `_gpu_items`, each within its limit, and remembers what is done.

    benchmarks/gpu_queue.sh 1|2|3 [--out DIR] [--state DIR] [--carried DIR] [--budget-s 230] [--only NAME ...]
                                  [--redo NAME ...] [--cpu-smoke] [--list]

A call does its own items in order, then what earlier calls left. It ends after `--budget-s`, whatever hangs; called
again, with the same `--state`, it goes on with what is not done. A benchmark is told when it will be ended, and
before that writes what it has measured by then. After every item all results and logs so far are in `--out`, written
under another name and renamed, so that a call that is killed brings them home too.

Items are forked from one process that has imported torch, and so begin at once, each with a CUDA context of its own.
This process needs nothing but Python's own library, so that it can say what is missing. What Python lacks comes as
wheels in `--carried` (`benchmarks/carry.sh` fills it); a wheel in parts is joined once the last part came, in whatever
call. On a machine that begins bare again, `gpu_queue.tar.gz` of the last call in `--carried` says what is done. An item
that needs what is not there is named and skipped. Exit code 0: all that could run passed; 1: something failed; 5: a
package that everything needs is missing; 75: call again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from _gpu_items import HERE, REPO, Item, items

BEGAN = time.monotonic()
WANTED = (
    *("torch", "accelerate", "cv2", "matplotlib", "numpy", "PIL", "psutil", "pydantic", "rich", "safetensors"),
    *("torchmetrics", "typer", "yaml"),
)
# Imported once, before anything is forked. None of them may ask CUDA for anything: a fork of that could not use it.
PRELOADED = ("torch", "torch._dynamo", "matplotlib.figure", "ddpm_lmk.run", "_subject")
SMOKE_PATIENCE = 5  # a smoke run is for any machine, however busy
SMOKE_ABOUT_S = 15.0
CLOSING_S = 4.0  # kept of a call for its last archive
LEAVING_S = 3.0  # kept of an item's limit for its process to end by itself
GRACE_S = 3.0  # for a process that was killed; one that a driver holds may never go
PIP_S = 60.0
LAST_LINES, LOG_BYTES = 4, 2**20
ARCHIVE, TABLE, REPORT = "gpu_queue.tar.gz", "gpu_queue.txt", "gpu_queue.json"
KEPT = ("results", "logs", "done")
AGAIN = 75


class Queue:
    """The state of the queue, in a folder that outlives a call."""

    def __init__(self, state: Path, carried: Path, *, call: int, is_smoke: bool) -> None:
        self.state, self.carried, self.call, self.is_smoke = state.resolve(), carried.resolve(), call, is_smoke
        names = ("results", "logs", "done", "site", "wheels", "packs", "runs")
        self.results, self.logs, self.done, self.site, self.wheels, self.packs, self.runs = (
            self.state / name for name in names
        )
        for name in names:
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.paths = [str(REPO), str(HERE), str(self.site)]
        sys.path[:0] = [path for path in self.paths if path not in sys.path]
        self.items = list(items(results=self.results, packs=self.packs, runs=self.runs, is_smoke=is_smoke))
        self.open: dict[str, str] = {}  # item -> why it is not done
        self.environment = {
            "PYTHONPATH": os.pathsep.join(self.paths),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.state / "compiled"),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # should anything ask for CUDA before a fork, then not CUDA itself
            **({"LMK_GPU_TESTS_ON": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if is_smoke else {}),
        }

    def take(self) -> None:
        """Take over what was carried: wheels, parts of wheels, the archive of an earlier machine."""
        for archive in self.carried.rglob(ARCHIVE):
            self._take_over(archive)
        for file in sorted(self.carried.rglob("*.whl*")):
            shutil.copy2(file, self.wheels)
        for sums in sorted(self.wheels.glob("*.whl.sha256")):
            self._join(sums.with_suffix(""), sums.read_text().split()[0])
        self._install([wheel for wheel in sorted(self.wheels.glob("*.whl")) if not self._note(wheel).exists()])

    def _take_over(self, path: Path) -> None:
        """What an earlier machine did need not be done again; what this one did stays."""
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                is_kept = member.isfile() and PurePosixPath(member.name).parts[0] in KEPT
                if is_kept and not (self.state / member.name).exists():
                    archive.extract(member, self.state, filter="data")  # refuses what leads out of the folder

    def _join(self, wheel: Path, digest: str) -> None:
        parts = sorted(wheel.parent.glob(f"{wheel.name}.part-*"))
        if wheel.exists() or not parts:
            return
        joined, found = wheel.with_suffix(".joined"), hashlib.sha256()
        with joined.open("wb") as out:
            for part in parts:
                found.update(content := part.read_bytes())
                out.write(content)
        if found.hexdigest() == digest:
            joined.rename(wheel)
            for part in parts:
                part.unlink()
        else:
            joined.unlink()
            tell(f"{wheel.name}: {len(parts)} parts are here, which are not all of it")

    def _note(self, wheel: Path) -> Path:
        return self.site / f".took-{wheel.name}"

    def _install(self, wheels: Sequence[Path]) -> None:
        """All at once, since pip takes a second to start; where that fails, one by one."""
        if not wheels:
            return
        fresh = self.site / ".fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command = [*pip, "--no-cache-dir", "--target", str(fresh), *map(str, wheels)]
        said = "pip took too long"
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_S)
            if done.returncode == 0:
                # pip would put its folder `nvidia` in the place of the one that is there
                shutil.copytree(fresh, self.site, dirs_exist_ok=True, copy_function=os.replace)
                for wheel in wheels:
                    self._note(wheel).touch()
                importlib.invalidate_caches()
                return
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        if len(wheels) == 1:
            tell(f"{wheels[0].name}: left out, {said}")
        else:
            for wheel in wheels:
                self._install([wheel])

    def due(self) -> Iterator[Item]:
        """What this call has to do: its own items, then those of earlier calls; before each what it reads, if gone."""
        by_name = {item.name: item for item in self.items}
        ours = [item for item in self.items if item.call == self.call]
        for item in [*ours, *(item for item in self.items if item.call < self.call)]:
            if not self.is_done(item):
                yield from (by_name[name] for name in item.needs if not self.is_done(by_name[name]))
            if not self.is_done(item):
                yield item

    def is_done(self, item: Item) -> bool:
        """Did it end, well or not, and is what it made still there?"""
        if not self._outcome(item.name):
            return False
        return item.makes is None or item.makes.exists() or not self._outcome(item.name).startswith("passed")

    def _outcome(self, name: str) -> str:
        file = self.done / f"{name}.json"
        return str(json.loads(file.read_text())["outcome"]) if file.exists() else ""

    def run(self, item: Item, left_s: float) -> None:
        """Do an item within the time that is left, or note why not."""
        missing = [f"no {module} here" for module in item.modules if not has(module)]
        missing += [f"{name} did not pass" for name in item.needs if self._outcome(name).startswith("failed")]
        waits = [name for name in item.needs if not self._outcome(name)]
        if missing or waits:
            self.open[item.name] = f"skipped: {', '.join(missing)}" if missing else f"later: needs {', '.join(waits)}"
            return
        if left_s < (SMOKE_ABOUT_S if self.is_smoke else item.about_s):
            self.open[item.name] = "later: no time left in this call"
            return
        wanted_s = item.limit_s * (SMOKE_PATIENCE if self.is_smoke else 1)
        limit_s = min(float(wanted_s), left_s)
        tell(f"== {item.name}, about {item.about_s} s on an H200, at most {limit_s:.0f} s here")
        begun, log, before = time.monotonic(), self.logs / f"{item.name}.log", self._results()
        log.unlink(missing_ok=True)
        if item.fills is not None:
            shutil.rmtree(item.fills, ignore_errors=True)
        until = ("--until", f"{begun + limit_s - LEAVING_S:.1f}") if item.is_benchmark else ()
        code = self._fork((*item.words, *until), log, limit_s)
        took_s = time.monotonic() - begun
        brought = self._results() - before
        left_out = [words for file in brought for words in json.loads(file.read_text())["budget"]["left_out"]]
        for line in _shortened(log).splitlines()[-LAST_LINES:]:
            tell(f"   {line[:160]}")
        if code is None and left_s < wanted_s:
            self.open[item.name] = f"later: cut off after {took_s:.0f} s by the end of this call"
            return
        if code == 0 and left_out and left_s < wanted_s:
            self.open[item.name] = f"later: {len(left_out)} left out at the end of this call"
            return
        outcome = "failed: over its limit" if code is None else f"failed: exit code {code}"
        if code == 0:
            is_empty = item.is_benchmark and not brought
            outcome = "failed: no result" if is_empty else "passed"
            outcome += f", {len(left_out)} left out" if left_out else ""
        tell(f"   {outcome}, {took_s:.1f} s")
        facts = {"outcome": outcome, "seconds": round(took_s, 1), "in_call": self.call}
        _replace(self.done / f"{item.name}.json", json.dumps(facts))
        self.open.pop(item.name, None)

    def _results(self) -> set[Path]:
        return set(self.results.glob("*.json"))

    def _fork(self, words: Sequence[str], log: Path, limit_s: float) -> int | None:
        """Exit code of Python with these words; None where time ran out. Waits for no process that will not die."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        process = context.Process(target=carry_out, args=(words, str(log), self.environment, self.paths))
        process.start()
        process.join(limit_s)
        code = process.exitcode
        with suppress(ProcessLookupError, PermissionError):  # what it started goes with it
            os.killpg(process.pid or 0, signal.SIGKILL)
        if code is None:
            process.kill()
            process.join(GRACE_S)
        return code

    def rows(self) -> list[dict[str, object]]:
        """Each item, its outcome, what it took and was expected to take."""
        rows: list[dict[str, object]] = []
        for item in self.items:
            row: dict[str, object] = {"item": item.name, "call": item.call, "estimated_s": item.about_s}
            file = self.done / f"{item.name}.json"
            if file.exists() and item.name not in self.open:
                row |= json.loads(file.read_text())
            else:
                row["outcome"] = self.open.get(item.name, "later: not asked for")
            rows.append(row)
        return rows

    def bring(self, out: Path) -> None:
        """Lay the table, the report and one archive with all results and logs so far into `out`, at once or not."""
        out.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        lines = [f"{row['call']} {row['item']:18} {row.get('seconds', ''):>6}  {row['outcome']}" for row in rows]
        _replace(out / TABLE, "\n".join(lines) + "\n")
        (ours := self.results / f"gpu_queue-{'cpu' if self.is_smoke else 'cuda'}.json").touch()
        files = [path for kept in KEPT for path in sorted((self.state / kept).rglob("[!.]*")) if path.is_file()]
        names = [str(path.relative_to(self.state)) for path in files]
        _replace(ours, report := self._report(rows, names))
        _replace(out / REPORT, report)
        half = out / f".{ARCHIVE}"
        with tarfile.open(half, "w:gz", compresslevel=6) as archive:
            for name in names:
                archive.add(self.state / name, name)
        half.replace(out / ARCHIVE)

    def _report(self, rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
        """The result file: what ran here, and what each call brought home."""
        from ddpm_lmk.system.machine import hardware, versions

        file = self.state / "calls.json"
        calls: dict[str, object] = json.loads(file.read_text()) if file.exists() else {}
        taken = {"wall_s": round(time.monotonic() - BEGAN, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        calls[str(self.call)] = {**taken, "brought": [*names]}
        _replace(file, json.dumps(calls))
        facts = {"benchmark": "gpu_queue", "date": taken["at"], "size": "toy" if self.is_smoke else "full"}
        facts |= {
            "hardware": hardware() | {"load_1_min": os.getloadavg()[0]},
            "versions": versions("torch", "ddpm-lmk"),
        }
        return json.dumps({**facts, "calls": calls, "rows": rows}, indent=1) + "\n"


def carry_out(words: Sequence[str], log: str, environment: Mapping[str, str], paths: Sequence[str]) -> None:
    """In a process that was forked for it: do what `python3 WORDS` does, and say all of it to `log`."""
    os.setpgrp()  # a group, to be ended as one; no session, which would outlive a call that is killed
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(environment)
    os.chdir(REPO)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():  # something asked CUDA before the fork: begin from nothing
        os.execv(sys.executable, [sys.executable, *words])
    sys.path[:0] = [path for path in paths if path not in sys.path]
    threading.Thread(target=_end_with_queue, daemon=True).start()
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _end_with_queue() -> None:
    """End this process and what it started when the queue is gone; the one it was forked from lives on with it."""
    if (queue := multiprocessing.parent_process()) is not None:
        queue.join()
        os.killpg(0, signal.SIGKILL)


def has(module: str) -> bool:
    """Can the items import it?"""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def main() -> int:
    """One call."""
    options = _options()
    until = BEGAN + options.budget_s - CLOSING_S
    carried = options.carried or (options.state / "nothing" if options.cpu_smoke else REPO / ".carry")
    queue = Queue(options.state, carried, call=options.call, is_smoke=options.cpu_smoke)
    if options.list:
        for item in queue.items:
            tell(f"{item.call} {item.name}: about {item.about_s} s ({item.why}), at most {item.limit_s} s")
            tell(f"    python3 {' '.join(item.words)}")
        return 0
    os.environ.update(queue.environment)  # before the process that all others are forked from starts
    queue.take()
    missing = [module for module in WANTED if not has(module)]
    tell(f"Python {sys.version.split()[0]} at {sys.executable}; missing: {', '.join(missing) or 'nothing'}")
    if missing:
        tell(f"carry these as wheels: benchmarks/carry.sh --python {sys.version_info.major}.{sys.version_info.minor}")
        return 5
    for name in options.redo:
        (queue.done / f"{name}.json").unlink(missing_ok=True)
    for item in queue.due():
        if not options.only or item.name in options.only:
            queue.run(item, until - time.monotonic())
            queue.bring(options.out)
    queue.bring(options.out)
    tell("\n" + (options.out / TABLE).read_text() + f"{options.out / ARCHIVE} has results and logs")
    outcomes = [str(row["outcome"]) for row in queue.rows() if int(str(row["call"])) <= options.call]
    if any(outcome.startswith("failed") for outcome in outcomes):
        return 1
    return AGAIN if any(outcome.startswith("later") for outcome in outcomes) and not options.only else 0


def tell(text: str) -> None:
    """Say it now."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _shortened(log: Path) -> str:
    """The end of a log, which is all of it unless it would fill the way home."""
    content = log.read_bytes() if log.exists() else b""
    if len(content) > LOG_BYTES:
        log.write_bytes(content := content[-LOG_BYTES:])
    return content.decode(errors="replace")


def _replace(path: Path, text: str) -> None:
    """Write it whole or not at all."""
    half = path.with_name(f".{path.name}")
    half.write_text(text)
    half.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", type=int, choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-queue-results")))
    parser.add_argument("--state", type=Path, default=Path("/tmp/ddpm-lmk-gpu-queue"))
    parser.add_argument(
        "--carried", type=Path, help="wheels and parts of wheels (default: .carry; at toy size nothing)"
    )
    parser.add_argument("--budget-s", type=float, default=230.0, help="seconds a call may take")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--redo", nargs="+", default=[], metavar="NAME", help="forget that these are done")
    parser.add_argument("--cpu-smoke", action="store_true", help="everything at toy size on a CPU")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Python would wait for a process that a driver holds
