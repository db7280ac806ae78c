"""Locks: one holder, free when it dies, and an error where a file system has none."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_lmk.errors import ResourceError
from ddpm_lmk.rundir.lock import take_lock
from ddpm_lmk.system import locks

ROOT = Path(__file__).parents[2]


def test_the_lock_of_a_killed_process_is_free_and_its_file_stays_as_it_was(tmp_path: Path) -> None:
    code = "import sys, time\nfrom pathlib import Path\nfrom ddpm_lmk.system import locks\n"
    code += "assert locks.lock(Path(sys.argv[1])) is not None\nprint('held', flush=True)\ntime.sleep(600)\n"
    path = tmp_path / "lock"
    path.write_text("who holds it")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with locks.locked(path) as is_mine:
        assert not is_mine
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locks.locked(path) as is_mine:
        assert is_mine
        with locks.locked(path) as is_twice:
            assert not is_twice, "a second descriptor of the same process is another holder"
    assert path.read_text() == "who holds it"


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", without)
    with pytest.raises(ResourceError, match=r"has no locks \(No locks available\).*mount it with locks") as refused:
        take_lock(tmp_path)
    assert refused.value.exit_code == 6
