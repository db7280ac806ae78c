"""ddpm-lmk: diffusion pre-training on pooled x-rays, and few-shot landmark detection with the same engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from ddpm_lmk.inference.detector import Detector

__version__ = "0.2.0"


def load(path: str | Path, *, dataset: str | None = None, device: Literal["auto", "cpu", "cuda"] = "auto") -> Detector:
    """A finished landmark run, ready to find landmarks: `ddpm_lmk.load(RUN).predict("film.png").points`.

    Args:
        path: a run directory, one of its snapshots, or a folder written by `ddpm-lmk export --format hub`.
        dataset: whose landmarks are wanted, of a run that has learnt those of several.
        device: auto takes a GPU if there is one.

    Raises:
        CheckpointError: no finished weights there, or damaged ones.
        ConfigError: an unknown device; the run has learnt no landmarks, or those of several datasets and none is named.
        DataError: how the run prepared its pictures cannot be found out.
    """
    # Here, so that `import ddpm_lmk` does not wait for torch.
    from ddpm_lmk.errors import ConfigError
    from ddpm_lmk.inference.detector import Detector
    from ddpm_lmk.inference.load import open_run

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r}; wanted 'auto', 'cpu' or 'cuda'")
    return Detector(open_run(path, kind="landmarks", device=device).for_dataset(dataset))
