"""The errors a user can cause or meet, each with the exit code the command line promises (docs/design.md, section 8).

An `LmkError` is one line: what was found, what was wanted, what to do. It is printed without a traceback; anything
else is a bug and keeps its traceback.
"""

from __future__ import annotations


class LmkError(Exception):
    """Base of all errors shown to users as one line."""

    exit_code = 1
    is_shared = False  # True on an error that every process of a run raises: one of them is enough to tell it


class ConfigError(LmkError):
    """A run file, override or command line that cannot be honoured."""

    exit_code = 2


class DataError(LmkError):
    """Images, labels or shards that are missing, broken or contradictory."""

    exit_code = 3


class CheckpointError(LmkError):
    """Weights or state that are damaged, foreign or do not fit; also any file refused for safety."""

    exit_code = 4


class LaunchError(LmkError):
    """The machine is not what was asked for: GPUs, processes, ports, a missing extra."""

    exit_code = 5


class ResourceError(LmkError):
    """Disk or memory is missing or not writable."""

    exit_code = 6


class RunConflictError(LmkError):
    """A run directory belongs to another run, or another process is working in it."""

    exit_code = 7


class DivergedError(LmkError):
    """Training produced non-finite numbers it could not recover from."""

    exit_code = 8


class StoppedError(LmkError):
    """Stopped by a signal or a stalled file system after a clean save; the same command continues."""

    exit_code = 75


class NoProgressError(LmkError):
    """Lost again and again before the next checkpoint; starting it once more would only repeat that."""

    exit_code = 76
