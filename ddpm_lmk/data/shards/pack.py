"""`shards pack`: reads the labels of a source, decodes its images in other processes, writes them in order of id.

The bytes written depend on the source and the settings alone, not on the number of processes, nor on how often packing
was interrupted. An image that cannot be used is listed in `refused.jsonl` with the reason; labels that contradict
themselves stop the packing. Memory does not grow with the source.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk import __version__
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.images.dicom_spacing import AT_DETECTOR, UNKNOWN
from ddpm_lmk.data.images.sandbox import answer, decoders, job_settings
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.labels import Findings, Labels
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.writer import ShardWriter, is_begun, refuse_existing
from ddpm_lmk.data.sources.annotated import read_annotated
from ddpm_lmk.data.sources.base import PhantomSource, RawDataset, RawSample, TarMember, folder_split, read_phantom
from ddpm_lmk.data.sources.folder import read_dicom_tree, read_folder
from ddpm_lmk.data.sources.ids import KeyedIds, open_key, write_map
from ddpm_lmk.data.sources.kinds import ANNOTATED
from ddpm_lmk.data.sources.public import read_cephalometric, read_chest, read_hand
from ddpm_lmk.data.sources.table import read_table
from ddpm_lmk.errors import ConfigError, DataError, LmkError, StoppedError
from ddpm_lmk.system.machine import granted_cores, versions
from ddpm_lmk.system.sandbox import Answer

_SHOWN = 1000  # refusals kept in memory; all of them are in the file
_FEW = 32  # so few phantoms are drawn before a process has started
DECODERS = ("numpy", "opencv-python-headless", "pillow", "pydicom", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg")
PATIENTS_NOTE = (
    "{} files name their patient, who is not kept without --id-key: patients will not be compared with other packs'"
)
SPLIT_NOTE = (
    "{} files name their patient, but --val-fraction went by file: films of one patient can be in train and in val; "
    "pack again with --id-key"
)
KEY_NOTE = "ids are hashed with the key in {}; keep it to yourself, and for further packs"

Progress = Callable[[int, int], None]

# Labels and places of the images of a source, none decoded; a reader uses the settings that mean something to it.
READERS: dict[str, Callable[[Path, PackSettings, KeyedIds | None], RawDataset]] = {
    "folder": read_folder,
    "dicom": read_dicom_tree,
    "table": read_table,
    **dict.fromkeys(ANNOTATED, read_annotated),
    "phantom": lambda source, want, keys: read_phantom(str(source), counts=want.counts, seed=want.seed, size=want.size),
    "chest": lambda source, want, keys: read_chest(source, convention=want.convention),
    "cephalometric": lambda source, want, keys: read_cephalometric(
        source, convention=want.convention, annotator=want.annotator
    ),
    "hand": lambda source, want, keys: read_hand(source, spacing_pair=want.spacing_pair),
}


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
        """How many images were left out."""
        return self.reasons.total()


def pack(
    source: str | Path,
    out: str | Path,
    settings: PackSettings,
    *,
    images: str | Path | None = None,
    id_key: str | Path | None = None,
    id_map: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack `source` (a folder, a list of files, a tar or several; for kind phantom: chest, skull or hand) into `out`.

    Args:
        images: the folder of the images that labels of another tool belong to; null: that of the labels.
        id_key: file with the key that turns paths into ids, made when it is not there; null: OUT.key for kinds dicom
            and dicom-sr, else ids are paths.
        id_map: file to write, for its owner only, with the path of every id.
        workers: decoding processes; null: one per core this process may use.
        progress: called with (images done, images in all).

    Raises:
        ConfigError: a setting that cannot be honoured. DataError: contradictory labels, or nothing left to pack.
        RunConflictError: `out` holds something, or another process is packing into it. StoppedError: the file system
            does not answer; the same call resumes.
    """
    started, out = time.perf_counter(), Path(out)
    settings = settings.filled_for(source, has_key=id_key is not None)
    refuse_existing(out)
    key_file = Path(id_key or out.absolute().with_name(f"{out.name}.key"))
    with keys_of(key_file if settings.hashed_ids else None, out) as keys:
        settings = settings.model_copy(update={"key_id": keys.key_id if keys else None})
        if images is None:
            dataset = READERS[settings.kind](Path(source), settings, keys)
        elif settings.kind in ANNOTATED:
            dataset = read_annotated(Path(source), settings, keys, Path(images))
        else:
            raise ConfigError(
                f"shards pack: --images means nothing for kind {settings.kind}; it is for {', '.join(ANNOTATED)}"
            )
        if keys is not None:
            dataset.warnings.append(KEY_NOTE.format(key_file))
        if id_map is not None:
            if keys is None or dataset.listing is None:
                raise ConfigError(
                    "--id-map says which hashed id is which file, but ids are not hashed; give --id-key too"
                )
            write_map(Path(id_map), dataset.listing)
        summary = _write(dataset, settings, out, granted_cores() if workers is None else workers, progress)
    write_fingerprints(Manifest.open(out))  # now, while the pixels are in the page cache; a pool compares by them
    summary.seconds = time.perf_counter() - started
    return summary


