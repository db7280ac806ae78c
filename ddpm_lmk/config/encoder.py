"""`model` of kind encoder_unet: the baselines' U-Net around an image classifier (paper.md, section 5)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ddpm_lmk.config.values import Section

STAGES = {"densenet161": 4, "resnext50": 4, "vgg19": 5}


class EncoderUNetConfig(Section):
    """A classifier's convolutions as encoder, and the decoder of segmentation-models-pytorch 0.3.3."""

    takes_time: ClassVar[bool] = False
    couples_images: ClassVar[bool] = True  # BatchNorm: what a device computes at once
    side_multiple: ClassVar[int] = 32  # five halvings

    kind: Literal["encoder_unet"] = "encoder_unet"
    encoder: Literal["densenet161", "vgg19", "resnext50"] = Field(
        "densenet161", description="classifier (paper: densenet161; it also tried vgg19 and resnext50_32x4d)"
    )
    scale: Annotated[float, Field(ge=0.1, le=4)] = Field(
        1.0, description="factor on the encoder's published channel counts (1: published weights fit)"
    )
    blocks: tuple[Annotated[int, Field(ge=1, le=64)], ...] | None = Field(
        None, description="layers per stage of the encoder; null: as published, e.g. 6, 12, 36, 24 of densenet161"
    )
    decoder: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (256, 128, 64, 32, 16),
        min_length=5,
        max_length=5,
        description="channels of the decoder, deepest first (paper: 256, 128, 64, 32, 16)",
    )
    in_channels: Literal[1, 3] = Field(
        1, description="3 repeats the grey image (paper: 1 for ImageNet, whose stem is summed; 3 for SSL)"
    )

    @model_validator(mode="after")
    def _one_number_per_stage(self) -> EncoderUNetConfig:
        if self.blocks is not None and len(self.blocks) != STAGES[self.encoder]:
            raise ValueError(f"blocks has {len(self.blocks)} numbers, {self.encoder} has {STAGES[self.encoder]} stages")
        return self

    def describe(self, image_size: int) -> str:
        """The network in a few words, for reports."""
        size = "" if self.scale == 1 else f" × {self.scale:g}"
        return f"U-Net with {self.encoder}{size}, {image_size}²"
