"""Named places where a test or a rehearsal breaks the program: it is killed there, or the disk refuses.

Off unless the environment asks for it, and then free: `reach` compares and returns. LMK_FAILPOINT holds
`name[:n][=action]`, several separated by commas: the n-th time (default: the first) a process gets to `name`, it acts
(default: kill). `ddpm-lmk doctor --failpoints` lists the names; a test holds the list and the code together.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from ddpm_lmk.errors import ConfigError

VARIABLE = "LMK_FAILPOINT"
PAUSE_S, FOR_EVER_S = 1.0, 1e6

POINTS = {
    "save.begin": "a checkpoint is due and nothing is written yet",
    "save.recorded": "a new checkpoint is durable and its event written, nothing is dropped yet",
    "directory.made": "the temporary directory of a checkpoint or snapshot is there, and empty",
    "directory.part": "a piece of a file in it is written (once per tensor, more often where that is large)",
    "directory.file": "a file in it is written and flushed (once per file)",
    "directory.manifest": "its manifest is written and flushed",
    "directory.flushed": "the temporary directory is flushed, the lock not yet looked at again",
    "directory.fenced": "the lock is still ours, the directory not yet renamed",
    "directory.renamed": "the directory has its name, its parent is not flushed",
    "directory.durable": "its parent is flushed",
    "retain.renamed": "an old checkpoint is renamed to trash, and not deleted",
    "retain.deleted": "an old checkpoint is deleted",
    "load.begin": "the newest checkpoint is about to be read",
    "load.aside": "a damaged checkpoint is renamed to .bad-*",
    "load.verified": "a checkpoint is read and verified",
    "evaluate.batch": "a batch of a validation on the way is about to be computed",
    "output.begin": "a whole file (results, tables, run file) is about to be written",
    "output.written": "its temporary file is written, not flushed",
    "output.flushed": "its temporary file is flushed, not renamed",
    "output.renamed": "it has its name, its folder is not flushed",
}
ACTIONS = {
    "kill": "SIGKILL to the process that gets there",
    "enospc": "the call fails as on a full disk",
    "eio": "the call fails as on a broken disk",
    "pause": f"waits {PAUSE_S:g} s",
    "hang": "waits for ever",
}


@dataclass
class _Armed:
    """What happens at one name, and how often it was reached."""

    at: int
    action: str
    seen: int = 0


_armed: dict[str, _Armed] | None = None  # None: the environment was not looked at yet
_counting = threading.Lock()


def reach(name: str) -> None:
    """Say that the program is at `name`; does nothing unless this name is armed.

    Raises:
        OSError: the armed action is a refusal of the disk.
        ConfigError: LMK_FAILPOINT cannot be understood.
    """
    if _armed is None:
        arm(os.environ.get(VARIABLE, ""))
    if _armed:
        _count(name)


def arm(text: str) -> None:
    """Arm what `text` says, in the form of LMK_FAILPOINT, and nothing else; the counts begin anew."""
    global _armed
    _armed = dict(_parse(part.strip()) for part in text.split(",") if part.strip())


def _parse(part: str) -> tuple[str, _Armed]:
    place, _, action = part.partition("=")
    name, _, count = place.partition(":")
    if name not in POINTS:
        raise ConfigError(f"{VARIABLE} names {name!r}; wanted one of {', '.join(POINTS)}")
    if (action or "kill") not in ACTIONS or not (count or "1").isdecimal():
        raise ConfigError(f"{VARIABLE} holds {part!r}; wanted NAME[:N][=ACTION] with ACTION of {', '.join(ACTIONS)}")
    return name, _Armed(int(count or "1"), action or "kill")


def _count(name: str) -> None:
    assert _armed is not None
    found = _armed.get(name)
    if found is None:
        return
    with _counting:
        found.seen += 1
        is_due = found.seen == found.at
    if is_due:
        _act(name, found.action)


def _act(name: str, action: str) -> None:
    sys.stderr.write(f"fail-point {name}: {action}\n")
    sys.stderr.flush()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("pause", "hang"):
        time.sleep(PAUSE_S if action == "pause" else FOR_EVER_S)
    else:
        number = errno.ENOSPC if action == "enospc" else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (fail-point {name})")
