"""`ddpm-lmk bench`: measure this machine, and compare results. The benchmarks themselves are files of `benchmarks/`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_lmk.errors import ConfigError
from ddpm_lmk.rundir.lock import make_writable
from ddpm_lmk.system import files, processes, shipped
from ddpm_lmk.system.console import print_status, print_table

bench_app = typer.Typer()

ALL = ("device", "loader", "step", "train", "scaling", "sweep")  # need no x-rays to run; each keeps to a budget
DEFAULT_BUDGET_MIN = 15.0
FEWEST_S = 10.0  # what starting, loading and writing take at least
GRACE_SHARE, FEWEST_GRACE_S = 0.03, 4.0  # from when a benchmark should have ended to the end of all
MOST_SHOWN = 3


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
        float | None,
        typer.Option(
            "--budget-min",
            metavar="MIN",
            min=0.5,
            help=f"minutes that it may take; {DEFAULT_BUDGET_MIN:.0f} for all. What does not fit is left out and named",
        ),
    ] = None,
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
    if name == "all" and budget_min is None:
        budget_min = DEFAULT_BUDGET_MIN
    if budget_min is None:
        codes: dict[str, int | None] = {name: _start(scripts[name], [*context.args, "--out", str(out)])}
    elif name == "all" or name in ALL:
        codes = _in_time(chosen, scripts, context.args, out, 60 * budget_min)
    else:
        raise ConfigError(f"--budget-min is for {', '.join(ALL)} and all; {name} takes the time it takes")
    if failed := {script: code for script, code in codes.items() if code != 0}:
        ends = (f"{script} ({'killed' if code is None else f'exit code {code}'})" for script, code in failed.items())
        print_status(f"failed: {', '.join(ends)}")
        raise typer.Exit(next(iter(failed.values())) or 1)


def _in_time(
    chosen: Sequence[str],
    scripts: dict[str, Path],
    words: Sequence[str],
    out: Path,
    budget_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, int | None]:
    """Run benchmarks so that all have ended after `budget_s` seconds; their exit codes.

    Each gets an equal share of what is left, so that what one does not need goes to those after it. A process that is
    still there some seconds after its share is killed.
    """
    grace_s = max(FEWEST_GRACE_S, GRACE_SHARE * budget_s)
    begin = clock()
    until = begin + budget_s - grace_s
    took: list[dict[str, Any]] = []
    for number, script in enumerate(chosen):
        share_s = (until - clock()) / (len(chosen) - number)
        facts: dict[str, Any] = {"benchmark": script, "share_s": round(max(0.0, share_s), 1), "exit_code": 0}
        took.append(facts)
        if share_s < FEWEST_S:
            facts |= {"took_s": 0.0, "left_out": ["all of it: no time left"]}
            continue
        print_status(f"bench {script} ({number + 1} of {len(chosen)}), {share_s:.0f} s: {' '.join(words)}".rstrip(": "))
        before, at = set(out.glob(f"{script}-*.json")), clock()
        code = _start(
            scripts[script],
            [*words, "--until", f"{at + share_s:.3f}", "--out", str(out)],
            limit_s=share_s + grace_s / 2,
        )
        facts |= {"took_s": round(clock() - at, 1), "exit_code": code}
        written = sorted(set(out.glob(f"{script}-*.json")) - before)
        facts["left_out"] = json.loads(written[-1].read_text())["budget"]["left_out"] if written else ["all of it"]
    _summarise(took, out, budget_s, clock() - begin)
    return {facts["benchmark"]: facts["exit_code"] for facts in took}


def _start(script: Path, words: Sequence[str], *, limit_s: float | None = None) -> int | None:
    """Run a benchmark and return its exit code; None where it had to be killed after `limit_s`."""
    # In a process of its own: memory, threads and chosen kernels of one benchmark must not weigh on the next.
    process = subprocess.Popen([sys.executable, str(script), *words])
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        processes.end_children(of=process.pid)
        process.kill()
        process.wait()
        return None


def _summarise(took: Sequence[dict[str, Any]], out: Path, budget_s: float, took_s: float) -> None:
    """Say what each benchmark took and left out, and write it beside the results."""
    from ddpm_lmk.bench.result import PACKAGES
    from ddpm_lmk.system.machine import hardware, versions

    rows = [
        (
            facts["benchmark"],
            f"{facts['took_s']:.0f}",
            f"{facts['share_s']:.0f}",
            "killed" if facts["exit_code"] is None else str(facts["exit_code"]),
            _short(facts["left_out"]),
        )
        for facts in took
    ]
    print_table(("benchmark", "s", "share, s", "exit code", "left out"), rows)
    typer.echo(f"{took_s:.0f} of {budget_s:.0f} s")
    now = datetime.now(UTC)
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "budget_s": budget_s,
        "took_s": round(took_s, 1),
        "hardware": hardware(),
        "versions": versions(*PACKAGES),
        "benchmarks": list(took),
    }
    if len(took) > 1:
        files.write_json(out / f"bench_all-{now:%Y%m%d-%H%M%S}.json", facts)


def _short(left_out: Sequence[str]) -> str:
    more = len(left_out) - MOST_SHOWN
    return "; ".join([*left_out[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]) or "nothing"


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
