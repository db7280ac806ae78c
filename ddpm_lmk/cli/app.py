"""The program `ddpm-lmk`: its main options, `doctor`, `demo` and `init`; other modules of `cli` add their commands.

Commands import what they need when they run, so that `--help` answers at once. An `LmkError` becomes one line on
standard error and its exit code; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ddpm_lmk import __version__
from ddpm_lmk.cli.bench import bench_app
from ddpm_lmk.cli.results import results_app
from ddpm_lmk.cli.shards import shards_app
from ddpm_lmk.cli.train import SHIPPED, CpuOption, GpusOption, launch_app, train_app
from ddpm_lmk.errors import LaunchError, LmkError
from ddpm_lmk.system import environment, files, shipped
from ddpm_lmk.system.console import accept_any_encoding, print_status, print_table
from ddpm_lmk.system.machine import require_safe_versions


class _Commands(TyperGroup):
    """The commands, whose help is told of completion below them and not by two options above."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.name in ("install_completion", "show_completion"):
                param.hidden = True
        return params


app = typer.Typer(
    cls=_Commands,
    help="Diffusion pre-training on pooled x-rays, and few-shot landmark detection with the same engine.",
    epilog="For completion by your shell: ddpm-lmk --install-completion (or --show-completion, to see it first).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class State:
    """The main options of one call."""

    debug = False


def main() -> int:
    """Carry out the command line of this process; returns its exit code."""
    files.protect()  # what is written is about patients
    accept_any_encoding()
    # Variables of an outer torchrun or mpirun would make torch wait for ranks that nobody starts.
    for line in environment.stand_alone():
        print_status(f"note: {line}")
    return run(sys.argv[1:])


def run(arguments: list[str]) -> int:
    """Carry out one command line and return its exit code."""
    State.debug = False  # tests call this many times in one process
    try:
        app(args=arguments, prog_name="ddpm-lmk")
    except SystemExit as stop:  # how click leaves, also after --help
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
    if context.invoked_subcommand != "doctor":  # which lists all packages that are too old
        require_safe_versions()


@app.command()
def doctor(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where runs would be written")] = Path("runs"),
    run_file: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN.yaml", help="a run there should be room for", **SHIPPED),
    ] = None,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="meet the other nodes there; start it on all at once")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="M", min=1, help="nodes that should meet")] = 2,
    node_rank: Annotated[int, typer.Option(metavar="R", min=0, help="number of this node, from 0")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
) -> None:
    """What this machine has, what will be used, what is missing and what to do."""
    from ddpm_lmk.cli.doctor import check_rendezvous, examine
    from ddpm_lmk.config.load import load_run
    from ddpm_lmk.launcher import place

    # Its data need not be here: only the size of its checkpoints counts.
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
    """The whole pipeline on synthetic x-rays: pack, pre-train, sweep, report. Minutes on two cores."""
    from ddpm_lmk.demo import run_demo
    from ddpm_lmk.launcher import place

    placement = place(gpus=gpus, cpu=cpu)
    typer.echo(f"report: {run_demo(out, placement).absolute()}")


app.add_typer(train_app)


@app.command()
def init(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="new folder; without one they are listed")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="DIR", help="write JSON schemas of such files for editors there")
    ] = None,
) -> None:
    """Copy the shipped run files and launch files to DIR, to be edited; without DIR list them."""
    if schema is not None:
        for path in _write_schemas(schema):
            typer.echo(str(path))
        typer.echo("first line of a file that an editor is to check: # yaml-language-server: $schema=PATH")
        return
    if folder is None:
        print_table(("file", "what for"), [(name, shipped.head(name)) for name in shipped.names()])
        typer.echo("any of them can be named from any folder; `ddpm-lmk init DIR` copies them to DIR")
        return
    written = shipped.copy_out(folder)
    typer.echo(f"{len(written)} files; {folder / shipped.GUIDE} says what is where")


def _write_schemas(folder: Path) -> list[Path]:
    """One JSON schema for each kind of settings file; returns what was written."""
    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.config.editor_schema import editor_schema
    from ddpm_lmk.launcher import LaunchFile
    from ddpm_lmk.sweep import SweepFile

    written = []
    for name, model in (("run", RunConfig), ("sweep", SweepFile), ("launch", LaunchFile)):
        written.append(folder / f"{name}.schema.json")
        files.write_json(written[-1], editor_schema(model))
    return written


app.add_typer(results_app)
app.add_typer(bench_app)
app.add_typer(shards_app)
app.add_typer(launch_app, name="launch")
