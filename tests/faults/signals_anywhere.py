"""Ask every command to stop at a random moment from its very start, and see that it is gone in time.

    python -m tests.faults.signals_anywhere --signals 60 --out signals_anywhere.json     (`make soak` does that)

Moments are drawn from the start of the process, so they fall into the interpreter's own start, imports, waits for other
nodes, for a server that never answers, for a lock and for a compiler, as well as into work. SIGINT goes to the process
or, as from a keyboard, to its whole group; SIGTERM to the process. Right is: 130 or 75 (the process was listening), the
signal's own end (it was not Python yet), or the end it would have come to anyway, within 25 s, and no process left.
Random choices follow from `--seed`; what a moment hits follows from the machine.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from tests.data.web import serve
from tests.faults.harness import ROOT, SMOKE, run_tool, tree_of

LIMIT_S = 25.0
SHORTEST_WAIT_S = 25.0  # a server is given up after half a minute, on a slow machine too
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
ENDLESS = "train.duration=1000000 steps"


@dataclass(frozen=True)
class Command:
    """A command line of `ddpm-lmk`, and how long it is busy at least on a quiet machine."""

    words: Callable[[Path], Sequence[object]]  # of a folder of its own
    lasts_s: float
    waits: bool = False  # for something that never comes


class Place:
    """What the commands work on: packs, finished runs, a sweep, a server that never answers, locks that are held."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.pool, self.films = folder, folder / "pool", folder / "films"
        self.cache = folder / "cache"
        pack(
            "skull",
            self.pool,
            PackSettings(kind="phantom", size=32, counts={"train": 12, "val": 4, "test": 6}, seed=7),
            workers=1,
        )
        self.films.mkdir()
        dice = np.random.default_rng(0)
        for number in range(400):
            film = dice.integers(0, 256, (96, 96), dtype=np.uint8)
            Image.fromarray(film).save(self.films / f"{number:03}.png")
        torch.save({"weight": torch.zeros(2000, 500)}, folder / "foreign.pt")
        data = f"data.path={self.pool}"
        self._run("pretrain", SMOKE / "pretrain.yaml", data, "--cpu", 1, "--out", folder / "pretrained")
        self._run("finetune", SMOKE / "finetune.yaml", data, "--cpu", 1, "--out", folder / "finetuned")
        sweep = {"name": "s", "run": str(SMOKE / "finetune.yaml")}
        sweep["grids"] = [{"shots": [1, 2], "seeds": [0, 1], "start": {"scratch": None}}]  # type: ignore[assignment]
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.silent = f"http://127.0.0.1:{server.getsockname()[1]}/pack"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.nowhere = f"127.0.0.1:{probe.getsockname()[1]}"
        self.remote = stack.enter_context(serve(self.pool)).url
        stalling = stack.enter_context(serve(self.pool))
        stalling.fault = lambda name, number: "hang" if name.endswith(".tar") else None
        self.stalling = stalling.url
        self.held = folder / "held"
        for cache in (self.held, self.held / "shards"):
            cache.mkdir()
            fcntl.flock(stack.enter_context((cache / ".lock").open("w")), fcntl.LOCK_EX)

    def _run(self, *words: object) -> None:
        process = self.start(words, self.folder / "prepared.txt")
        assert process.wait(600) == 0, (self.folder / "prepared.txt").read_text()

    def start(self, words: Sequence[object], said: Path, **environment: str) -> subprocess.Popen[bytes]:
        """`ddpm-lmk WORDS` in a process group of its own."""
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LMK_CACHE": str(self.cache)} | environment
        with said.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ddpm_lmk.cli", *map(str, words)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | more,
                start_new_session=True,
            )


def commands(place: Place) -> dict[str, Command]:
    """Every command, and every kind of wait."""
    data, ram, one = f"data.path={place.pool}", "runtime.cache_pixels=ram", ("--cpu", 1)
    pretrain, finetune = ("pretrain", SMOKE / "pretrain.yaml"), ("finetune", SMOKE / "finetune.yaml")
    finished = place.folder / "finetuned"
    nodes = ("--nodes", 2, "--rdzv", place.nowhere)
    return {
        "pack": Command(lambda at: ("shards", "pack", place.films, "--kind", "folder", "--size", 64, "--out", at), 3),
        "pack phantoms": Command(
            lambda at: ("shards", "pack", "hand", "--kind", "phantom", "--count", "train=300", "--out", at), 20
        ),
        "verify": Command(lambda at: ("shards", "verify", place.pool), 2),
        "show": Command(lambda at: ("shards", "show", place.pool, "--out", at), 4),
        "compare": Command(lambda at: ("shards", "compare", place.pool), 2),
        "pretrain": Command(lambda at: (*pretrain, data, ENDLESS, *one, "--out", at), 12),
        "pretrain, two processes": Command(lambda at: (*pretrain, data, ENDLESS, "--cpu", 2, "--out", at), 20),
        "finetune": Command(lambda at: (*finetune, data, ENDLESS, *one, "--out", at), 12),
        "sweep": Command(lambda at: ("sweep", place.folder / "sweep.yaml", data, ENDLESS, "--cpu", 2, "--out", at), 20),
        "demo": Command(lambda at: ("demo", *one, "--out", at), 40),
        "evaluate": Command(lambda at: ("evaluate", finished, "--data", place.pool, "--out", at), 6),
        "predict": Command(lambda at: ("predict", finished, *sorted(place.films.iterdir())[:60], "--out", at), 8),
        "sample": Command(
            lambda at: ("sample", place.folder / "pretrained", "--steps", 15, "--out", at.with_suffix(".png")), 6
        ),
        "export": Command(lambda at: ("export", finished, "--out", at.with_suffix(".safetensors")), 5),
        "report": Command(lambda at: ("report", finished, "--out", at.with_suffix(".html")), 5),
        "import-weights": Command(
            lambda at: ("import-weights", place.folder / "foreign.pt", "--out", at.with_suffix(".safetensors")), 6
        ),
        "bench": Command(lambda at: ("bench", "device", "--budget-min", 1, "--out", at), 15),
        "doctor": Command(lambda at: ("doctor", "--out", at), 5),
        "help": Command(lambda at: ("--help",), 0.7),
        "wait for another node": Command(
            lambda at: (*pretrain, data, *one, *nodes, "--node-rank", 1, "--out", at), 10, waits=True
        ),
        "wait for other nodes to join": Command(
            lambda at: (*pretrain, data, *one, *nodes, "--node-rank", 0, "--out", at), 10, waits=True
        ),
        "doctor waits for another node": Command(
            lambda at: ("doctor", "--rdzv", place.nowhere, "--node-rank", 1), 8, waits=True
        ),
        "wait for a server": Command(
            lambda at: (*pretrain, f"data.path={place.silent}", *one, "--out", at), 10, waits=True
        ),
        "verify waits for a server": Command(lambda at: ("shards", "verify", place.silent), 6, waits=True),
        "wait for a download": Command(
            lambda at: (*pretrain, f"data.path={place.stalling}", ram, *one, "--out", at),
            12,
            waits=True,
        ),
        "wait for a lock": Command(
            lambda at: (*pretrain, f"data.path={place.remote}", ram, *one, "--out", at), 12, waits=True
        ),
        "wait for a compiler": Command(
            lambda at: (*pretrain, data, ENDLESS, "train.compile=true", *one, "--out", at), 20
        ),
    }


