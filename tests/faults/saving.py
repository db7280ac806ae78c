"""What the tests about saving and the campaign share: a short run, breaking it, and what must be true afterwards."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_lmk.rundir import retention
from ddpm_lmk.rundir.checkpoint import Checkpoint, load_checkpoint, load_latest
from tests.engine import processes
from tests.engine.toy import config
from tests.faults.forge import Forge

SAVES = (3, 6, 9, 12)
SETTINGS: dict[str, Any] = {
    "duration": 12,
    "micro_batch": 2,
    "select": "best",
    "evaluate_every": 2,
}


def job(out: Path, *, exactness: str = "ordered", **more: Any) -> dict[str, Any]:
    """Twelve steps, four checkpoints of which the newest is kept, best weights, and a rule that changes the rate."""
    cfg = config(
        train=SETTINGS | {"exactness": exactness},
        runtime={"checkpoint_every": 3, "keep_checkpoints": 1},
        data={"validation_split": "val"},
        optim={"plateau": {"patience": 0}},
    )
    return {"config": cfg.model_dump(mode="json"), "out": str(out), **more}


@dataclass(frozen=True)
class Outcome:
    """How an undisturbed run ends."""

    digest: str
    losses: list[float]

    @classmethod
    def of(cls, out: Path) -> Outcome:
        return cls(processes.facts(out)["digest"], processes.losses(out))


def undisturbed(forge: Forge, folder: Path, **more: Any) -> Outcome:
    """The run nothing happens to."""
    forge.finish(job(folder / "undisturbed", **more))
    return Outcome.of(folder / "undisturbed")


def good_steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints, every one of which must load; at least one, where one was ever saved."""
    steps = [load_checkpoint(path).state["step"] for path in retention.complete(out / "checkpoints")]
    said = processes.events(out) if (out / "events.jsonl").exists() else []
    assert steps or "checkpoint.saved" not in said, "a checkpoint was saved, and none is left"
    return steps


def continues(forge: Forge, work: dict[str, Any], wanted: Outcome) -> None:
    """The same command goes on and ends with the bits of the undisturbed run, and nothing half done stays."""
    out = Path(work["out"])
    forge.finish(work)
    assert Outcome.of(out) == wanted
    assert good_steps(out)[0] == SAVES[-1]
    left = [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith((".tmp", ".trash"))]
    assert left == []


def kill_often(forge: Forge, folder: Path, wanted: Outcome, *, kills: int, seed: int) -> int:
    """One run after the other is killed somewhere, and again when it goes on, until `kills` hit; then all continue."""
    dice = random.Random(seed)
    hits, works = 0, []
    while hits < kills:
        assert len(works) < 4 * kills, "runs end before they are killed"
        works.append(job(folder / f"run-{len(works)}"))
        while hits < kills and forge.run(works[-1], kill_after_s=dice.uniform(0.02, 0.3))[0] == -signal.SIGKILL:
            hits += 1
            good_steps(Path(works[-1]["out"]))
    for work in works:
        continues(forge, work, wanted)
    return hits


def same(found: Checkpoint, wanted: Checkpoint) -> bool:
    """Equal to the last bit."""
    if found.state != wanted.state or found.tensors.keys() != wanted.tensors.keys():
        return False
    return all(
        found.tensors[file].keys() == group.keys()
        and all(torch.equal(found.tensors[file][name], value) for name, value in group.items())
        for file, group in wanted.tensors.items()
    )


Damage = tuple[str, Callable[[Path], None]]  # what it does, and to which file


def damages(newest: Path, *, flips: int, truncations: int, seed: int) -> Iterator[tuple[Path, Damage]]:
    """Damages to the files of a checkpoint: bits and cuts drawn at random, then each blunt kind to each file."""
    dice = random.Random(seed)
    files = sorted(newest.iterdir())
    sizes = [file.stat().st_size for file in files]

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.write_bytes(data)

    def truncate(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: dice.randrange(len(data))])

    for number in range(flips):
        # Every second one by bytes, the others file by file: a manifest is small and matters as much.
        yield (dice.choices(files, sizes)[0] if number % 2 else files[number // 2 % len(files)]), ("flipped", flip)
    for number in range(truncations):
        yield files[number % len(files)], ("truncated", truncate)
    for file in files:
        yield file, ("deleted", Path.unlink)
        yield file, ("emptied", lambda file: file.write_bytes(b""))  # type: ignore[misc]
        yield file, ("grown", lambda file: file.write_bytes(file.read_bytes() + b"\0"))  # type: ignore[misc]


def damage_all(folder: Path, *, flips: int, truncations: int, seed: int = 0) -> dict[str, int]:
    """Damage the newest of two checkpoints in every way, one at a time; how many of each kind were found out.

    Each time the older one has to be loaded, bit for bit, and the newest set aside.
    """
    newest, older = retention.complete(folder)[:2]
    wanted, found_out = load_checkpoint(older), {}
    whole = shutil.copytree(newest, folder.parent / "whole")
    for file, (what, damage) in damages(newest, flips=flips, truncations=truncations, seed=seed):
        damage(file)
        bad: list[Path] = []
        loaded = load_latest(folder, on_bad=lambda path, reason, bad=bad: bad.append(path))  # type: ignore[misc]
        assert loaded is not None
        assert same(loaded, wanted), f"{file.name} {what} was loaded"
        [aside] = bad
        shutil.rmtree(aside)
        shutil.copytree(whole, newest)
        found_out[what] = found_out.get(what, 0) + 1
    return found_out
