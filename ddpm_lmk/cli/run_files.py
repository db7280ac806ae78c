"""Run files on the command line: the shipped ones are found by their names, listed, and copied out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
