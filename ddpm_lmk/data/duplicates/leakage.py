"""What a pool must not learn from: films that are also in a test set, and copies of films it already has.

Protected are the splits that are not trained on: those of the pool's own sets, and those of the labelled sets named in
`data.protect`. A training film leaks when it has the pixels of a protected one, is a near copy of it, or shows the same
patient. What is left out follows from the packs and the settings alone, so every process of a run finds the same.

Keeps what is costly to find and follows from its inputs alone, in the cache of this machine, for the next process.

Comparing the films of a pool takes 2 s for 200,000 chests, but in a crowded pool the time grows with the square of
their number: ten million are compared once, not once per process and restart. Processes that want the same thing wait
for the first of them. What is damaged, or cannot be kept, is found again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.duplicates.fingerprints import PRINT_DTYPE, prints_of
from ddpm_lmk.data.duplicates.search import MOST_DETAIL_BITS, RADIUS, copies_of, first_of_its_kind
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.errors import ConfigError, ResourceError
from ddpm_lmk.system import files

log = logging.getLogger(__name__)


def remembered(folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned for this `key` before, or returns now; both are plain JSON."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(folder / f"{name}.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        log.info("%s cannot be written (%s): what is found is not kept", folder, error.strerror)
        return make()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(path)
        if known is not None:
            return known
        made = make()
        try:
            files.write_json(path, {"digest": _digest(made), "content": made})
        except ResourceError as error:
            log.info("%s", error)
        return made


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_bytes())
        return kept["content"] if kept["digest"] == _digest(kept["content"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


KINDS = ("same pixels", "near copy", "same patient")
_AT_ONCE = 1 << 20  # prints in memory at a time
_MOST_LISTED = 1000
_REMEMBER_FROM = 100_000  # films; fewer are compared again in a second

Place = tuple[int, int]  # source, row


class Source:
    """Some films of a packed set: those of some splits, less some rows, or a list of rows."""

    def __init__(
        self,
        manifest: Manifest,
        splits: tuple[str, ...] = (),
        *,
        without: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.manifest, self.splits = manifest, splits
        self._without, self._rows = without, rows

    def rows(self) -> np.ndarray:
        """Their rows, `[R]`."""
        return np.asarray(self.manifest.rows(self.splits, without=self._without)) if self._rows is None else self._rows

    def facts(self) -> dict[str, Any]:
        """Which set this is, for a run's record; no names of samples."""
        known = {"dataset": self.manifest.dataset, "fingerprint": self.manifest.fingerprint}
        return {**known, "path": str(self.manifest.root), "splits": list(self.splits), "images": len(self.rows())}


@dataclass(frozen=True)
class Finding:
    """A film and the earlier or protected one it repeats, each as (source, row)."""

    kind: str
    film: Place
    of: Place


@dataclass(frozen=True)
class Uncompared:
    """Two sets whose patients cannot be compared, by name, and why."""

    trained_on: str
    protected: str
    reason: str

    def __str__(self) -> str:
        return f"the patients of {self.trained_on} and {self.protected} were not compared: {self.reason}"


@dataclass
class Leakage:
    """What was compared and found. Sources are numbered: first the sets trained on, then the protected ones."""

    trained: list[Source]
    protected: list[Source]
    leaks: list[Finding] = field(default_factory=list)
    copies: list[Finding] = field(default_factory=list)
    uncompared: list[Uncompared] = field(default_factory=list)

    def rows_of(self, findings: Sequence[Finding], source: int) -> np.ndarray:
        """Rows of one source among the findings."""
        return np.array(sorted(each.film[1] for each in findings if each.film[0] == source), dtype=np.int64)


@dataclass(frozen=True)
class Exclusion:
    """What a run leaves out: `rows[m]` of the m-th set trained on; `record` is the content of leakage.json."""

    rows: tuple[np.ndarray, ...]
    record: dict[str, Any]


