"""Kill a run again and again, and compare what it ends with to the same run left in peace.

    python -m tests.faults.soak --kills 30 --worlds 1 2 4 --out soak.json       (`make soak` does that)

Every kill is a `kill -9` at a random moment, of one rank, of the launcher, or of all processes at once; after the
launcher is gone the run is started again on a number of processes drawn anew. The run must be of exactness class
`exact` where that number changes. Compared are the sha256 of weights, average and optimizer state in the last
checkpoint. Ends with 0 where all are equal, with 1 where they are not. Random choices follow from `--seed`; when a
process is hit follows from the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system import machine
from tests.faults.harness import Started, digests, events, steps_done, write_run

TARGETS = ("rank", "launcher", "all")
START_LIMIT_S = 300.0


def soak(
    folder: Path, *, kills: int, worlds: list[int], seed: int, steps: int, run_file: Path | None = None
) -> dict[str, Any]:
    """Do it; the result says what was done and whether the digests agree."""
    draw = random.Random(seed)
    if run_file is None:
        data = folder / "data"
        pack("skull", data, PackSettings(kind="phantom", size=32, counts={"train": 12}, seed=7), workers=1)
        exactness = {} if len(set(worlds)) == 1 else {"exactness": "exact", "micro_batch": 1}
        run_file = write_run(folder, data, length=f"{steps} steps", checkpoint_every="4 steps", **exactness)
    began = time.monotonic()
    peaceful = folder / "peaceful"
    assert _start(run_file, peaceful, worlds[0]).wait(1800) == 0, "the undisturbed run failed"
    peace_s = time.monotonic() - began
    wanted = digests(peaceful)
    hurt = _hurt(run_file, folder / "hurt", draw, kills=kills, worlds=worlds)
    found = digests(folder / "hurt")
    lost = [event["seconds"] for event in events(folder / "hurt", "ranks.recovered")]
    return {
        "what": "digests of a run killed at random moments against the undisturbed one",
        "day": datetime.now(UTC).date().isoformat(),
        "equal": found == wanted,
        "kills": sum(hurt["kills"].values()),
        "kills_by_target": dict(hurt["kills"]),
        "starts_by_processes": {str(world): count for world, count in sorted(hurt["starts"].items())},
        "steps": steps,
        "undisturbed_s": round(peace_s, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "rank_lost_to_all_training_s_max": max(lost, default=None),
        "sha256": found,
        "sha256_undisturbed": wanted,
        "seed": seed,
        "hardware": machine.hardware(),
        "versions": machine.versions("ddpm-lmk", "torch"),
    }


def _hurt(run_file: Path, out: Path, draw: random.Random, *, kills: int, worlds: list[int]) -> dict[str, Any]:
    """Run to the end through `kills` kills; a kill counts when the processes were there to be hit."""
    done: Counter[str] = Counter()
    starts: Counter[int] = Counter()
    while True:
        world = draw.choice(worlds)
        starts[world] += 1
        run = _start(run_file, out, world)
        while sum(done.values()) < kills:
            target = _kill(run, out, world, draw, is_early=draw.random() < 0.2)
            if target is None:
                break
            done[target] += 1
            sys.stderr.write(f"kill {sum(done.values())}: {target} of {world} processes at step {steps_done(out)}\n")
            if target != "rank" or world == 1:
                break
        code = run.wait(1800)
        if code == 0:
            assert sum(done.values()) >= kills, f"it was over after {dict(done)}; give it more --steps"
            return {"kills": done, "starts": starts}
        assert code < 0 or code in (75, 76, 137), f"ended with {code}:\n{run.said.read_text()}"
        _wait_for_orphans(run)


def _kill(run: Started, out: Path, world: int, draw: random.Random, *, is_early: bool) -> str | None:
    """Hit something at a random moment: of the start, or of training after a new step; None where it has ended."""
    before = steps_done(out)
    limit = time.monotonic() + START_LIMIT_S
    while run.process.poll() is None and time.monotonic() < limit:
        if steps_done(out) > before or (is_early and run.ranks()):
            break
        time.sleep(0.02)
    time.sleep(draw.random() * (3.0 if is_early else 1.0))
    target = draw.choice(TARGETS if world > 1 else ("launcher",))
    run.tree = _tree(run)
    victims = {
        "rank": run.tree[1:] and [draw.choice(run.tree[1:])],
        "launcher": run.tree[:1],
        "all": run.tree,
    }[target]
    if run.process.poll() is not None or not victims:
        return None if run.process.poll() is not None else _kill(run, out, world, draw, is_early=False)
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return target


def _tree(run: Started) -> list[psutil.Process]:
    """The launcher and its ranks."""
    try:
        return [psutil.Process(run.process.pid), *run.ranks()]
    except psutil.NoSuchProcess:
        return []


def _wait_for_orphans(run: Started) -> None:
    """Nothing of a launcher that is gone may be left after five seconds (failures.md C10)."""
    _, alive = psutil.wait_procs(run.tree[1:], timeout=5)
    assert not alive, f"still there after their launcher: {alive}"


def _start(run_file: Path, out: Path, world: int) -> Started:
    """Restarts are not limited here: the moments are random, and some come before the next checkpoint."""
    return Started([run_file], out, launch={"device": "cpu", "processes": world, "restarts": 1000})


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=400, help="length of the run; it must outlast the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a pre-training run file of your own instead of phantoms")
    parser.add_argument("--out", type=Path, help="result file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-soak-") as folder:
        result = soak(
            Path(folder),
            kills=given.kills,
            worlds=given.worlds,
            seed=given.seed,
            steps=given.steps,
            run_file=given.run,
        )
    text = json.dumps(result, indent=1) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    sys.stdout.write(text)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
