"""The command line: thin, one function call per command, and the only place that prints results."""

from __future__ import annotations

from ddpm_lmk.system.processes import leave
from ddpm_lmk.system.signals import leaving_at_once


def main() -> None:
    """Entry point of `ddpm-lmk`; a scheduler may ask to stop at any moment from here, while imports last too."""
    with leaving_at_once():
        from ddpm_lmk.cli import app

        leave(app.main())


def run(arguments: list[str]) -> int:
    """Carry out one command line and return its exit code."""
    from ddpm_lmk.cli import app

    return app.run(arguments)
