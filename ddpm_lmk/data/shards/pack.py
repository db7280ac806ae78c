"""From a source to shards: `pack` reads labels, decodes in other processes, writes in order of id.

The bytes written depend on the source and the settings alone, not on the number of processes, nor on how often packing
was interrupted: the same call goes on after the last finished shard. A picture that cannot be used is listed in
`refused.jsonl` with the reason; labels that contradict themselves stop the packing (DataError), because a wrong label
is worse than a missing picture.

What came of a packing: counts, why pictures were left out, and what was passed over in those that were taken.

A set of digests that costs tens of bytes each, for corpora of millions of pictures.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk import __version__
from ddpm_lmk.data.duplicates.fingerprints import write_prints
from ddpm_lmk.data.images.dicom_spacing import AT_DETECTOR, UNKNOWN
from ddpm_lmk.data.images.resize import Filter, Window
from ddpm_lmk.data.shards.decoding import Packed, Refused, decoded
from ddpm_lmk.data.shards.labels import Labels
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack_settings import PackSettings, checked_settings
from ddpm_lmk.data.shards.records import Aspect, Encoding
from ddpm_lmk.data.shards.writer import ShardWriter, is_begun, refuse_existing
from ddpm_lmk.data.sources.base import Convention, Kind, RawDataset, RawSample, read_phantom
from ddpm_lmk.data.sources.folder import read_dicom_tree, read_folder
from ddpm_lmk.data.sources.ids import KeyedIds, open_key, write_map
from ddpm_lmk.data.sources.public import read_cephalometric, read_chest, read_hand
from ddpm_lmk.data.sources.table import read_table
from ddpm_lmk.errors import ConfigError, DataError, LmkError
from ddpm_lmk.system.machine import granted_cores, versions

_FIRST_SLOTS = 1 << 12


class DigestSet:
    """Remembers the first 96 bits of digests: of ten million, two differ and are taken for one once in 10^15 corpora.

    Open addressing in two arrays, doubled when they are two thirds full.
    """

    def __init__(self) -> None:
        self._count = 0
        self._high = np.zeros(_FIRST_SLOTS, np.uint64)  # 0: free
        self._low = np.zeros(_FIRST_SLOTS, np.uint32)

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Add a digest of at least 12 bytes; False when it was there already."""
        high, low = int.from_bytes(digest[:8], "little") | 1, int.from_bytes(digest[8:12], "little")
        slot = self._find(high, low)
        if self._high[slot]:
            return False
        self._high[slot], self._low[slot] = high, low
        self._count += 1
        if 3 * self._count > 2 * len(self._high):
            self._grow()
        return True

    def _find(self, high: int, low: int) -> int:
        """The slot of this digest, or the free one where it belongs."""
        slot = low & (len(self._high) - 1)
        while self._high[slot] and (int(self._high[slot]), int(self._low[slot])) != (high, low):
            slot = (slot + 1) & (len(self._high) - 1)
        return slot

    def _grow(self) -> None:
        high, low = self._high, self._low
        self._high, self._low = np.zeros(2 * len(high), np.uint64), np.zeros(2 * len(low), np.uint32)
        for index in np.flatnonzero(high):
            slot = self._find(int(high[index]), int(low[index]))
            self._high[slot], self._low[slot] = high[index], low[index]


_SHOWN = 1000  # refusals kept in memory; all of them are in the file


@dataclass
class PackSummary:
    """What was packed. `refused` are the first lines of refused.jsonl, `reasons` counts all of them by their code."""

    out: Path
    packed: int = 0
    per_split: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    resumed_at: int = 0  # images that an interrupted packing had done before
    seconds: float = 0.0
    image_bytes: int = 0

    @property
    def num_refused(self) -> int:
        """How many pictures were left out."""
        return self.reasons.total()

    def count(self, split: str, images: int, image_bytes: int) -> None:
        """Count packed samples."""
        if images:
            self.packed += images
            self.image_bytes += image_bytes
            self.per_split[split] = self.per_split.get(split, 0) + images

    def refuse(self, line: dict[str, str]) -> None:
        """Count a picture that was left out."""
        self.reasons[line["code"]] += 1
        if len(self.refused) < _SHOWN:
            self.refused.append(line)


