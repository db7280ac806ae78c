"""The whole pipeline on synthetic x-rays, through the same functions as the commands: pack, pre-train, sweep, report.

What is packed and trained is in `configs/demo`. A demo that was stopped is resumed; one that is finished only writes
its report again. Numbers measured on phantoms say nothing about patients.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ddpm_lmk.config import Section
from ddpm_lmk.config.load import load_run, load_yaml, validate
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.forecast import Forecast
from ddpm_lmk.errors import LaunchError, RunConflictError
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.launcher.preflight import check_run
from ddpm_lmk.report.page import write_report
from ddpm_lmk.rundir.lock import listed
from ddpm_lmk.sweep import StageRun, Sweep, load_sweep
from ddpm_lmk.sweep.check import check_sweep, refuse_other_settings
from ddpm_lmk.sweep.forecast import SweepForecast, forecast_run, forecast_sweep
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.console import Whole, about, duration, print_status, progress, remaining
from ddpm_lmk.system.machine import granted_cores
from ddpm_lmk.system.shipped import shipped
from ddpm_lmk.system.signals import check_stopped

MOST_CPU_WORKERS = 4  # eighteen cells of seconds each: more workers spend their time on importing torch
BUDGET_S = 2.0  # for timed steps: they delay a demo of minutes
REPORT_S = 10.0  # figures and a page


class DemoPack(Section):
    """One set of phantoms."""

    source: Literal["chest", "skull", "hand"] = Field(description="kind of phantom")
    counts: dict[str, Annotated[int, Field(ge=1)]] = Field(description="images per split")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="other seeds are other patients")


class DemoShards(Section):
    """`configs/demo/shards.yaml`."""

    size: Annotated[int, Field(ge=32)] = Field(64, description="side of the stored square, pixels")
    packs: dict[str, DemoPack] = Field(description="folders under OUT/shards; `pool` and `labelled` are used")


@dataclass
class Demo:
    """A demo in a folder, and how long its stages take here.

    Attributes:
        forecast: of pre-training; None where it is done, or not known.
        sweep_forecast: of fine-tuning; None before `measure`.
        unknown: why not all of it could be timed; then no time left is shown.
    """

    out: Path
    placement: Placement
    shards: DemoShards
    pretraining: StageRun
    sweep: Sweep
    began: float = field(default_factory=time.monotonic)
    forecast: Forecast | None = None
    sweep_forecast: SweepForecast | None = None
    unknown: str = ""

    @classmethod
    def load(cls, out: Path, placement: Placement, configs: Path) -> Demo:
        """Read the run files of the demo, with its own folders in them."""
        shards = validate(DemoShards, load_yaml(configs / "shards.yaml"), source="shards.yaml of the demo")
        pool, labelled = (json.dumps(str(out / "shards" / name)) for name in ("pool", "labelled"))
        pretraining = load_run(configs / "pretrain.yaml", [f"data.path={pool}"])
        words = [f"data.path={labelled}", f"start.pretrained={json.dumps(str(out / 'pretrain'))}"]
        sweep = load_sweep(configs / "sweep.yaml", words, out=out / "sweep")
        stage = StageRun(name="pre-training", folder=out / "pretrain", cfg=pretraining)
        return cls(out, placement, shards, stage, sweep)

    @property
    def workers(self) -> int:
        """Processes of the sweep. The network is small: one process per core is faster than one with many threads."""
        most = min(granted_cores(), MOST_CPU_WORKERS)
        return self.placement.processes if self.placement.device == "cuda" else max(self.placement.processes, most)

    @property
    def training_placement(self) -> Placement:
        """Where pre-training runs: on a number of processes that divides the global batch."""
        return replace(self.placement, processes=max(count for count in (1, 2, 4) if count <= self.workers))

    def measure(self) -> None:
        """Time steps of what is left."""
        if not self.pretraining.is_done():
            cfg, folder = self.pretraining.cfg, self.pretraining.folder
            found = forecast_run(cfg, folder, self.training_placement, budget_s=BUDGET_S)
            self.forecast, self.unknown = (None, found) if isinstance(found, str) else (found, "")
        device = self.placement.device
        self.sweep_forecast = forecast_sweep(self.sweep, device, workers=self.workers, budget_s=BUDGET_S)
        self.unknown = self.unknown or self.sweep_forecast.unknown

    @property
    def expected_s(self) -> dict[str, float]:
        """Seconds of each stage that is left, as far as they are known, in their order."""
        return {
            "pre-training": 0.0 if self.forecast is None else self.forecast.total_s,
            "fine-tuning": 0.0 if self.sweep_forecast is None else self.sweep_forecast.total_s,
            "the report": REPORT_S,
        }

    def __str__(self) -> str:
        total_s = sum(self.expected_s.values())
        parts = ", ".join(f"{duration(part_s)} of {stage}" for stage, part_s in self.expected_s.items() if part_s >= 1)
        how_long = f"more than {duration(total_s)}" if self.unknown else about(total_s)
        more = f"; not all of them: {self.unknown}" if self.unknown else ""
        return f"{how_long} here: {parts} (from steps timed here{more})"

    def whole(self, stage: str) -> Whole | None:
        """What `stage` shows the time left of: all of the demo; None where that is not known."""
        if self.unknown:
            return None
        seconds = list(self.expected_s.values())
        return Whole("demo", self.began, sum(seconds[list(self.expected_s).index(stage) + 1 :]))

    def print_status(self, text: str, stage: str) -> None:
        """Say that a stage begins, and how long it takes from here to the end."""
        whole = self.whole(stage)
        print_status(text if whole is None else f"{text}, {remaining(self.expected_s[stage] + whole.then_s)}")


def run_demo(out: Path, placement: Placement, *, configs: Path | None = None) -> Path:
    """Run the demo in `out`, or what is left of it; returns the report's path.

    Raises:
        LmkError: whatever a stage raises.
    """
    demo = Demo.load(out, placement, configs or shipped("configs") / "demo")
    refuse_another_recipe(demo)  # before minutes are spent on what would end in a table of unlike runs
    print_status(f"1/4 packing synthetic x-rays into {out / 'shards'}")
    for name, dataset in demo.shards.packs.items():
        _pack_once(out / "shards" / name, dataset, demo.shards.size)
    demo.measure()  # needs the datasets; packing them takes less than the tenth of a demo
    print_status(f"demo: {demo}")
    demo.print_status(f"2/4 pre-training without labels into {demo.pretraining.folder}", "pre-training")
    _pretrain(demo)
    demo.print_status(f"3/4 fine-tuning with few labels into {demo.sweep.out}", "fine-tuning")
    _fine_tune(demo)
    print_status("4/4 writing the report")
    report = write_report([demo.sweep.out], out / "report.html")
    print_status(f"done in {duration(time.monotonic() - demo.began)}")
    return report[0]


def _pack_once(out: Path, dataset: DemoPack, size: int) -> None:
    if (out / "manifest.json").is_file():
        Manifest.open(out).close()  # refuses damaged shards before minutes of training
        return
    with progress(f"packing {out.name}") as show:
        settings = PackSettings(kind="phantom", size=size, counts=dataset.counts, seed=dataset.seed)
        pack(dataset.source, out, settings, progress=show)


def refuse_another_recipe(demo: Demo) -> None:
    """Raise `RunConflictError` where a folder holds a demo of other settings, e.g. of an older version."""
    for name, dataset in demo.shards.packs.items():
        path = demo.out / "shards" / name
        if not (path / "manifest.json").is_file():
            continue
        manifest = Manifest.open(path)
        wanted = {"name": f"phantom-{dataset.source}", "size": demo.shards.size}
        wanted |= dataset.model_dump(exclude={"source"})
        rows = [(key, manifest.settings.get(key), value) for key, value in wanted.items()]
        manifest.close()
        if other := [row for row in rows if row[1] != row[2]]:
            raise RunConflictError(
                f"{path} holds phantoms of another demo: {listed(other)}; use another --out directory, or remove "
                f"{demo.out}"
            )
    refuse_other_settings(demo.sweep.out, [demo.pretraining, *demo.sweep.cells])


def _pretrain(demo: Demo) -> None:
    cfg, out, placement = demo.pretraining.cfg, demo.pretraining.folder, demo.training_placement
    for remark in check_run(cfg, out, placement):
        print_status(remark)
    # Timed before the first stage, together with the sweep: a run that timed itself would say only its own part.
    job: dict[str, Any] = {"config": cfg.model_dump(mode="json"), "out": str(out), "is_foretold": False}
    whole = demo.whole("pre-training")
    if demo.forecast is not None and whole is not None:
        job |= {"forecast": asdict(demo.forecast), "whole": asdict(whole)}
    _require_success(launch(job, placement), "pre-training", out)


def _fine_tune(demo: Demo) -> None:
    whole = demo.whole("fine-tuning")
    seconds = demo.sweep_forecast.seconds() if demo.sweep_forecast is not None and whole is not None else None
    placement = replace(demo.placement, processes=demo.workers)
    for remark in check_sweep(demo.sweep, placement):
        print_status(remark)
    code = run_sweep(demo.sweep, processes=placement.processes, device=placement.device, seconds=seconds, whole=whole)
    _require_success(code, "the sweep", demo.sweep.out)


def _require_success(code: int, what: str, out: Path) -> None:
    """Raise an error with the exit code of a stage that was stopped, or of a launch that failed."""
    check_stopped(code)
    if code != 0:
        raise LaunchError(f"{what} ended with exit code {code}; see {out}; the same command continues it")
