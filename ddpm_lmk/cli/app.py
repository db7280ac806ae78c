"""The command line: one function call per command, and the only place that prints.

Commands import what they need when they run, so that `--help` answers at once. An `LmkError` becomes one line on
standard error and its exit code; anything else is a bug and keeps its traceback. Commands about shards are in
`cli.shards`, about finished runs in `cli.results`, measuring in `cli.bench`; what one does is in the module it calls.
"""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_lmk import __version__
from ddpm_lmk.cli.bench import bench_app
from ddpm_lmk.cli.launch import found, launch_app, run_files_app, show_difference
from ddpm_lmk.cli.results import results_app
from ddpm_lmk.cli.shards import shards_app
from ddpm_lmk.errors import ConfigError, LaunchError, LmkError
from ddpm_lmk.system import environment, files
from ddpm_lmk.system.console import accept_any_encoding, console, print_table, reader_width, say
from ddpm_lmk.system.machine import require_safe_versions
from ddpm_lmk.system.signals import leaving_at_once

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.config.values import Stage
    from ddpm_lmk.launcher import Placement
    from ddpm_lmk.sweep import Sweep

app = typer.Typer(
    help="Diffusion pre-training on pooled x-rays, and few-shot landmark detection with the same engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN.yaml", help="run file; `ddpm-lmk init` lists those shipped", callback=found),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="settings that win over the file")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run directory", show_default="runs/NAME")]
GpusOption = Annotated[int | None, typer.Option("--gpus", metavar="N", help="use N GPUs of this node")]
CpuOption = Annotated[int | None, typer.Option("--cpu", metavar="N", help="use N CPU processes")]
ForkOption = Annotated[
    Path | None,
    typer.Option("--fork", metavar="NEWDIR", help="go on there from the newest checkpoint of --out"),
]
ShareGroupOption = Annotated[bool, typer.Option("--share-group", help="let the group read and write the outputs")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would run, and stop")]
ExplainOption = Annotated[
    bool,
    typer.Option(
        "--explain", help="list the settings with default, type and bound; `--explain train` those that begin so"
    ),
]


class State:
    """What the main options of one call say."""

    debug = False


def main() -> int:
    """Carry out the command line of this process; returns its exit code."""
    files.protect()
    accept_any_encoding()
    for line in environment.stand_alone():
        say(f"note: {line}")
    return run(sys.argv[1:])


def run(arguments: list[str]) -> int:
    """Carry out one command line and return its exit code."""
    State.debug = False
    try:
        app(args=arguments, prog_name="ddpm-lmk")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except LmkError as error:
        if State.debug:
            traceback.print_exc()
        typer.echo(f"error[{type(error).__name__}]: {error}", err=True)
        return error.exit_code
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of expected errors too")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    State.debug = debug
    if context.invoked_subcommand != "doctor":  # which says what is wrong with all of them
        require_safe_versions()


@app.command()
def doctor(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where runs would be written")] = Path("runs"),
    run_file: Annotated[
        Path | None, typer.Option("--run", metavar="RUN.yaml", help="a run there should be room for", callback=found)
    ] = None,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="meet the other nodes there; start it on all at once")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="M", min=1, help="nodes that should meet")] = 2,
    node_rank: Annotated[int, typer.Option(metavar="R", min=0, help="number of this node, from 0")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
) -> None:
    """What this machine has, what will be used, what is missing and what to do."""
    from ddpm_lmk.cli.doctor import examine
    from ddpm_lmk.cli.doctor.hardware import check_rendezvous
    from ddpm_lmk.config.load import load_run
    from ddpm_lmk.launcher import place

    # Its data need not be here.
    cfg = None if run_file is None else load_run(run_file, ["data.path=.", "data.weights=null"])
    findings = examine(out, cfg=cfg)
    if rdzv is not None:
        findings.append(check_rendezvous(rdzv, nodes=nodes, node_rank=node_rank))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        rows = [(finding.level, finding.topic, finding.seen, finding.advice) for finding in findings]
        print_table(("", "what", "found", "what to do"), rows)
        typer.echo(f"a run without --gpus and --cpu would use {place()}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(LaunchError.exit_code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="new or unfinished demo folder")] = Path(
        "demo-output"
    ),
    gpus: GpusOption = None,
    cpu: CpuOption = None,
) -> None:
    """The whole road on synthetic x-rays: pack, pre-train, sweep, report. Minutes on two cores."""
    from ddpm_lmk.demo import run_demo
    from ddpm_lmk.launcher import place

    placement = place(gpus=gpus, cpu=cpu)
    typer.echo(f"report: {run_demo(out, placement).absolute()}")