class FileNotes:
    """Counts what the files of packed pictures said that their reader should know; `state` outlives an interruption."""

    def __init__(self) -> None:
        self._passed_over: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._at_detector = 0

    def add(self, facts: dict[str, Any] | None) -> None:
        """Count the facts of one picture."""
        facts = facts or {}
        self._passed_over.update(facts.get("passed_over") or ())
        spacing = facts.get("spacing") or ""
        self._unknown.update([spacing] if spacing.startswith(UNKNOWN) else ())
        self._at_detector += spacing.endswith(AT_DETECTOR)

    def state(self) -> dict[str, Any]:
        """What was counted so far."""
        counts = {"passed_over": dict(self._passed_over), "unknown": dict(self._unknown)}
        return {**counts, "at_detector": self._at_detector}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._passed_over, self._unknown = Counter(state["passed_over"]), Counter(state["unknown"])
        self._at_detector = state["at_detector"]

    def sentences(self) -> list[str]:
        """One for each kind of note."""
        found = []
        if self._passed_over:
            named = ", ".join(f"{name} of {count} images" for name, count in sorted(self._passed_over.items()))
            found.append(f"DICOM attributes that do not read, or leave nothing to see, were passed over: {named}")
        for reason, count in sorted(self._unknown.items()):
            found.append(f"the spacing of {count} images is {reason}")
        if self._at_detector:
            found.append(
                f"{self._at_detector} images state their spacing at the detector only, so their millimetres are too "
                "long by the magnification, 5 to 30 % for most films"
            )
        return found


Progress = Callable[[int, int], None]
PHANTOM_COUNTS = {"train": 400, "val": 40, "test": 100}


