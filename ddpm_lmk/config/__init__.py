"""The schema of a run file: `RunConfig` and its sections.

Every field has a type, a bound, a unit and a description (`ddpm-lmk pretrain RUN.yaml --explain` prints them). `load`
reads, composes and writes run files. How many processes and nodes a run uses is in the launch file (`launcher`), which
shares no key with this one. Values of the paper are named with their section in `docs/method.md`.
"""

from __future__ import annotations

from ddpm_lmk.config.data import AugmentConfig, DataConfig
from ddpm_lmk.config.model import EncoderUNetConfig, GU2NetConfig, Network, UNetConfig
from ddpm_lmk.config.run_file import RunConfig
from ddpm_lmk.config.task import (
    Codec,
    ContourCodecConfig,
    DenoiseConfig,
    DiscCodecConfig,
    GaussianCodecConfig,
    LandmarksConfig,
    RefineConfig,
    SimclrV2Config,
    SpatialCodecConfig,
    ZoomConfig,
)
from ddpm_lmk.config.training import (
    ClipConfig,
    EmaConfig,
    EvaluateConfig,
    InitConfig,
    OptimConfig,
    PlateauConfig,
    SpikeConfig,
    TrainConfig,
)
from ddpm_lmk.config.values import Duration, Fraction, Positive, Section

__all__ = [
    "AugmentConfig",
    "ClipConfig",
    "Codec",
    "ContourCodecConfig",
    "DataConfig",
    "DenoiseConfig",
    "DiscCodecConfig",
    "Duration",
    "EmaConfig",
    "EncoderUNetConfig",
    "EvaluateConfig",
    "Fraction",
    "GU2NetConfig",
    "GaussianCodecConfig",
    "InitConfig",
    "LandmarksConfig",
    "Network",
    "OptimConfig",
    "PlateauConfig",
    "Positive",
    "RefineConfig",
    "RunConfig",
    "Section",
    "SimclrV2Config",
    "SpatialCodecConfig",
    "SpikeConfig",
    "TrainConfig",
    "UNetConfig",
    "ZoomConfig",
]
