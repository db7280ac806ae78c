"""What a whole run writes at its end, killed in the middle of each file: a reader sees all of it or none."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from ddpm_lmk.config import RunConfig
from tests.faults.breaking import Break
from tests.faults.forge import Forge

NETWORK = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8}
TIMES = ("wall_s", "images_per_s", "data_wait", "seconds", "finished")


def job(phantoms: Path, out: Path) -> dict[str, Any]:
    """Two steps of fine-tuning on two phantoms, and the score on six others."""
    cfg = RunConfig.model_validate(
        {
            "data": {"path": str(phantoms), "image_size": 32, "workers": 0, "shots": 2},
            "model": NETWORK,
            "task": {"kind": "landmarks"},
            "train": {"length": 2, "group_size": 2, "log_every": 1},
        }
    )
    return {"config": cfg.model_dump(mode="json"), "out": str(out), "device": "cpu"}


def visible(out: Path) -> dict[str, Any]:
    """Every file of the run directory that has its name, read whole; times taken out."""
    found: dict[str, Any] = {}
    for path in out.iterdir():
        if path.suffix == ".json":
            found[path.name] = _without_times(json.loads(path.read_text()))
        elif path.suffix in (".csv", ".yaml"):
            found[path.name] = path.read_text()
    return found


def interrupt(forge: Forge, work: dict[str, Any], place: Break, wanted: dict[str, Any]) -> bool:
    """Kill at one file; True if the run got there. What is visible then is as it has to be, and the rest follows."""
    out = Path(work["out"])
    code, said = forge.run(work, breaks=[place], whole=True)
    assert code in (0, -signal.SIGKILL), said
    for name, content in visible(out).items():
        assert content == wanted[name], f"{name} is not what it has to be after {place}"
    forge.finish(work, whole=True)
    assert visible(out) == wanted
    left = [path.name for path in out.iterdir() if path.name.startswith(".tmp")]
    assert left == []
    return code != 0


def undisturbed(forge: Forge, phantoms: Path, out: Path) -> dict[str, Any]:
    """What a run nothing happens to leaves."""
    forge.finish(job(phantoms, out), whole=True)
    return visible(out)


def _without_times(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without_times(value) for key, value in content.items() if key not in (*TIMES, "results_sha256")}
