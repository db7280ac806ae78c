"""Codecs: landmarks to a training signal, and a network's maps back to landmarks with an uncertainty.

`DiscCodec` is the paper's (docs/method.md, section 3) with its quirks kept: softmax over landmarks, no gradient outside
the discs, contour centroids, (0, 0) on failure. `SpatialCodec` is ours: one probability distribution over all pixels
per landmark. `ContourCodec` is contour-hugging, the paper's [20]: such a distribution, trained on one pixel, with
temperatures. `GaussianCodec` is GU2Net's: every pixel a probability of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpm_lmk.config import Codec as CodecConfig
from ddpm_lmk.tasks.codecs.base import Codec, Decoded, Frame
from ddpm_lmk.tasks.codecs.contour import ContourCodec
from ddpm_lmk.tasks.codecs.disc import DiscCodec
from ddpm_lmk.tasks.codecs.spatial import GaussianCodec, SpatialCodec

__all__ = ["Codec", "ContourCodec", "Decoded", "DiscCodec", "Frame", "GaussianCodec", "SpatialCodec", "build_codec"]


CODECS: dict[str, Callable[[Any], Codec]] = {
    "disc": DiscCodec,
    "spatial": SpatialCodec,
    "contour": ContourCodec,
    "gaussian": GaussianCodec,
}


def build_codec(cfg: CodecConfig) -> Codec:
    """The codec a run file asks for."""
    return CODECS[cfg.kind](cfg)
