"""What counts as a request to stop, and how long a process has for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ddpm_lmk import stop
from ddpm_lmk.errors import ConfigError


@pytest.fixture
def hangup_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_the_end_of_a_terminal_is_no_request(hangup_ignored: None) -> None:
    with stop.leaving_at_once(), stop.StopRequest(raises=False) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.level == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.level == 1
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_without_it_the_end_of_a_terminal_is_one() -> None:
    with stop.StopRequest(raises=False) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.level == 1


@pytest.mark.parametrize("module", ["typer", "ddpm_lmk.runfile"])
def test_a_request_while_the_command_is_still_being_imported_has_the_code_of_a_stop(module: str) -> None:
    """A scheduler that asks in the first second must not lose the run: its script queues 75 again, and nothing else."""
    program = f"""
import os, signal, sys
class Asks:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Asks())
from ddpm_lmk import cli
cli.main()
"""
    words = [sys.executable, "-c", program, "pretrain", "none.yaml"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 75
    assert "the same command continues" in done.stderr


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "-1", "4"])
def test_a_time_of_grace_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stop.GRACE, text)
    with pytest.raises(ConfigError, match=f"{stop.GRACE}='{text}'; wanted seconds"):
        stop.grace_s()