def campaign(folder: Path, *, signals: int, seed: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Ask `signals` times, the commands in turn; the result says what was seen and whether the limit was kept."""
    dice = random.Random(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background ignore it, and hands that on
    with ExitStack() as stack:
        place = Place(folder, stack)
        chosen = {name: it for name, it in commands(place).items() if only is None or name in only}
        slowness = _slowness(place)
        rows = []
        for number in range(signals):
            if number % len(chosen) == 0:
                order = dice.sample(sorted(chosen), len(chosen))
            name = order[number % len(chosen)]
            sent = dice.choice(sorted(CODES))
            to = dice.choice(("process", "group")) if sent == signal.SIGINT else "process"
            after_s = dice.random() * chosen[name].lasts_s * slowness
            if chosen[name].waits:
                after_s = min(after_s, SHORTEST_WAIT_S)
            rows.append(_ask(place, name, chosen[name], folder / f"{number}", sent, to, after_s))
            sys.stderr.write(f"{number + 1}: {rows[-1]}\n")
    return {
        "what": "seconds from a signal, at a random moment from the start of a command, to the end of its last process",
        "all_right": all(row["is_right"] for row in rows),
        "limit_s": LIMIT_S,
        "signals": len(rows),
        "commands": len({row["command"] for row in rows}),
        "seconds_max": max(row["seconds"] for row in rows),
        "ends": {end: sum(row["end"] == end for row in rows) for end in sorted({row["end"] for row in rows})},
        "rows": rows,
        "seed": seed,
    }


def _slowness(place: Place) -> float:
    """How many times longer than on a quiet machine things take here and now."""
    began = time.monotonic()
    place.start(["--help"], place.folder / "help.txt").wait(120)
    return max(1.0, (time.monotonic() - began) / 0.7)


def _ask(
    place: Place, name: str, command: Command, at: Path, sent: signal.Signals, to: str, after_s: float
) -> dict[str, Any]:
    """Start it, wait, send the signal, and see how it ends and what is left."""
    said = at.with_name(f"{at.name}-said.txt")
    more = {"LMK_CACHE": str(place.held)} if name == "wait for a lock" else {}
    process = place.start(command.words(at), said, **more)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    tree = tree_of(process.pid)
    began = time.monotonic()
    if process.poll() is None:
        (os.killpg if to == "group" else os.kill)(process.pid, sent)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        code = None
    left_s = max(0.0, began + LIMIT_S - time.monotonic())
    _, alive = psutil.wait_procs([each for each in tree if each.pid != process.pid], timeout=left_s)
    seconds = time.monotonic() - began
    for each in [*alive, *tree_of(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    end = _end(code, sent, said.read_text(errors="replace"))
    is_right = end != "wrong" and not alive and not (command.waits and end == "finished")
    row = {"command": name, "signal": sent.name, "to": to, "after_s": round(after_s, 2), "exit_code": code}
    if not is_right:
        sys.stderr.write(said.read_text(errors="replace")[-3000:])
    return row | {"seconds": round(seconds, 2), "end": end, "left": len(alive), "is_right": is_right}


def _end(code: int | None, sent: signal.Signals, said: str) -> str:
    """In a word: stopped (it was listening), not started (it was not yet), finished, or wrong."""
    if code == CODES[sent]:
        return "stopped"
    if code == -sent or (sent == signal.SIGINT and code == 1 and "KeyboardInterrupt" in said and "cli/" not in said):
        return "not started"
    return "finished" if code == 0 else "wrong"


if __name__ == "__main__":
    run_tool(
        __doc__,
        lambda folder, given: campaign(folder, signals=given.signals, seed=given.seed, only=given.only),
        "all_right",
        signals={"type": int, "default": 60},
        seed={"type": int, "default": 0},
        only={"nargs": "*", "help": "names of commands"},
    )
