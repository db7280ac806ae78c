"""`task`: what is learnt.

`task` of kinds mocov3, simclrv2 and dino: self-supervised pre-training of an encoder (docs/method.md, section 5).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ddpm_lmk.config.values import ADVANCED, Fraction, NonNegative, Positive, Section, Stage, is_null


class TaskConfig(Section):
    """What the sections of all tasks have in common."""

    stage: ClassVar[Stage]

    @property
    def is_time_conditioned(self) -> bool:
        """Does the task tell the network a timestep?"""
        return False


class ZoomConfig(Section):
    """Some of the images are crops, so that the network learns what a second look will see (docs/method.md, section 9)."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of images that are zoomed in", json_schema_extra=ADVANCED
    )
    smallest: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.125,
        description="smallest side of a crop, as a share of the image side; drawn log-uniformly up to all of it",
        json_schema_extra=ADVANCED,
    )


class DenoiseConfig(TaskConfig):
    """Noise prediction, the pre-training task (docs/method.md, section 2)."""

    stage: ClassVar[Stage] = "pretrain"

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
    zoom: ZoomConfig | None = Field(
        None,
        description="train on crops of data.fine_size pixels too, at all scales; null: on whole images only",
        exclude_if=is_null,
    )

    @model_validator(mode="after")
    def _timesteps_in_order(self) -> DenoiseConfig:
        if not self.t_min <= (self.t_max if self.t_max is not None else self.num_timesteps - 1) < self.num_timesteps:
            raise ValueError(
                f"wanted t_min <= t_max < num_timesteps, found {self.t_min}, {self.t_max}, {self.num_timesteps}"
            )
        return self

    @property
    def is_time_conditioned(self) -> bool:
        """Always."""
        return True


class DiscCodecConfig(Section):
    """The paper's heatmaps: a binary disc per landmark, softmax over landmarks, contour centroid (docs/method.md, section 3)."""

    kind: Literal["disc"] = "disc"
    sigma_px: Positive = Field(
        5.0, description="Gaussian width in network pixels; the disc is where it exceeds half its peak"
    )
    masks: Literal["drawn", "warped"] = Field(
        "drawn",
        description="discs drawn around the moved points, or warped with the image, nearest neighbour (released code)",
    )


class SpatialCodecConfig(Section):
    """Our heatmaps: one distribution over all pixels per landmark, sub-pixel decoding with an uncertainty."""

    kind: Literal["spatial"] = "spatial"
    sigma_px: Positive = Field(2.0, description="width of the Gaussian target, network pixels")
    decode_radius_px: Positive = Field(
        6.0, description="the point is the mean of the distribution within this distance of its peak, network pixels"
    )


class ContourCodecConfig(Section):
    """Contour-hugging heatmaps, the paper's [20]: softmax over pixels, likelihood of one, peak (docs/method.md, 3 and 5)."""

    kind: Literal["contour"] = "contour"
    pixel: Literal["nearest", "floor"] = Field(
        "nearest", description="the landmark's pixel: the nearest, or rounded down on the released grid ([20])"
    )
    decode_radius_px: NonNegative = Field(
        0.0, description="the point is the mean of the map within this distance of its peak; 0: the peak ([20])"
    )
    ere_cut: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="the expected radial error leaves out what is below this share of the peak ([20]: 0.05)"
    )
    temperatures: Literal["none", "fitted"] = Field(
        "none",
        description="one per landmark, fitted on data.validation_split",
    )
    folds: Annotated[int, Field(ge=2, le=20)] = Field(
        5, description="not used any more: versions to 0.1 fitted temperatures on folds of the shots"
    )


