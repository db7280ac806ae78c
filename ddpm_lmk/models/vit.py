"""Vision transformers as encoders: the plain ViT (Dosovitskiy et al., ICLR 2021), DINOv2 and DINOv3.

Parameters have the names of DINOv2's own code (`blocks.0.attn.qkv.weight`); `vit_tensors` brings those of timm, of
Hugging Face's transformers and of DINOv3 to them. The three differ in little: DINOv2 scales its branches (LayerScale)
and may have register tokens, DINOv3 turns queries and keys by their place (RoPE) instead of adding an embedding of it.
Positions are resized to the images: cubic, as the code does that the weights are usually read with (transformers for
DINOv2, timm for the plain ViT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64  # of every published size
ROPE_BASE = 100.0  # DINOv3
NUM_MAPS = 4  # outputs of as many blocks, evenly spaced, go to the decoder


@dataclass(frozen=True)
class ViTSize:
    """A published vision transformer."""

    patch: int  # side of a patch, pixels
    heads: int
    grid: int | None  # side of the square of position embeddings, patches; None: rotary positions
    registers: int = 0
    is_antialiased: bool = False  # where positions are resized to fewer
    depth: int = 12
    eps: float = 1e-6


VITS = {
    "dinov2_vits14": ViTSize(14, 6, 37),
    "dinov2_vits14_reg": ViTSize(14, 6, 37, registers=4, is_antialiased=True),
    "dinov2_vitb14": ViTSize(14, 12, 37),
    "dinov2_vitb14_reg": ViTSize(14, 12, 37, registers=4, is_antialiased=True),
    "dinov3_vits16": ViTSize(16, 6, None, registers=4, eps=1e-5),
    "dinov3_vitb16": ViTSize(16, 12, None, registers=4, eps=1e-5),
    "vit_small_patch16_224": ViTSize(16, 6, 14, is_antialiased=True),
    "vit_base_patch16_224": ViTSize(16, 12, 14, is_antialiased=True),
}


class VisionTransformer(nn.Module):
    """Images [B, C, H, W], sides multiples of a patch -> tokens of four blocks, as maps [B, 4 D, H/patch, W/patch]."""

    def __init__(self, size: ViTSize, *, in_channels: int, heads: int, depth: int) -> None:
        super().__init__()
        dim = HEAD_DIM * heads
        self.size = size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_channels, dim, size.patch, stride=size.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if size.grid is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.grid**2, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if size.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, size.registers, dim))
            nn.init.normal_(self.register_tokens, std=1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, eps=size.eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=size.eps)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The last of them is always there.
        self.taken = [max(0, math.ceil(depth * part / NUM_MAPS) - 1) for part in range(1, NUM_MAPS + 1)]

    @property
    def channels(self) -> int:
        """Of the maps."""
        return NUM_MAPS * self.norm.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x)
        height, width = patches.shape[-2:]
        patches, cls = patches.flatten(2).transpose(1, 2), self.cls_token.view(1, 1, -1)  # [B, H W, D]
        angles = None
        if self.size.grid is None:
            angles = rotary_angles(height, width, patches.device)
        else:
            cls = cls + self.pos_embed[:, :1]
            patches = patches + self._positions(height, width)
        # Registers have no place.
        prefix = [cls, self.register_tokens] if self.size.registers else [cls]
        # Not len(x), which an export to ONNX would take for a constant.
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), patches], 1)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, angles)
            maps += [self.norm(x)[:, -height * width :]] * self.taken.count(index)
        return torch.cat(maps, -1).transpose(1, 2).unflatten(2, (height, width))

    def _positions(self, height: int, width: int) -> Tensor:
        """Embeddings `[1, H W, D]` of the places of the patches."""
        assert self.size.grid is not None
        table = self.pos_embed[:, 1:]
        if (height, width) == (self.size.grid, self.size.grid):
            return table
        square = table.transpose(1, 2).unflatten(2, (self.size.grid, self.size.grid)).float()
        resized = F.interpolate(
            square, size=(height, width), mode="bicubic", align_corners=False, antialias=self.size.is_antialiased
        )
        return resized.flatten(2).transpose(1, 2).to(table.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each after a norm, scaled per channel and added."""

    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = TokenAttention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class LayerScale(nn.Module):
    """A factor per channel; 1 in a plain ViT, which has none."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TokenAttention(nn.Module):
    """Multi-head attention over tokens [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, 64]
        if angles is not None:
            q, k = (turned(each, *angles) for each in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotary_angles(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[H W, 64]` of DINOv3's rotary positions: centres of patches in [-1, 1], in y and in x."""
    frequency = ROPE_BASE ** -torch.arange(0, 1, 4 / HEAD_DIM, dtype=torch.float32, device=device)
    axes = [(2 * torch.arange(0.5, count, device=device) / count - 1) for count in (height, width)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # [H W, 2]
    angles = (2 * math.pi * places[:, :, None] * frequency).flatten(1).tile(2)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys `[B, heads, N, 64]`, those of patches (the last ones) turned; pairs are half a head apart."""
    prefix, patches = x[..., : -len(cos), :], x[..., -len(cos) :, :]
    first, second = patches.chunk(2, -1)
    rotated = patches * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)
    return torch.cat((prefix, rotated), -2)


# From the names of others to DINOv2's, in this order.
NAMES = [
    (r"^(dinov2|dinov2_with_registers|dinov3|vit|backbone|model)\.", ""),
    (r"^embeddings\.(?=cls_token|mask_token|register_tokens)", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"^(encoder\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.(output\.dense|mlp\.down_proj)\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(?:layer_scale|gamma_)([12])(\.lambda1)?$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
UNUSED = re.compile(r"^(mask_token|pooler\.|head|fc_norm\.|classifier|rope_embed|pos_drop|local_cls_norm)|bias_mask$")


def vit_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a vision transformer under the names of ours; None where they are of none."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        found[name] = value
    blocks = sorted({name.rpartition(".attn.")[0] for name in found if ".attn." in name and name.startswith("blocks.")})
    if not blocks or "patch_embed.proj.weight" not in found or "cls_token" not in found:
        return None
    for block in blocks:
        _join_attention(found, f"{block}.attn.")
        for scale in (f"{block}.ls1.gamma", f"{block}.ls2.gamma"):  # a plain ViT has none
            found.setdefault(scale, torch.ones_like(found["cls_token"][0, 0]))
    if "pos_embed" in found and found["pos_embed"].shape[1] == _num_patches(found["pos_embed"]):
        # timm's with registers have added the first token's own embedding to it
        none = torch.zeros_like(found["pos_embed"][:, :1])
        found["pos_embed"] = torch.cat((none, found["pos_embed"]), 1)
    return {name: value for name, value in found.items() if not UNUSED.search(name)}


def _num_patches(table: Tensor) -> int:
    """The square below the length of a table of positions."""
    return math.isqrt(table.shape[1]) ** 2


def _join_attention(found: dict[str, Tensor], attn: str) -> None:
    """Queries, keys and values in one matrix, with a bias that is 0 where there is none."""
    parts = [f"{attn}{part}." for part in ("query", "key", "value")]
    if f"{parts[0]}weight" in found:
        found[f"{attn}qkv.weight"] = torch.cat([found.pop(f"{part}weight") for part in parts])
    weight = found.get(f"{attn}qkv.weight")
    if weight is None:
        return
    nothing = torch.zeros_like(weight[: len(weight) // 3, 0])
    own = [found.pop(f"{part}bias", None) for part in parts]
    timm = [found.pop(f"{attn}{part}_bias", None) for part in "qkv"]
    biases = [next((bias for bias in pair if bias is not None), nothing) for pair in zip(own, timm, strict=True)]
    joined = found.setdefault(f"{attn}qkv.bias", torch.cat(biases))
    # DINOv3's own files mask the bias of its keys, which may hold anything.
    if (mask := found.get(f"{attn}qkv.bias_mask")) is not None:
        found[f"{attn}qkv.bias"] = torch.where(mask == 1, joined, 0)
