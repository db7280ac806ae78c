"""`task`: what is learnt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ddpm_lmk.config.values import NonNegative, Positive, Section, Stage


class DenoiseConfig(Section):
    """Noise prediction, the pre-training task (paper.md, section 2)."""

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
    """Contour-hugging heatmaps, the paper's [20]: softmax over pixels, likelihood of one, peak (paper.md, 3 and 5)."""

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
        description="one per landmark, fitted on data.validation_split, or where it is null on folds of the shots",
    )
    folds: Annotated[int, Field(ge=2, le=20)] = Field(
        5, description="parts the shots are cut into for that; each costs a training without it"
    )


class GaussianCodecConfig(Section):
    """Gaussian heatmaps of independent pixels, as GU2Net is trained on (paper.md, section 5)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma_px: Positive = Field(3.0, description="width of the Gaussian target, network pixels (GU2Net: 3)")
    radius_px: Positive = Field(9.0, description="half the side of the box it lives in, network pixels (GU2Net: 9)")
    decode_radius_px: NonNegative = Field(
        0.0, description="the point is the mean of the map within this distance of its peak; 0: the peak (GU2Net)"
    )


Codec = Annotated[
    DiscCodecConfig | SpatialCodecConfig | ContourCodecConfig | GaussianCodecConfig, Field(discriminator="kind")
]


class LandmarksConfig(Section):
    """Landmark detection, the fine-tuning task."""

    stage: ClassVar[Stage] = "finetune"

    kind: Literal["landmarks"] = "landmarks"
    codec: Codec = Field(default_factory=SpatialCodecConfig)
    timestep: Annotated[int, Field(ge=0)] | None = Field(
        None, description="timestep the network is told; null: no time conditioning at all (paper)"
    )
    views: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="slightly moved views averaged at evaluation; 1: the image as it is (paper)"
    )
