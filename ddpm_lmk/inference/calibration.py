"""Temperatures that make the probabilities of a contour-hugging model honest.

One temperature per landmark, the one under which images the model has not learnt from are most likely: those of
`data.validation_split` (docs/method.md, section 5, for what [20] does). RUN/calibration.json keeps them; `load` puts
them back. Whether they help is `reliability`'s.

How well a model knows its errors: expected against real radial errors, in numbers and as a picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.tasks import LandmarkTask, Task
from ddpm_lmk.tasks.codecs import ContourCodec
from ddpm_lmk.tasks.landmarks import frame_of

FILE_NAME = "calibration.json"
SUMMARY = ("learnt_on", "labels", "surprise_before", "surprise_after")
# The likelihood is smooth in log T: between two of these a parabola is right to half a per cent (see the tests).
GRID = np.geomspace(0.1, 10.0, 41)


@dataclass
class Likelihoods:
    """-log p of the landmarks' pixels, summed over images, at every temperature of `GRID`."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, len(GRID))))  # [N, G]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] labels

    def __add__(self, other: Likelihoods) -> Likelihoods:
        if not len(self.counts):
            return other
        return Likelihoods(self.sums + other.sums, self.counts + other.counts)

    def temperatures(self) -> np.ndarray:
        """The most likely temperature of each landmark `[N]`, within the grid; 1 where there is no label."""
        best = self.sums.argmin(1)
        inner = best.clip(1, len(GRID) - 2)
        rows = np.arange(len(best))
        before, here, after = (self.sums[rows, inner + step] for step in (-1, 0, 1))
        curvature = before - 2 * here + after
        shift = 0.5 * (before - after) / np.where(curvature > 0, curvature, np.inf)
        found = GRID[inner] * (GRID[1] / GRID[0]) ** shift.clip(-1, 1)
        found = np.where(best == inner, found, GRID[best])
        return np.where(self.counts > 0, found, 1.0)


@torch.inference_mode()
def likelihoods(
    cfg: RunConfig,
    task: LandmarkTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    split: str,
    cache: dict[str, Any] | None = None,
) -> Likelihoods:
    """Over every labelled image of `split`, once, added in the order of ranks; call on every rank."""
    assert isinstance(task.codec, ContourCodec)
    place: dict[str, Any] = {"rank": parallel.rank, "world": parallel.world, "device": str(parallel.device)}
    loader = open_loader(cfg, stage="evaluate", split=split, cache=cache, **place)
    was_training = model.training
    model.eval()
    found = Likelihoods()
    try:
        for batch in loader:
            beat("score")
            batch = batch.to(parallel.device)
            assert batch.points is not None, "landmark batches carry points"
            with parallel.autocast(cfg.train.precision):
                maps = task.maps(model, batch)
            sums, counts = _of_batch(task.codec, maps, batch.points, batch.weight, frame_of(batch))
            found += Likelihoods(sums.double().cpu().numpy(), counts.double().cpu().numpy())
    finally:
        model.train(was_training)
        loader.close()
    total = Likelihoods()
    for part in parallel.gather([found]):
        total += part[0]
    return total


