"""A finished run, opened for use: its run file, dataset facts, task and network with the selected weights."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import validate
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.spec import DatasetSpec, unlabelled
from ddpm_lmk.engine.device_fit import is_emulated
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError
from ddpm_lmk.inference import calibration, radius
from ddpm_lmk.models import build_model
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.system.files import read_json
from ddpm_lmk.tasks import LandmarkTask, Task, build_task

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"  # of a run directory
# Not the encoding: PNG and raw pixels are the same pixels.
PIXEL_SETTINGS = ("size", "aspect", "filter", "window", "bits")


@dataclass(frozen=True)
class LoadedRun:
    """Everything needed to use what a run has learnt; for a mixture of datasets, `spec` and `task` are of them all."""

    path: Path  # the run directory, or a folder as `report.hub` writes it
    cfg: RunConfig
    spec: DatasetSpec
    task: Task
    model: nn.Module
    parallel: Parallel
    meta: dict[str, Any]  # of the snapshot; of a hub folder, `results`, `radius` and `calibration` are in it too

    @property
    def results(self) -> dict[str, Any]:
        """The run's results.json, of a mixture the part about this dataset; empty where there is none."""
        whole = self.meta.get("results") or read_json(self.path / "results.json") or {}
        return next((part for part in whole.get("parts", ()) if part["spec"] == self.spec.name), whole)

    @property
    def weights_sha256(self) -> str:
        """Of the file of the weights, which says what they are wherever they lie."""
        files = self.meta["files"]  # a hub folder has one, whose name may be of the hub's cache
        return files[next(iter(files)) if len(files) == 1 else f"{self.meta['use']}.safetensors"]["sha256"]

    @property
    def radius(self) -> dict[str, Any] | None:
        """radius.json of this dataset and these weights; None where `ddpm-lmk calibrate` has learnt none."""
        step = self.meta["step"]
        own = (radius.check(facts, self.spec, source=self.path, step=step) for facts in self.meta.get("radius", ()))
        places = (self.path, *sorted(self.path.glob("parts/*")))
        beside = (radius.read(place, self.spec, step=step) for place in places)
        return next((facts for facts in chain(own, beside) if facts is not None), None)

    def for_dataset(self, name: str | None) -> LoadedRun:
        """The same for one of the datasets it has learnt, which has to be named where there are several.

        Raises:
            ConfigError: no name, or one of another dataset.
        """
        known = {part.name: part for part in self.spec.domains}
        if name is None and len(known) == 1:
            return self
        if name not in known:
            raise ConfigError(
                f"{self.path} has learnt {', '.join(known)}, asked for {name or 'none of them'}; name one (--dataset)"
            )
        return self.for_landmarks_of(known[name])

    def for_landmarks_of(self, spec: DatasetSpec) -> LoadedRun:
        """The same for the dataset whose landmarks `spec` lists; raises DataError where it has learnt none such."""
        assert isinstance(self.task, LandmarkTask)
        task = self.task.part(spec)
        return replace(self, spec=task.spec, task=task)

    def pixel_settings(self) -> dict[str, Any]:
        """How the pictures it learnt from were prepared: size, aspect, filter, window, bits.

        Raises:
            DataError: neither the run's results nor its data are there to say so.
        """
        if "pixels" in self.results:
            return self.results["pixels"]
        try:
            return pixel_settings(Manifest.open(self.cfg.data.path[0]))
        except DataError as error:
            raise DataError(f"how {self.path} prepared its pictures is not known: {error}") from error


def pixel_settings(manifest: Manifest) -> dict[str, Any]:
    """The part of a pack's settings that decides what a picture looks like to the network."""
    return {key: manifest.settings[key] for key in PIXEL_SETTINGS}


def open_run(
    path: str | Path,
    *,
    kind: Literal["landmarks", "denoise"] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> LoadedRun:
    """Open a run directory, one of its snapshots or a hub folder; the moving average is used where there is one.

    Raises:
        CheckpointError: no finished weights, damaged ones, or a bare file that does not say what it belongs to.
        ConfigError: the run has learnt another kind of task.
        LaunchError: the device is not there.
    """
    path = Path(path)
    weights, meta = load_weights(path, "auto")
    if "config" not in meta:
        raise CheckpointError(
            f"{path} holds weights only; wanted a run directory, a snapshot or a hub folder, which say how to use them"
        )
    cfg = validate(RunConfig, meta["config"], source=str(path))
    if kind is not None and cfg.task.kind != kind:
        raise ConfigError(f"{path} is a run of task {cfg.task.kind}, wanted {kind}; give another run directory")
    spec = unlabelled(cfg.name) if meta.get("spec") is None else DatasetSpec.model_validate(meta["spec"])
    task = build_task(cfg, spec)
    parallel = Parallel(device)
    cfg = _without_emulation(cfg, parallel.device.type)
    with torch.random.fork_rng(devices=[]):  # the caller's draws stay what they were; weights are replaced anyway
        torch.manual_seed(cfg.seed)
        network = build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)
        model = task.wrap(network)
    load_all(model, weights)
    layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
    model = model.to(parallel.device).to(memory_format=layout).eval()  # type: ignore[call-overload]
    is_whole = "results" in meta or (path / "config.yaml").is_file()
    run = path if is_whole else _run_of_snapshot(Path(meta["path"]))
    # temperatures are no weights: they lie beside the snapshots, and every snapshot of the run uses them
    calibration.put(meta.get("calibration") or calibration.read(run), task)
    return LoadedRun(run, cfg, spec, task, model, parallel, meta)


def _run_of_snapshot(snapshot: Path) -> Path:
    """The run directory around a snapshot, however it was named; a snapshot that was copied elsewhere is alone."""
    if len(snapshot.parts) < 3 or ".." in snapshot.parts:  # named from inside of the run
        snapshot = Path(os.path.abspath(snapshot))  # noqa: PTH100 - a link may lead to a snapshot elsewhere
    return snapshot.parents[1] if snapshot.parent.name == SNAPSHOTS else snapshot


def _without_emulation(cfg: RunConfig, device: str) -> RunConfig:
    """The run in fp32 where it asked for a precision that this CPU only emulates: as good, and faster."""
    if not is_emulated(cfg.train.precision, device):
        return cfg
    log.warning("trained with train.precision=%s, which is emulated here; computing in fp32", cfg.train.precision)
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": "fp32"})})
