"""The datasets of a run: which of their rows it uses, with which labels and geometry, and decoding one of them.

Knows configuration and manifests, neither the memory pixels live in nor torch. Labels are read when a corpus opens;
without labels only the index is touched, so a pool of a million images opens in no time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.data import DataConfig
from ddpm_lmk.data.duplicates.leakage import exclusion
from ddpm_lmk.data.images.resize import to_network_size
from ddpm_lmk.data.loading.augment import Floats, compose, resize_matrix
from ddpm_lmk.data.loading.order import few_shot_rows
from ddpm_lmk.data.shards.index import ByShard, ListedRows, SplitRows
from ddpm_lmk.data.shards.manifest import Manifest, open_datasets
from ddpm_lmk.data.shards.records import CorruptSampleError, SampleRecord, to_stored_matrix
from ddpm_lmk.data.shards.remote import CacheSettings, with_retries
from ddpm_lmk.data.spec import DatasetSpec, mixture
from ddpm_lmk.errors import ConfigError, DataError

HELD_OUT = "held_out"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a batch says about a sample besides its pixels; `to_network` takes native px to network px."""

    id: str
    points: Floats | None  # [N, 2] native px
    native_size: tuple[int, int]
    mm_per_px: float  # NaN: unknown
    to_network: Floats  # [2, 3]


class Corpus:
    """Some rows of one dataset, at the network's image size. With `labelled`, only rows that have points."""

    def __init__(self, manifest: Manifest, rows: SplitRows, image_size: int, *, labelled: bool) -> None:
        self.manifest, self.image_size = manifest, image_size
        self._resize = resize_matrix(manifest.stored_size, image_size)
        self.records: dict[int, SampleRecord] = {}
        self.rows: SplitRows | np.ndarray = rows
        if labelled:
            # Few, unlike a pool's: all labels are read now, so that a missing one is known before training.
            read = ((row, with_retries(manifest.read_record, row)) for row in rows)
            self.records = {row: record for row, record in read if record.points is not None}
            self.rows = np.array(list(self.records), dtype=np.int64)

    @property
    def by_shard(self) -> ByShard:
        """The rows, grouped by the shard they lie in."""
        if isinstance(self.rows, SplitRows):
            return self.rows
        return ListedRows(self.rows, self.manifest.shard_of(self.rows))

    def keep(self, rows: np.ndarray) -> None:
        """Use only these rows from here on."""
        self.rows = rows
        self.records = {row: self.records[row] for row in rows.tolist() if row in self.records}

    def facts(self, row: int) -> Facts:
        """Label, spacing and geometry of a row; without labels the name is dataset:row."""
        record = self.records.get(row)
        if record is None:  # the index alone: a pool's records would be a read from the shards for every sample
            entry = self.manifest.index[row]
            size = (int(entry["width"]), int(entry["height"]))
            to_stored = to_stored_matrix(size, self.manifest.stored_size, self.manifest.aspect)
            return Facts(f"{self.manifest.dataset}:{row}", None, size, np.nan, compose(self._resize, to_stored))
        spacing = self.manifest.spec.resolve_spacing(record.points, record.mm_per_px)
        to_network = compose(self._resize, record.to_stored)
        return Facts(record.id, record.points, record.native_size, np.nan if spacing is None else spacing, to_network)

    def decode(self, row: int) -> np.ndarray:
        """Pixels at network size, uint8 or uint16 `[S, S]`: shrunk by area, enlarged linearly, half-pixel centres.

        Raises:
            CorruptSampleError: the bytes are not those packed, or are no image.
            StoppedError: the file system does not answer.
        """
        data = with_retries(self.manifest.read_bytes, row)
        try:
            pixels = self.manifest.decode_bytes(data)
            pixels = to_network_size(pixels, self.image_size)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"row {row}: {error}") from error
        except DataError:
            raise
        except Exception as error:  # a decoder may leak anything, StopIteration included (docs/faults.md, B27)
            raise CorruptSampleError(f"row {row} of {self.manifest.root}: {type(error).__name__}: {error}") from error
        return pixels


