"""Ask a run of two processes to stop, and take processes from it, in every phase; measure how long it takes to obey.

    python -m tests.faults.signals --out signals.json

One run is started again and again in the same directory. Requests go to the launcher, to every process, or to one rank,
while it starts, steps, saves and evaluates: it must end with 75 (130 after Ctrl-C) within 25 s and leave no process.
Then a rank is killed (training again within 30 s), a rank is stopped (within 90 s, at the default limit), and the
launcher is killed (no rank left after 5 s). Ends with 0 where all that holds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system import heartbeat, machine
from tests.faults import breaking
from tests.faults.breaking import Break
from tests.faults.harness import Started, are_gone, events, newest_checkpoint, steps_done, write_run

GRACE_S, LOST_S, STALLED_S, ORPHAN_S = 25.0, 30.0, 90.0, 5.0
LAUNCH = {"device": "cpu", "processes": 2}
TARGETS = ("launcher", "all", "rank")
PHASES = ("start", "step", "save", "evaluate")
OTHERS = ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGHUP, 75))


def campaign(folder: Path, *, targets: tuple[str, ...] = TARGETS, phases: tuple[str, ...] = PHASES) -> dict[str, Any]:
    """All of it; the result says what was seen and whether every limit was kept."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the run would inherit that it is ignored
    data, out = folder / "data", folder / "run"
    pack("skull", data, PackSettings(kind="phantom", size=32, counts={"train": 12, "val": 60}, seed=7), workers=1)
    run_file = write_run(
        folder,
        data,
        length="1000000 steps",
        checkpoint_every="15 steps",
        log_every="1 steps",
        evaluate_every="20 steps",
    )
    words = [run_file, "data.validation_split=val", "evaluate.batch=1"]

    def start(**environment: str) -> Started:
        return Started(words, out, launch=LAUNCH, **environment)

    stops = [_stop(start, out, target, phase, signal.SIGTERM, 75) for phase in phases for target in targets]
    stops += [_stop(start, out, "launcher", "step", number, code) for number, code in OTHERS]
    stops.append(_insist(start, out))
    losses = _lose(start, out)
    kept = all(stop["is_right"] and stop["seconds"] <= GRACE_S for stop in stops)
    limits = {"rank_killed": LOST_S, "rank_stopped": STALLED_S, "launcher_killed": ORPHAN_S}
    return {
        "what": "seconds from a request to the end of the last process, and from a loss to all ranks in training again",
        "day": datetime.now(UTC).date().isoformat(),
        "all_within_limits": kept and all(losses[f"{name}_s"] <= limit for name, limit in limits.items()),
        "limits_s": {"stop": GRACE_S, **limits},
        "stop_s_max": max(stop["seconds"] for stop in stops),
        "stops": stops,
        **losses,
        "hardware": machine.hardware(),
        "versions": machine.versions("ddpm-lmk", "torch"),
    }


def _stop(
    start: Callable[..., Started], out: Path, target: str, phase: str, number: signal.Signals, code: int
) -> dict[str, Any]:
    """Start, wait for the phase, ask, and see how it ends."""
    slow: list[Break] = [{"call": "os.fsync", "save": 2, "how": "pause"}]
    environment = breaking.environment(*slow) if phase == "save" else {}
    run = start(**environment)
    _wait_for(run, out, phase)
    ranks = run.ranks()
    victims = {"launcher": [run.process.pid], "rank": [rank.pid for rank in ranks[1:]]}
    victims["all"] = [run.process.pid, *(rank.pid for rank in ranks)]
    began = time.monotonic()
    for pid in victims[target]:
        os.kill(pid, number)
    found = run.wait(60)
    seconds = time.monotonic() - began
    is_right = found == code and are_gone([rank.pid for rank in ranks])
    result = {"signal": number.name, "to": target, "during": phase, "exit_code": found, "seconds": round(seconds, 1)}
    sys.stderr.write(f"{result}\n" if is_right else f"{result} WRONG\n{run.said.read_text()}\n")
    return {**result, "is_right": is_right}


def _insist(start: Callable[..., Started], out: Path) -> dict[str, Any]:
    """A second request, later than the first: at once, nothing is saved."""
    run = start(**breaking.environment({"call": "os.fsync", "save": 2, "at": None, "how": "pause"}))
    _wait_for(run, out, "save")
    ranks = run.ranks()
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    began, saved = time.monotonic(), newest_checkpoint(out)
    run.process.send_signal(signal.SIGTERM)
    code = run.wait(60)
    seconds = time.monotonic() - began
    was_there = code == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(ranks, timeout=2)
    is_right = code in (75, 128 + signal.SIGTERM) and seconds <= 2.0 and not alive
    is_right &= not was_there or newest_checkpoint(out) == saved
    result = {"signal": "SIGTERM twice", "to": "launcher", "during": "save", "exit_code": code}
    sys.stderr.write(f"{result} {seconds:.1f} s\n")
    return {**result, "seconds": round(seconds, 1), "is_right": is_right}


def _lose(start: Callable[..., Started], out: Path) -> dict[str, Any]:
    """Kill a rank, stop a rank, kill the launcher: one launch."""
    run = start()
    known = len(events(out, "ranks.recovered"))
    _wait_for(run, out, "step")
    began = time.monotonic()
    run.ranks()[1].kill()
    run.until(lambda: len(events(out, "ranks.recovered")) == known + 1)
    killed_s = time.monotonic() - began
    _wait_for(run, out, "step")
    began = time.monotonic()
    run.ranks()[0].send_signal(signal.SIGSTOP)
    run.until(lambda: len(events(out, "ranks.recovered")) == known + 2, timeout=240)
    stopped_s = time.monotonic() - began
    ranks = run.ranks()
    began = time.monotonic()
    run.process.kill()
    run.wait(10)
    psutil.wait_procs(ranks, timeout=30)
    found = {"rank_killed_s": killed_s, "rank_stopped_s": stopped_s, "launcher_killed_s": time.monotonic() - began}
    sys.stderr.write(f"{found}\n")
    return {name: round(seconds, 2) for name, seconds in found.items()}


def _wait_for(run: Started, out: Path, phase: str) -> None:
    """Until the run is in this phase."""
    if phase == "start":
        run.until(run.ranks)
        time.sleep(0.7)
        return
    before = steps_done(out)
    # A resumed run repeats lines up to where it was asked to stop: wait for new ones.
    run.until(lambda: steps_done(out) > before + 3 or (steps_done(out) < before and steps_done(out) > 3))
    if phase == "save":
        run.until(lambda: "broken at os.fsync" in run.said.read_text())  # the one before it is durable
    if phase == "step":
        run.until(lambda: all(steps_done(out) % every in range(2, every - 5) for every in (15, 20)))
    if phase == "evaluate":
        [pulse] = {Path(rank.environ()[heartbeat.FOLDER]) for rank in run.ranks()}
        run.until(lambda: any(beat.phase == "evaluate" for beat in heartbeat.read_heartbeats(pulse)))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-signals-") as folder:
        result = campaign(Path(folder))
    text = json.dumps(result, indent=1) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    sys.stdout.write(text)
    return 0 if result["all_within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
