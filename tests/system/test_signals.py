"""What counts as a request to stop, how long a process has for it, and that it ends whatever it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ddpm_lmk.errors import ConfigError, StoppedError
from ddpm_lmk.system import signals
from tests.faults.harness import ROOT

SLEEPS = """
import subprocess, sys, time
from ddpm_lmk.system.signals import StopRequest, leaving_at_once
with {block}:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    {wait}
"""
SHORT_NAPS = "[time.sleep(0.1) for _ in range(6000)]"
# Waits for itself in C; no signal gets it out of there. Zeros are a mutex that is free, with glibc.
IN_C = "import ctypes; mutex = ctypes.create_string_buffer(128); lock = ctypes.CDLL(None).pthread_mutex_lock"
IN_C += "; lock(mutex); lock(mutex)"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="such a mutex is all zeros with glibc")


@pytest.mark.parametrize(("is_ignored", "level"), [(True, 0), (False, 1)], ids=["under nohup", "without"])
def test_the_end_of_a_terminal_is_a_request_unless_it_is_ignored(is_ignored: bool, level: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with signals.leaving_at_once(), signals.StopRequest(raises=False) as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.level == level
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.level == 1
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize(
    ("block", "wait", "number", "code", "message"),
    [
        ("leaving_at_once()", SHORT_NAPS, signal.SIGHUP, 75, "SIGHUP outside of training"),
        ("leaving_at_once()", SHORT_NAPS, signal.SIGUSR1, 75, "SIGUSR1 outside of training"),
        pytest.param("leaving_at_once()", IN_C, signal.SIGTERM, 75, "SIGTERM outside of training", marks=linux_only),
        pytest.param("leaving_at_once()", IN_C, signal.SIGINT, 130, "SIGINT outside of training", marks=linux_only),
        ("StopRequest(within_s=0.3)", SHORT_NAPS, signal.SIGTERM, 75, "not saved within"),
        pytest.param("StopRequest(within_s=0.3)", IN_C, signal.SIGINT, 130, "not saved within", marks=linux_only),
    ],
)
def test_a_process_ends_in_time_with_the_code_of_a_stop_whatever_it_waits_for_and_takes_its_children_along(
    block: str, wait: str, number: signal.Signals, code: int, message: str
) -> None:
    program = SLEEPS.format(block=block, wait=wait)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    process = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert message in errors
    assert "the same command continues" in errors
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
