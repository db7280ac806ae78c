"""Data leakage: images a pool must not learn from, because a test set has them too, and duplicates inside the pool.

Protected are the splits that are not trained on: those of the pool's own datasets, and those of the labelled datasets
in `data.protect`. A training image leaks when it has the pixels of a protected one, is a near-duplicate of it, or shows
the same patient. What is left out follows from the datasets and the settings alone, so every process finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.duplicates.fingerprints import FINGERPRINT_DTYPE, read_fingerprints
from ddpm_lmk.data.duplicates.search import find_matches, find_originals
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.errors import ConfigError

KINDS = ("same pixels", "near copy", "same patient")
SAME_PIXELS, NEAR_COPY, SAME_PATIENT = KINDS
_MOST_LISTED = 1000  # leakage.json is read by people; the counts are complete

Place = tuple[int, int]  # source, row


class Source:
    """Some images of a dataset: `rows` `[R]`, or those of some splits but for the rows in `without`."""

    def __init__(
        self,
        manifest: Manifest,
        splits: tuple[str, ...] = (),
        *,
        without: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.manifest, self.splits = manifest, splits
        self.rows = np.asarray(manifest.rows(splits, without=without)) if rows is None else rows

    def facts(self) -> dict[str, Any]:
        """Which dataset this is, for a run's record; no names of samples."""
        known = {"dataset": self.manifest.dataset, "fingerprint": self.manifest.fingerprint}
        return {**known, "path": str(self.manifest.root), "splits": list(self.splits), "images": len(self.rows)}


@dataclass(frozen=True)
class Finding:
    """An image, and the earlier or protected one it repeats, each as (source, row)."""

    kind: str
    image: Place
    of: Place


@dataclass(frozen=True)
class Uncompared:
    """Two datasets whose patients cannot be compared, by name, and why."""

    trained_on: str
    protected: str
    reason: str

    def __str__(self) -> str:
        return f"the patients of {self.trained_on} and {self.protected} were not compared: {self.reason}"


@dataclass
class Leakage:
    """What a comparison found. Sources are numbered: first those trained on, then the protected ones."""

    trained: list[Source]
    protected: list[Source]
    leaks: list[Finding] = field(default_factory=list)
    copies: list[Finding] = field(default_factory=list)
    uncompared: list[Uncompared] = field(default_factory=list)


@dataclass(frozen=True)
class Exclusion:
    """What a run leaves out: `rows[m]` of the m-th dataset trained on; `record` is the content of leakage.json."""

    rows: tuple[np.ndarray, ...]
    record: dict[str, Any]


# A process asks again for the same datasets: to check a run, to open its loader, to write its record, for every score.
_KNOWN: dict[tuple[Any, ...], Exclusion] = {}


def exclusion(manifests: Sequence[Manifest], data: DataConfig, cache: CacheSettings | None = None) -> Exclusion:
    """The images of a pool that are not trained on; compared once per process (14 s of one core for a million).

    `cache`: where copies of remote datasets lie.

    Raises:
        ConfigError: a dataset in `data.protect` has no split to protect.
        DataError: a folder is not a dataset, or its fingerprints are damaged.
    """
    guards = [Manifest.open(path, cache) for path in data.protect]
    digests = [tuple(manifest.fingerprint for manifest in part) for part in (manifests, guards)]
    key = (*digests, data.splits, data.dedup.leakage, data.dedup.duplicates)
    if key not in _KNOWN:
        _KNOWN[key] = _compare_pool(manifests, guards, data)
    return _KNOWN[key]


def pool_exclusion(
    pool: Sequence[Manifest],
    labelled: Manifest,
    data: DataConfig,
    *,
    shots: np.ndarray,
    held_out: np.ndarray,
    cache: CacheSettings | None = None,
) -> Exclusion:
    """The images of `data.propagate` that are not trained on: repeats of protected ones, of shots, and of one another.

    Protected are the splits of the labelled set and of the pool's sets that neither is trained on, the shots that are
    `held_out`, and `data.protect`. Rows of the shots themselves are among those left out. Raises as `exclusion`.
    """
    assert data.propagate is not None
    splits = data.propagate.splits
    guards = [Manifest.open(path, cache) for path in data.protect]
    digests = tuple(tuple(manifest.fingerprint for manifest in part) for part in ([labelled], pool, guards))
    key = ("pool", digests, data.splits, splits, shots.tobytes(), held_out.tobytes(), data.dedup)
    if key in _KNOWN:
        return _KNOWN[key]
    is_own = [manifest.fingerprint == labelled.fingerprint for manifest in pool]
    own = np.union1d(shots, held_out)
    trained = [Source(labelled, rows=shots)]  # first, so that of an image found twice the labelled one stays
    for manifest, same in zip(pool, is_own, strict=True):
        names = tuple(split for split in splits if split in manifest.splits)
        trained.append(Source(manifest, names, without=own if same else None))
    used = (*data.splits, *splits) if any(is_own) else data.splits
    protected = [Source(labelled, tuple(split for split in labelled.splits if split not in used))]
    protected += [Source(labelled, rows=held_out)]
    for manifest in (manifest for manifest, same in zip(pool, is_own, strict=True) if not same):
        protected.append(Source(manifest, tuple(split for split in manifest.splits if split not in splits)))
    protected += [_protected_splits(manifest, (*data.splits, *splits)) for manifest in guards]
    found = _left_out(trained, [source for source in protected if len(source.rows)], data, num_labelled=1)
    rows = [np.union1d(rows, own) if same else rows for same, rows in zip(is_own, found.rows[1:], strict=True)]
    _KNOWN[key] = Exclusion(tuple(rows), found.record)
    return _KNOWN[key]


