"""Every system call of a save, killed or refused one after the other by strace, on the thread that saves.

A first run lists the calls the second save makes (it has a checkpoint before it, and drops that one afterwards); each
of them, by name and number, is then the place where a run dies, or where the disk says ENOSPC or EIO.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path

from tests.faults.forge import Forge
from tests.faults.saving import SAVES, Outcome, continues, good_steps, job

SAVE = 2
CALLS = (
    *("mkdir", "openat", "open", "write", "pwrite64", "lseek", "fsync", "fdatasync", "close", "dup", "fcntl", "ioctl"),
    *("stat", "lstat", "fstat", "newfstatat", "statfs", "fstatfs", "access", "getdents64", "read", "ftruncate"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
)
# Calls whose refusal a disk can cause; the others fail for reasons of the program only.
REFUSABLE = {"mkdir": "ENOSPC", "openat": "ENOSPC", "write": "ENOSPC", "fsync": "EIO", "close": "EIO", "statfs": "EIO"}
REFUSABLE |= {"rename": "ENOSPC", "unlinkat": "EIO", "rmdir": "EIO", "getdents64": "EIO", "ftruncate": "EIO"}
LINE = re.compile(r"(\w+)\((.*)\) += (-?\d+)")
OPENED = re.compile(r'"(?P<path>[^"]+)", (?P<flags>[A-Z_|]+)')
END = "checkpoint.saved"


def watch(forge: Forge, folder: Path) -> list[tuple[str, str]]:
    """Name and arguments of the calls of one save and the retention after it, in order."""
    log = folder / "calls.txt"
    options = ["-s", "200", "-e", f"trace={','.join('?' + call for call in CALLS)}"]
    forge.finish(job(folder / "watched"), trace={"save": SAVE, "options": options, "log": str(log)})
    calls = [(match[1], match[2]) for line in log.read_text().splitlines() if (match := LINE.match(line))]
    end = max(i for i, (name, text) in enumerate(calls) if name == "rmdir" and f"step-{SAVES[SAVE - 2]:08d}" in text)
    return calls[: end + 1]


def places(calls: list[tuple[str, str]]) -> list[str]:
    """Every call as `strace --inject` names it, killed; and refused where a disk can refuse it."""
    seen: Counter[str] = Counter()
    found = []
    for name, _ in calls:
        seen[name] += 1
        found.append(f"{name}:signal=KILL:when={seen[name]}")
        if name in REFUSABLE:
            found.append(f"{name}:error={REFUSABLE[name]}:when={seen[name]}")
    return found


def disturb(forge: Forge, folder: Path, disturbance: str, wanted: Outcome) -> int:
    """Break one call of a save; the exit code. A killed run continues, a refused one does not even stop."""
    work = job(folder / "run")
    options = ["-e", f"trace={disturbance.partition(':')[0]}", "-e", f"inject={disturbance}"]
    code, said = forge.run(work, trace={"save": SAVE, "options": options, "log": str(folder / "disturbed.txt")})
    assert "INJECTED" in (folder / "disturbed.txt").read_text() or code == -signal.SIGKILL, f"{disturbance} was not met"
    assert good_steps(folder / "run"), "no good checkpoint"
    if "KILL" in disturbance:
        assert code == -signal.SIGKILL, said
        continues(forge, work, wanted)
    else:
        assert code == 0, said
        assert Outcome.of(folder / "run") == wanted
    return code


def want_flushes_in_order(calls: list[tuple[str, str]]) -> None:
    """What a loss of power needs: no name before its content, no word before its name, nothing dropped before that."""
    written: dict[str, bool] = {}  # path -> flushed
    order = []
    for name, text in calls:
        if name == "openat" and "O_CREAT" in text and ".tmp-" in text:
            opened = OPENED.search(text)
            assert opened is not None
            written[opened["path"]] = False
        elif name == "mkdir" and ".tmp-" in text:
            written[text.split('"')[1]] = False
        elif name == "fsync":
            path = text.partition("<")[2].rpartition(">")[0]
            order.append("parent flushed" if path.endswith("/checkpoints") else "flushed")
            if path in written:
                written[path] = True
        elif name in ("rename", "renameat", "renameat2"):
            if ".tmp-" in text:
                assert written
                assert all(written.values()), f"renamed before {[p for p, done in written.items() if not done]}"
            order.append("named" if ".tmp-" in text else "dropped")
        elif name == "write" and END in text:
            order.append("said")
    assert order[-4:] == ["named", "parent flushed", "said", "dropped"], order
    assert len(written) == len(["directory", "state", "model", "ema", "optim", "best", "manifest"])
