"""What counts as a request to stop, and how long a process has for it."""

from __future__ import annotations

import os
import signal
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


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "-1", "4"])
def test_a_time_of_grace_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stop.GRACE, text)
    with pytest.raises(ConfigError, match=f"{stop.GRACE}='{text}'; wanted seconds"):
        stop.grace_s()