def _compare_pool(manifests: Sequence[Manifest], guards: Sequence[Manifest], data: DataConfig) -> Exclusion:
    splits = [tuple(split for split in data.splits if split in manifest.splits) for manifest in manifests]
    trained = [Source(manifest, names) for manifest, names in zip(manifests, splits, strict=True)]
    rest = [tuple(split for split in manifest.splits if split not in data.splits) for manifest in manifests]
    protected = [Source(manifest, names) for manifest, names in zip(manifests, rest, strict=True) if names]
    protected += [_protected_splits(manifest, data.splits) for manifest in guards]
    if (
        data.dedup.duplicates == "keep" and not protected
    ):  # else a dataset without fingerprints would be decoded for nothing
        nothing = tuple(np.zeros(0, np.int64) for _ in manifests)
        return Exclusion(nothing, _record(Leakage(trained, []), data, left_out=0))
    return _left_out(trained, protected, data)


def _left_out(trained: list[Source], protected: list[Source], data: DataConfig, *, num_labelled: int = 0) -> Exclusion:
    """What of `trained` is left out, as the settings say; the first `num_labelled` sources stay as they are."""
    found = compare(trained, protected)
    found.leaks, found.copies = (
        [each for each in findings if each.image[0] >= num_labelled] for findings in (found.leaks, found.copies)
    )
    if data.dedup.leakage == "leave_out":  # what leaks is counted once, not also as a duplicate
        leaking = {finding.image for finding in found.leaks}
        found.copies = [each for each in found.copies if each.image not in leaking]
    out = {each.image for each in found.leaks} if data.dedup.leakage == "leave_out" else set()
    out |= {each.image for each in found.copies} if data.dedup.duplicates == "leave_out" else set()
    rows = [np.array(sorted(row for s, row in out if s == number), dtype=np.int64) for number in range(len(trained))]
    return Exclusion(tuple(rows), _record(found, data, left_out=len(out)))


def _protected_splits(manifest: Manifest, splits: Sequence[str]) -> Source:
    """Of a dataset in `data.protect`: the splits not trained on, and any test split whatever is trained on."""
    names = tuple(s for s in manifest.splits if s not in splits or s.startswith("test"))
    if not names:
        raise ConfigError(
            f"data.protect names {manifest.root}, whose splits ({', '.join(manifest.splits)}) are all trained on; "
            "name a set with a test split"
        )
    return Source(manifest, names)


def compare(trained: Sequence[Source], protected: Sequence[Source]) -> Leakage:
    """Leaks from `protected` into `trained`, and duplicates inside `trained`, where the first in order is the original.

    A duplicate of an image that leaks by its pixels leaks too, even where the ends of such a chain are not near.
    """
    images = _Images.of(trained, first_source=0)
    leaks = _find_leaks(images, _Images.of(protected, first_source=len(trained)))
    first, is_exact = find_originals(images.fingerprints)
    copies = [
        Finding(SAME_PIXELS if is_exact[place] else NEAR_COPY, images.place(place), images.place(first[place]))
        for place in np.flatnonzero(first != np.arange(len(first))).tolist()
    ]
    _spread(leaks, copies)
    listed = [leaks[image] for image in sorted(leaks)]
    return Leakage(list(trained), list(protected), listed, copies, uncompared_patients(trained, protected))


def find_seen(tested: Source, trained: Sequence[Source]) -> list[Finding]:
    """The images of `tested` that have a duplicate, or their patient, in `trained`; one finding for each of them."""
    seen = _find_leaks(_Images.of([tested], first_source=0), _Images.of(trained, first_source=1))
    return [seen[image] for image in sorted(seen)]


@dataclass(frozen=True)
class _Images:
    """Fingerprints `[N]` of the images of several sources, and where each lies: source and row, `[N, 2]`."""

    fingerprints: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, sources: Sequence[Source], *, first_source: int) -> _Images:
        fingerprints, places = [np.zeros(0, FINGERPRINT_DTYPE)], [np.zeros((0, 2), np.int64)]
        for number, source in enumerate(sources, first_source):
            fingerprints.append(read_fingerprints(source.manifest)[source.rows])
            places.append(np.stack([np.full_like(source.rows, number), source.rows], axis=1))
        return cls(np.concatenate(fingerprints), np.concatenate(places))

    def place(self, number: int) -> Place:
        return int(self.places[number, 0]), int(self.places[number, 1])