def spec_of(cfg: RunConfig, specs: Sequence[DatasetSpec]) -> DatasetSpec:
    """Facts of the data of a run: of all labelled datasets together, of the first one in a pool without labels."""
    return mixture(specs) if cfg.task.stage == "finetune" else specs[0]


def images_left_out(cfg: RunConfig) -> tuple[np.ndarray, ...] | None:
    """Rows of each dataset that pre-training must not see, or sees already; None for a run with labels.

    Comparing a pool takes the longest of what comes before the first step (`duplicates.leakage.exclusion`).
    """
    if cfg.task.stage == "finetune":
        return None
    return exclusion(open_datasets(cfg), cfg.data, CacheSettings.of(cfg)).rows


def training_corpora(cfg: RunConfig, left_out: Sequence[np.ndarray] | None = None) -> list[Corpus]:
    """The rows trained on: for a pool `data.splits` less leaks and copies, for landmarks the shots of each set.

    Args:
        left_out: what `images_left_out` gave, here or on another rank; None: asked for here.

    Raises:
        ConfigError: a split is trained on and scored, more shots than images.
        DataError: a folder is not a dataset, a split does not exist or is empty, there are no labels.
    """
    data, labelled = cfg.data, cfg.task.stage == "finetune"
    for key, split in (("data.validation_split", data.validation_split), ("evaluate.split", cfg.evaluate.split)):
        if split in data.splits:
            raise ConfigError(f"{key}={split} is also in data.splits, so it would be trained on; use another split")
    if left_out is None:
        left_out = images_left_out(cfg)
    corpora = _open_splits(cfg, data.splits, labelled=labelled, left_out=left_out)
    for corpus in corpora if labelled else ():
        corpus.keep(_shots(cfg, corpus)[0])
    return corpora


def evaluation_corpora(cfg: RunConfig, split: str, *, labelled: bool | None = None) -> list[Corpus]:
    """All rows of one split, or those with labels, which None means for landmarks. Raises as `training_corpora`.

    Split `held_out` is the part of the shots that `data.hold_out` keeps from training.
    """
    if split == HELD_OUT and cfg.data.hold_out is not None:
        corpora = _open_splits(cfg, cfg.data.splits, labelled=True)
        for corpus in corpora:
            corpus.keep(_shots(cfg, corpus)[1])
        return corpora
    return _open_splits(cfg, (split,), labelled=cfg.task.stage == "finetune" if labelled is None else labelled)


