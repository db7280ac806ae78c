"""The command line: thin, one function call per command."""

from __future__ import annotations

from ddpm_lmk.stop import leaving_at_once


def main() -> None:
    """Entry point of `ddpm-lmk`; a scheduler may ask to stop while the rest is still being imported."""
    with leaving_at_once():
        from ddpm_lmk.cli import app
    app.main()


def run(arguments: list[str]) -> int:
    """Carry out one command line and return its exit code."""
    from ddpm_lmk.cli import app

    return app.run(arguments)