def _find_leaks(images: _Images, protected: _Images) -> dict[Place, Finding]:
    """The images that repeat a protected one. Pixels weigh more than looks, and looks more than a patient in common."""
    if not len(protected.fingerprints):
        return {}
    ours, theirs = images.fingerprints, protected.fingerprints
    patients, where = np.unique(theirs["patient"], return_index=True)
    nearest = np.minimum(np.searchsorted(patients, ours["patient"]), len(patients) - 1)
    same = np.flatnonzero((patients[nearest] == ours["patient"]) & (ours["patient"] != 0))
    found = {a: (SAME_PATIENT, b) for a, b in zip(same.tolist(), where[nearest[same]].tolist(), strict=True)}
    for a, b in zip(*(each.tolist() for each in find_matches(ours, theirs)), strict=True):
        is_exact = np.array_equal(ours["pixels"][a], theirs["pixels"][b])
        found[a] = (SAME_PIXELS if is_exact else NEAR_COPY, b)
    return {images.place(a): Finding(kind, images.place(a), protected.place(b)) for a, (kind, b) in found.items()}


def _spread(leaks: dict[Place, Finding], copies: Sequence[Finding]) -> None:
    """Add the duplicates of leaking images to `leaks`."""
    members: dict[Place, list[Place]] = {}
    for copy in copies:
        members.setdefault(copy.of, [copy.of]).append(copy.image)
    for images in members.values():
        by_pixels = [leaks[image] for image in images if image in leaks and leaks[image].kind != SAME_PATIENT]
        for image in images if by_pixels else ():
            if image not in leaks or leaks[image].kind == SAME_PATIENT:
                leaks[image] = Finding(NEAR_COPY, image, by_pixels[0].of)


def uncompared_patients(trained: Sequence[Source], protected: Sequence[Source]) -> list[Uncompared]:
    """The pairs of datasets between which a patient would not be found again, though one of them names patients."""
    datasets = {source.manifest.fingerprint: source.manifest for source in (*trained, *protected)}
    if len(datasets) == 1:  # ids of one dataset are comparable
        return []
    naming = {fingerprint: _Naming.of(manifest) for fingerprint, manifest in datasets.items()}
    pairs = dict.fromkeys(
        (one.manifest.fingerprint, other.manifest.fingerprint) for one in trained for other in protected
    )
    reasons = {(one, other): _why_not_compared(naming[one], naming[other]) for one, other in pairs if one != other}
    return [
        Uncompared(datasets[one].dataset, datasets[other].dataset, reason)
        for (one, other), reason in reasons.items()
        if reason is not None
    ]


@dataclass(frozen=True)
class _Naming:
    """How a dataset names its patients."""

    dataset: str
    key: str | None  # which key made the ids; None: they are not hashed, empty: packed before it was noted
    any: bool
    any_short: bool  # unique inside this dataset only

    @classmethod
    def of(cls, manifest: Manifest) -> _Naming:
        patients = read_fingerprints(manifest)["patient"]
        key = (manifest.settings.get("key_id") or "") if manifest.settings.get("hashed_ids") else None
        return cls(manifest.dataset, key, bool(patients.any()), bool((patients & 1).any()))


def _why_not_compared(one: _Naming, other: _Naming) -> str | None:
    nameless = [each.dataset for each in (one, other) if not each.any]
    if nameless:
        return None if len(nameless) == 2 else f"{nameless[0]} names no patients"
    cure = "pack both with one --id-key"
    if (one.key is None) != (other.key is None):
        return f"ids are hashed in one of them only; {cure}"
    if "" in (one.key, other.key):
        return f"ids are hashed, and an older version did not note with which key; {cure}"
    if one.key != other.key:
        return f"ids were hashed with different keys; {cure}"
    if one.key is None and one.dataset != other.dataset and (one.any_short or other.any_short):
        return f"short ids mean somebody inside one set only; {cure}, or with one --name where ids mean the same"
    return None


def _record(found: Leakage, data: DataConfig, *, left_out: int) -> dict[str, Any]:
    """The content of leakage.json. Images are named by dataset and row: ids may hold what must not leave the shards."""
    sources = [*found.trained, *found.protected]

    def line(finding: Finding) -> dict[str, Any]:
        image, of = ({"dataset": sources[s].manifest.dataset, "row": row} for s, row in (finding.image, finding.of))
        return {"kind": finding.kind, "film": image, "of": of}

    return {
        "settings": {"leaks": data.dedup.leakage, "copies": data.dedup.duplicates},
        "trained_on": [source.facts() for source in found.trained],
        "protected": [source.facts() for source in found.protected],
        "leaks": count_kinds(found.leaks),
        "copies": count_kinds(found.copies),
        "left_out": left_out,
        "overlap": 0 if data.dedup.leakage == "leave_out" else len(found.leaks),
        "patients_not_compared": [asdict(pair) for pair in found.uncompared],
        "listed": {
            "leaks": [line(finding) for finding in found.leaks[:_MOST_LISTED]],
            "copies": [line(finding) for finding in found.copies[:_MOST_LISTED]],
        },
    }


def count_kinds(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings of each kind."""
    return {kind: sum(finding.kind == kind for finding in findings) for kind in KINDS}
