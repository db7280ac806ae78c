"""`model`: networks.

`model` of kind encoder_unet: the baselines' U-Net around an image classifier (docs/method.md, section 5).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ddpm_lmk.config.values import ADVANCED, Section

STAGES = {"densenet161": 4, "resnext50": 4, "vgg19": 5}
# Encoders beside the paper's: the side of a patch of a vision transformer, and 32 for convolutions.
PATCHES = {
    **dict.fromkeys(("dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitb14", "dinov2_vitb14_reg"), 14),
    **dict.fromkeys(("dinov3_vits16", "dinov3_vitb16", "vit_small_patch16_224", "vit_base_patch16_224"), 16),
}
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base")


class EncoderUNetConfig(Section):
    """An image encoder, and the decoder of segmentation-models-pytorch 0.3.3, or a lighter one for transformers."""

    takes_time: ClassVar[bool] = False
    couples_images: ClassVar[bool] = True  # BatchNorm: what a device computes at once

    kind: Literal["encoder_unet"] = "encoder_unet"
    encoder: Literal[
        "densenet161",
        "vgg19",
        "resnext50",
        "dinov2_vits14",
        "dinov2_vits14_reg",
        "dinov2_vitb14",
        "dinov2_vitb14_reg",
        "dinov3_vits16",
        "dinov3_vitb16",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "convnext_tiny",
        "convnext_small",
        "convnext_base",
    ] = Field(
        "densenet161",
        description="image encoder (paper: densenet161; it also tried vgg19 and resnext50_32x4d); docs/weights.md",
    )
    frozen: bool = Field(
        False,
        description="keep the encoder as init.weights has it, norms included; only the decoder learns",
        json_schema_extra=ADVANCED,
        exclude_if=lambda value: not value,  # run files of before this key keep their hash
    )
    normalize: Literal["auto", "imagenet", "none"] = Field(
        "auto",
        description="imagenet: the encoder sees (image - mean) / deviation of ImageNet's three channels; auto: so for "
        "transformers and ConvNeXt, none for the paper's three",
        json_schema_extra=ADVANCED,
        exclude_if=lambda value: value == "auto",
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

    @property
    def is_of_the_paper(self) -> bool:
        """Is the encoder one of the paper's three?"""
        return self.encoder in STAGES

    @property
    def side_multiple(self) -> int:
        """What the side of the images has to be a multiple of, pixels: a patch, or five halvings."""
        return PATCHES.get(self.encoder, 32)

    @property
    def is_normalized(self) -> bool:
        """Does the encoder see ImageNet's mean and deviation?"""
        return self.normalize == "imagenet" or (self.normalize == "auto" and not self.is_of_the_paper)

    @model_validator(mode="after")
    def _one_number_per_stage(self) -> EncoderUNetConfig:
        stages = STAGES.get(self.encoder) or (1 if self.encoder in PATCHES else 4)
        if self.blocks is not None and len(self.blocks) != stages:
            raise ValueError(f"blocks has {len(self.blocks)} numbers, {self.encoder} has {stages} stages")
        return self

    @model_validator(mode="after")
    def _sees_colour(self) -> EncoderUNetConfig:
        if self.in_channels == 1 and (self.is_normalized or not self.is_of_the_paper):
            what = self.encoder if not self.is_of_the_paper else "normalize=imagenet"
            raise ValueError(f"{what} is for three channels; set in_channels=3, which repeats the grey image")
        return self

    def describe(self, image_size: int) -> str:
        """The network in a few words, for reports."""
        size = ("" if self.scale == 1 else f" × {self.scale:g}") + (" (frozen)" if self.frozen else "")
        return f"U-Net with {self.encoder}{size}, {image_size}²"


class UNetConfig(Section):
    """The DDPM U-Net of the paper (docs/method.md, section 1) and its smaller relatives."""

    takes_time: ClassVar[bool] = True
    couples_images: ClassVar[bool] = False

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
    pixel_unshuffle: Literal[1, 2, 4, 8] = Field(
        1, description="the first level works on blocks of so many pixels a side, at 1/pixel_unshuffle of the image's"
    )
    checkpointing: Literal["auto"] | tuple[bool, ...] | bool = Field(
        False,
        description="recompute activations in the backward pass, per level or everywhere: less memory, about a quarter more FLOPs (the paper: everywhere); auto: where memory is short",
    )

    @model_validator(mode="after")
    def _levels_and_groups_fit(self) -> UNetConfig:
        if self.width % 2 or self.width % self.groups:
            raise ValueError(
                f"model.width={self.width} must be even and divisible by model.groups={self.groups}; "
                f"nearest: {-(-self.width // (2 * self.groups)) * 2 * self.groups}"
            )
        for key in ("linear_attention", "checkpointing"):
            values = getattr(self, key)
            if isinstance(values, tuple) and len(values) != len(self.multipliers):
                raise ValueError(
                    f"model.{key} has {len(values)} entries for {len(self.multipliers)} levels; "
                    "give one per level, or a single true or false"
                )
        return self

    @property
    def side_multiple(self) -> int:
        """What the side of the images has to be a multiple of, pixels."""
        return self.pixel_unshuffle * 2 ** (len(self.multipliers) - 1)

    def describe(self, image_size: int) -> str:
        """The network in a few words, for reports."""
        levels = ", ".join(map(str, self.multipliers))
        return f"width {self.width} × ({levels}), {image_size}² at {image_size // self.pixel_unshuffle}²"


class GU2NetConfig(Section):
    """The universal detector the paper calls YOLO+ (docs/method.md, section 5): one network for one or several datasets."""

    takes_time: ClassVar[bool] = False
    couples_images: ClassVar[bool] = True  # BatchNorm
    side_multiple: ClassVar[int] = 16  # four halvings

    kind: Literal["gu2net"] = "gu2net"
    width: Annotated[int, Field(ge=4, le=512)] = Field(
        64, description="channels of the local network's first level; half of those of the global one (original: 64)"
    )

    def describe(self, image_size: int) -> str:
        """The network in a few words, for reports."""
        return f"GU2Net, width {self.width}, {image_size}²"


def _kind(section: Any) -> str:
    """A section without a kind is the paper's network."""
    # Not pydantic's own discriminator, which wants the kind to be given: most files set `width` and no more.
    return section.get("kind", "ddpm_unet") if isinstance(section, dict) else getattr(section, "kind", "ddpm_unet")


Network = Annotated[
    Annotated[UNetConfig, Tag("ddpm_unet")]
    | Annotated[EncoderUNetConfig, Tag("encoder_unet")]
    | Annotated[GU2NetConfig, Tag("gu2net")],
    Discriminator(_kind),
]
