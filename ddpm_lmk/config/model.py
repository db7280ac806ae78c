"""`model`: networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddpm_lmk.config.values import Section


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