def _shots(cfg: RunConfig, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """The labelled rows a run learns from, and those it holds out, of one set."""
    data, hold_out = cfg.data, cfg.data.hold_out
    if data.draw == "listed":
        rows = _listed_rows(corpus, data)
    else:
        rows = few_shot_rows(np.asarray(corpus.rows), corpus.manifest.dataset, data.shots, data.draw, cfg.seed)
    if hold_out is None:
        return rows, rows[:0]
    if len(rows) < hold_out.of:
        raise ConfigError(
            f"data.hold_out.of={hold_out.of}, but there are {len(rows)} shots; use at most as many parts as shots"
        )
    is_out = np.arange(len(rows)) % hold_out.of == hold_out.fold  # in turn, so every fold has early and late shots
    return rows[~is_out], rows[is_out]


def _listed_rows(corpus: Corpus, data: DataConfig) -> np.ndarray:
    """The rows of the first `data.shots` of `data.images`, in their order; ConfigError where one is no labelled row."""
    assert data.images is not None, "DataConfig wants them"
    row_of = {record.id: row for row, record in corpus.records.items()}
    names = data.images[: data.shots]
    for name in names:
        if name not in row_of:
            raise ConfigError(f"data.images: {name} {_why_not(corpus.manifest, name, data.splits)}")
    return np.array([row_of[name] for name in names], dtype=np.int64)


def _why_not(manifest: Manifest, name: str, splits: Sequence[str]) -> str:
    """Why an image cannot be a shot, in words that follow its name."""
    records = (with_retries(manifest.read_record, row) for row in range(len(manifest)))
    record = next((record for record in records if record.id == name), None)
    where, like = manifest.root, manifest.read_record(0).id
    if record is None:
        return f"is not in {where}, where ids are like {like}; list ids of labelled images of data.splits"
    if record.split not in splits:
        return f"is in split {record.split} of {where}, data.splits is {', '.join(splits)}; list another image"
    return f"has no landmarks in {where}; label it and pack again, or list another image"


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """What the data is: the manifest's own fingerprint, or a digest over those of a pool."""
    return joined([corpus.manifest.fingerprint for corpus in corpora])


def joined(fingerprints: Sequence[str]) -> str:
    """One fingerprint for several, in their order."""
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def fingerprints_of(cfg: RunConfig, paths: Sequence[str]) -> list[str]:
    """What datasets are, wherever they lie. Raises as `Manifest.open`."""
    return [Manifest.open(path, CacheSettings.of(cfg)).fingerprint for path in paths]


def _open_splits(
    cfg: RunConfig, splits: Sequence[str], *, labelled: bool, left_out: Sequence[np.ndarray] | None = None
) -> list[Corpus]:
    """In a pool, a dataset may lack some of the splits, but each split must be in one of the datasets."""
    data, manifests = cfg.data, open_datasets(cfg)
    for manifest in manifests:
        _check_settings(manifest, data.require_dataset)
    if len({manifest.fingerprint for manifest in manifests}) < len(manifests):
        raise ConfigError("data.path names the same packed set twice; use data.weights to draw more from one")
    for split in splits:
        if not any(split in manifest.splits for manifest in manifests):
            there = "; ".join(f"{manifest.root}: {', '.join(manifest.splits)}" for manifest in manifests)
            raise DataError(f"there is no split {split!r} (there are {there}); change data.splits or evaluate.split")
    without: Sequence[np.ndarray | None] = [None] * len(manifests) if left_out is None else left_out
    return [
        _open_one(manifest, splits, data.image_size, labelled=labelled, without=rows)
        for manifest, rows in zip(manifests, without, strict=True)
    ]


def _check_settings(manifest: Manifest, wanted: Mapping[str, str | int | None]) -> None:
    """Refuse a dataset that was packed with other settings than the run file asks for."""
    for key, value in wanted.items():
        if key not in manifest.settings:
            known = ", ".join(sorted(manifest.settings))
            raise ConfigError(f"data.require_dataset.{key}={value}: packs have no such setting; they have {known}")
        if value is not None and manifest.settings[key] != value:
            raise ConfigError(
                f"data.require_dataset.{key}={value}, but {manifest.root} was packed with "
                f"{key}={manifest.settings[key]}; pack it again with that setting, or change data.require_dataset.{key}"
            )


def _open_one(
    manifest: Manifest, splits: Sequence[str], image_size: int, *, labelled: bool, without: np.ndarray | None
) -> Corpus:
    present = [split for split in splits if split in manifest.splits]
    names = ", ".join(splits)
    if not present:
        raise DataError(f"{manifest.root} has none of the splits {names}; it has {', '.join(manifest.splits)}")
    if labelled and manifest.spec.num_landmarks == 0:
        raise DataError(f"{manifest.root} is packed without landmarks; task landmarks needs a labelled set")
    corpus = Corpus(manifest, manifest.rows(present, without=without), image_size, labelled=labelled)
    if len(corpus.rows) == 0 and without is not None and len(without):
        raise DataError(
            f"{manifest.root}: all {len(without)} images of {names} are in protected splits or other datasets too; "
            "take it out of data.path, or see data.dedup.leakage and data.dedup.duplicates"
        )
    if len(corpus.rows) == 0:
        raise DataError(f"{manifest.root} has no {'labelled ' if labelled else ''}image in {names}; pack some")
    return corpus
