"""Weights into networks, strictly: every tensor fits by name and shape, or nothing is loaded and the differences told.

`load_all` and `load_trunk` fill our networks from our own state dicts; `from_upstream` turns a state dict of the
paper's released code into ours. The mapping is short because our modules keep the released names (docs/method.md,
section 1): only `init_conv.weight` changes, which loses the input channel reserved for self-conditioning. That channel
was only ever fed zeros, so the output stays equal. Files are read elsewhere: ours by `rundir.checkpoint`, pickles in a
sandbox by `import_torch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models.unet import UNet

HEAD = "final_conv."
NUM_SHOWN = 5
Shapes = dict[str, tuple[int, ...]]


def load_all(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy every tensor of `state` into `model`; raises CheckpointError and changes nothing unless all of them fit."""
    _check(_shapes(state), _shapes(model.state_dict()), what="weights")
    model.load_state_dict(dict(state))  # checked above: PyTorch would fill what fits before it complains


def load_trunk(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `load_all` for everything but the output layer `final_conv`, which keeps the values it has in `model`."""
    trunk = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    own_head = {name: value for name, value in model.state_dict().items() if name.startswith(HEAD)}
    load_all(model, trunk | own_head)


def from_upstream(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a released network, as a state dict of ours with equal output.

    Args:
        state: name -> tensor, or a checkpoint's dict that holds such a dict under `model_state_dict`. Any width and
            number of levels is accepted.

    Raises CheckpointError, with the first five differences, unless names and shapes are exactly a released network's.
    """
    tensors = _tensors(state)
    wanted = _upstream_shapes(upstream_config(tensors), num_outputs=tensors["final_conv.weight"].shape[0])
    _check(_shapes(tensors), wanted, what="released checkpoint")
    return {name: value[:, 1:].clone() if name == "init_conv.weight" else value for name, value in tensors.items()}


def upstream_config(state: Mapping[str, Any]) -> UNetConfig:
    """The network a released state dict belongs to, read off its shapes; raises CheckpointError when it is none."""
    tensors = _tensors(state)
    try:
        width = tensors["init_conv.weight"].shape[0]
        num_levels = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("downs."))
        resampled = [f"downs.{level}.3.1.weight" for level in range(num_levels - 1)] + [
            f"downs.{num_levels - 1}.3.weight"
        ]
        multipliers = tuple(tensors[name].shape[0] // width for name in resampled)
        assert tensors["final_conv.weight"].ndim == 4  # of any number of outputs: pre-training and landmarks alike
        return UNetConfig(width=width, multipliers=multipliers, pixel_unshuffle=1)
    except (KeyError, ValueError, IndexError, AssertionError) as error:
        raise CheckpointError(
            f"found {len(tensors)} tensors ({', '.join(sorted(tensors)[:3])}, ...), which are no released network's "
            f"({type(error).__name__}: {error}); wanted names such as init_conv.weight and downs.0.0.block1.proj.weight"
        ) from error


def architecture_hash(shapes: Shapes) -> str:
    """A short name for a set of tensor names and shapes."""
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:8]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = state.get("model_state_dict", state)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise CheckpointError(
            "found a dict that is not tensors by name; wanted a state dict, or a dict with one under 'model_state_dict'"
        )
    return dict(inner)


def _upstream_shapes(cfg: UNetConfig, *, num_outputs: int) -> Shapes:
    with torch.device("meta"):
        shapes = _shapes(UNet(cfg, out_channels=num_outputs, full_size=True).state_dict())
    return shapes | {"init_conv.weight": (cfg.width, 2, 1, 1)}


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _check(found: Shapes, wanted: Shapes, *, what: str) -> None:
    """Raise CheckpointError with both architectures' hashes and the first differences, in the model's order."""
    differences = [
        f"{name} is missing" if name not in found else f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ] + [f"{name} is unknown" for name in found if name not in wanted]
    if differences:
        raise CheckpointError(
            f"{what} {architecture_hash(found)} does not fit model {architecture_hash(wanted)}, {len(differences)} "
            f"differences: {'; '.join(differences[:NUM_SHOWN])}{'; ...' if len(differences) > NUM_SHOWN else ''}. "
            "Use the model section the weights were trained with"
        )
