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

from ddpm_lmk.config import DataConfig, RunConfig
from ddpm_lmk.data.duplicates.leakage import Exclusion, exclusion, pool_exclusion
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
    """Some rows of one dataset, at the network's image size. With `labelled`, only rows that have points.

    Attributes:
        pseudo_labels: points `[N, 2]` native px of rows that have no label of their own, NaN for those unknown.
        sizes: sides of the squares that a sample is decoded to: the network's, and that of its finer copy if any.
    """

    def __init__(
        self, manifest: Manifest, rows: SplitRows, image_size: int, *, labelled: bool, fine_size: int | None = None
    ) -> None:
        self.manifest, self.image_size = manifest, image_size
        self.sizes = (image_size,) if fine_size is None else (image_size, fine_size)
        self._resize = resize_matrix(manifest.stored_size, image_size)
        self.records: dict[int, SampleRecord] = {}
        self.pseudo_labels: dict[int, Floats] = {}
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

    def use(self, pseudo_labels: Mapping[int, Floats]) -> None:
        """Use only the rows that are given points `[N, 2]` here, native px, NaN for those unknown."""
        self.pseudo_labels = dict(pseudo_labels)
        self.keep(np.array(sorted(self.pseudo_labels), dtype=np.int64))

    def facts(self, row: int) -> Facts:
        """Label, spacing and geometry of a row; where labels are not read the name is dataset:row."""
        record = self.records.get(row)
        if record is None:  # the index alone: a pool's records would be a read from the shards for every sample
            entry = self.manifest.index[row]
            size = (int(entry["width"]), int(entry["height"]))
            to_stored = to_stored_matrix(size, self.manifest.stored_size, self.manifest.aspect)
            name, points = f"{self.manifest.dataset}:{row}", self.pseudo_labels.get(row)
            return Facts(name, points, size, np.nan, compose(self._resize, to_stored))
        spacing = self.manifest.spec.resolve_spacing(record.points, record.mm_per_px)
        to_network = compose(self._resize, record.to_stored)
        return Facts(record.id, record.points, record.native_size, np.nan if spacing is None else spacing, to_network)

    def decode(self, row: int) -> tuple[np.ndarray, ...]:
        """Pixels at each of `sizes`, uint8 or uint16 `[S, S]`: shrunk by area, enlarged linearly, half-pixel centres.

        Raises:
            CorruptSampleError: the bytes are not those packed, or are no image.
            StoppedError: the file system does not answer.
        """
        data = with_retries(self.manifest.read_bytes, row)
        try:
            pixels = self.manifest.decode_bytes(data)
            return tuple(to_network_size(pixels, size) for size in self.sizes)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"row {row}: {error}") from error
        except DataError:
            raise
        except Exception as error:  # a decoder may leak anything, StopIteration included (docs/faults.md, B27)
            raise CorruptSampleError(f"row {row} of {self.manifest.root}: {type(error).__name__}: {error}") from error


def enlarged(cfg: RunConfig, corpus: Corpus) -> list[str]:
    """What to say where a dataset holds fewer pixels than a run takes."""
    stored, root = corpus.manifest.stored_size, corpus.manifest.root
    return [
        f"{root} holds images of {stored} pixels, which are enlarged to data.{key}={wanted} and gain no detail; pack "
        f"them with --size {wanted}, or use smaller images"
        for key, wanted in (("image_size", cfg.data.image_size), ("fine_size", cfg.data.fine_size))
        if stored < (wanted or 0)
    ]


def spec_of(cfg: RunConfig, specs: Sequence[DatasetSpec]) -> DatasetSpec:
    """Facts of the data of a run: of all labelled datasets together, of the first one in a pool without labels."""
    return mixture(specs) if cfg.task.stage == "finetune" else specs[0]


