"""Small sweeps for tests: run files, sweep files, and what a sweep has said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ddpm_lmk.config import RunConfig
from ddpm_lmk.models import build_model
from ddpm_lmk.rundir.checkpoint import save_snapshot

RUN = """
name: tiny
data: {{path: {data}, image_size: 32}}
runtime: {{workers: 0, log_every: 1 steps, checkpoint_every: {save_every} steps}}
model: {{width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}}
task: {{kind: {kind}}}
train: {{duration: {duration}, global_batch_size: 2}}
evaluate: {{batch: 4}}
"""


def write_run(
    path: Path, data: Path | str = "nowhere", *, kind: str = "landmarks", duration: str = "3 steps", save_every: int = 2
) -> None:
    """A run file of a tiny network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RUN.format(data=data, kind=kind, duration=duration, save_every=save_every))


def write_sweep(folder: Path, data: Path | str = "nowhere", duration: str = "3 steps", **keys: Any) -> Path:
    """A run file and a sweep file beside it; `keys` replace those of the only grid."""
    write_run(folder / "run.yaml", data, duration=duration)
    grid = {"shots": [1, 2], "seeds": [0, 1], "start": {"scratch": None}} | keys
    return write_content(folder, {"name": "table", "run": "run.yaml", "grids": [grid]})


def write_content(folder: Path, content: dict[str, Any]) -> Path:
    """A sweep file."""
    (folder / "sweep.yaml").write_text(json.dumps(content))
    return folder / "sweep.yaml"


def quiet() -> Console:
    """A console that is no terminal and can be read."""
    return Console(file=io.StringIO(), width=200)


def text_of(shown: Console | Table) -> str:
    """What a console has shown, or shows of a table."""
    console = shown if isinstance(shown, Console) else quiet()
    if isinstance(shown, Table):
        console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def torn_weights(folder: Path, cfg: RunConfig) -> Path:
    """A snapshot whose header is right and whose weights are not: what only loading them finds."""
    state = build_model(cfg.model, out_channels=19).state_dict()
    path = save_snapshot(folder / "snapshots", {"model": state, "ema": state}, {"step": 1})
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "ema.safetensors").write_bytes(content)
    return path
