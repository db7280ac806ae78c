"""Where the weights of a run come from: `starting_state` decides it, `put_weights` how much of `init.weights` is used.

All of them where the parent learnt the same task with the same outputs; the encoder where that is all the weights have
of the network; else all but the output layer. The weights of one network go into both of a run with a second look, and
of a parent with one each into its own. `require_fitting` puts tensors without content into a network without
content in the very same way, so what it lets through is loaded later, unless bytes are damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models import build_model
from ddpm_lmk.models.coarse_to_fine import PARTS, CoarseToFine, parts_of
from ddpm_lmk.models.encoder_unet import is_encoder_only, load_encoder, require_file
from ddpm_lmk.models.weights import from_upstream, load_all, load_trunk
from ddpm_lmk.rundir.checkpoint import load_checkpoint, weights_header
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.console import print_status
from ddpm_lmk.tasks import Task, build_task


def starting_state(
    cfg: RunConfig, task: Task, *, session: Session, parallel: Parallel, run: RunDir
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state a run begins with, and the facts of its parent weights, if any. The first that applies:

    1. The newest good checkpoint of the run directory: everything continues as it was.
    2. `init.weights`, into a network that is otherwise random from `seed`. All of it where the parent learnt the same
       task with the same outputs on the same dataset; the encoder where that is all the weights have of the network;
       else all but the output layer, which stays random from `seed`. With a second look, in both of its networks.
    3. Random from `seed`.
    """
    with parallel.together():
        verified = run.load_latest() if parallel.is_main else None
    newest = parallel.broadcast(None if verified is None else verified.path)
    with parallel.together():
        model = session.model(cfg, task, parallel.device)
        parent = None
        if newest is None and cfg.init.weights is not None:
            parent = _load_parent(cfg, task, model, session)
            if parallel.is_main and parent["loaded"] == "encoder" and len(parent["files"]) == 1:
                (digest,) = (listed["sha256"] for listed in parent["files"].values())
                print_status(f"encoder from {parent['path']}, sha256 {digest}")
        # After the parent weights: the average begins with them.
        state = TrainState.fresh(cfg, model)
        if newest is not None:
            # Rank 0 has read and verified it already; the others read it from the shared disk.
            state.load(verified or load_checkpoint(newest), load_all=load_all)
    return state, parent


def _load_parent(cfg: RunConfig, task: Task, model: nn.Module, session: Session) -> dict[str, Any]:
    """Put `init.weights` into `model`; returns what is worth knowing about them later."""
    assert cfg.init.weights is not None
    if cfg.model.kind == "encoder_unet":
        require_file(cfg.init.weights)
    weights, meta = session.weights(cfg.init)
    part = put_weights(cfg, task, model, weights, meta)
    facts: dict[str, Any] = {key: meta[key] for key in ("path", "use", "step", "fingerprint", "files") if key in meta}
    return {**facts, "loaded": part}


def put_weights(
    cfg: RunConfig, task: Task, model: nn.Module, weights: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> str:
    """Put weights, with the facts that came with them, into the network of `cfg`; returns which part they filled.

    Raises:
        CheckpointError: they do not fit; the network is as it was.
    """
    if "config" not in meta and "init_conv.weight" in weights and weights["init_conv.weight"].shape[1] == 2:
        weights = from_upstream(weights)  # the released network has an input channel more than ours
    looks: Mapping[str, Mapping[str, Tensor]] = parts_of(weights) or dict.fromkeys(PARTS, weights)
    is_same = meta.get("out_channels") == task.out_channels and meta.get("export") == task.export()
    part = "all" if is_same else "encoder" if is_encoder_only(cfg.model, looks["coarse"]) else "trunk"
    load = {"all": load_all, "trunk": load_trunk, "encoder": load_encoder}[part]
    networks = {name: getattr(model, name) for name in PARTS} if isinstance(model, CoarseToFine) else {"coarse": model}
    for name, network in networks.items():  # of one kind: what does not fit the first is refused before any has changed
        # Exported weights may be in 16 bits; a run trains in fp32 and casts where it computes.
        load(network, {key: value.to(torch.float32) for key, value in looks[name].items()})
    return part


def require_fitting(cfg: RunConfig, spec: DatasetSpec) -> None:
    """Refuse `init.weights` that are not there or do not fit; of the file only its header is read.

    Raises:
        CheckpointError: as loading them would, but for damage that only their hash shows.
    """
    assert cfg.init.weights is not None
    if cfg.model.kind == "encoder_unet":
        require_file(cfg.init.weights)
    put_weights(cfg, build_task(cfg, spec), _hollow(cfg, spec), *weights_header(cfg.init.weights, cfg.init.use))


def require_fitting_stage(cfg: RunConfig, spec: DatasetSpec, stage: RunConfig, stage_spec: DatasetSpec) -> None:
    """As `require_fitting`, for weights that another run of a sweep has yet to make."""
    if cfg.init.use == "ema" and stage.train.ema is None:
        raise CheckpointError(
            f"{cfg.init.weights} will hold no ema.safetensors, since its run has train.ema=null; choose the other with "
            "init.use"
        )
    task = build_task(stage, stage_spec)
    export = json.loads(json.dumps(task.export()))  # as it is read back
    meta = {"config": stage.name, "out_channels": task.out_channels, "export": export}
    put_weights(cfg, build_task(cfg, spec), _hollow(cfg, spec), _hollow(stage, stage_spec).state_dict(), meta)


def _hollow(cfg: RunConfig, spec: DatasetSpec) -> nn.Module:
    """The network of a run, of tensors without content."""
    # Cells of a sweep differ in name, seed and shots only: one network serves all of them.
    data = cfg.data.model_copy(update={"shots": None, "draw": "first", "images": None})
    # What is frozen has the same tensors, and would ask for the weights, which are no part of the settings.
    model = cfg.model.model_copy(update={"frozen": False}) if cfg.model.kind == "encoder_unet" else cfg.model
    settings = cfg.model_copy(update={"name": "same", "seed": 0, "data": data, "model": model})
    return _built(settings.model_dump_json(include={"data", "model", "task"}), spec.model_dump_json())


@lru_cache(maxsize=8)
def _built(settings: str, spec: str) -> nn.Module:
    cfg, facts = RunConfig.model_validate_json(settings), DatasetSpec.model_validate_json(spec)
    task = build_task(cfg, facts)
    with torch.device("meta"):
        return task.wrap(
            build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)
        )