def images_left_out(cfg: RunConfig) -> tuple[np.ndarray, ...] | None:
    """Rows of each dataset without labels that a run must not see, or sees already; None where it has labels alone.

    Comparing a pool takes the longest of what comes before the first step (`duplicates.leakage.exclusion`).
    """
    if cfg.task.stage == "pretrain":
        return exclusion(open_datasets(cfg), cfg.data, CacheSettings.of(cfg)).rows
    return None if cfg.data.propagate is None else pool_compared(cfg).rows


def pool_compared(cfg: RunConfig) -> Exclusion:
    """Which images of `data.propagate` are left out, and the record of it; raises as `unlabelled_corpora`."""
    [labelled] = _open_splits(cfg, cfg.data.splits, labelled=True)
    shots, held_out = _shots(cfg, labelled)
    pool = _open_pool(cfg, labelled.manifest)
    rows = {"shots": shots, "held_out": held_out}
    return pool_exclusion(pool, labelled.manifest, cfg.data, cache=CacheSettings.of(cfg), **rows)


def unlabelled_corpora(cfg: RunConfig, left_out: Sequence[np.ndarray] | None = None) -> list[Corpus]:
    """The images of `data.propagate`, whose labels are not read if there are any; none without it.

    Args:
        left_out: what `images_left_out` gave, here or on another rank; None: asked for here.

    Raises:
        ConfigError: a split is used and scored, two sets of one name. DataError: as `training_corpora`.
    """
    propagate = cfg.data.propagate
    if propagate is None:
        return []
    left_out = pool_compared(cfg).rows if left_out is None else left_out
    manifests = _open_pool(cfg, Manifest.open(cfg.data.path[0], CacheSettings.of(cfg)))
    size, fine_size = cfg.data.image_size, cfg.data.fine_size
    corpora = []
    for manifest, rows in zip(manifests, left_out, strict=True):
        names = [split for split in propagate.splits if split in manifest.splits]
        corpus = Corpus(manifest, manifest.rows(names, without=rows), size, labelled=False, fine_size=fine_size)
        corpora += [corpus] if len(corpus.rows) else []
    if not corpora:
        raise DataError(
            f"data.propagate finds no image without a label in {', '.join(propagate.splits)} of "
            f"{', '.join(str(manifest.root) for manifest in manifests)}: {sum(map(len, left_out))} are shots, or "
            "repeat one or a scored image; name a set with more (data.propagate.path) or use fewer data.shots"
        )
    return corpora


def _open_pool(cfg: RunConfig, labelled: Manifest) -> list[Manifest]:
    propagate, cache = cfg.data.propagate, CacheSettings.of(cfg)
    assert propagate is not None
    manifests = [Manifest.open(path, cache) for path in cfg.data.unlabelled_path]
    names = [manifest.dataset for manifest in manifests]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"data.propagate.path has two sets of one name ({', '.join(names)}), which names their images; name each "
            "once, or pack one with another --name"
        )
    for manifest in manifests:
        _check_settings(manifest, cfg.data.require_dataset)
    _check_splits(manifests, propagate.splits, "data.propagate.splits")
    if labelled.fingerprint in [manifest.fingerprint for manifest in manifests]:
        _check_unscored(cfg, propagate.splits, "data.propagate.splits")
    return manifests


def training_corpora(cfg: RunConfig, left_out: Sequence[np.ndarray] | None = None) -> list[Corpus]:
    """The rows trained on: for a pool `data.splits` less leaks and copies, for landmarks the shots of each set.

    Args:
        left_out: what `images_left_out` gave, here or on another rank; None: asked for here.

    Raises:
        ConfigError: a split is trained on and scored, more shots than images.
        DataError: a folder is not a dataset, a split does not exist or is empty, there are no labels.
    """
    data, labelled = cfg.data, cfg.task.stage == "finetune"
    _check_unscored(cfg, data.splits, "data.splits")
    if labelled:
        corpora = _open_splits(cfg, data.splits, labelled=True)
        for corpus in corpora:
            corpus.keep(_shots(cfg, corpus)[0])
        return corpora
    return _open_splits(
        cfg, data.splits, labelled=False, left_out=images_left_out(cfg) if left_out is None else left_out
    )