def exclusion(manifests: Sequence[Manifest], data: DataConfig, cache: CacheSettings | None = None) -> Exclusion:
    """The films of a pool that are not trained on. Found once per process, for large pools once per machine.

    Raises:
        ConfigError: a set in `data.protect` has no split to protect.
        DataError: a folder is not a pack, or its prints are damaged.
    """
    cache = cache or CacheSettings()
    guards = tuple(Manifest.open(path, cache) for path in data.protect)
    packs = tuple(map(_Opened, manifests)), tuple(map(_Opened, guards))
    settings = data.splits, data.dedup.leakage, data.dedup.duplicates
    if sum(map(len, manifests)) < _REMEMBER_FROM:
        return _exclusion(*packs, *settings)
    names = [[(str(each.manifest.root), each.manifest.fingerprint) for each in part] for part in packs]
    key = {"version": 2, "radius": RADIUS, "detail": MOST_DETAIL_BITS, "packs": names, "settings": settings}

    def make() -> dict[str, Any]:
        found = _exclusion(*packs, *settings)
        return {"rows": [rows.tolist() for rows in found.rows], "record": found.record}

    kept = remembered(cache.root / "compared", key, make)
    return Exclusion(tuple(np.array(rows, dtype=np.int64) for rows in kept["rows"]), kept["record"])


class _Opened:
    """A manifest as a key of the cache: equal where the packed data is."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opened) and other.manifest.fingerprint == self.manifest.fingerprint

    def __hash__(self) -> int:
        return hash(self.manifest.fingerprint)


@lru_cache(maxsize=8)
def _exclusion(
    pool: tuple[_Opened, ...], guards: tuple[_Opened, ...], splits: tuple[str, ...], leaks: str, copies: str
) -> Exclusion:
    trained = [Source(each.manifest, tuple(s for s in splits if s in each.manifest.splits)) for each in pool]
    protected = [Source(source.manifest, _rest(source.manifest, splits)) for source in trained]
    protected = [source for source in protected if source.splits] + [_guarded(each.manifest, splits) for each in guards]
    if copies == "keep" and not protected:
        return Exclusion(tuple(np.zeros(0, np.int64) for _ in pool), _record(Leakage(trained, []), leaks, copies, 0))
    found = compare(trained, protected)
    if leaks == "leave_out":
        gone = {finding.film for finding in found.leaks}
        found.copies = [each for each in found.copies if each.film not in gone]
    out = [*(found.leaks if leaks == "leave_out" else ()), *(found.copies if copies == "leave_out" else ())]
    rows = tuple(np.unique(found.rows_of(out, number)) for number in range(len(trained)))
    return Exclusion(rows, _record(found, leaks, copies, sum(map(len, rows))))


def _rest(manifest: Manifest, splits: Sequence[str]) -> tuple[str, ...]:
    return tuple(split for split in manifest.splits if split not in splits)


def _guarded(manifest: Manifest, splits: Sequence[str]) -> Source:
    """The splits of a labelled set to protect: those not trained on, and any test split whatever is trained on."""
    names = tuple(s for s in manifest.splits if s not in splits or s.startswith("test"))
    if not names:
        raise ConfigError(
            f"data.protect names {manifest.root}, whose splits ({', '.join(manifest.splits)}) are all trained on; "
            "name a set with a test split"
        )
    return Source(manifest, names)


def compare(trained: Sequence[Source], protected: Sequence[Source]) -> Leakage:
    """Leaks from `protected` into `trained`, and copies inside `trained`: the first film, in order, is the original.

    A copy of a film that leaks by its picture leaks too, even where the two ends of such a chain are not alike enough.
    """
    found = Leakage(list(trained), list(protected), uncompared=uncompared_patients(trained, protected))
    guard, places = _gathered(protected, first=len(trained))
    leaks: dict[Place, Finding] = {}
    if len(guard):
        for number, source in enumerate(trained):
            leaks |= {finding.film: finding for finding in _leaks(source, number, guard, places)}
    prints, places = _gathered(trained, first=0)
    first, is_exact = first_of_its_kind(prints)
    repeated = np.flatnonzero(first != np.arange(len(first)))
    for place in repeated.tolist():
        kind = KINDS[0] if is_exact[place] else KINDS[1]
        found.copies.append(Finding(kind, _place(places, place), _place(places, int(first[place]))))
    _spread(leaks, found.copies)
    found.leaks = [leaks[film] for film in sorted(leaks)]
    return found


def seen(tested: Source, trained: Sequence[Source]) -> list[Finding]:
    """The films of `tested` that have a copy, or their patient, in `trained`; one finding for each of them."""
    guard, places = _gathered(trained, first=1)
    return _leaks(tested, 0, guard, places) if len(guard) else []


def uncompared_patients(trained: Sequence[Source], protected: Sequence[Source]) -> list[Uncompared]:
    """The pairs of sets between which a patient would not be found again, though one of them names patients."""
    sets = {source.manifest.fingerprint: source.manifest for source in (*trained, *protected)}
    naming = {fingerprint: _naming(manifest) for fingerprint, manifest in sets.items()} if len(sets) > 1 else {}
    pairs = dict.fromkeys(
        (one.manifest.fingerprint, other.manifest.fingerprint) for one in trained for other in protected
    )
    found = []
    for one, other in pairs:
        reason = None if one == other else _why_not_compared(naming[one], naming[other])
        if reason is not None:
            found.append(Uncompared(sets[one].dataset, sets[other].dataset, reason))
    return found


@dataclass(frozen=True)
class _Naming:
    """How a set names its patients."""

    dataset: str
    key: str | None  # which key made the ids; None: they are not hashed, empty: packed before it was noted
    any: bool
    any_short: bool  # mean somebody inside this set only


def _naming(manifest: Manifest) -> _Naming:
    patients = prints_of(manifest)["patient"]
    key = (manifest.settings.get("key_id") or "") if manifest.settings.get("hashed_ids") else None
    return _Naming(manifest.dataset, key, bool(patients.any()), bool((patients & 1).any()))


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


def _spread(leaks: dict[Place, Finding], copies: Sequence[Finding]) -> None:
    """Add the copies of leaking films to `leaks`."""
    groups: dict[Place, list[Place]] = {}
    for copy in copies:
        groups.setdefault(copy.of, [copy.of]).append(copy.film)
    for films in groups.values():
        known = [leaks[film] for film in films if film in leaks and leaks[film].kind != KINDS[2]]
        for film in films if known else ():
            if film not in leaks or leaks[film].kind == KINDS[2]:
                leaks[film] = Finding(KINDS[1], film, known[0].of)


def _leaks(source: Source, number: int, guard: np.ndarray, places: np.ndarray) -> list[Finding]:
    rows, prints, found = source.rows(), prints_of(source.manifest), {}
    patients, where = np.unique(guard["patient"], return_index=True)
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        here = prints[part]
        place = np.minimum(np.searchsorted(patients, here["patient"]), len(patients) - 1)
        same_patient = np.flatnonzero((patients[place] == here["patient"]) & (here["patient"] != 0))
        for a, b in zip(same_patient.tolist(), where[place[same_patient]].tolist()):
            found[int(part[a])] = (KINDS[2], b)
        for a, b in zip(*(each.tolist() for each in copies_of(here, guard))):
            is_exact = np.array_equal(here["pixels"][a], guard["pixels"][b])
            found[int(part[a])] = (KINDS[0] if is_exact else KINDS[1], b)
    return [Finding(kind, (number, row), _place(places, of)) for row, (kind, of) in sorted(found.items())]


def _gathered(sources: Sequence[Source], *, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Prints of all sources `[N]`, and the (source, row) of each `[N, 2]`; sources count from `first`."""
    prints, places = [np.zeros(0, PRINT_DTYPE)], [np.zeros((0, 2), np.int64)]
    for number, source in enumerate(sources, first):
        rows = source.rows()
        prints.append(prints_of(source.manifest)[rows])
        places.append(np.stack([np.full(len(rows), number), rows], axis=1))
    return np.concatenate(prints), np.concatenate(places)


