"""What one run is: `RunConfig` and its sections.

Every field has a type, a bound, a unit and a description (`ddpm-lmk pretrain RUN.yaml --explain` prints them). Reading,
composing and writing run files lives in `runfile`; how many processes and nodes a run uses lives in the launch file
(`launcher`) and shares no key with this one. Values of the paper are named with their section in `paper.md`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ddpm_lmk.config.data import AugmentConfig, DataConfig, DedupConfig, HoldOutConfig
from ddpm_lmk.config.model import EncoderUNetConfig, GU2NetConfig, Network, UNetConfig
from ddpm_lmk.config.renamed import under_new_names
from ddpm_lmk.config.task import (
    Codec,
    ContourCodecConfig,
    DenoiseConfig,
    DinoConfig,
    DiscCodecConfig,
    EncoderTask,
    EncoderTaskConfig,
    GaussianCodecConfig,
    LandmarksConfig,
    MocoV3Config,
    SimclrV2Config,
    SpatialCodecConfig,
)
from ddpm_lmk.config.training import (
    ClipConfig,
    EmaConfig,
    EvaluateConfig,
    InitConfig,
    OptimConfig,
    PlateauConfig,
    RuntimeConfig,
    SpikeConfig,
    TrainConfig,
)
from ddpm_lmk.config.values import Duration, Fraction, NonNegative, Positive, Section

__all__ = [
    "AugmentConfig",
    "ClipConfig",
    "Codec",
    "ContourCodecConfig",
    "DataConfig",
    "DedupConfig",
    "DenoiseConfig",
    "DinoConfig",
    "DiscCodecConfig",
    "Duration",
    "EmaConfig",
    "EncoderUNetConfig",
    "EvaluateConfig",
    "Fraction",
    "GU2NetConfig",
    "GaussianCodecConfig",
    "HoldOutConfig",
    "InitConfig",
    "LandmarksConfig",
    "MocoV3Config",
    "Network",
    "NonNegative",
    "OptimConfig",
    "PlateauConfig",
    "Positive",
    "RunConfig",
    "RuntimeConfig",
    "Section",
    "SimclrV2Config",
    "SpatialCodecConfig",
    "SpikeConfig",
    "TrainConfig",
    "UNetConfig",
]


class RunConfig(Section):
    """Everything about one run."""

    name: str = Field("run", min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._+-]+$", description="shown in reports")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="root of all randomness")
    data: DataConfig
    model: Annotated[Network, Field(description="network")] = Field(default_factory=UNetConfig)
    task: Annotated[
        DenoiseConfig | EncoderTask | LandmarksConfig, Field(discriminator="kind", description="what is learnt")
    ]
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @property
    def is_told_time(self) -> bool:
        """Is the network told a timestep? Where it is not, the layers that only a timestep reaches do not learn."""
        return getattr(self.task, "timestep", 0) is not None

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        """Settings stored by an earlier version: in a checkpoint, a snapshot, the job of a sweep's worker."""
        return under_new_names(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        needs_validation = [
            name
            for name, used in (
                ("optim.plateau", self.optim.plateau is not None),
                ("train.patience", self.train.patience is not None),
                ("train.select=best", self.train.select == "best"),
            )
            if used
        ]
        if needs_validation and self.data.validation_split is None:
            raise ValueError(f"{', '.join(needs_validation)} needs data.validation_split")
        self._want_free_micro_batch()
        if self.train.gradient != "mean" and self.train.micro_batch is None:
            raise ValueError(
                f"train.gradient={self.train.gradient} adds up means of micro-batches; it needs train.micro_batch, a size "
                "that does not depend on the number of processes"
            )
        if self.train.exactness == "exact" and (self.train.micro_batch is None or self.train.compile):
            raise ValueError(
                "train.exactness=exact needs train.micro_batch, a size that does not depend on the number of processes, "
                "and train.compile=false, since kernels are compiled per process"
            )
        is_pretraining = self.task.stage == "pretrain"
        if is_pretraining and self.evaluate.split not in (None, "test"):
            raise ValueError(
                f"evaluate.split={self.evaluate.split} is for task landmarks; pre-training is scored on data.validation_split"
            )
        if is_pretraining and self.data.shots is not None:
            raise ValueError(
                "data.shots is for labelled training (task landmarks); pre-training uses every image of data.splits"
            )
        if not is_pretraining and self.data.protect:
            raise ValueError("data.protect is for pre-training; a fine-tuning run trains on one set's splits")
        if self.data.image_size % self.model.side_multiple:
            raise ValueError(
                f"data.image_size={self.data.image_size} must be a multiple of {self.model.side_multiple} for this "
                f"model.kind={self.model.kind}, which halves its maps"
            )
        self._want_fitting_network()
        return self

    def _want_free_micro_batch(self) -> None:
        """Where something depends on the micro-batch, it cannot be left to the device."""
        if self.train.micro_batch != "auto":
            return
        reasons = {
            "train.exactness=exact": self.train.exactness == "exact",
            f"train.gradient={self.train.gradient}": self.train.gradient != "mean",
            "train.epoch_boundary=epoch in pre-training": self.train.epoch_boundary == "epoch"
            and self.task.stage == "pretrain",
            f"model.kind={self.model.kind}": self.model.kind != "ddpm_unet",
        }
        if found := [name for name, is_so in reasons.items() if is_so]:
            raise ValueError(f"train.micro_batch=auto would change what {found[0]} computes; give a number, or null")

    def _want_fitting_network(self) -> None:
        if not self.model.takes_time and self.task.kind == "denoise":
            raise ValueError(f"model.kind={self.model.kind} takes no timestep, which task denoise needs; use ddpm_unet")
        if not self.model.takes_time and self.task.kind == "landmarks" and self.task.timestep is not None:
            raise ValueError(f"model.kind={self.model.kind} takes no timestep; set task.timestep=null")
        if isinstance(self.task, EncoderTaskConfig):
            self._want_encoder(self.task)
        if self.model.couples_images and self.train.exactness == "exact":
            raise ValueError(
                f"model.kind={self.model.kind} normalises over the images of a micro-batch, so bits depend on the number "
                "of processes; use train.exactness=ordered"
            )

    def _want_encoder(self, task: EncoderTaskConfig) -> None:
        if not isinstance(self.model, EncoderUNetConfig):
            raise ValueError(
                f"task {self.task.kind} learns an encoder, which {self.model.kind} has not; use encoder_unet"
            )
        if len(task.std) not in (1, self.model.in_channels):
            raise ValueError(f"task.std has {len(task.std)} numbers for model.in_channels={self.model.in_channels}")
        if min(self.train.given_micro_batch or self.train.global_batch_size, self.train.global_batch_size) < 2:
            raise ValueError(f"task {self.task.kind} normalises over a micro-batch; wanted at least 2 images in one")

    @model_validator(mode="after")
    def _labels_agree(self) -> RunConfig:
        codec = self.task.codec if isinstance(self.task, LandmarksConfig) else None
        if codec is None and self.data.hold_out is not None:
            raise ValueError("data.hold_out keeps labelled shots from training; it is for task landmarks")
        if isinstance(codec, ContourCodecConfig) and codec.temperatures == "fitted" and len(self.data.path) > 1:
            raise ValueError("task.codec.temperatures=fitted is for one labelled set; a mixture goes without: use none")
        return self
