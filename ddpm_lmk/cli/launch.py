"""`ddpm-lmk launch ...`: writing what another system starts.

`--diff`: what two run files do differently, key by key.

Run files on the command line: the shipped ones are found by their names, listed, and copied out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system import shipped
from ddpm_lmk.system.console import print_table, say

run_files_app = typer.Typer()


def found(path: Path | None) -> Path | None:
    """Callback of every argument that names a run or launch file: a shipped one is used where there is none here."""
    if path is None:
        return None
    file = shipped.find(path)
    if file != path:
        say(f"{path} is the one shipped with ddpm-lmk, {file}; `ddpm-lmk init DIR` copies it out to be edited")
    return file


@run_files_app.command()
def init(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="new folder; without one they are listed")
    ] = None,
) -> None:
    """Copy the shipped run files and launch files to DIR, to be edited; without DIR list them."""
    if folder is None:
        print_table(("file", "what for"), [(name, shipped.head(name)) for name in shipped.names()])
        typer.echo("any of them can be named from any folder; `ddpm-lmk init DIR` copies them to DIR")
        return
    written = shipped.copy_out(folder)
    typer.echo(f"{len(written)} files; {folder / shipped.GUIDE} says what is where")


launch_app = typer.Typer(help="Write what a cluster starts.", no_args_is_help=True)


@launch_app.callback()
def _launch() -> None:
    """Keeps the name of the only command below on the command line."""


@launch_app.command("slurm")
def slurm(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="run file", callback=found)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="settings that win over the file")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="GPUs of each node")] = None,
    cpu: Annotated[int | None, typer.Option("--cpu", metavar="N", help="CPU processes on each node")] = None,
    launch: Annotated[Path | None, typer.Option(metavar="FILE", help="launch file instead", callback=found)] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="M", min=1, help="number of nodes")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run directory, seen by all nodes")] = None,
    script: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to write it", show_default="NAME.sbatch")
    ] = None,
    time: Annotated[
        str, typer.Option(metavar="HH:MM:SS", help="time limit of one job; the run goes on in the next")
    ] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option(metavar="N", min=1, help="cores of each node")] = 8,
    grace: Annotated[
        int, typer.Option(metavar="SECONDS", min=10, help="time to save in before the nodes are taken")
    ] = 120,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="as in sbatch")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="as in sbatch")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="hand it to sbatch as well")] = False,
) -> None:
    """Write (and submit) a batch script that saves and queues itself again when it is preempted."""
    from ddpm_lmk.config.load import load_run
    from ddpm_lmk.launcher import Placement
    from ddpm_lmk.launcher import slurm as writer
    from ddpm_lmk.launcher.placement import read_launch_file
    from ddpm_lmk.launcher.preflight import check_run

    if (gpus is not None) + (cpu is not None) + (launch is not None) != 1:
        raise ConfigError("give one of --gpus N, --cpu N and --launch FILE: what each node has to start")
    file = None if launch is None else read_launch_file(launch)
    cfg = load_run(run_file, overrides or [])
    on_gpus = (file.processes if file.device == "cuda" else 0) if file is not None else gpus or 0
    folder = (out or Path("runs") / cfg.name).absolute()
    words = writer.command(
        cfg,
        run_file,
        overrides or [],
        gpus=on_gpus,
        cpu=cpu or 0,
        out=folder,
        launch=launch,
    )
    # A queue is long; what a login node does not see is checked as the job starts.
    if all((Path(path) / "manifest.json").is_file() for path in cfg.data.path):
        processes = file.processes if file is not None else on_gpus or cpu or 1
        many = nodes or (file.nodes if file is not None else 1)
        place = Placement("cuda" if on_gpus else "cpu", processes, many, zero=0 if file is None else file.zero)
        for remark in check_run(cfg, folder, place):
            typer.echo(remark, err=True)
    job = writer.Job(
        name=cfg.name,
        command=words,
        nodes=nodes or (file.nodes if file is not None else 1),
        gpus_per_node=on_gpus,
        cpus_per_task=cpus_per_task,
        time=time,
        grace_s=grace,
        partition=partition,
        account=account,
    )
    path = script or Path(f"{cfg.name}.sbatch")
    writer.write_script(job, path)
    typer.echo(writer.submit(path) if submit else f"{path}: submit it with `sbatch {path}`")


NOT_GIVEN = "(not given)"


def show_difference(run_file: Path, words: list[str], other: Path) -> None:
    """Print a row (key, value here, value there, what it is) where two run files differ, and stop.

    Args:
        words: `key=value` of the command line; they belong to the first file.
    """
    from ddpm_lmk.config.explain import descriptions
    from ddpm_lmk.config.load import diff_runs, load_run

    here = load_run(run_file, [*_stand_in(run_file), *words])
    there = load_run(other, _stand_in(other))
    told = descriptions(there) | descriptions(here)
    rows = [(key, str(a), str(b), told.get(key, "")) for key, a, b in diff_runs(here, there)]
    if rows:
        print_table(("key", str(run_file), str(other), "what"), rows)
    else:
        typer.echo("no difference")
    raise typer.Exit()


def _stand_in(path: Path) -> list[str]:
    """A data.path for a run file that leaves it to the command line, as those in configs/ do."""
    from ddpm_lmk.config.load import load_yaml

    data = load_yaml(path).get("data") or {}
    return [] if isinstance(data, dict) and "path" in data else [f"data.path={NOT_GIVEN}"]
