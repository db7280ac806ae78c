"""Children that run a module of this package on a job: started in one way, and ended with their parent in any case.

The parent calls `start_child`; the module's `main` does its work inside `child_job`. Ranks of a run are started by
torchelastic (`launcher.restarts`) and decoders by `data.images.sandbox`, which has a protocol of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from ddpm_lmk.system import files, signals
from ddpm_lmk.system.processes import die_with_parent

PARENT = "parent"  # key of a job: number of the process that started the child


def start_child(
    module: str,
    job: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: int | IO[str] | None = None,
    stderr: int | IO[str] | None = None,
) -> subprocess.Popen[str]:
    """Start `python -m module` with `job` as JSON on its standard input; it calls `child_job`.

    It is in a session of its own: Ctrl-C reaches the parent only, which asks its children to stop when it is ready.
    """
    # A file and no pipe: a child that dies before it has read all cannot block or break the writer.
    with tempfile.TemporaryFile("w+") as stdin:
        json.dump({**job, PARENT: os.getpid()}, stdin)
        stdin.seek(0)
        command = [sys.executable, "-m", module]
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, env=environment, start_new_session=True
        )


@contextmanager
def child_job() -> Iterator[dict[str, Any]]:
    """In the child: its job. The process dies with its parent, writes privately and leaves at once on a signal."""
    job = json.load(sys.stdin)
    die_with_parent(job.pop(PARENT))
    files.protect()
    with signals.leaving_at_once():
        yield job


def collect_output(children: Sequence[subprocess.Popen[str]], *, within_s: float) -> list[str]:
    """What each child writes to its piped output until it ends; all are killed when `within_s` are over."""
    deadline = time.monotonic() + within_s
    outputs = []
    try:
        for child in children:
            try:
                outputs.append(child.communicate(timeout=max(0.0, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                child.kill()
                outputs.append(child.communicate()[0])
    finally:
        for child in children:
            child.kill()
    return outputs
