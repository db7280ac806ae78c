"""The whole road on synthetic x-rays, through the same functions as the commands: pack, pre-train, sweep, report.

What is packed and trained is in `configs/demo`. A demo that was stopped goes on where it was; one that is finished only
writes its report again. Numbers measured on phantoms say nothing about patients.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ddpm_lmk.config import Section
from ddpm_lmk.console import progress, say
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.data.pack import pack
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.report.page import write_report
from ddpm_lmk.runfile import load_run, load_yaml, validate
from ddpm_lmk.shipped import shipped
from ddpm_lmk.stop import check_stopped
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.cores import granted_cores

MOST_CPU_WORKERS = 4


class DemoPack(Section):
    """One set of phantoms."""

    source: Literal["chest", "skull", "hand"] = Field(description="kind of phantom")
    counts: dict[str, Annotated[int, Field(ge=1)]] = Field(description="images per split")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="other seeds are other patients")


class DemoShards(Section):
    """`configs/demo/shards.yaml`."""

    size: Annotated[int, Field(ge=32)] = Field(64, description="side of the stored square, pixels")
    packs: dict[str, DemoPack] = Field(description="folders under OUT/shards; `pool` and `labelled` are used")


def run_demo(out: Path, placement: Placement, *, configs: Path | None = None) -> Path:
    """Run the demo in `out`, or what is left of it; returns the report's path.

    Raises:
        LmkError: whatever a stage raises.
    """
    started = time.monotonic()
    configs = configs or shipped("configs") / "demo"
    settings = validate(DemoShards, load_yaml(configs / "shards.yaml"), source=str(configs / "shards.yaml"))
    say(f"1/4 packing synthetic x-rays into {out / 'shards'}")
    for name, wanted in settings.packs.items():
        _pack_once(out / "shards" / name, wanted, settings.size)
    say(f"2/4 pre-training without labels into {out / 'pretrain'}")
    _pretrain(configs / "pretrain.yaml", out, placement)
    say(f"3/4 fine-tuning with few labels into {out / 'sweep'}")
    _sweep(configs / "sweep.yaml", out, placement)
    say("4/4 writing the report")
    report = write_report([out / "sweep"], out / "report.html")
    say(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    return report[0]


def _pack_once(out: Path, wanted: DemoPack, size: int) -> None:
    if (out / "manifest.json").is_file():
        Manifest.open(out).close()
        return
    with progress(f"packing {out.name}") as show:
        pack(wanted.source, "phantom", out, size=size, counts=wanted.counts, seed=wanted.seed, progress=show)


def _pretrain(run_file: Path, out: Path, placement: Placement) -> None:
    cfg = load_run(run_file, [f"data.path={json.dumps(str(out / 'shards' / 'pool'))}"])
    job = {"config": cfg.model_dump(mode="json"), "out": str(out / "pretrain")}
    workers = _workers(placement)
    processes = max(count for count in (1, 2, 4) if count <= workers)  # has to divide the group
    code = launch(job, processes=processes, device=placement.device)
    check_stopped(code)
    if code != 0:
        raise LaunchError(f"pre-training ended with exit code {code}; see {out / 'pretrain'}")


def _sweep(sweep_file: Path, out: Path, placement: Placement) -> None:
    words = {"data.path": out / "shards" / "labelled", "start.pretrained": out / "pretrain"}
    sweep = load_sweep(sweep_file, [f"{key}={json.dumps(str(path))}" for key, path in words.items()])
    code = run_sweep(sweep, out / "sweep", processes=_workers(placement), device=placement.device)
    check_stopped(code)
    if code != 0:
        raise LaunchError(f"the sweep ended with exit code {code}; the same command continues it")


def _workers(placement: Placement) -> int:
    """The network is small: on the CPU one process per core is faster than one process with many threads."""
    most = min(granted_cores(), MOST_CPU_WORKERS)
    return placement.processes if placement.device == "cuda" else max(placement.processes, most)
