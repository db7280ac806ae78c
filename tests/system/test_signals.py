"""What counts as a request to stop, and how long a process has for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from ddpm_lmk.errors import ConfigError, StoppedError
from ddpm_lmk.system import signals


@pytest.fixture
def hangup_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_the_end_of_a_terminal_is_no_request(hangup_ignored: None) -> None:
    with signals.leaving_at_once(), signals.StopRequest(raises=False) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.level == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.level == 1
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_without_it_the_end_of_a_terminal_is_one() -> None:
    with signals.StopRequest(raises=False) as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.level == 1


def test_a_signal_that_both_threads_tell_of_is_one_request_however_long_the_first_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals, "SAME_REQUEST_S", 0.0)
    monkeypatch.setattr(signals, "_leave", left.append)
    with signals.StopRequest(raises=False, on_first=lambda number: time.sleep(0.2)) as request:
        os.write(request._outlet, bytes([signal.SIGTERM, signal.SIGTERM | signals.MARKED]))
    assert request.level == 1
    assert left == []


@pytest.mark.parametrize("module", ["typer", "ddpm_lmk.config.load"])
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


IN_C = """
import ctypes, subprocess, sys
from ddpm_lmk.system import signals as stop
with stop.leaving_at_once():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    mutex = ctypes.create_string_buffer(128)  # zeros are a mutex that is free
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # waits for itself; no signal gets it out of there
"""


@pytest.mark.skipif(sys.platform != "linux", reason="such a mutex is all zeros with glibc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_process_that_waits_in_c_hears_a_request_and_takes_its_children_along(
    number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen([sys.executable, "-c", IN_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{number.name} outside of training; the same command continues" in said
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_part_that_was_stopped_stops_the_whole() -> None:
    signals.check_stopped(0)
    signals.check_stopped(6)
    for code in (75, 130):
        with pytest.raises(StoppedError) as error:
            signals.check_stopped(code)
        assert error.value.exit_code == code


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "-1", "4"])
def test_a_time_of_grace_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.GRACE, text)
    with pytest.raises(ConfigError, match=f"{signals.GRACE}='{text}'; wanted seconds"):
        signals.grace_s()