def _add_training_command(name: Stage, text: str) -> None:
    """`pretrain` and `finetune` are one command that wants another kind of task."""

    @app.command(name, help=text)
    def command(
        run_file: RunFileArgument = None,
        overrides: Overrides = None,
        out: OutOption = None,
        gpus: GpusOption = None,
        cpu: CpuOption = None,
        nodes: Annotated[int | None, typer.Option(metavar="M", help="nodes; the same command runs on each")] = None,
        node_rank: Annotated[int, typer.Option(metavar="R", help="number of this node, from 0")] = 0,
        rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="address of node 0")] = None,
        launch: Annotated[
            Path | None, typer.Option(metavar="FILE", help="launch file, e.g. launch/gpu8.yaml", callback=found)
        ] = None,
        fork: ForkOption = None,
        share_group: ShareGroupOption = False,
        strict: Annotated[bool, typer.Option("--strict", help="refuse mixed devices and failed validations")] = False,
        loader: Annotated[str | None, typer.Option(metavar="auto|torch|dali", help="short for data.loader=")] = None,
        dry_run: DryRunOption = False,
        explain: ExplainOption = False,
        diff: Annotated[
            Path | None, typer.Option(metavar="OTHER.yaml", help="compare with another run file", callback=found)
        ] = None,
    ) -> None:
        with leaving_at_once():
            from ddpm_lmk.cli.offer import for_run
            from ddpm_lmk.config import RunConfig
            from ddpm_lmk.config.load import load_run
            from ddpm_lmk.launcher import place
            from ddpm_lmk.rundir.lock import check_unlocked

            if explain:
                _explain(RunConfig, [run_file, *(overrides or [])])
            if share_group:
                files.protect(share_group=True)
            short = [] if loader is None else [f"data.loader={loader}"]
            words = [*(overrides or []), *short]
            run_file = _given(run_file, "RUN.yaml")
            if diff is not None:
                show_difference(run_file, words, diff)
            cfg = load_run(run_file, words)
            _check_task(cfg, name, run_file)
            if node_rank == 0 and not dry_run:  # before torch is imported; the other nodes work in the same place
                check_unlocked(fork or out or Path("runs") / cfg.name)
            placement = place(gpus=gpus, cpu=cpu, nodes=nodes, node_rank=node_rank, rdzv=rdzv, launch_file=launch)
            instead = for_run(cfg, name, run_file, placement.device)
            place_of = out or Path("runs") / cfg.name
            _train(cfg, place_of, placement, fork=fork, strict=strict, dry_run=dry_run, instead=instead)


_add_training_command("pretrain", "Pre-train on unlabelled x-rays. Continues when --out already holds this run.")
_add_training_command("finetune", "Train a landmark detector, from random or pre-trained weights, and score it.")


@app.command()
def sweep(
    sweep_file: Annotated[
        Path | None,
        typer.Argument(metavar="SWEEP.yaml", help="sweep file, e.g. configs/sweep/base.yaml", callback=found),
    ] = None,
    overrides: Overrides = None,
    out: OutOption = None,
    gpus: GpusOption = None,
    cpu: CpuOption = None,
    per_device: Annotated[str, typer.Option(metavar="N|auto", help="workers that share a device; auto: try")] = "1",
    scale: Annotated[str | None, typer.Option(metavar="NAME", help="a variant of the file, e.g. small")] = None,
    dry_run: DryRunOption = False,
    explain: ExplainOption = False,
) -> None:
    """Pre-train what is missing, then fine-tune over methods × shots × seeds; finished cells are kept."""
    from ddpm_lmk.cli.offer import for_sweep
    from ddpm_lmk.engine.forecast import LONG_S
    from ddpm_lmk.launcher import place
    from ddpm_lmk.sweep import SweepFile, load_sweep, plan_table
    from ddpm_lmk.sweep.check import check_sweep
    from ddpm_lmk.sweep.probe import workers_per_device

    if explain:
        _explain(SweepFile, [sweep_file, *(overrides or [])])
    file = _given(sweep_file, "SWEEP.yaml")
    loaded = load_sweep(file, overrides or [], out=out, scale=scale)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        console().print(plan_table(loaded, folder))
        there = _foreseen(gpus, cpu)
        for remark in check_sweep(loaded, folder, there):
            say(remark)
        there = place() if gpus is None and cpu is None else there
        each = 1 if per_device == "auto" else workers_per_device(per_device, loaded, device=there.device, say=say)
        _warn_of_emulation(loaded, there.device)
        from ddpm_lmk.sweep.forecast import budget, budget_table

        devices, instead = there.processes, for_sweep(loaded, file, there.device, scale=scale)
        found = budget(loaded, folder, there.device, workers=devices * each, devices=devices)
        if found.runs:
            console().print(budget_table(found))
        if found.total_s > LONG_S and instead is not None:
            say(instead)
        return
    from ddpm_lmk.sweep.run import run_sweep

    where = place(gpus=gpus, cpu=cpu)
    check_sweep(loaded, folder, where)  # before steps are timed
    shared = workers_per_device(per_device, loaded, device=where.device, say=say)
    say(f"sweep {loaded.name}: {where}, {folder}{f', {shared} workers on each' if shared > 1 else ''}")
    _warn_of_emulation(loaded, where.device)
    from ddpm_lmk.sweep.forecast import budget

    devices, instead = where.processes, for_sweep(loaded, file, where.device, scale=scale)
    expected = budget(loaded, folder, where.device, workers=devices * shared, devices=devices)
    say(f"sweep {loaded.name}: {expected}")
    if expected.total_s > LONG_S and instead is not None:
        say(instead)
    seconds = expected.seconds() if expected.is_known else None
    code = run_sweep(loaded, folder, processes=where.processes, per_device=shared, device=where.device, seconds=seconds)
    raise typer.Exit(code)


