"""The whole road on synthetic x-rays, through the same functions as the commands: pack, pre-train, sweep, report.

What is packed and trained is in `configs/demo`. A demo that was stopped goes on where it was; one that is finished only
writes its report again. Numbers measured on phantoms say nothing about patients.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ddpm_lmk.config import RunConfig, Section
from ddpm_lmk.config.load import load_run, load_yaml, validate
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.forecast import Forecast, Work, steps_done
from ddpm_lmk.errors import LaunchError, RunConflictError
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.launcher.preflight import check_run
from ddpm_lmk.launcher.time_runs import time_run
from ddpm_lmk.report.page import write_report
from ddpm_lmk.rundir.lock import listed
from ddpm_lmk.sweep import StageRun, Sweep, is_done, load_sweep
from ddpm_lmk.sweep.check import refuse_other_settings
from ddpm_lmk.sweep.forecast import Budget, budget
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.console import Whole, about, duration, progress, remaining, say
from ddpm_lmk.system.machine import granted_cores
from ddpm_lmk.system.shipped import shipped
from ddpm_lmk.system.signals import check_stopped

MOST_CPU_WORKERS = 4
MANIFEST = "manifest.json"
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
    """The four stages in a folder, and how long those that are not done take here.

    Attributes:
        expected_s: by stage, in their order.
        unknown: why not all of them could be timed; then nothing is told of what is left.
    """

    out: Path
    placement: Placement
    configs: Path
    began: float = field(default_factory=time.monotonic)
    expected_s: dict[str, float] = field(default_factory=dict)
    unknown: str = ""

    def __post_init__(self) -> None:
        self.settings = validate(DemoShards, load_yaml(self.configs / "shards.yaml"), source="shards.yaml of the demo")
        packs = {name: str(self.out / "shards" / name) for name in self.settings.packs}
        self.pretraining = load_run(self.configs / "pretrain.yaml", [f"data.path={json.dumps(packs['pool'])}"])
        words = {"data.path": packs["labelled"], "start.pretrained": str(self.out / "pretrain")}
        self.sweep = load_sweep(
            self.configs / "sweep.yaml", [f"{key}={json.dumps(path)}" for key, path in words.items()]
        )

    @property
    def workers(self) -> int:
        """Processes of the sweep."""
        return _workers(self.placement)

    @property
    def processes(self) -> int:
        """Processes of pre-training: a number that divides the group."""
        return max(count for count in (1, 2, 4) if count <= self.workers)

    def expect(self) -> tuple[Forecast | None, Budget | None]:
        """Time what is left; None for what is done, and for all of it where some cannot be timed."""
        self.expected_s["packing"] = _packing_s(self.settings, self.out)
        spec = {name: SPECS[f"phantom-{made.source}"] for name, made in self.settings.packs.items()}
        counts = {name: made.counts for name, made in self.settings.packs.items()}
        forecast = None
        folder = self.out / "pretrain"
        if not is_done(folder, StageRun("pretrain", folder, self.pretraining)):
            place = replace(self.placement, processes=self.processes)
            timing = time_run(self.pretraining, spec["pool"], place, budget_s=BUDGET_S)
            if isinstance(timing, str):
                self.unknown = timing
            else:
                work = Work.of(self.pretraining, done=steps_done(folder), counts=counts["pool"])
                forecast = timing.forecast(work)
                self.expected_s["pre-training"] = timing.start_s + forecast.total_s
        path = str(self.out / "shards" / "labelled")
        facts: dict[str, Any] = {"specs": {path: spec["labelled"]}, "counts": {path: counts["labelled"]}}
        device, folder = self.placement.device, self.out / "sweep"
        found = budget(self.sweep, folder, device, workers=self.workers, budget_s=BUDGET_S, **facts)
        self.expected_s["fine-tuning"] = found.total_s
        self.expected_s["the report"] = REPORT_S
        self.unknown = next((why for why in found.runs.values() if isinstance(why, str)), self.unknown)
        return (None, None) if self.unknown else (forecast, found)

    def __str__(self) -> str:
        total_s = sum(self.expected_s.values())
        parts = ", ".join(f"{duration(part_s)} of {stage}" for stage, part_s in self.expected_s.items() if part_s >= 1)
        how_long = f"more than {duration(total_s)}" if self.unknown else about(total_s)
        more = f"; not all of them: {self.unknown}" if self.unknown else ""
        return f"{how_long} here: {parts} (from steps timed here{more})"

    def say(self, text: str, stage: str) -> None:
        """Say that a stage begins, and what is left from here on."""
        whole = self.whole(stage)
        left = "" if whole is None else f", {remaining(self.expected_s.get(stage, 0.0) + whole.then_s)}"
        say(f"{text}{left}")

    def whole(self, stage: str) -> Whole | None:
        """The road, as this stage shows it; None where it is not known how long it is."""
        if self.unknown:
            return None
        order = ("packing", "pre-training", "fine-tuning", "the report")
        after = order[order.index(stage) + 1 :]
        return Whole("demo", self.began, sum(self.expected_s.get(name, 0.0) for name in after))


def run_demo(out: Path, placement: Placement, *, configs: Path | None = None) -> Path:
    """Run the demo in `out`, or what is left of it; returns the report's path.

    Raises:
        LmkError: whatever a stage raises.
    """
    demo = Demo(out, placement, configs or shipped("configs") / "demo")
    refuse_another_recipe(out, demo.settings, demo.pretraining, demo.sweep)
    forecast, expected = demo.expect()
    say(f"demo: {demo}")
    say(f"1/4 packing synthetic x-rays into {out / 'shards'}")
    whole = demo.whole("packing")
    for name, wanted in demo.settings.packs.items():
        _pack_once(out / "shards" / name, wanted, demo.settings.size, whole)
    demo.say(f"2/4 pre-training without labels into {out / 'pretrain'}", "pre-training")
    _pretrain(demo, forecast)
    demo.say(f"3/4 fine-tuning with few labels into {out / 'sweep'}", "fine-tuning")
    _sweep(demo, expected)
    say("4/4 writing the report")
    report = write_report([out / "sweep"], out / "report.html")
    say(f"done in {duration(time.monotonic() - demo.began)}")
    return report[0]


def _packing_s(settings: DemoShards, out: Path) -> float:
    """Seconds of the packs that are not there, from a phantom drawn here."""
    left = {name: made for name, made in settings.packs.items() if not (out / "shards" / name / MANIFEST).is_file()}
    seconds = 0.0
    for made in left.values():
        render(made.source, made.seed, 0, settings.size)
        began = time.monotonic()
        render(made.source, made.seed, 1, settings.size)
        seconds += (time.monotonic() - began) * sum(made.counts.values()) / granted_cores()
    return seconds


def _pack_once(out: Path, wanted: DemoPack, size: int, whole: Whole | None) -> None:
    if (out / MANIFEST).is_file():
        Manifest.open(out).close()
        return
    began = time.monotonic()
    with progress(f"packing {out.name}", lines=False) as show:

        def tell(done: int, total: int) -> None:
            show(done, total)
            if whole is None:
                return
            line = whole.line((time.monotonic() - began) / done * (total - done), f"{done} of {total} images packed")
            if line is not None and not sys.stderr.isatty():
                say(line)

        pack(
            wanted.source,
            out,
            PackSettings(kind="phantom", size=size, counts=wanted.counts, seed=wanted.seed),
            progress=tell,
        )


def refuse_another_recipe(out: Path, settings: DemoShards, pretraining: RunConfig, sweep: Sweep) -> None:
    """Raise `RunConflictError` where a folder holds a demo of other settings, e.g. of an older version."""
    for name, wanted in settings.packs.items():
        path = out / "shards" / name
        if not (path / "manifest.json").is_file():
            continue
        manifest = Manifest.open(path)
        asked = {
            "name": f"phantom-{wanted.source}",
            "size": settings.size,
            "counts": wanted.counts,
            "seed": wanted.seed,
        }
        rows = [(key, manifest.settings.get(key), value) for key, value in asked.items()]
        manifest.close()
        if other := [row for row in rows if row[1] != row[2]]:
            raise RunConflictError(
                f"{path} holds phantoms of another demo: {listed(other)}; use another --out directory, or remove {out}"
            )
    refuse_other_settings(out / "sweep", [StageRun("pre-training", out / "pretrain", pretraining)], sweep.cells)


def _pretrain(demo: Demo, forecast: Forecast | None) -> None:
    out = demo.out / "pretrain"
    for remark in check_run(demo.pretraining, out, replace(demo.placement, processes=demo.processes)):
        say(remark)
    job = {"config": demo.pretraining.model_dump(mode="json"), "out": str(out), "is_foretold": False}
    whole = demo.whole("pre-training")
    if forecast is not None and whole is not None:
        job |= {"forecast": asdict(forecast), "whole": asdict(whole)}
    _check(launch(job, replace(demo.placement, processes=demo.processes)), "pre-training", out)


def _sweep(demo: Demo, expected: Budget | None) -> None:
    out = demo.out / "sweep"
    shown: dict[str, Any] = (
        {} if expected is None else {"seconds": expected.seconds(), "whole": demo.whole("fine-tuning")}
    )
    code = run_sweep(demo.sweep, out, processes=demo.workers, device=demo.placement.device, **shown)
    _check(code, "the sweep", out)


def _check(code: int, what: str, out: Path) -> None:
    """Raise what says that a stage has not come to its end, with the exit code it ended with where it was stopped."""
    check_stopped(code)
    if code != 0:
        raise LaunchError(f"{what} ended with exit code {code}; see {out}; the same command continues it")


def _workers(placement: Placement) -> int:
    """The network is small: on the CPU one process per core is faster than one process with many threads."""
    most = min(granted_cores(), MOST_CPU_WORKERS)
    return placement.processes if placement.device == "cuda" else max(placement.processes, most)
