"""Per-process cache of pixels, networks and parent weights, reused across sweep cells; and compiling a network.

A sweep's worker does one cell after the other. Their pixels are decoded once, a network is built, placed and compiled
once, and only its weights are set anew; weights that were read and checked once are kept. All of it is exact: a cell
gives the same bits whether it is the first of a session, the last, or alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddpm_lmk.config import InitConfig, RunConfig
from ddpm_lmk.engine.requirements import check_cuda_graphs
from ddpm_lmk.models import build_model
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import choose_norm
from ddpm_lmk.rundir.checkpoint import HUB, META, load_weights
from ddpm_lmk.tasks import Task

log = logging.getLogger(__name__)

COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
NETWORKS_GIB = 2.0  # on the device, beside the one in use: a sweep goes from method to method and back
PARENTS_GIB = 4.0  # in memory
Weights = tuple[dict[str, Tensor], dict[str, Any]]
Cached = TypeVar("Cached")


class Session:
    """Keeps what the next run of this process may use; a run alone has one of its own.

    Attributes:
        cache: decoded pixels, as `open_loader` keeps them.
    """

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}
        self._networks: dict[tuple[Any, ...], nn.Module] = {}
        self._parents: dict[tuple[Any, ...], Weights] = {}

    def model(self, cfg: RunConfig, task: Task, device: torch.device) -> nn.Module:
        """The network of `cfg` with the random weights of its seed, the same on every kind of device."""
        # On the host and from the seed alone: the first weights are the same on every device and in every cell.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            fresh = task.wrap(
                build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)
            )
        setting = (device, cfg.train.channels_last, cfg.train.compile, cfg.train.cuda_graphs, cfg.train.group_norm)
        head = cfg.task if cfg.task.stage == "pretrain" else None  # some tasks train more than the network
        key = (cfg.model, type(task), type(fresh), head, task.out_channels, task.full_size, task.domains, *setting)
        model = self._networks.pop(key, None)
        if model is not None:
            # In place: a compiled network, and CUDA graphs, stay valid.
            model.load_state_dict(fresh.state_dict())
            for parameter, new in zip(model.parameters(), fresh.parameters(), strict=True):
                parameter.requires_grad_(new.requires_grad)  # the run before may have frozen some
        else:
            layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
            model = fresh.to(device).to(memory_format=layout)  # type: ignore[call-overload]
            use_norm(model, choose_norm(cfg.train.group_norm, device, is_compiled=cfg.train.compile is True))
            compile_model(model, cfg, device)
        self._networks[key] = model  # now the youngest
        _drop_oldest(self._networks, NETWORKS_GIB, lambda network: network.state_dict().values())
        return model

    def weights(self, init: InitConfig) -> Weights:
        """The starting weights of a run as `load_weights` reads and checks them; nobody may change them in place."""
        assert init.weights is not None
        key = (init.weights, init.use, *_stamps(Path(init.weights)))
        weights = self._parents.pop(key, None) or load_weights(init.weights, init.use)
        self._parents[key] = weights
        _drop_oldest(self._parents, PARENTS_GIB, lambda parent: parent[0].values())
        return weights


def _stamps(path: Path) -> list[tuple[str, Any]]:
    """What changes when the weights at `path` do: the facts of a snapshot, which hold the digests of its files."""
    if path.is_file():
        stat = path.stat()
        return [(str(path), (stat.st_ino, stat.st_size, stat.st_mtime_ns))]
    # The facts and not the tensors: they are small, and a changed tensor has another digest in them.
    files = sorted([*path.glob(META), *path.glob(HUB), *path.glob(f"snapshots/*/{META}")])
    return [(str(file), file.read_bytes()) for file in files]


def _drop_oldest(cached: dict[Any, Cached], limit_gib: float, tensors: Callable[[Cached], Iterable[Tensor]]) -> None:
    """Let the oldest go while there is more than so much beside the youngest."""
    sizes = {key: sum(tensor.nbytes for tensor in tensors(value)) for key, value in cached.items()}
    *older, youngest = cached
    for key in older:
        if sum(sizes.values()) - sizes[youngest] <= limit_gib * 2**30:
            return
        del cached[key], sizes[key]


def compile_model(model: nn.Module, cfg: RunConfig, device: torch.device) -> None:
    """Have the passes of `model` compiled when they first run, where the run asks for that.

    Compilation happens inside the first passes, of training and of evaluation, and again where a shape is new.

    Raises:
        LaunchError: CUDA graphs on another device.
    """
    check_cuda_graphs(cfg, device.type)
    if cfg.train.compile:
        compile_cache()
        model.compile(dynamic=False, mode="reduce-overhead" if cfg.train.cuda_graphs else None)


def compile_cache() -> Path:
    """The folder that keeps compiled code from now on, shared by all processes: the first compiles, later ones load.

    It is the user's own: PyTorch's choice is under /tmp, which a node empties and anybody may fill.
    """
    if COMPILE_CACHE not in os.environ:
        folder = Path(os.environ.get("LMK_CACHE") or Path.home() / ".cache" / "ddpm-lmk") / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            from torch._inductor.runtime.cache_dir_utils import default_cache_dir

            log.warning(
                "compiled code cannot be kept in %s (%s), but until the node is emptied", folder, error.strerror
            )
            folder = Path(default_cache_dir())
        os.environ[COMPILE_CACHE] = str(folder)
    return Path(os.environ[COMPILE_CACHE])
