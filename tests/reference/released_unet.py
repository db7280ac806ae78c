"""The network of the paper's released code, rewritten plainly from its description (docs/method.md, section 1).

Tests compare `ddpm_lmk.models` with it. It shares no code with the package: parameters live in one flat dict under the
released names, every operation is spelled out with elementary tensor functions, and nothing is optimised. It has the
two input channels of the released network, of which the first (self-conditioning) is always fed zeros.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS, HEADS, HEAD_DIM = 4, 4, 32


def released_shapes(
    width: int, multipliers: tuple[int, ...] = (1, 2, 4, 8), out_channels: int = 1
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a released checkpoint's `model_state_dict`."""
    shapes: dict[str, tuple[int, ...]] = {}
    time_dim, hidden = 4 * width, HEADS * HEAD_DIM
    dims = [width] + [width * m for m in multipliers]
    levels = list(pairwise(dims))

    def conv(name: str, cin: int, cout: int, k: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (cout, cin, k, k)
        if bias:
            shapes[f"{name}.bias"] = (cout,)

    def vector_pair(name: str, count: int) -> None:
        shapes[f"{name}.weight"] = (count,)
        shapes[f"{name}.bias"] = (count,)

    def linear(name: str, cin: int, cout: int) -> None:
        shapes[f"{name}.weight"] = (cout, cin)
        shapes[f"{name}.bias"] = (cout,)

    def resnet(name: str, cin: int, cout: int) -> None:
        linear(f"{name}.mlp.1", time_dim, 2 * cout)
        for block, channels in (("block1", cin), ("block2", cout)):
            conv(f"{name}.{block}.proj", channels, cout, 3)
            vector_pair(f"{name}.{block}.norm", cout)
        if cin != cout:
            conv(f"{name}.res_conv", cin, cout, 1)

    def attention(name: str, count: int, is_linear: bool) -> None:
        vector_pair(f"{name}.fn.norm", count)
        conv(f"{name}.fn.fn.to_qkv", count, 3 * hidden, 1, bias=False)
        conv(f"{name}.fn.fn.to_out.0" if is_linear else f"{name}.fn.fn.to_out", hidden, count, 1)
        if is_linear:
            vector_pair(f"{name}.fn.fn.to_out.1", count)

    conv("init_conv", 2, width, 1)
    linear("time_mlp.1", width, time_dim)
    linear("time_mlp.3", time_dim, time_dim)
    last = len(levels) - 1
    for i, (din, dout) in enumerate(levels):
        resnet(f"downs.{i}.0", din, din)
        resnet(f"downs.{i}.1", din, din)
        attention(f"downs.{i}.2", din, is_linear=True)
        if i < last:
            conv(f"downs.{i}.3.1", 4 * din, dout, 1)
        else:
            conv(f"downs.{i}.3", din, dout, 3)
    resnet("mid_block1", dims[-1], dims[-1])
    attention("mid_attn", dims[-1], is_linear=False)
    resnet("mid_block2", dims[-1], dims[-1])
    for i, (din, dout) in enumerate(reversed(levels)):
        resnet(f"ups.{i}.0", dout + din, dout)
        resnet(f"ups.{i}.1", dout + din, dout)
        attention(f"ups.{i}.2", dout, is_linear=True)
        conv(f"ups.{i}.3" if i == last else f"ups.{i}.3.1", dout, din, 3)
    resnet("final_res_block", 2 * width, width)
    conv("final_conv", width, out_channels, 1)
    return shapes


def random_state(
    shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Weights of ordinary size, none of them zero, so that every term of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
        scaled = values / math.sqrt(fan_in) + (1.0 if ".norm.weight" in name or "to_out.1.weight" in name else 0.0)
        state[name] = scaled.to(dtype)
    return state


class ReleasedUNet:
    """`forward` of the released network over a dict of weights; gradients flow to those that require them."""

    def __init__(self, state: dict[str, Tensor], levels: int = 4) -> None:
        self.state, self.levels = state, levels

    def __call__(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        x = self.conv("init_conv", torch.cat((torch.zeros_like(x), x), dim=1))
        r, skips = x.clone(), []
        time = None if t is None else self.time_embedding(t, x.dtype)
        for i in range(self.levels):
            x = self.resnet(f"downs.{i}.0", x, time)
            skips.append(x)
            x = self.resnet(f"downs.{i}.1", x, time)
            x = self.attention(f"downs.{i}.2", x, is_linear=True)
            skips.append(x)
            if i < self.levels - 1:
                x = self.conv(f"downs.{i}.3.1", space_to_channels(x))
            else:
                x = self.conv(f"downs.{i}.3", x, padding=1)
        x = self.resnet("mid_block1", x, time)
        x = self.attention("mid_attn", x, is_linear=False)
        x = self.resnet("mid_block2", x, time)
        for i in range(self.levels):
            x = self.resnet(f"ups.{i}.0", torch.cat((x, skips.pop()), dim=1), time)
            x = self.resnet(f"ups.{i}.1", torch.cat((x, skips.pop()), dim=1), time)
            x = self.attention(f"ups.{i}.2", x, is_linear=True)
            if i < self.levels - 1:
                x = self.conv(f"ups.{i}.3.1", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
            else:
                x = self.conv(f"ups.{i}.3", x, padding=1)
        x = self.resnet("final_res_block", torch.cat((x, r), dim=1), time)
        return self.conv("final_conv", x)

    def conv(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), padding=padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def time_embedding(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.state["time_mlp.1.weight"].shape[1] // 2
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)], dtype=dtype)
        angles = t.to(dtype).unsqueeze(1) * frequencies.unsqueeze(0)
        embedding = torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)
        hidden = self.linear("time_mlp.1", embedding)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.linear("time_mlp.3", hidden)

    def group_norm(self, name: str, x: Tensor, groups: int) -> Tensor:
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, groups, -1)
        mean = grouped.mean(dim=-1, keepdim=True)
        variance = ((grouped - mean) ** 2).mean(dim=-1, keepdim=True)
        x = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(batch, channels, height, width)
        return x * self.state[f"{name}.weight"].view(1, -1, 1, 1) + self.state[f"{name}.bias"].view(1, -1, 1, 1)

    def block(self, name: str, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None) -> Tensor:
        weight = self.state[f"{name}.proj.weight"]
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = ((weight - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
        x = F.conv2d(x, (weight - mean) / torch.sqrt(variance + 1e-5), self.state[f"{name}.proj.bias"], padding=1)
        x = self.group_norm(f"{name}.norm", x, GROUPS)
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return x * torch.sigmoid(x)

    def resnet(self, name: str, x: Tensor, time: Tensor | None) -> Tensor:
        scale_shift = None
        if time is not None:
            both = self.linear(f"{name}.mlp.1", time * torch.sigmoid(time))
            half = both.shape[1] // 2
            scale_shift = (both[:, :half, None, None], both[:, half:, None, None])
        hidden = self.block(f"{name}.block2", self.block(f"{name}.block1", x, scale_shift), None)
        return hidden + (self.conv(f"{name}.res_conv", x) if f"{name}.res_conv.weight" in self.state else x)

    def attention(self, name: str, x: Tensor, *, is_linear: bool) -> Tensor:
        batch, _, height, width = x.shape
        normed = self.group_norm(f"{name}.fn.norm", x, 1)
        q, k, v = self.conv(f"{name}.fn.fn.to_qkv", normed).view(batch, 3, HEADS, HEAD_DIM, height * width).unbind(1)
        if is_linear:
            q = exp_normalised(q, dim=2) * HEAD_DIM**-0.5
            k = exp_normalised(k, dim=3)
            context = torch.einsum("bhdn,bhen->bhde", k, v)
            out = torch.einsum("bhde,bhdn->bhen", context, q)
        else:
            weights = exp_normalised(torch.einsum("bhdi,bhdj->bhij", q * HEAD_DIM**-0.5, k), dim=3)
            out = torch.einsum("bhij,bhdj->bhdi", weights, v)
        out = out.reshape(batch, HEADS * HEAD_DIM, height, width)
        if not is_linear:
            return x + self.conv(f"{name}.fn.fn.to_out", out)
        return x + self.group_norm(f"{name}.fn.fn.to_out.1", self.conv(f"{name}.fn.fn.to_out.0", out), 1)


def exp_normalised(x: Tensor, dim: int) -> Tensor:
    """Softmax, with the maximum taken out first."""
    exps = torch.exp(x - x.amax(dim=dim, keepdim=True))
    return exps / exps.sum(dim=dim, keepdim=True)


def space_to_channels(x: Tensor) -> Tensor:
    """Rearrange 'b c (h p1) (w p2) -> b (c p1 p2) h w' with p1 = p2 = 2."""
    batch, channels, height, width = x.shape
    cells = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * 4, height // 2, width // 2)