app.add_typer(run_files_app)
app.add_typer(results_app)
app.add_typer(bench_app)
app.add_typer(shards_app)
app.add_typer(launch_app, name="launch")


def _given(path: Path | None, name: str) -> Path:
    """--explain needs no file, everything else does."""
    if path is None:
        raise ConfigError(f"{name} is missing; `ddpm-lmk init` lists those shipped, --explain every setting of one")
    return path


def _foreseen(gpus: int | None, cpu: int | None) -> Placement:
    """Where a sweep is foreseen before torch is waited for; its GPUs need not be on this machine."""
    from ddpm_lmk.launcher import Placement, place

    if gpus is None and cpu is None:
        return Placement("cpu", 1)
    return Placement("cuda", gpus) if gpus and cpu is None else place(gpus=gpus, cpu=cpu)


def _check_task(cfg: RunConfig, wanted: Stage, run_file: Path | None) -> None:
    if cfg.task.stage != wanted:
        other = cfg.task.stage
        raise ConfigError(f"{run_file} has task.kind={cfg.task.kind}; use `ddpm-lmk {other} {run_file}`")


def _warn_of_emulation(sweep: Sweep, device: str) -> None:
    """Each cell would only tell its log that this processor has no instructions for the precision asked for."""
    runs = [cell.cfg for cell in sweep.cells] + [stage.cfg for stage in sweep.stages]
    asked = {cfg.train.precision: cfg for cfg in runs}
    if device != "cpu" or not asked.keys() & {"bf16", "fp16"}:
        return  # without waiting for torch
    from ddpm_lmk.engine.device_fit import choose_precision, emulation_warning

    for cfg in asked.values():
        if warning := emulation_warning(cfg, choose_precision(cfg, device).name, device):
            say(f"warning: {warning}")


def _train(
    cfg: RunConfig,
    out: Path,
    placement: Placement,
    *,
    fork: Path | None,
    strict: bool,
    dry_run: bool,
    instead: str | None,
) -> None:
    """With `fork`, `out` is where the run comes from and `fork` where it goes on; `instead`: to say if it is long."""
    from ddpm_lmk.launcher import launch
    from ddpm_lmk.launcher.preflight import check_run

    for remark in check_run(cfg, fork or out, placement, fork=None if fork is None else out):
        say(remark)
    if dry_run:
        from ddpm_lmk.cli.dry_run import plan_run

        print_table(("", ""), plan_run(cfg, placement, out, instead=instead))
        return
    environment.check_copies(placement.nodes)
    job = {"config": cfg.model_dump(mode="json"), "out": str(fork or out), "strict": strict, "instead": instead}
    job["fork"] = None if fork is None else str(out)
    out = fork or out
    say(f"{cfg.name}: {placement}, {out}")
    code = launch(job, placement)
    if code == 0:
        typer.echo(f"{out / 'results.json'}")
        say(f"next: {_next_step(cfg, out)}")
    raise typer.Exit(code)


def _next_step(cfg: RunConfig, out: Path) -> str:
    """What is usually done with a finished run."""
    run = shlex.quote(str(out))
    if cfg.task.stage == "pretrain":
        return f"fine-tune from it: init.weights={run} in `ddpm-lmk finetune`, start.pretrained={run} in a sweep"
    return f"`ddpm-lmk predict {run} IMAGES --out found`, or `ddpm-lmk report {run}` for a page"


def _explain(model: type[BaseModel], words: list[str | Path | None]) -> None:
    """Words are beginnings of keys; a run file among them has the same settings as any other."""
    from ddpm_lmk.config.explain import page

    wanted = [str(word) for word in words if word is not None and Path(word).suffix not in (".yaml", ".yml")]
    typer.echo(page(model, wanted, width=reader_width()))
    raise typer.Exit()
