"""The whole proof about checkpoints, minutes long: `python -m tests.faults.campaign [--out FILE]`.

Every system call of a save, random kills, damage to every file, disks of 1 to 3.5
checkpoints, and each file of a run's results. It stops at the first thing that is not as it has to be; if nothing is
wrong, the figures go to `benchmarks/results/faults_checkpoint.json`. The fast suite runs a sample (test_saving.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system.machine import hardware, versions
from tests.engine import processes
from tests.faults import disk, outputs, syscalls
from tests.faults.breaking import Break
from tests.faults.forge import ROOT, Forge
from tests.faults.saving import Outcome, continues, damage_all, job, kill_often, undisturbed

SIZES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
PLACE_OF_RESULTS = ROOT / "benchmarks" / "results" / "faults_checkpoint.json"
MOST_CALLS = 400


def every_call(forge: Forge, folder: Path, wanted: Outcome) -> dict[str, Any]:
    """Kill, and refuse, each system call of a save and the retention after it."""
    folder.mkdir()
    calls = syscalls.watch(forge, folder)
    syscalls.want_flushes_in_order(calls)
    kinds: Counter[str] = Counter()
    for number, disturbance in enumerate(syscalls.places(calls)):
        place = folder / str(number)
        place.mkdir()
        syscalls.disturb(forge, place, disturbance, wanted)
        kinds["killed" if "KILL" in disturbance else "refused"] += 1
        shutil.rmtree(place)
    return {"calls_of_a_save": len(calls), **kinds, "ended_bit_exact": kinds.total()}


def every_output(forge: Forge, folder: Path, phantoms: Path) -> dict[str, int]:
    """Kill at each stage of each whole file a run writes."""
    wanted = outputs.undisturbed(forge, phantoms, folder / "undisturbed")
    hits = 0
    for call, how in (("os.fsync", "kill"), ("os.replace", "kill"), ("os.replace", "kill after")):
        for number in range(1, MOST_CALLS):
            place: Break = {"call": call, "at": number, "how": how}  # type: ignore[typeddict-item]
            work = outputs.job(phantoms, folder / f"{call}-{how.replace(' ', '-')}-{number}")
            if not outputs.interrupt(forge, work, place, wanted):
                break  # the run makes fewer such calls
            hits += 1
    return {"kills": hits, "half_files_seen": 0, "same_results_afterwards": hits}


def every_size(forge: Forge, folder: Path) -> list[dict[str, Any]]:
    """Disks from one checkpoint to three and a half."""
    wanted = undisturbed(forge, folder, ballast=disk.BALLAST)
    size = disk.checkpoint_size(folder / "undisturbed")
    return [
        disk.fill(forge, folder / str(times), wanted, times=times, checkpoint_bytes=size) | {"checkpoint_bytes": size}
        for times in SIZES
    ]


def two_processes(forge: Forge, folder: Path) -> dict[str, int]:
    """Two processes in class `exact`, rank 0 killed in its second save; one process goes on, to the same bits."""
    wanted = undisturbed(forge, folder, exactness="exact")
    places: list[Break] = [
        {"call": "os.mkdir", "at": 2, "how": "kill"},
        {"call": "os.fsync", "at": 3, "how": "kill"},
        {"call": "os.rename", "at": 1, "how": "kill after"},
        {"call": "os.rename", "at": 2, "how": "kill after"},
    ]
    for number, place in enumerate(places):
        work = job(folder / str(number), exactness="exact")
        ranks = processes.launch(forge, folder, [work | {"breaks": [place | {"save": 2}]}], world=2)
        codes, said = processes.wait(ranks, timeout=120)
        assert codes[0] == -signal.SIGKILL, said
        continues(forge, work, wanted)
    return {"kills": len(places), "continued_bit_exact_by_one_process": len(places)}


def every_damage(forge: Forge, folder: Path) -> dict[str, int]:
    """200 flipped bits, 50 truncations, and the blunt kinds; each has to be found out."""
    work = job(folder / "run")
    work["config"]["train"]["keep_checkpoints"] = 2
    forge.finish(work)
    return damage_all(folder / "run" / "checkpoints", flips=200, truncations=50) | {"loaded_silently": 0}


def campaign(folder: Path, say: Callable[[str], Any]) -> dict[str, Any]:
    """All parts, one after the other, and the figures of each."""
    phantoms = folder / "phantoms"
    pack(
        "skull",
        phantoms,
        PackSettings(kind="phantom", size=32, counts={"train": 4, "val": 2, "test": 3}, seed=7),
        workers=1,
    )
    with Forge() as forge:
        (folder / "plain").mkdir()
        wanted = undisturbed(forge, folder / "plain")
        parts: dict[str, Callable[[Path], Any]] = {
            "damage": lambda place: every_damage(forge, place),
            "full_disk": lambda place: every_size(forge, place),
            "results": lambda place: every_output(forge, place, phantoms),
            "random_kills": lambda place: {"kills": kill_often(forge, place, wanted, kills=100, seed=3)},
            "two_processes": lambda place: two_processes(forge, place),
            "system_calls": lambda place: every_call(forge, place / "calls", wanted),
        }
        figures = {}
        for name, part in parts.items():
            began = time.monotonic()
            (folder / name).mkdir()
            figures[name] = part(folder / name)
            say(f"{name}: {json.dumps(figures[name])} in {time.monotonic() - began:.0f} s\n")
    return figures


def main() -> None:
    """Run it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PLACE_OF_RESULTS)
    out: Path = parser.parse_args().out
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = campaign(Path(folder), sys.stdout.write)
    result = {
        "benchmark": "faults_checkpoint",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions("torch", "safetensors", "accelerate"),
        "wall_s": round(time.monotonic() - began),
        **figures,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