def _place(places: np.ndarray, number: int) -> Place:
    return int(places[number, 0]), int(places[number, 1])


def _record(found: Leakage, leaks: str, copies: str, left_out: int) -> dict[str, Any]:
    """The content of leakage.json. Films are named by set and row: ids may hold what must not leave the packs."""
    sources = [*found.trained, *found.protected]

    def line(finding: Finding) -> dict[str, Any]:
        named = {
            key: {"dataset": sources[s].manifest.dataset, "row": r}
            for key, (s, r) in (("film", finding.film), ("of", finding.of))
        }
        return {"kind": finding.kind, **named}

    overlap = [] if leaks == "leave_out" else found.leaks
    return {
        "settings": {"leaks": leaks, "copies": copies},
        "trained_on": [source.facts() for source in found.trained],
        "protected": [source.facts() for source in found.protected],
        "leaks": count_kinds(found.leaks),
        "copies": count_kinds(found.copies),
        "left_out": left_out,
        "overlap": len(overlap),
        "patients_not_compared": [asdict(pair) for pair in found.uncompared],
        "listed": {
            "leaks": [line(finding) for finding in found.leaks[:_MOST_LISTED]],
            "copies": [line(finding) for finding in found.copies[:_MOST_LISTED]],
        },
    }


def count_kinds(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings of each kind."""
    return {kind: sum(finding.kind == kind for finding in findings) for kind in KINDS}
