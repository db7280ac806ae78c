"""What one run is: `RunConfig` and its sections.

Every field has a type, a bound, a unit and a description (`ddpm-lmk pretrain RUN.yaml --explain` prints them). Reading,
composing and writing run files lives in `runfile`; how many processes and nodes a run uses lives in the launch file
(`launcher`) and shares no key with this one. Values of the paper are named with their section in `paper.md`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Duration:
    """A length of training: `6000 steps`, `200 epochs` or `171000 images`; a bare number means steps."""

    UNITS = ("steps", "epochs", "images")

    def __init__(self, count: float, unit: str = "steps") -> None:
        if unit not in self.UNITS:
            raise ValueError(f"unknown unit {unit!r}, wanted one of {', '.join(self.UNITS)}")
        if not 0 <= count < 1e15:
            raise ValueError(f"a duration must be finite and not negative, found {count}")
        self.count, self.unit = count, unit

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Read `'200 epochs'`, `'1 epoch'`, `6000` or another Duration."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(value)
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(step|epoch|image)?s?\s*", str(value))
        if match is None:
            raise ValueError(f"{value!r} is not a duration; write e.g. '6000 steps', '200 epochs' or '171000 images'")
        return cls(float(match[1].replace("_", "")), (match[2] or "step") + "s")

    def steps(self, group_size: int, num_images: int, steps_per_epoch: int | None = None) -> int:
        """Length in optimizer steps, at least 1 unless zero; epochs use `steps_per_epoch` when windows end with them."""
        if self.unit == "steps":
            count = self.count
        elif self.unit == "images":
            count = self.count / group_size
        else:
            count = self.count * (steps_per_epoch or num_images / group_size)
        return 0 if count == 0 else max(1, round(count))

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}" if self.count != int(self.count) else f"{int(self.count)} {self.unit}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.count, self.unit) == (other.count, other.unit)

    def __hash__(self) -> int:
        return hash((self.count, self.unit))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())


class Section(BaseModel):
    """A part of a run file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class AugmentConfig(Section):
    """Random changes of a training image, drawn from `(seed, position)`; the geometric ones move the points too."""

    probability: Fraction = Field(0.5, description="share of images that are changed at all (paper: 0.5)")
    shift: Fraction = Field(0.02, description="largest shift in x and in y, as a share of the image side (paper: 0.02)")
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = Field(2.0, description="largest rotation in degrees (paper: 2)")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="sizes are drawn from [1 - scale, 1 + scale]")
    scale_axes: Literal["shared", "independent"] = Field(
        "shared", description="one size factor, or one for x and one for y"
    )
    brightness: Fraction = Field(0.0, description="largest offset added to intensities in [0, 1]")
    contrast: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="contrast factor drawn from [1 - c, 1 + c], around the mean"
    )
    gamma: NonNegative = Field(0.0, description="exponent drawn from exp(uniform(-gamma, gamma))")
    noise: Fraction = Field(
        0.0, description="largest standard deviation of added Gaussian noise, intensities in [0, 1]"
    )


class DataConfig(Section):
    """Where images come from, which of them are used, and how they reach the device."""

    path: tuple[str, ...] = Field(
        min_length=1, description="folder(s) written by `ddpm-lmk shards pack`; several make a pool"
    )
    weights: tuple[Positive, ...] | None = Field(
        None, description="share of draws per folder; null: by number of images"
    )
    splits: tuple[str, ...] = Field(
        ("train",), min_length=1, description="splits trained on (the paper pre-trains on train and val)"
    )
    validation_split: str | None = Field(
        None, description="labelled split for early stopping and choice of weights; null: no validation labels are used"
    )
    shots: Annotated[int, Field(ge=1)] | None = Field(None, description="number of labelled training images; null: all")
    draw: Literal["first", "random"] = Field(
        "first", description="which images the shots are: first by name (paper), or drawn from the seed"
    )
    image_size: Annotated[int, Field(ge=16, le=4096)] = Field(
        256, description="side of the square network input, pixels"
    )
    intensity: Literal["per_image", "full_range"] = Field(
        "per_image",
        description="scale to [0, 1] by each image's own minimum and maximum (paper), or by the range of its type",
    )
    residency: Literal["auto", "stream", "ram", "device"] = Field(
        "auto", description="where pixels live: encoded shards, decoded in memory, or decoded on the device"
    )
    loader: Literal["auto", "torch"] = Field("auto", description="loader backend")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        2, description="decoding threads per process; 0 decodes in the training thread"
    )
    shuffle_window: Annotated[int, Field(ge=1)] = Field(
        16, description="shards whose samples are mixed with one another; reads stay inside the window"
    )
    max_bad_fraction: Fraction = Field(0.001, description="share of undecodable samples after which the run stops")
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @field_validator("path", "splits", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weights_match(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.path):
            raise ValueError(
                f"weights has {len(self.weights)} entries, path has {len(self.path)}; give one weight per folder"
            )
        return self


class UNetConfig(Section):
    """The DDPM U-Net of the paper (paper.md, section 1) and its smaller relatives."""

    kind: Literal["ddpm_unet"] = "ddpm_unet"
    width: Annotated[int, Field(ge=8, le=1024)] = Field(
        96, description="channels of the first level (the paper: 256, since it sets dim = image size)"
    )
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 4, 8), min_length=1, description="channels per level, as multiples of width"
    )
    groups: Annotated[int, Field(ge=1)] = Field(4, description="GroupNorm groups (the paper calls this res_blocks)")
    heads: Annotated[int, Field(ge=1)] = Field(4, description="attention heads (the paper: num_head_channels)")
    head_dim: Annotated[int, Field(ge=1)] = Field(32, description="channels per attention head (the paper: attn_res)")
    linear_attention: tuple[bool, ...] | bool = Field(
        True, description="linear attention per level; one value for all (the paper: all)"
    )
    patch: Literal[1, 2, 4, 8] = Field(
        1, description="pixel-unshuffle factor before the first level: the network works at 1/patch of the image side"
    )
    checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass: less memory, about a quarter more FLOPs (the paper: always)",
    )