@contextmanager
def keys_of(path: Path | None, out: Path) -> Iterator[KeyedIds | None]:
    """Ids under the key of a file; one that was made for nothing is removed: no id was ever made with it."""
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


def _write(
    dataset: RawDataset, settings: PackSettings, out: Path, workers: int, progress: Progress | None
) -> PackSummary:
    position, labels, notes = _Position(), Labels(dataset.spec, settings), FileNotes()
    summary = PackSummary(out.absolute(), warnings=list(dataset.warnings))
    with ShardWriter(
        out,
        dataset=settings.name,
        spec=dataset.spec,
        splits=dataset.split_names(),
        encoding=settings.encoding,
        bits=settings.bits,
        stored_size=settings.size,
        aspect=settings.aspect,
        settings=settings.stated(),
        left_out=dataset.refused,
        # Another decoder may give other pixels: half of a dataset each would be neither.
        made_with={"ddpm-lmk": __version__, **versions(*DECODERS)},
        state=lambda: {"position": asdict(position), "labels": asdict(labels.findings), "notes": asdict(notes)},
    ) as writer:
        samples = iter(dataset.samples)
        if writer.resumed is not None:
            noted = writer.resumed
            for sample in islice(samples, noted["position"]["done"]):
                position.advance(sample)
            if asdict(position) == noted["position"]:
                labels.findings, notes = Findings(**noted["labels"]), FileNotes(**noted["notes"])
                summary.resumed_at = position.done
            else:
                summary.warnings.append("the source changed since packing was interrupted: begun anew")
                writer.restart()
                position, samples = _Position(), iter(dataset.samples)
        few = settings.kind == "phantom" and (workers <= 1 or len(dataset.samples) <= _FEW)
        processes = 0 if few else max(1, min(workers, len(dataset.samples)))
        for sample, fields, image in decode(samples, settings, processes):
            position.advance(sample)
            if "refused" in fields:
                writer.refuse({"id": sample.id, "code": fields["code"], "reason": fields["refused"]})
            else:
                sample = completed(dataset, sample, fields, settings)
                # A copy with a label is kept: dropping it would leave a hole in a labelled set.
                if sample.points is None and writer.holds(image):
                    reason = "the same picture as an earlier one"
                    writer.refuse({"id": sample.id, "code": "DUPLICATE", "reason": reason})
                else:
                    notes.add(fields["facts"])
                    writer.add(labels.record(sample, tuple(fields["native"]), fields["facts"]), image)
            if progress is not None:
                progress(position.done, len(dataset.samples))
        labels.raise_if_wrong()
        summary.warnings += labels.warnings() + notes.sentences()
        if dataset.unkept_patients:
            summary.warnings.append(PATIENTS_NOTE.format(dataset.unkept_patients))
            if 0 < settings.val_fraction < 1 and settings.kind not in ANNOTATED:  # these go by patient all the same
                summary.warnings.append(SPLIT_NOTE.format(dataset.unkept_patients))
        count(summary, writer)
    return summary


def count(summary: PackSummary, writer: ShardWriter) -> None:
    """Count what was written, by this call and by those it resumed; DataError where that is nothing."""
    for block in writer.rows():
        for code, split in enumerate(writer.splits):
            sizes = block["size"][block["split"] == code]
            if len(sizes):
                summary.packed += len(sizes)
                summary.image_bytes += int(np.sum(sizes, dtype=np.int64))
                summary.per_split[split] = summary.per_split.get(split, 0) + len(sizes)
    for line in writer.refusals():
        summary.reasons[line["code"]] += 1
        if len(summary.refused) < _SHOWN:
            summary.refused.append(line)
    if not summary.packed:
        counts = ", ".join(f"{code} {count}" for code, count in summary.reasons.most_common())
        first = [f" ({counts}), first {line['id']!r}: {line['reason']}" for line in summary.refused[:1]]
        raise DataError(f"nothing to pack: {summary.num_refused} images were refused{''.join(first)}")


