"""`ddpm-lmk bench`: measure this machine, and compare results. The benchmarks themselves are files of `benchmarks/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ddpm_lmk.errors import ConfigError
from ddpm_lmk.rundir.lock import make_writable
from ddpm_lmk.system import shipped
from ddpm_lmk.system.console import print_status, print_table

bench_app = typer.Typer()

ALL = ("device", "loader", "step", "train", "scaling", "sweep")  # need no x-rays to run; each keeps to a budget
DEFAULT_BUDGET_MIN = 15.0


@bench_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|all", help=f"{', '.join(ALL)}, or another file of benchmarks/")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the result files")] = Path(
        "bench-results"
    ),
    budget_min: Annotated[
        float, typer.Option("--budget-min", metavar="MIN", min=0.1, help="minutes that it may take, about")
    ] = DEFAULT_BUDGET_MIN,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="result files or folders: ratios, where the noise allows one"),
    ] = None,
) -> None:
    """Measure this machine: its peaks, loading, the step, training, several processes, a sweep.

    Every result is compared with the earlier ones and drawn. Further words go to the benchmark itself (the head of its
    file lists them); `all` takes --device auto|cpu|cuda. To report new hardware, run `ddpm-lmk bench all` and send the
    folder.
    """
    if compare is not None:
        _compare(*(shipped.find(side) for side in compare))
        return
    scripts = _scripts()
    if name is None:
        raise ConfigError(
            f"NAME is missing; `ddpm-lmk bench all` measures this machine in about {DEFAULT_BUDGET_MIN:.0f} minutes "
            f"({', '.join(ALL)}); on their own there are {', '.join(scripts)}"
        )
    name = Path(name).stem  # benchmarks/loader.py is the file itself
    if name != "all" and name not in scripts:
        raise ConfigError(f"there is no benchmark {name!r}; use one of {', '.join(scripts)}, or all")
    make_writable(out)  # before minutes of measuring
    chosen = [script for script in ALL if script in scripts] if name == "all" else [name]
    has_budget = name == "all" or budget_min != DEFAULT_BUDGET_MIN
    shared = ["--budget-s", f"{60 * budget_min / len(chosen):.0f}"] if has_budget else []
    failed = {}
    for number, script in enumerate(chosen, 1):
        print_status(f"bench {script} ({number} of {len(chosen)}) {' '.join(context.args)}".rstrip())
        words = [*context.args, *shared, "--out", str(out)]
        # In a process of its own: memory, threads and chosen kernels of one benchmark must not weigh on the next.
        code = subprocess.run([sys.executable, str(scripts[script]), *words], check=False).returncode
        if code:
            failed[script] = code
    if failed:
        print_status(f"failed: {', '.join(f'{script} (exit code {code})' for script, code in failed.items())}")
        raise typer.Exit(next(iter(failed.values())))


def _scripts() -> dict[str, Path]:
    return {
        path.stem: path for path in sorted(shipped.shipped("benchmarks").glob("[!_]*.py")) if path.stem != "collect"
    }


def _compare(first: Path, second: Path) -> None:
    """Print ratios of everything that both sides measured alike, and what cannot be compared and why."""
    from ddpm_lmk.bench.compare import compare_sides, open_side

    lines, remarks = compare_sides(open_side(first), open_side(second))
    typer.echo(f"A = {first}\nB = {second}")
    if lines:
        rows = [
            (line.what, line.conditions, line.clock, f"{line.first:.4g}", f"{line.second:.4g}", str(line.comparison))
            for line in lines
        ]
        print_table(("what", "conditions", "measured by", "A", "B", "A over B"), rows)
    for remark in remarks:
        typer.echo(remark)
