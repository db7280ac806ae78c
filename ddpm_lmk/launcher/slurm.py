"""The batch script of a Slurm cluster: one task per node, saved and queued again when it is preempted.

The scheduler sends SIGUSR1 to the script some time before it takes the nodes away (`--signal=B:USR1@SECONDS`), or
SIGTERM when it preempts; the script passes it on, the run saves and ends with 75, and the script queues itself again.
Any other code ends the job: a run without progress (76) would only burn its allocation. So does the third 75 at the
same checkpoint: `srun` returns the largest code of all nodes, which hides the reason that one of them had.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError, LaunchError
from ddpm_lmk.system import files

FIRST_PORT, PORTS = 20000, 20000
SPARE_S = 30  # between the run's own grace and the moment the scheduler takes the nodes

SCRIPT = """\
#!/bin/bash
# {title}
# Written by `ddpm-lmk launch slurm`; submit with `sbatch {script}`. The same script continues the run.
{directives}
set -uo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(( {first_port} + SLURM_JOB_ID % {ports} ))
export head port
export DDPM_LMK_GRACE_S={grace_s}  # seconds from a signal to the end of the last process

# One task per node; each starts the processes of its node and looks after them. From 22.05 on srun has one core per
# task unless it is told again.
srun --kill-on-bad-exit=0 --cpus-per-task={cpus} bash -c {task} &
step=$!

# A signal before the end of the time limit, or of a preemption, goes to all tasks. It also ends a `wait`: wait again.
pass_on() {{ asked=1; echo "asked to stop: the run saves and is queued again" >&2; kill -USR1 "$step" 2>/dev/null; }}
trap pass_on USR1 TERM

asked=0; code=0
wait "$step" || code=$?
while [ "$asked" = 1 ]; do
    asked=0; code=0
    wait "$step" || code=$?
done

# The newest checkpoint at every end of this job; three times the same is no progress.
gets_on() {{
    newest=$(ls {out}/checkpoints 2>/dev/null | grep "^step-" | tail -n 1)
    echo "${{newest:-none}}" >> "$SLURM_JOB_NAME-$SLURM_JOB_ID.ends"
    [ "$(tail -n 3 "$SLURM_JOB_NAME-$SLURM_JOB_ID.ends" | uniq -c | awk '{{print $1}}' | tail -n 1)" -lt 3 ]
}}
[ "$code" = 75 ] && ! gets_on && code=76

case $code in
    0) ;;
    75) scontrol requeue "$SLURM_JOB_ID" ;;
    76) echo "no progress in several restarts: not queued again" >&2 ;;
    *) echo "ended with exit code $code: not queued again" >&2 ;;
esac
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What Slurm has to know."""

    name: str
    command: tuple[str, ...]  # of one node, without its place among the others
    nodes: int = 1
    gpus_per_node: int = 0  # 0: it trains on the CPU
    cpus_per_task: int = 8
    time: str = "24:00:00"
    grace_s: int = 120
    partition: str | None = None
    account: str | None = None


def write_script(job: Job, path: Path) -> None:
    """Write the batch script of `job`.

    Raises:
        ConfigError: a time that Slurm does not know.
        ResourceError: the place cannot be written.
    """
    if not re.fullmatch(r"(\d+-)?\d{1,3}(:\d{2}){0,2}", job.time):
        raise ConfigError(f"--time {job.time!r}; wanted MINUTES, HH:MM:SS or D-HH:MM:SS as Slurm reads them")
    for option, word in (("--partition", job.partition), ("--account", job.account)):
        if word is not None and not re.fullmatch(r"[\w.,%/+=@-]+", word):
            raise ConfigError(f"{option} {word!r}; wanted a word without spaces and quotes")
    devices = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else f"{job.cpus_per_task} cores"
    script = SCRIPT.format(
        title=f"{job.name}: {job.nodes} x {devices}",
        script=shlex.quote(str(path)),
        directives="\n".join(f"#SBATCH {line}" for line in _directives(job)),
        first_port=FIRST_PORT,
        grace_s=job.grace_s,
        cpus=job.cpus_per_task,
        ports=PORTS,
        task=shlex.quote(_task(job)),
        out=shlex.quote(job.command[job.command.index("--out") + 1]),
    )
    files.write_text(path, script)


def submit(path: Path) -> str:
    """Hand a script to Slurm; returns what `sbatch` says. Raises `LaunchError`."""
    if shutil.which("sbatch") is None:
        raise LaunchError(f"there is no sbatch on this machine; copy {path} to a login node and run `sbatch {path}`")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"sbatch refused {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _directives(job: Job) -> list[str]:
    lines = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_task}",
        f"--time={job.time}",
        f"--signal=B:USR1@{job.grace_s + SPARE_S}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    lines += [f"--gpus-per-node={job.gpus_per_node}"] * bool(job.gpus_per_node)
    lines += [f"--partition={job.partition}"] * bool(job.partition)
    return [*lines, *([f"--account={job.account}"] * bool(job.account))]


def _task(job: Job) -> str:
    """The command of one node; what differs between nodes is filled in there."""
    words = shlex.join(job.command)
    if job.nodes == 1:
        return f"exec {words}"
    return f'exec {words} --nodes {job.nodes} --node-rank "$SLURM_NODEID" --rdzv "$head:$port"'


def command(
    cfg: RunConfig, run_file: Path, overrides: Sequence[str], *, gpus: int, cpu: int, out: Path, launch: Path | None
) -> tuple[str, ...]:
    """`ddpm-lmk VERB RUN.yaml ...` of this installation, with settings that mean the same in any folder."""
    fixed = fixed_settings(cfg)
    kept = [word for word in overrides if word.partition("=")[0].strip() not in fixed]
    added = [f"{key}={json.dumps(value)}" for key, value in fixed.items()]
    words = [*program(), cfg.task.stage, str(run_file.absolute()), *kept, *added, "--out", str(out)]
    if launch is not None:
        return (*words, "--launch", str(launch.absolute()))
    return (*words, *(("--gpus", str(gpus)) if gpus else ("--cpu", str(cpu))))


def program() -> tuple[str, ...]:
    """`ddpm-lmk` of the interpreter that runs here, which a batch job need not have on its path."""
    script = Path(sys.executable).with_name("ddpm-lmk")
    return (str(script),) if script.is_file() else (sys.executable, "-m", "ddpm_lmk.cli")


def fixed_settings(cfg: RunConfig) -> dict[str, str | list[str] | None]:
    """Settings that depend on the current folder, where a batch job may not start: absolute paths, ids of images."""
    propagate = cfg.data.propagate
    places: dict[str, str | list[str] | None] = {
        "data.path": list(cfg.data.path),
        "data.protect": list(cfg.data.protect),
        "data.propagate.path": list(propagate.path) if propagate is not None and propagate.path is not None else None,
        "runtime.cache_dir": cfg.runtime.cache_dir,
        "init.weights": cfg.init.weights,
    }
    absolute = {key: _absolute(value) for key, value in places.items()}
    fixed = {key: value for key, value in absolute.items() if value != places[key]}
    # Of a file that lists them nothing is left here: the job, and every restart of it, has what it lists now.
    return fixed if cfg.data.images is None else fixed | {"data.images": list(cfg.data.images)}


def _absolute(value: str | list[str] | None) -> str | list[str] | None:
    if isinstance(value, list):
        return [str(_absolute(each)) for each in value]
    return value if value is None or "://" in value else str(Path(value).absolute())
