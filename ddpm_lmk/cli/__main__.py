"""`python -m ddpm_lmk.cli`, the same as `ddpm-lmk`."""

from __future__ import annotations

from ddpm_lmk.cli import main

main()
