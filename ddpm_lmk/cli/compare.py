"""`--diff`: what two run files do differently, key by key."""

from __future__ import annotations

from pathlib import Path

import typer

from ddpm_lmk.system.console import print_table

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