def pack(
    source: str | Path,
    kind: Kind,
    out: str | Path,
    *,
    name: str | None = None,
    size: int = 256,
    aspect: Aspect = "squeeze",
    filter: Filter = "area",  # noqa: A002 - the field's word
    bits: int = 8,
    window: Window | None = None,
    frame: int | None = None,
    allow_burned_in: bool = False,
    encoding: Encoding = "raw",
    quality: int = 95,
    convention: Convention = "paper",
    split: str | None = None,
    val_fraction: float = 0.0,
    annotator: str = "mean",
    spec: str | None = None,
    unit: str | None = None,
    thresholds: Sequence[float] = (),
    spacing_pair: tuple[int, int] | None = None,
    clip_landmarks: bool = False,
    keep_unlabelled: bool = False,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    id_key: str | Path | None = None,
    id_map: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack `source` (a folder, a list of files, a tar or several; for kind phantom: chest, skull or hand) into `out`.

    Args:
        window: null: voi for kind dicom, else percentile.
        id_key: file with the key that turns paths into ids, made when it is not there; null: OUT.key for kind dicom,
            else ids are paths. id_map: file that is to say, to its owner only, which id is which path.
        workers: decoding processes; null: one per core this process may use.
        progress: called with (images done, images in all).
    Other arguments are the fields of `PackSettings`.

    Raises:
        ConfigError: a setting that cannot be honoured. DataError: contradictory labels, or nothing left to pack.
        RunConflictError: `out` holds something, or another process is packing into it. StoppedError: the file system
            does not answer; the same call goes on.
    """
    settings, out, started = _settings(locals()), Path(out), time.perf_counter()
    refuse_existing(out)
    key_file = Path(id_key or out.absolute().with_name(f"{out.name}.key"))
    with _keys(key_file if settings.hashed_ids else None, out) as keys:
        settings = settings.model_copy(update={"key_id": keys.key_id if keys else None})
        found = _read(Path(source) if kind != "phantom" else str(source), settings, keys)
        found.warnings += [_KEY_NOTE.format(key_file)] if keys is not None else []
        if id_map is not None:
            _write_map(Path(id_map), found)
        summary = _write(found, settings, out, granted_cores() if workers is None else workers, progress)
    write_prints(Manifest.open(out))
    summary.seconds = time.perf_counter() - started
    return summary


_PATIENTS_NOTE = (
    "{} files name their patient, who is not kept without --id-key: patients will not be compared with other packs'"
)
_KEY_NOTE = "ids are hashed with the key in {}; keep it to yourself, and for further packs"


def _settings(given: dict[str, Any]) -> PackSettings:
    """The arguments of `pack`, checked, with what depends on others filled in. Raises ConfigError."""
    kind, is_dicom = given["kind"], given["kind"] == "dicom"
    filled = {
        "name": given["name"] or _default_name(given["source"], kind),
        "window": given["window"] or ("voi" if is_dicom else "percentile"),
        "counts": given["counts"] or (PHANTOM_COUNTS if kind == "phantom" else {}),
        "thresholds": tuple(given["thresholds"]),
        "hashed_ids": is_dicom or given["id_key"] is not None,
    }
    return checked_settings({key: given[key] for key in PackSettings.model_fields if key in given} | filled)


@contextmanager
def _keys(path: Path | None, out: Path) -> Iterator[KeyedIds | None]:
    """Ids under the key of a file; one that was made for nothing goes again: no id was ever made with it."""
    if path is None:
        yield None
        return
    was_there = path.exists()
    keys = open_key(path)
    try:
        yield keys
    except LmkError:
        if not (was_there or is_begun(out)):
            path.unlink()
        raise


def _read(source: Path | str, settings: PackSettings, keys: KeyedIds | None) -> RawDataset:
    if isinstance(source, str):
        return read_phantom(source, counts=settings.counts, seed=settings.seed, size=settings.size)
    split, val_fraction, seed = settings.split or "train", settings.val_fraction, settings.seed
    if settings.kind == "folder":
        return read_folder(source, name=settings.name, split=split, val_fraction=val_fraction, seed=seed, keys=keys)
    if settings.kind == "dicom":
        assert keys is not None
        return read_dicom_tree(source, name=settings.name, split=split, val_fraction=val_fraction, seed=seed, keys=keys)
    if settings.kind == "chest":
        return read_chest(source, convention=settings.convention)
    if settings.kind == "cephalometric":
        return read_cephalometric(source, convention=settings.convention, annotator=settings.annotator)
    if settings.kind == "hand":
        return read_hand(source, spacing_pair=settings.spacing_pair)
    return read_table(
        source,
        name=settings.name,
        split=settings.split,
        annotator=settings.annotator,
        spec=settings.spec,
        unit=settings.unit,
        thresholds=settings.thresholds,
        spacing_pair=settings.spacing_pair,
        keep_unlabelled=settings.keep_unlabelled,
        keys=keys,
    )


def _write_map(path: Path, found: RawDataset) -> None:
    if found.keys is None or found.listing is None:
        raise ConfigError("--id-map says which hashed id is which file, but ids are not hashed; give --id-key too")
    write_map(path, found.listing)


def _write(
    found: RawDataset, settings: PackSettings, out: Path, workers: int, progress: Progress | None
) -> PackSummary:
    position, labels, notes = _Position(), Labels(found.spec, settings), FileNotes()
    with ShardWriter(
        out,
        dataset=settings.name,
        spec=found.spec,
        splits=found.split_names(),
        encoding=settings.encoding,
        bits=settings.bits,
        stored_size=settings.size,
        aspect=settings.aspect,
        settings=settings.model_dump(mode="json"),
        left_out=found.refused,
        made_with={"ddpm-lmk": __version__, **versions(*_DECODERS)},
        state=lambda: {"position": position.state(), "labels": labels.state(), "notes": notes.state()},
    ) as writer:
        samples, summary = _begin(found, writer, position, labels, notes)
        seen = _seen(writer)
        summary.resumed_at = position.done
        for sample, item in decoded(found, samples, settings, workers):
            position.pass_over(sample)
            refusal = _refusal(item, seen)
            if refusal is not None:
                writer.refuse(refusal)
            elif isinstance(item, Packed):
                notes.add(item.facts)
                writer.add(labels.record(item), item.image)
            if progress is not None:
                progress(position.done, len(found.samples))
        labels.raise_if_wrong()
        summary.warnings += labels.warnings() + notes.sentences()
        if found.unkept_patients:
            summary.warnings.append(_PATIENTS_NOTE.format(found.unkept_patients))
        _count(summary, found, writer)
        _raise_if_empty(summary)
    return summary


_DECODERS = ("numpy", "opencv-python-headless", "pillow", "pydicom", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg")


class _Position:
    """How far packing is, and a digest of the samples up to there."""

    def __init__(self) -> None:
        self.done, self._digest = 0, b""

    def pass_over(self, sample: RawSample) -> None:
        self.done += 1
        self._digest = hashlib.sha256(self._digest + sample.digest()).digest()

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "digest": self._digest.hex()}

    def restart(self) -> None:
        self.done, self._digest = 0, b""


def _begin(
    found: RawDataset, writer: ShardWriter, position: _Position, labels: Labels, notes: FileNotes
) -> tuple[Iterator[RawSample], PackSummary]:
    """The samples that are still to be done: all of them, or those after where an interrupted packing was."""
    summary = PackSummary(writer.out, warnings=list(found.warnings))
    samples = iter(found.samples)
    if writer.resumed is None:
        return samples, summary
    noted = writer.resumed
    for sample in islice(samples, noted["position"]["done"]):
        position.pass_over(sample)
    if position.state() == noted["position"]:
        labels.restore(noted["labels"])
        notes.restore(noted["notes"])
        return samples, summary
    summary.warnings.append("the source changed since packing was interrupted: begun anew")
    writer.restart()
    position.restart()
    return iter(found.samples), summary


def _seen(writer: ShardWriter) -> DigestSet:
    seen = DigestSet()
    for block in writer.rows():
        for digest in block["sha256"]:
            seen.add(digest.tobytes())
    return seen


def _refusal(item: Packed | Refused, seen: DigestSet) -> dict[str, str] | None:
    if isinstance(item, Refused):
        return {"id": item.id, "code": item.code, "reason": item.reason}
    is_new = seen.add(hashlib.sha256(item.image).digest()[:16])
    if is_new or item.sample.points is not None:
        return None
    return {"id": item.sample.id, "code": "DUPLICATE", "reason": "the same picture as an earlier one"}


def _count(summary: PackSummary, found: RawDataset, writer: ShardWriter) -> None:
    names = found.split_names()
    for block in writer.rows():
        for code, split in enumerate(names):
            chosen = block["size"][block["split"] == code]
            summary.count(split, len(chosen), int(np.sum(chosen, dtype=np.int64)))
    for line in writer.all_refusals():
        summary.refuse(line)


def _raise_if_empty(summary: PackSummary) -> None:
    if summary.packed:
        return
    counts = ", ".join(f"{code} {count}" for code, count in summary.reasons.most_common())
    first = (
        f" ({counts}), first {summary.refused[0]['id']!r}: {summary.refused[0]['reason']}" if summary.refused else ""
    )
    raise DataError(f"nothing to pack: {summary.num_refused} images were refused{first}")


def _default_name(source: str | Path, kind: Kind) -> str:
    """A dataset name from a folder's, which for DICOM may be a patient's."""
    if kind in ("folder", "table"):
        return re.sub("[^A-Za-z0-9._-]+", "-", Path(source).absolute().name)[:80] or "dataset"
    return f"phantom-{source}" if kind == "phantom" else kind