class DenoiseConfig(Section):
    """Noise prediction, the pre-training task (paper.md, section 2)."""

    kind: Literal["denoise"] = "denoise"
    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule")
    num_timesteps: Annotated[int, Field(ge=2)] = Field(500, description="timesteps T (paper: 500)")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="first beta of the linear schedule")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(2e-2, description="last beta of the linear schedule")
    t_min: Annotated[int, Field(ge=0)] = Field(
        1, description="smallest timestep drawn (the released code never draws 0)"
    )
    t_max: Annotated[int, Field(ge=1)] | None = Field(
        None, description="largest timestep drawn; null: num_timesteps - 1"
    )
    target: Literal["eps", "x0", "v"] = Field("eps", description="what the network predicts (paper: eps)")
    loss: Literal["l2", "l1"] = Field("l2", description="mean squared or absolute error over pixels")

    @model_validator(mode="after")
    def _timesteps_in_order(self) -> DenoiseConfig:
        if not self.t_min <= (self.t_max if self.t_max is not None else self.num_timesteps - 1) < self.num_timesteps:
            raise ValueError(
                f"wanted t_min <= t_max < num_timesteps, found {self.t_min}, {self.t_max}, {self.num_timesteps}"
            )
        return self


class DiscCodecConfig(Section):
    """The paper's heatmaps: a binary disc per landmark, softmax over landmarks, contour centroid (paper.md, section 3)."""

    kind: Literal["disc"] = "disc"
    sigma_px: Positive = Field(
        5.0, description="Gaussian width in network pixels; the disc is where it exceeds half its peak"
    )


class SpatialCodecConfig(Section):
    """Our heatmaps: one distribution over all pixels per landmark, sub-pixel decoding with an uncertainty."""

    kind: Literal["spatial"] = "spatial"
    sigma_px: Positive = Field(2.0, description="width of the Gaussian target, network pixels")
    decode_radius_px: Positive = Field(
        6.0, description="the point is the mean of the distribution within this distance of its peak, network pixels"
    )


Codec = Annotated[DiscCodecConfig | SpatialCodecConfig, Field(discriminator="kind")]


class LandmarksConfig(Section):
    """Landmark detection, the fine-tuning task."""

    kind: Literal["landmarks"] = "landmarks"
    codec: Codec = Field(default_factory=SpatialCodecConfig)
    timestep: Annotated[int, Field(ge=0)] | None = Field(
        None, description="timestep the network is told; null: no time conditioning at all (paper)"
    )
    views: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="slightly moved views averaged at evaluation; 1: the image as it is (paper)"
    )


