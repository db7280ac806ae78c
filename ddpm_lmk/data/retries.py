"""Reading from a file system or a server that may fail for a while. That never makes a sample corrupt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ddpm_lmk.errors import DataError, StoppedError

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.2, 1.0, 3.0, 6.0)  # a network mount that is back within ten seconds costs nothing

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def with_retries(read: Callable[[Argument], Result], what: Argument) -> Result:
    """Call `read(what)`, again after a pause when the file system fails.

    Raises:
        StoppedError: it failed five times.
    """
    for delay in (*RETRY_DELAYS_S, None):
        try:
            return read(what)
        except (OSError, DataError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            if delay is None:
                raise StoppedError(
                    f"the data cannot be read ({cause.strerror or cause}) after {len(RETRY_DELAYS_S) + 1} tries; "
                    "give the same command when the file system is back"
                ) from error
            log.warning("reading failed (%s), again in %g s", cause.strerror or cause, delay)
            time.sleep(delay)
    raise AssertionError("unreachable")