def _check_unscored(cfg: RunConfig, splits: Sequence[str], key: str) -> None:
    for scored, split in (("data.validation_split", cfg.data.validation_split), ("evaluate.split", cfg.evaluate.split)):
        if split in splits:
            raise ConfigError(f"{scored}={split} is also in {key}, so it would be trained on; use another split")


def evaluation_corpora(cfg: RunConfig, split: str, *, labelled: bool | None = None) -> list[Corpus]:
    """All rows of one split, or those with labels, which None means for landmarks. Raises as `training_corpora`.

    Split `held_out` is the part of the shots that `data.hold_out` keeps from training.
    """
    if cfg.task.stage == "pretrain":  # whose losses are of whole images: no finer pixels are read
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"fine_size": None})})
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


def packs_of(cfg: RunConfig, corpora: Sequence[Corpus]) -> dict[str, list[str]]:
    """Fingerprints of all datasets of a run by the keys that name their places, to know them again elsewhere.

    Args:
        corpora: what it learns from, as `training_corpora` gives. Raises as `Manifest.open`.
    """
    packs = {
        "data.path": [corpus.manifest.fingerprint for corpus in corpora],
        "data.protect": fingerprints_of(cfg, cfg.data.protect),
    }
    if cfg.data.propagate is not None:
        packs["data.propagate.path"] = fingerprints_of(cfg, cfg.data.unlabelled_path)
    return packs


def _open_splits(
    cfg: RunConfig, splits: Sequence[str], *, labelled: bool, left_out: Sequence[np.ndarray] | None = None
) -> list[Corpus]:
    """In a pool, a dataset may lack some of the splits, but each split must be in one of the datasets."""
    data, manifests = cfg.data, open_datasets(cfg)
    for manifest in manifests:
        _check_settings(manifest, data.require_dataset)
    if len({manifest.fingerprint for manifest in manifests}) < len(manifests):
        raise ConfigError("data.path names the same packed set twice; use data.weights to draw more from one")
    _check_splits(manifests, splits, "data.splits, evaluate.split or --split")
    without: Sequence[np.ndarray | None] = [None] * len(manifests) if left_out is None else left_out
    return [
        _open_one(manifest, splits, data, labelled=labelled, without=rows)
        for manifest, rows in zip(manifests, without, strict=True)
    ]


def _check_splits(manifests: Sequence[Manifest], splits: Sequence[str], keys: str) -> None:
    for split in splits:
        if not any(split in manifest.splits for manifest in manifests):
            there = "; ".join(f"{manifest.root}: {', '.join(manifest.splits)}" for manifest in manifests)
            raise DataError(f"there is no split {split!r} (there are {there}); change {keys}")


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
    manifest: Manifest, splits: Sequence[str], data: DataConfig, *, labelled: bool, without: np.ndarray | None
) -> Corpus:
    present = [split for split in splits if split in manifest.splits]
    names = ", ".join(splits)
    if not present:
        raise DataError(f"{manifest.root} has none of the splits {names}; it has {', '.join(manifest.splits)}")
    if labelled and manifest.spec.num_landmarks == 0:
        raise DataError(f"{manifest.root} is packed without landmarks; task landmarks needs a labelled set")
    rows = manifest.rows(present, without=without)
    corpus = Corpus(manifest, rows, data.image_size, labelled=labelled, fine_size=data.fine_size)
    if len(corpus.rows) == 0 and without is not None and len(without):
        raise DataError(
            f"{manifest.root}: all {len(without)} images of {names} are in protected splits or other datasets too; "
            "take it out of data.path, or see data.dedup.leakage and data.dedup.duplicates"
        )
    if len(corpus.rows) == 0:
        raise DataError(f"{manifest.root} has no {'labelled ' if labelled else ''}image in {names}; pack some")
    return corpus