@dataclass
class _Position:
    """How far packing is, and a digest of the samples up to there."""

    done: int = 0
    digest: str = ""

    def advance(self, sample: RawSample) -> None:
        self.done += 1
        self.digest = hashlib.sha256(self.digest.encode() + sample.digest()).hexdigest()


@dataclass
class FileNotes:
    """Counts facts of the packed files that their user should know."""

    passed_over: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    at_detector: int = 0

    def add(self, facts: dict[str, Any] | None) -> None:
        facts = facts or {}
        for name in facts.get("passed_over") or ():
            self.passed_over[name] = self.passed_over.get(name, 0) + 1
        spacing = facts.get("spacing") or ""
        if spacing.startswith(UNKNOWN):
            self.unknown[spacing] = self.unknown.get(spacing, 0) + 1
        self.at_detector += spacing.endswith(AT_DETECTOR)

    def sentences(self) -> list[str]:
        """One for each kind of note."""
        lines = []
        if self.passed_over:
            named = ", ".join(f"{name} of {count} images" for name, count in sorted(self.passed_over.items()))
            lines.append(f"DICOM attributes that do not read, or leave nothing to see, were passed over: {named}")
        lines += [f"the spacing of {count} images is {reason}" for reason, count in sorted(self.unknown.items())]
        if self.at_detector:
            lines.append(
                f"{self.at_detector} images state their spacing at the detector only, so their millimetres are too "
                "long by the magnification, 5 to 30 % for most films"
            )
        return lines


def decode(
    samples: Iterable[RawSample], settings: PackSettings, workers: int, **wanted: bool
) -> Iterator[tuple[RawSample, dict[str, Any], bytes]]:
    """Every one of `samples` with what `sandbox.answer` made of it.

    Args:
        workers: decoding processes; 0: this one, for phantoms, which are no danger.
        wanted: what a job asks for besides.

    Raises:
        StoppedError: the file system does not answer.
        LaunchError: decoding processes cannot be started.
    """
    waiting: deque[RawSample] = deque()

    def jobs() -> Iterator[dict[str, Any]]:
        for sample in samples:
            waiting.append(sample)
            yield _job(sample, settings) | wanted

    with ExitStack() as stack:
        answers = stack.enter_context(decoders(workers)).answers(jobs()) if workers else _answers_here(jobs())
        for fields, image in answers:
            sample = waiting.popleft()
            if "io_error" in fields:  # says nothing about the image: refused, it would make the result depend on luck
                raise StoppedError(
                    f"image {sample.id!r} cannot be read ({fields['io_error']}); give the same command when the file "
                    "system is back: packing continues"
                )
            yield sample, fields, image


def _answers_here(jobs: Iterable[dict[str, Any]]) -> Iterator[Answer]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # images are too small to share: on a busy machine threads waited 1.5 s for 0.04 s of work
    try:
        yield from map(answer, jobs)
    finally:
        cv2.setNumThreads(threads)


def _job(sample: RawSample, settings: PackSettings) -> dict[str, Any]:
    how = job_settings(settings.model_dump())
    if isinstance(sample.path, PhantomSource):
        source = sample.path
        return {"phantom": (source.kind, source.seed, source.index, source.size), **how}
    where: dict[str, Any] = {"path": str(sample.path)}
    if isinstance(sample.path, TarMember):
        where = {"path": str(sample.path.tar), "offset": sample.path.offset, "size": sample.path.size}
    return where | how | {"native_size": sample.native_size}


def completed(dataset: RawDataset, sample: RawSample, fields: dict[str, Any], settings: PackSettings) -> RawSample:
    """The sample with what only its file knew. What a table states goes before what a file states."""
    if "points" in fields:
        sample = replace(sample, points=np.array(fields["points"]))
    if sample.mm_per_px is None:
        sample = replace(sample, mm_per_px=fields["mm_per_px"])
    if sample.group is not None or not fields.get("patient"):
        return sample
    group, split = None if dataset.keys is None else dataset.keys.of_patient(fields["patient"]), sample.split
    dataset.unkept_patients += group is None
    # By patient, now that one is known: both of their images on the same side. Folders need a key for that, as ever.
    if settings.val_fraction and (group is not None or settings.kind in ANNOTATED):
        split = folder_split(
            group or fields["patient"], settings.split or "train", settings.val_fraction, settings.seed
        )
    return replace(sample, group=group, split=split)
