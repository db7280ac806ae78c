"""Which images to label next: those whose descriptors, by a finished run, stand for all the others best.

A descriptor is a decoder map of the run's U-Net, averaged over the fields of a grid, so that it says what is where.
Images are compared by Euclidean distance (docs/method.md, section 12) and chosen by facility location
(`facility_location`). Writes OUT/suggestions.csv and suggestions.json, and OUT/suggestions.png to look at.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.data import read_image_ids
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.bad_samples import BadSample, Quarantine
from ddpm_lmk.data.loading.corpus import Corpus, evaluation_corpora, training_corpora
from ddpm_lmk.data.loading.loader import EvalLoader, Seat
from ddpm_lmk.data.loading.order import keyed_uniform
from ddpm_lmk.data.preview.pictures import suggestion_sheet
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.data.shards.remote import with_retries
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.inference.facility_location import choose
from ddpm_lmk.inference.load import LoadedRun, open_run
from ddpm_lmk.models.coarse_to_fine import CoarseToFine
from ddpm_lmk.models.unet import Level, UNet
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.system import files
from ddpm_lmk.system.console import progress
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask

GRID = 8  # fields of a descriptor along each side
CHANNELS = 16  # of a field
NOISE = 0.06  # timestep that a denoising network is conditioned on, as a share of all: fine-tuning's 30 of 500


@dataclass(frozen=True)
class Suggestion:
    """A row of suggestions.csv; `coverage` and `gain` as `facility_location.Choice` says."""

    rank: int
    image_id: str
    dataset: str
    split: str
    row: int
    coverage: float
    gain: float
    nearest_labelled: str | None


@dataclass(frozen=True)
class SuggestSummary:
    """What was suggested, out of how many images, of which some were labelled and some could not be read.

    Attributes:
        named: images that were said to be labelled, in the set or not.
    """

    out: Path
    suggestions: list[Suggestion]
    num_images: int
    labelled: int
    named: int
    bad: list[dict[str, Any]]


@dataclass(frozen=True)
class _Pool:
    """The images of a set that can be read.

    Attributes:
        places: corpus and row of each image.
        ids: of each image.
        points: its descriptor, `[n, d]` float32.
    """

    corpora: Sequence[Corpus]
    places: list[tuple[int, int]]
    ids: list[str]
    points: np.ndarray

    def digest(self, number: int) -> bytes:
        """Of the pixels of an image, as packed."""
        corpus, row = self.places[number]
        return self.corpora[corpus].manifest.index[row]["sha256"].tobytes()


def suggest_images(
    run: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    splits: Sequence[str] = ("train",),
    count: int = 10,
    labelled: Sequence[str] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> SuggestSummary:
    """Rank the `count` images of a packed set that are worth a label most; writes the list and a sheet of the images.

    Args:
        run: run directory or snapshot of a pre-training (denoise) or landmark run of a U-Net.
        splits: whose images are candidates, and are to be covered.
        labelled: ids, or CSV files with a column image_id, of images that are labelled already. None given: the shots
            of a landmark run, no image for a pre-training.

    Raises:
        ConfigError: another kind of run, no image named is there, more are wanted than there are.
        DataError: the set is not there, or too many of its images cannot be read.
    """
    out = Path(out)
    check_writable(out)
    loaded = open_run(run, device=device)
    level = _level(loaded)
    names, digests = _labelled(loaded, labelled)
    others: dict[str, Any] = {
        "weights": None,
        "require_dataset": {},
        "fine_size": None,
    }  # descriptors are of whole images
    data_of = loaded.cfg.data.model_copy(update={"path": (str(data),), **others})
    cfg = loaded.cfg.model_copy(update={"data": data_of})
    corpora = [corpus for split in dict.fromkeys(splits) for corpus in evaluation_corpora(cfg, split, labelled=False)]
    pool, bad = _describe(loaded, level, cfg, corpora)
    chosen = [i for i, name in enumerate(pool.ids) if name in names or (digests and pool.digest(i) in digests)]
    where, room = f"{data} ({', '.join(splits)})", len(pool.ids) - len(chosen)
    if labelled and not chosen:
        raise ConfigError(
            f"--labelled names {', '.join(list(names)[:3])}: not in {where}, whose ids are like {pool.ids[0]}"
        )
    if not 1 <= count <= room:
        raise ConfigError(f"--count={count}: {where} has {room} readable images without a label; use 1..{room}")
    with progress("choosing images", lines=False) as show:
        choices = choose(pool.points, count, chosen=chosen, show=show)
    suggestions = []
    for rank, choice in enumerate(choices, start=1):
        corpus, row = pool.places[choice.index]
        manifest = corpora[corpus].manifest
        place = (manifest.dataset, manifest.splits[manifest.index[row]["split"]], row)
        coverage, gain = round(choice.coverage, 6), round(choice.gain, 6)
        nearest = None if choice.nearest is None else pool.ids[choice.nearest]
        suggestions.append(Suggestion(rank, pool.ids[choice.index], *place, coverage, gain, nearest))
    summary = SuggestSummary(out, suggestions, len(pool.ids), len(chosen), len(names) + len(digests), bad)
    shown = [(corpora[corpus].manifest, row) for corpus, row in (pool.places[choice.index] for choice in choices)]
    files.write_bytes(out / "suggestions.png", suggestion_sheet(shown, [each.coverage for each in suggestions]))
    files.write_text(out / "suggestions.csv", _to_csv(suggestions))
    facts = {"run": str(loaded.path), "step": loaded.meta["step"], "data": str(data), "splits": list(splits)}
    counts = {"num_images": summary.num_images, "labelled": [pool.ids[i] for i in chosen], "bad": bad}
    listed = [asdict(each) for each in suggestions]
    files.write_json(out / "suggestions.json", {**facts, **counts, "suggestions": listed})
    return summary


def _level(loaded: LoadedRun) -> nn.Module:
    """The block whose maps describe an image: the end of the second level of the decoder, from below."""
    # Of two networks the one that sees whole images.
    network = loaded.model.coarse if isinstance(loaded.model, CoarseToFine) else loaded.model
    if not isinstance(network, UNet) or not isinstance(loaded.task, DenoiseTask | LandmarkTask):
        raise ConfigError(
            f"{loaded.path} is a run of task {loaded.cfg.task.kind} with model.kind={loaded.cfg.model.kind}; "
            "wanted a pre-training by denoising, or a landmark run, with model.kind=ddpm_unet"
        )
    level = network.ups[min(1, len(network.ups) - 1)]
    assert isinstance(level, Level)
    return level.block2


def _labelled(loaded: LoadedRun, given: Sequence[str]) -> tuple[set[str], set[bytes]]:
    """Which images are labelled: ids the user names, or digests of the shots of the run."""
    if given:
        names: set[str] = set()
        for name in given:
            try:
                names |= set(read_image_ids(name)) if name.lower().endswith(".csv") else {name}
            except ValueError as error:
                raise ConfigError(f"--labelled: {error}") from error
        return names, set()
    if not isinstance(loaded.task, LandmarkTask):
        return set(), set()
    cfg = loaded.cfg.model_copy(update={"data": loaded.cfg.data.model_copy(update={"hold_out": None})})
    try:
        shots = training_corpora(cfg)
    except DataError as error:
        raise DataError(
            f"which images {loaded.path} learnt from is not known: {error}; or name them: --labelled"
        ) from error
    return set(), {corpus.manifest.index[row]["sha256"].tobytes() for corpus in shots for row in corpus.rows}


def _describe(
    loaded: LoadedRun, level: nn.Module, cfg: RunConfig, corpora: Sequence[Corpus]
) -> tuple[_Pool, list[dict[str, Any]]]:
    """Descriptors of all images that can be read, and the list of the others.

    Raises:
        DataError: too many cannot be read.
    """
    # Every image is looked at once, so none is kept.
    cfg = cfg.model_copy(update={"runtime": cfg.runtime.model_copy(update={"cache_pixels": "stream"})})
    loader = EvalLoader(cfg, corpora, Seat(0, 1, loaded.parallel.device, "torch"), None, skips_bad=True)
    places = [(number, int(row)) for number, corpus in enumerate(corpora) for row in corpus.rows]
    points = np.zeros((len(places), GRID * GRID * CHANNELS), np.float32)
    is_read = np.zeros(len(places), bool)
    with progress("describing images") as show:
        for batch in loader:
            here = (batch.weight > 0).numpy(force=True)
            positions = batch.positions.numpy(force=True)[here]
            points[positions] = _descriptors(loaded, level, batch).numpy(force=True)[here]
            is_read[positions] = True
            show(int(positions.max(initial=0)) + 1, len(places))
    loader.close()
    ids, bad = [], list(loader.bad)
    for place, (number, row) in enumerate(places):
        try:
            ids.append(with_retries(corpora[number].manifest.read_record, row).id)
        except CorruptSampleError as error:
            ids.append("")
            is_read[place] = False
            bad.append(BadSample(number, row, str(error)))
    quarantine = Quarantine(corpora, cfg.data.max_bad_fraction)
    quarantine.merge(bad, step=0)
    quarantine.check()
    kept = np.flatnonzero(is_read).tolist()
    listed = [{key: value for key, value in entry.items() if key != "step"} for entry in quarantine.entries]
    return _Pool(corpora, [places[i] for i in kept], [ids[i] for i in kept], points[is_read]), listed


@torch.inference_mode()
def _descriptors(loaded: LoadedRun, level: nn.Module, batch: Batch) -> Tensor:
    """Descriptors `[B, GRID * GRID * CHANNELS]` float32 of a batch."""
    maps: list[Tensor] = []
    hook = level.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with hook, loaded.parallel.autocast(loaded.cfg.train.precision):
        if isinstance(loaded.task, DenoiseTask):
            t = max(1, round(NOISE * loaded.task.schedule.num_timesteps))
            loaded.model(batch.images, torch.full((len(batch.images),), t, device=batch.images.device))
        else:
            assert isinstance(loaded.task, LandmarkTask)
            loaded.task.maps(loaded.model, batch)
    pooled = F.adaptive_avg_pool2d(maps[0].float(), GRID)  # [B, C, GRID, GRID]
    # Random signs keep distances (Achlioptas, 2003), so a wide network needs no more memory than a small one.
    drawn = keyed_uniform(0, "descriptor", np.arange(pooled.shape[1]), CHANNELS)
    signs = torch.from_numpy(np.where(drawn < 0.5, -1, 1) / CHANNELS**0.5).to(pooled)
    return torch.einsum("bchw,cd->bdhw", pooled, signs).flatten(1)


def _to_csv(suggestions: Sequence[Suggestion]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Suggestion.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in suggestions)
    return text.getvalue()
