"""Which of the state dicts in a foreign checkpoint is meant, and whose network it is.

A file may hold several: raw weights and their average (EMA), a student and a teacher, a network and a loss. One is
taken, by the names trainers use, and the others are named, so that they can be asked for. The published checkpoints of
the paper hold their network under `model_state_dict` (docs/method.md, section 1); its other baselines are plain state
dicts in torchvision's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_lmk.config import EncoderUNetConfig
from ddpm_lmk.config.model import CONVNEXTS, PATCHES, STAGES
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models.encoder_unet import build_any_encoder, encoder_tensors
from ddpm_lmk.models.weights import from_upstream, upstream_config

STATE_KEYS = ("model_state_dict", "state_dict", "model", "net", "network", "params", "weights")
WRAPPERS = ("module", "_orig_mod", "model", "ema_model", "online_model", "net", "network")  # DDP, compile, trainers
NOT_WEIGHTS = ("opt", "sched", "lr_sched", "scaler", "amp", "callbacks", "loops")  # how names of other tensors begin
DEPTH = 3  # of dicts that are looked into


@dataclass(frozen=True)
class Chosen:
    """One of the sets of weights in a file."""

    name: str  # where the file holds it; "" where the file is nothing else
    tensors: dict[str, Tensor]
    cut: str  # what was taken off the beginning of every name
    others: dict[str, int]  # number of tensors of the other sets, by name
    passed_over: list[str]  # what else is there, and is no weights

    def summary(self) -> dict[str, Any]:
        """For the answer of the sandbox, as JSON."""
        return {"taken": self.name, "cut": self.cut, "others": self.others, "passed_over": self.passed_over}


def choose(content: Any, take: str | None = None) -> Chosen:
    """The set of weights called `take`; without a name the one a trainer means by its first `STATE_KEYS`.

    Where there is no such name the largest set is taken. A part of a set (`state_dict.model`, of names `model.x` beside
    others) is taken by itself where it is a network that is known here.

    Raises:
        CheckpointError: no weights by name, or none called `take`.
    """
    sets = dict(_sets(content, ""))
    if not sets:
        raise CheckpointError(
            f"it holds no tensors by name; wanted a state dict (of model.state_dict()), or one under "
            f"{', '.join(STATE_KEYS)}"
        )
    if take is not None and take not in sets:
        raise CheckpointError(f"it holds no weights called {take!r}; it has: {', '.join(filter(None, sets))}")
    name = _default_name(sets) if take is None else take
    tensors, cut = _without_wrappers(sets[name])
    others = {other: len(weights) for other, weights in sets.items() if other != name}
    beside = [key for key in content if not isinstance(content[key], Tensor)] if name else []
    passed_over = [key for key in beside if not any(f"{other}.".startswith(f"{key}.") for other in sets)]
    passed_over += [inner for inner in sets[name] if not inner.startswith(cut)]  # counters of an average
    return Chosen(name, tensors, cut, others, passed_over)


def _sets(content: Any, name: str, depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict of tensors by name, with its place, and the parts of it that a trainer's wrapper names."""
    if not isinstance(content, dict) or depth == 0 or not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
        heads = dict.fromkeys(key.partition(".")[0] for key in tensors)
        for head in (head for head in heads if head in WRAPPERS and _without_wrappers(tensors)[1] == ""):
            part = {key: value for key, value in tensors.items() if key.startswith(f"{head}.")}
            yield f"{name}.{head}".lstrip("."), part
    for key, value in content.items():
        if not key.lower().startswith(NOT_WEIGHTS):
            yield from _sets(value, f"{name}.{key}".lstrip("."), depth - 1)


def _default_name(sets: dict[str, dict[str, Tensor]]) -> str:
    """The set that is meant where no name is given."""
    known = [key for key in STATE_KEYS if key in sets]
    # The root goes first: where the file itself is a state dict, its parts are only views of it.
    by_size = sorted(sets, key=lambda name: (name != "", -sum(value.numel() for value in sets[name].values())))
    name = (known or by_size)[0]
    parts = [name, *(other for other in sets if other.rpartition(".")[0] == name and other != name)]
    return next((part for part in parts if _is_known_network(_without_wrappers(sets[part])[0])), name)


def _is_known_network(tensors: Mapping[str, Tensor]) -> bool:
    try:
        return _network(tensors) is not None
    except CheckpointError:  # names alike
        return False


def _without_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors without what a trainer put before all their names, and what that was; counters need not have it."""
    cut = ""
    while True:
        heads = {name.removeprefix(cut).partition(".")[0] for name, value in tensors.items() if value.ndim}
        head = next(iter(heads), "")
        if len(heads) != 1 or head not in WRAPPERS:
            return {name.removeprefix(cut): value for name, value in tensors.items() if name.startswith(cut)}, cut
        cut += f"{head}."
        tensors = {name: value for name, value in tensors.items() if name.startswith(cut)}


def describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Number of tensors and parameters, and the network they belong to where it is one of the paper's."""
    facts: dict[str, Any] = {
        "num_tensors": len(tensors),
        "num_parameters": sum(value.numel() for value in tensors.values()),
        "network": _network(tensors) or "unknown: kept under its own names",
    }
    if "init_conv.weight" in tensors:
        from_upstream(tensors)
    return facts


def _network(tensors: Mapping[str, Tensor]) -> str | None:
    """The network that some weights belong to, by their names, where it is one of the paper's."""
    if "init_conv.weight" in tensors and "final_conv.weight" in tensors:
        cfg = upstream_config(tensors)
        outputs = tensors["final_conv.weight"].shape[0]
        return f"released DDPM U-Net: width {cfg.width}, multipliers {list(cfg.multipliers)}, {outputs} outputs"
    encoder = _published_encoder(tensors)
    return f"{encoder} of published size, for model.kind=encoder_unet" if encoder else None


def _published_encoder(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of the encoders these are, exactly; their heads and counters do not matter."""
    shapes = {name: value.shape for name, value in encoder_tensors(tensors).items() if not name.endswith("_tracked")}
    for encoder in (*STAGES, *PATCHES, *CONVNEXTS):
        for channels in (1, 3) if encoder in STAGES else (3,):
            with torch.device("meta"):
                cfg = EncoderUNetConfig.model_validate({"encoder": encoder, "in_channels": channels})
                own = build_any_encoder(cfg).state_dict()
            if shapes == {name: value.shape for name, value in own.items() if not name.endswith("_tracked")}:
                return encoder
    return None
