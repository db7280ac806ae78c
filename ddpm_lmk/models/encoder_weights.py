"""Weights into the encoder of an `encoder_unet`: of one of our runs, or of torchvision's classifiers.

Taken strictly: every tensor of the encoder has to be there with its shape. Decoder and output layer keep their values.
Three things of foreign files are known and mended: classifiers are left behind, old DenseNet files write `norm.1` for
`norm1` and lack `num_batches_tracked`, and a stem for colour is summed for a network of one channel (what
segmentation-models-pytorch does: a grey image repeated three times then gives the same maps).

Where to get ImageNet weights (none can be shipped): https://download.pytorch.org/models/ has densenet161-8d451a50.pth,
vgg19-dcbb9e9d.pth and resnext50_32x4d-7cdf4587.pth, the files the library used; `ddpm-lmk import-weights FILE --out
FILE.safetensors` makes them readable. The paper's own encoders are its release's `model_epoch*_iter10000.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ddpm_lmk.config import Network
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models.weights import load_all

OURS = "encoder."
LEFT_BEHIND = ("classifier.", "fc.")
OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
STEMS = ("features.conv0.weight", "features.0.weight", "conv1.weight")
SOURCE = (
    "ImageNet weights: https://download.pytorch.org/models/ (densenet161-8d451a50.pth, vgg19-dcbb9e9d.pth, "
    "resnext50_32x4d-7cdf4587.pth), made readable by `ddpm-lmk import-weights`"
)


def is_encoder_only(cfg: Network, state: Mapping[str, Tensor]) -> bool:
    """Is the encoder all that these weights have of the network of `cfg`?"""
    return cfg.kind == "encoder_unet" and not any(name.startswith("decoder.") for name in state)


def load_encoder(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an encoder's tensors into `model.encoder`; raises CheckpointError and changes nothing unless all fit."""
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise CheckpointError("found weights of an encoder; wanted model.kind=encoder_unet to put them into")
    own = encoder.state_dict()
    found = encoder_tensors(state)
    for name in STEMS:
        if name in own and name in found and own[name].shape[1] == 1 < found[name].shape[1]:
            found[name] = found[name].sum(1, keepdim=True)
    for name in own:
        if name.endswith("num_batches_tracked") and name not in found:  # of no use where momentum is given
            found[name] = own[name]
    try:
        load_all(encoder, found)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (model.encoder, model.scale, model.blocks). {SOURCE}") from error


def encoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, under torchvision's present names."""
    if any(name.startswith(OURS) for name in state):
        return {name.removeprefix(OURS): value for name, value in state.items() if name.startswith(OURS)}
    kept = {name: value for name, value in state.items() if not name.startswith(LEFT_BEHIND)}
    return {OLD_NAME.sub(r"\1\2.", name): value for name, value in kept.items()}


def want_file(path: str) -> None:
    """Raise CheckpointError, with where to get one, unless there is something at `path`."""
    if not Path(path).exists():
        raise CheckpointError(f"{path} does not exist; give a run, a snapshot or a .safetensors file. {SOURCE}")