class GaussianCodecConfig(Section):
    """Gaussian heatmaps of independent pixels, as GU2Net is trained on (docs/method.md, section 5)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma_px: Positive = Field(3.0, description="width of the Gaussian target, network pixels (GU2Net: 3)")
    radius_px: Positive = Field(9.0, description="half the side of the box it lives in, network pixels (GU2Net: 9)")
    decode_radius_px: NonNegative = Field(
        0.0, description="the point is the mean of the map within this distance of its peak; 0: the peak (GU2Net)"
    )


Codec = Annotated[
    DiscCodecConfig | SpatialCodecConfig | ContourCodecConfig | GaussianCodecConfig, Field(discriminator="kind")
]


class RefineConfig(Section):
    """A second look: a network of its own on crops around the points of the first (docs/method.md, section 9)."""

    crop: Annotated[float, Field(gt=0, lt=1)] = Field(0.25, description="side of a crop, as a share of the image side")
    size: Annotated[int, Field(ge=16, le=4096)] | None = Field(
        None, description="side of a crop, network pixels; null: data.image_size"
    )
    crops: Annotated[int, Field(ge=1, le=64)] = Field(2, description="crops cut per image and step in training")
    jitter: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.06,
        description="largest distance of a crop's centre from its landmark in x and y, as a share of the image side",
    )
    codec: Codec | None = Field(
        None,
        description="codec of the second look, its numbers in crop pixels; null: as task.codec",
        json_schema_extra=ADVANCED,
    )

    @model_validator(mode="after")
    def _landmark_in_crop(self) -> RefineConfig:
        if self.jitter >= self.crop / 2:
            raise ValueError(
                f"jitter={self.jitter} moves landmarks out of crops of side {self.crop}; use less than {self.crop / 2:g}"
            )
        return self


class LandmarksConfig(TaskConfig):
    """Landmark detection, the fine-tuning task."""

    stage: ClassVar[Stage] = "finetune"

    kind: Literal["landmarks"] = "landmarks"
    codec: Codec = Field(default_factory=SpatialCodecConfig)
    timestep: Annotated[int, Field(ge=0)] | None = Field(
        None, description="timestep the network is conditioned on; null: no time conditioning at all (paper)"
    )
    views: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="slightly moved views averaged at evaluation; 1: the image as it is (paper)"
    )
    refine: RefineConfig | None = Field(
        None,
        description="a second look at crops of data.fine_size pixels around the points; null: one look (paper)",
        exclude_if=is_null,
    )

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """The codec of each look."""
        return (self.codec,) if self.refine is None else (self.codec, self.refine.codec or self.codec)

    @property
    def is_time_conditioned(self) -> bool:
        """Where a timestep is set."""
        return self.timestep is not None


Momentum = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1)]


class ViewConfig(Section):
    """How one view of an image is drawn: cropped, mirrored, toned, blurred, solarized, in this order.

    Saturation, hue and conversion to grey, which the papers of photographs have too, do nothing to a grey image.
    """

    count: Annotated[int, Field(ge=1, le=64)] = Field(1, description="views of this kind")
    size: Annotated[int, Field(ge=16, le=4096)] | None = Field(None, description="side, pixels; null: data.image_size")
    crop: tuple[Fraction, Fraction] = Field((0.2, 1.0), description="smallest and largest share of the area")
    flip: Fraction = Field(0.5, description="share of views that are mirrored")
    jitter: Fraction = Field(0.8, description="share of views whose brightness and contrast change")
    brightness: NonNegative = Field(0.4, description="factor drawn from [1 - b, 1 + b]")
    contrast: NonNegative = Field(0.4, description="factor around the mean, drawn from [1 - c, 1 + c]")
    blur: Fraction = Field(0.5, description="share of views that are blurred")
    blur_sigma: tuple[Positive, Positive] = Field((0.1, 2.0), description="smallest and largest Gaussian width, pixels")
    solarize: Fraction = Field(
        0.0, description="share of views whose bright half is inverted", json_schema_extra=ADVANCED
    )

    @field_validator("crop", "blur_sigma")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"wanted 0 < smallest <= largest, found {list(value)}")
        return value


class EncoderTaskConfig(TaskConfig):
    """What the three have in common."""

    stage: ClassVar[Stage] = "pretrain"

    views: tuple[ViewConfig, ...] = Field((ViewConfig(count=2),), min_length=1, description="views of each image")
    drawn: Literal["image", "micro_batch"] = Field(
        "image",
        description="one draw per image, or one for all of a micro-batch (released code)",
        json_schema_extra=ADVANCED,
    )
    mean: float = Field(
        0.0,
        description="subtracted from views in [0, 1] (released code: 0.5; fine-tuning does not)",
        json_schema_extra=ADVANCED,
    )
    std: tuple[Positive, ...] = Field(
        (1.0,), description="divisor, one or one per channel of model.in_channels", json_schema_extra=ADVANCED
    )

    @property
    def num_views(self) -> int:
        """Views of each image."""
        return sum(view.count for view in self.views)


class MocoV3Config(EncoderTaskConfig):
    """Momentum contrast without a queue (Chen, Xie & He, ICCV 2021)."""

    kind: Literal["mocov3"] = "mocov3"
    projector: tuple[Width, ...] = Field(
        (2048, 2048, 256), min_length=1, description="widths of the projector's layers"
    )
    predictor: tuple[Width, ...] = Field((2048, 256), min_length=1, description="widths of the predictor's layers")
    temperature: Positive = Field(0.2, description="of the softmax over keys (the method: 0.2; released code: 0.5)")
    momentum: Momentum = Field(0.99, description="of the momentum encoder (the method: 0.99; released code: 0.999)")
    momentum_schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="towards 1 over the run, or as it is", json_schema_extra=ADVANCED
    )
    loss_scale: Literal["two_tau", "one"] = Field(
        "two_tau",
        description="the loss is multiplied by 2 x temperature (the method), or not (released code)",
        json_schema_extra=ADVANCED,
    )

    @model_validator(mode="after")
    def _two_views(self) -> MocoV3Config:
        _check_two_views(self)
        if self.projector[-1] != self.predictor[-1]:
            raise ValueError(
                f"projector ends with {self.projector[-1]}, predictor with {self.predictor[-1]}; wanted equal"
            )
        return self


class SimclrV2Config(EncoderTaskConfig):
    """Contrastive learning with a deeper head (Chen et al., NeurIPS 2020); without its momentum memory, as the paper."""

    kind: Literal["simclrv2"] = "simclrv2"
    projector: tuple[Width, ...] = Field(
        (2208, 2208, 128), min_length=1, description="widths of the projector's layers"
    )
    temperature: Positive = Field(0.1, description="of the softmax (the method: 0.1; released code: 0.5)")

    @model_validator(mode="after")
    def _two_views(self) -> SimclrV2Config:
        _check_two_views(self)
        return self


class DinoConfig(EncoderTaskConfig):
    """Self-distillation without labels (Caron et al., ICCV 2021). The first kind of view is the teacher's (global)."""

    kind: Literal["dino"] = "dino"
    views: tuple[ViewConfig, ...] = Field(
        (ViewConfig(count=2, crop=(0.4, 1.0)), ViewConfig(count=6, size=96, crop=(0.05, 0.4))),
        min_length=1,
        description="views of each image, global ones first",
    )
    num_global: Annotated[int, Field(ge=1)] = Field(2, description="first views, which the teacher sees too")
    head: tuple[Width, ...] = Field((2048, 2048, 256), min_length=1, description="widths of the head's layers")
    head_norm: bool = Field(
        False,
        description="BatchNorm in the head, an option of the method; keeps images apart that look alike",
        json_schema_extra=ADVANCED,
    )
    prototypes: Annotated[int, Field(ge=2)] = Field(
        4096, description="outputs of the last, weight-normed layer (the method: 65536; released code: 256)"
    )
    student_temperature: Positive = Field(0.1, description="of the student's softmax")
    teacher_temperature: tuple[Positive, Positive] = Field(
        (0.04, 0.07), description="of the teacher's softmax, first and after the warm-up (released code: 0.5, 0.5)"
    )
    temperature_warmup: Fraction = Field(
        0.3, description="share of the run in which it rises", json_schema_extra=ADVANCED
    )
    momentum: Momentum = Field(0.996, description="of the teacher")
    momentum_schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="towards 1 over the run, or as it is", json_schema_extra=ADVANCED
    )
    center_momentum: Momentum = Field(
        0.9, description="of the teacher's mean output (released code: 0.5)", json_schema_extra=ADVANCED
    )
    frozen: Fraction = Field(
        0.01, description="share of the run in which the last layer stays as it is", json_schema_extra=ADVANCED
    )

    @model_validator(mode="after")
    def _global_views(self) -> DinoConfig:
        if not self.num_global < self.num_views:
            raise ValueError(f"num_global={self.num_global} of {self.num_views} views; wanted fewer than all")
        return self


EncoderTask = MocoV3Config | SimclrV2Config | DinoConfig


def _check_two_views(cfg: MocoV3Config | SimclrV2Config) -> None:
    if cfg.num_views != 2 or len({view.size for view in cfg.views}) > 1:
        raise ValueError(f"task {cfg.kind} compares two views of one size; found {cfg.num_views}")


AnyTask = Annotated[DenoiseConfig | EncoderTask | LandmarksConfig, Field(discriminator="kind")]