class EmaConfig(Section):
    """Exponential moving average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.995, description="decay per step (paper: 0.995)")
    warmup: bool = Field(False, description="decay min(decay, (1 + step) / (10 + step)): follows the weights early on")


class ClipConfig(Section):
    """Gradient clipping."""

    kind: Literal["norm", "value"] = Field(
        "norm", description="by global norm, or element by element (paper pre-training: value)"
    )
    limit: Positive = Field(1.0, description="largest norm or absolute value")


class PlateauConfig(Section):
    """Lower the learning rate when the validation score stands still (paper.md, section 3)."""

    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="multiplies the learning rate")
    patience: Annotated[int, Field(ge=0)] = Field(
        13, description="evaluations without progress that are tolerated (paper: 13)"
    )
    threshold: NonNegative = Field(1e-4, description="smallest relative progress that counts")


class OptimConfig(Section):
    """AdamW and its schedule; the learning rate is a function of the step."""

    kind: Literal["adamw", "sgd"] = Field("adamw", description="optimizer (sgd: plain, for tests of scale)")
    lr: Positive = Field(1e-4, description="learning rate (paper: 1e-4 pre-training, 1e-5 fine-tuning)")
    head_lr: Positive | None = Field(None, description="learning rate of the output layer; null: lr")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW betas"
    )
    eps: Positive = Field(1e-8, description="AdamW epsilon")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay")
    decay_all: bool = Field(
        True, description="decay norms and biases too (paper), or only weights of two and more dimensions"
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="shape of the learning rate after the warm-up (paper: constant)"
    )
    warmup: Duration = Field(Duration(0), description="linear warm-up of the learning rate")
    clip: ClipConfig | None = Field(None, description="gradient clipping; null: none")
    plateau: PlateauConfig | None = Field(None, description="plateau rule; needs data.validation_split")


class TrainConfig(Section):
    """Length, batches, precision, and what is kept on the way."""

    length: Duration = Field(Duration(1000), description="length of training: steps, epochs or images")
    group_size: Annotated[int, Field(ge=1)] = Field(
        32, description="images per optimizer step, over all processes (paper: 4 x 8 and 2 x 8)"
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="images a device computes at once; null: its whole share of the group"
    )
    windows: Literal["straddle", "epoch"] = Field(
        "straddle", description="may a group reach over the end of an epoch, or is the last one short (paper)"
    )
    gradient: Literal["mean", "sum"] = Field(
        "mean", description="mean over the group, or the sum of micro-batch means (released pre-training code)"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="autocast type; auto: bf16 on CUDA, fp32 on the CPU"
    )
    channels_last: bool = Field(True, description="NHWC memory layout")
    compile: bool = Field(False, description="torch.compile the model")
    ema: EmaConfig | None = Field(default_factory=EmaConfig, description="moving average of weights; null: none")
    log_every: Duration = Field(Duration(10), description="between lines in metrics.jsonl")
    checkpoint_every: Duration = Field(Duration(500), description="between resumable checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(3, description="newest checkpoints kept")
    snapshot_every: Duration | None = Field(None, description="between snapshots of weights; null: only at the end")
    evaluate_every: Duration | None = Field(
        None, description="between evaluations on data.validation_split; null: only at the end"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="evaluations without improvement before stopping (paper: 27); null: never"
    )
    select: Literal["last", "best"] = Field(
        "last", description="weights that are kept and tested: the last, or the best on validation (paper)"
    )


class InitConfig(Section):
    """Where the weights come from, decided once (`runs.starting_state`)."""

    weights: str | None = Field(
        None, description="run directory, snapshot directory or .safetensors file; null: random"
    )
    use: Literal["ema", "model"] = Field("ema", description="which weights of a snapshot")


class EvaluateConfig(Section):
    """What is scored after training."""

    split: str | None = Field(
        "test",
        description="split a landmark run is scored on at the end; null: none (pre-training: data.validation_split)",
    )
    batch: Annotated[int, Field(ge=1)] = Field(16, description="images per forward pass")
    samples: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="images drawn from the model after pre-training"
    )


class RunConfig(Section):
    """Everything about one run."""

    name: str = Field("run", min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._+-]+$", description="shown in reports")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="root of all randomness")
    data: DataConfig
    model: Annotated[UNetConfig, Field(description="network")] = Field(default_factory=UNetConfig)
    task: Annotated[DenoiseConfig | LandmarksConfig, Field(discriminator="kind", description="what is learnt")]
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

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
        if self.task.kind == "denoise" and self.evaluate.split not in (None, "test"):
            raise ValueError(
                f"evaluate.split={self.evaluate.split} is for task landmarks; pre-training is scored on data.validation_split"
            )
        if self.task.kind == "denoise" and self.data.shots is not None:
            raise ValueError(
                "data.shots is for labelled training (task landmarks); pre-training uses every image of data.splits"
            )
        if self.data.image_size % (self.model.patch * 2 ** (len(self.model.multipliers) - 1)):
            raise ValueError(
                f"data.image_size={self.data.image_size} must be a multiple of "
                f"{self.model.patch * 2 ** (len(self.model.multipliers) - 1)} for model.patch={self.model.patch} "
                f"and {len(self.model.multipliers)} levels"
            )
        return self
