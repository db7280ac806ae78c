"""Reading from a file system or a server that may fail for a while. That never makes a sample corrupt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ddpm_lmk.errors import DataError, StoppedError

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.2, 1.0, 3.0, 6.0)  # a network mount that is back within ten seconds costs nothing
GIVE_UP_S = 30.0  # clients of object stores try again too; at 60 s a launcher takes the rank for dead

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def with_retries(read: Callable[[Argument], Result], what: Argument) -> Result:
    """Call `read(what)`, again after a pause when the file system fails.

    Raises:
        StoppedError: it failed five times, or for half a minute.
    """
    began = time.monotonic()
    for number, delay in enumerate((*RETRY_DELAYS_S, None), start=1):
        try:
            return read(what)
        except (OSError, DataError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            if delay is None or time.monotonic() - began > GIVE_UP_S:
                raise StoppedError(
                    f"the data cannot be read ({cause.strerror or cause}) after {number} tries; "
                    "give the same command when the file system is back"
                ) from error
            log.warning("reading failed (%s), again in %g s", cause.strerror or cause, delay)
            time.sleep(delay)
    raise AssertionError("unreachable")