def _of_batch(codec: ContourCodec, maps: Tensor, points: Tensor, weight: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
    counted = codec.counts(points, frame) * weight[:, None]  # [B, N]
    columns = [codec.surprise(maps.float() / t, points, frame) for t in GRID.tolist()]
    return (torch.stack(columns, -1) * counted[..., None]).sum(0), counted.sum(0)


def record(found: Likelihoods, task: LandmarkTask, *, learnt_on: str) -> dict[str, Any]:
    """The content of calibration.json; `learnt_on` says in words which images the temperatures are from."""
    temperatures = found.temperatures()
    one = int(np.abs(np.log(GRID)).argmin())
    grid = np.log(GRID)
    after = [float(np.interp(np.log(t), grid, sums)) for t, sums in zip(temperatures, found.sums)]
    labels = max(float(found.counts.sum()), 1.0)
    return {
        "temperatures": [round(float(t), 6) for t in temperatures],
        "landmarks": list(task.spec.landmark_names),
        "learnt_on": learnt_on,
        "labels": int(found.counts.sum()),
        "surprise_before": float(found.sums[:, one].sum()) / labels,
        "surprise_after": sum(after) / labels,
    }


def keep(facts: Mapping[str, Any], task: LandmarkTask, folder: Path, parallel: Parallel) -> None:
    """Use temperatures from here on, and write them into a run directory."""
    parallel.on_main(lambda: files.write_json(folder / FILE_NAME, dict(facts)))
    put(facts, task)


def put(facts: Mapping[str, Any] | None, task: Any) -> None:
    """Give a task the temperatures of its run, if it has some; raises CheckpointError where they fit no landmarks."""
    if facts is None or not isinstance(task, LandmarkTask) or not isinstance(task.codec, ContourCodec):
        return
    values = facts.get("temperatures")
    if (
        not isinstance(values, list)
        or len(values) != task.spec.num_landmarks
        or not all(isinstance(value, float) and 0.0 < value < 1e3 for value in values)
    ):
        raise CheckpointError(
            f"{FILE_NAME} does not hold {task.spec.num_landmarks} temperatures; calibrate again with the same run, or "
            "remove the file to do without"
        )
    task.codec.temperatures = torch.tensor(values, dtype=torch.float32)


def read(folder: Path) -> dict[str, Any] | None:
    """What `keep` wrote into a run directory; None where there is nothing."""
    return read_json(folder / FILE_NAME)


def summary(folder: Path) -> dict[str, Any] | None:
    """What results.json says of the temperatures of a run directory."""
    facts = read(folder)
    return None if facts is None else {key: facts.get(key) for key in SUMMARY}


PLOT_NAME = "calibration.png"
BINS = 10
PEAK_LIMIT = 0.15  # peaks of sharp maps of this size are rarely above it (paper.md, section 5)
INK, DOTS, LINE = "#1c2733", "#0b66b0", "#c4621b"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def write_reliability(folder: Path, spread: np.ndarray, error: np.ndarray, *, unit: str, title: str) -> dict[str, Any]:
    """Write the plot of expected and real errors, both `[M, N]` in `unit`, into `folder`; returns `reliability`."""
    facts = reliability(spread.ravel(), error.ravel())
    plot = reliability_plot(spread.ravel(), error.ravel(), facts, unit=unit, title=title)
    files.write_bytes(folder / PLOT_NAME, plot)
    return {"unit": unit, **facts}


def reliability(spread: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """How well expected errors `[K]` tell real ones `[K]`, both in the same unit.

    Returns:
        `bins` of equal counts in order of the expected error, each with both means; `correlation` of ranks
        (Spearman); `gap`, the mean distance of the two means, weighted by count: 0 for an honest model.
    """
    order = np.argsort(spread, kind="stable")
    bins = [
        {"count": len(part), "expected": float(spread[part].mean()), "error": float(error[part].mean())}
        for part in np.array_split(order, min(BINS, len(order)))
        if len(part)
    ]
    gap = sum(each["count"] * abs(each["expected"] - each["error"]) for each in bins) / max(len(order), 1)
    return {"bins": bins, "correlation": _spearman(spread, error), "gap": gap}


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """Expected calibration error of peak probabilities `[K]`, as McCouat and Voiculescu (CVPR 2022) compute it.

    The caller counts a point as right when it is within the circle that has the area of one pixel of the map.

    Returns:
        `ece_pct`, the mean distance of confidence and accuracy in per cent, weighted by count, and its bins: ten of
        equal width up to 0.15, the last one open.
    """
    edges = np.linspace(0, PEAK_LIMIT, BINS + 1)[1:-1]
    which = np.searchsorted(edges, confidence, side="right")
    bins = [
        {
            "count": int(part.sum()),
            "confidence": float(confidence[part].mean()),
            "accuracy": float(is_right[part].mean()),
        }
        for index in range(BINS)
        if (part := which == index).any()
    ]
    distance = sum(each["count"] * abs(each["confidence"] - each["accuracy"]) for each in bins)
    return {"ece_pct": 100 * distance / max(len(confidence), 1), "peaks": bins}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks; None where one side does not vary."""
    ranks = [_ranks(values) for values in (a, b)]
    spreads = [float(each.std()) if len(each) else 0.0 for each in ranks]
    if min(spreads) == 0.0:
        return None
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / (spreads[0] * spreads[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2.0)[inverse]


def reliability_plot(spread: np.ndarray, error: np.ndarray, facts: dict[str, Any], *, unit: str, title: str) -> bytes:
    """PNG of expected `[K]` and real errors `[K]` in `unit`; `facts` is `reliability` of them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.2), layout="constrained")
        cloud, bars = figure.subplots(1, 2)
        figure.suptitle(f"{title}: {spread.size:,} landmarks", x=0.01, ha="left", fontsize=11)
        floor = max(1e-3, 0.01 * float(np.median(error)))  # a sure map expects no error at all: drawn at the edge
        positive = np.maximum(np.stack([spread, error]), floor)
        cloud.loglog(*positive, ".", ms=3, alpha=0.35, color=DOTS, rasterized=True)
        low, high = float(positive.min()), float(positive.max())
        cloud.plot([low, high], [low, high], "--", lw=1, color=INK)
        rank = facts["correlation"]
        told = "not defined" if rank is None else f"{rank:.2f}"
        cloud.set(xlabel=f"expected radial error, {unit}", ylabel=f"radial error, {unit}")
        cloud.set_title(f"rank correlation {told}")
        expected = [each["expected"] for each in facts["bins"]]
        real = [each["error"] for each in facts["bins"]]
        bars.plot(expected, real, "o-", color=LINE, label=f"{len(expected)} bins of equal count")
        top = 1.05 * max([*expected, *real, 1e-3])
        bars.plot([0, top], [0, top], "--", lw=1, color=INK, label="honest")
        bars.set(xlim=(0, top), ylim=(0, top), xlabel=f"mean expected radial error, {unit}")
        bars.set_ylabel(f"mean radial error, {unit}")
        bars.set_title(f"reliability: mean gap {facts['gap']:.2f} {unit}")
        bars.legend(loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def after_training(
    cfg: RunConfig, task: Task, model: nn.Module, run: RunDir, parallel: Parallel, session: Session
) -> None:
    """Fit them on the validation split, under the weights that are kept; on every rank.

    A run without one was begun by a version that fitted them before training: they are in its directory.
    """
    split = cfg.data.validation_split
    if not isinstance(task, LandmarkTask) or not isinstance(task.codec, ContourCodec):
        return
    if task.codec.cfg.temperatures != "fitted":
        return
    if split is None:
        put(parallel.on_main(lambda: read(run.path)), task)
        return
    found = likelihoods(cfg, task, model, parallel, split=split, cache=session.cache)
    keep(record(found, task, learnt_on=f"validation split {split}"), task, run.path, parallel)
