"""The command line: thin, one function call per command."""

from __future__ import annotations

from ddpm_lmk.cli.app import main, run

__all__ = ["main", "run"]
