"""Samples of a source to pictures ready to be written, in their order, by decoding processes.

What a file says beside its pixels is merged with what its labels say here: spacing, patient, split. Memory does not
grow with the source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.images.decode import read_content
from ddpm_lmk.data.images.dicom import is_dicom
from ddpm_lmk.data.images.image import ReadOptions, RefusedImageError
from ddpm_lmk.data.images.sandbox import answer, decoders
from ddpm_lmk.data.shards.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import PhantomSource, RawDataset, RawSample, TarMember, folder_split
from ddpm_lmk.errors import StoppedError
from ddpm_lmk.system.sandbox import Answer

_FEW = 32  # so few phantoms are drawn before a process has started


@dataclass(frozen=True)
class Packed:
    """A picture ready to be written; `native` is width and height in native pixels, `facts` are the file's."""

    sample: RawSample
    native: tuple[int, int]
    image: bytes
    facts: dict[str, Any] | None


@dataclass(frozen=True)
class Refused:
    """A picture that is left out."""

    id: str
    code: str
    reason: str


def decoded(
    found: RawDataset, samples: Iterable[RawSample], settings: PackSettings, workers: int
) -> Iterator[tuple[RawSample, Packed | Refused]]:
    """Every one of `samples`, which are of `found`, with its picture or the reason why there is none.

    Files are decoded in other processes, whatever `workers` is; phantoms, which are no danger, also in this one.

    Raises:
        StoppedError: the file system does not answer.
        LaunchError: decoding processes cannot be started.
    """
    waiting: deque[RawSample] = deque()

    def messages() -> Iterator[dict[str, Any]]:
        for sample in samples:
            waiting.append(sample)
            yield _message(sample, settings)

    if settings.kind == "phantom" and (workers <= 1 or len(found.samples) <= _FEW):
        for said in _answered_here(messages()):
            yield _paired(found, waiting.popleft(), said, settings)
        return
    with decoders(min(workers, len(found.samples))) as processes:
        for said in processes.answers(messages()):
            yield _paired(found, waiting.popleft(), said, settings)


def with_spacing_of_files(samples: Sequence[RawSample]) -> tuple[list[RawSample], int]:
    """The samples with the spacing that their DICOM files state, and how many labelled ones stay without.

    Whether errors can be millimetres must be known before anything is decoded. Only headers are read, in a process of
    their own, and only of labelled files whose labels state no spacing. Files that will be refused do not count.

    Raises:
        LaunchError: a decoding process cannot be started.
    """
    unknown = {sample.id: sample for sample in samples if sample.points is not None and sample.mm_per_px is None}
    asked = [sample for sample in unknown.values() if isinstance(sample.path, Path) and begins_as_dicom(sample.path)]
    if not asked:
        return list(samples), len(unknown)
    options = asdict(ReadOptions(frame=0, allow_burned_in=True))  # of all that may be taken
    jobs = (
        {"path": str(sample.path), "options": options, "native_size": sample.native_size, "only_spacing": True}
        for sample in asked
    )
    with decoders(1) as processes:
        said = {sample.id: fields for sample, (fields, _) in zip(asked, processes.answers(jobs), strict=True)}
    stated = {name: fields["mm_per_px"] for name, fields in said.items() if fields.get("mm_per_px") is not None}
    left_out = sum("mm_per_px" not in fields for fields in said.values())  # whoever decodes them will say why
    found = [replace(sample, mm_per_px=stated.get(sample.id, sample.mm_per_px)) for sample in samples]
    return found, len(unknown) - len(stated) - left_out


def begins_as_dicom(path: Path) -> bool:
    """Is it a DICOM file by its first bytes? Pipes are not waited for, and what cannot be read is none."""
    try:
        return is_dicom(read_content(path, size=_DICOM_HEAD))
    except (OSError, RefusedImageError):
        return False


_DICOM_HEAD = 132  # the preamble and `DICM`


def _answered_here(messages: Iterable[dict[str, Any]]) -> Iterator[Answer]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures are too small to share: on a busy machine threads waited 1.5 s for 0.04 s of work
    try:
        yield from map(answer, messages)
    finally:
        cv2.setNumThreads(threads)


def _message(sample: RawSample, settings: PackSettings) -> dict[str, Any]:
    store = settings.model_dump(include={"size", "aspect", "filter", "window", "bits", "encoding", "quality"})
    if isinstance(sample.path, PhantomSource):
        source = sample.path
        return {"phantom": (source.kind, source.seed, source.index, source.size), "store": store}
    options = ReadOptions(
        frame=settings.frame,
        voi=settings.window == "voi",
        allow_burned_in=settings.allow_burned_in,
        only_dicom=settings.kind == "dicom",
    )
    where: dict[str, Any] = {"path": str(sample.path)}
    if isinstance(sample.path, TarMember):
        where = {"path": str(sample.path.tar), "offset": sample.path.offset, "size": sample.path.size}
    return where | {"options": asdict(options), "native_size": sample.native_size, "store": store}


def _paired(
    found: RawDataset, sample: RawSample, said: Answer, settings: PackSettings
) -> tuple[RawSample, Packed | Refused]:
    fields, image = said
    if "io_error" in fields:
        raise StoppedError(
            f"image {sample.id!r} cannot be read ({fields['io_error']}); give the same command when the file system "
            "is back: packing continues"
        )
    if "refused" in fields:
        return sample, Refused(sample.id, fields["code"], fields["refused"])
    width, height = fields["native"]
    return sample, Packed(_completed(found, sample, fields, settings), (width, height), image, fields["facts"])


def _completed(found: RawDataset, sample: RawSample, said: dict[str, Any], settings: PackSettings) -> RawSample:
    """The sample with what only its file knew. What a table states goes before what a file states."""
    if "points" in said:
        sample = replace(sample, points=np.array(said["points"]))
    if sample.mm_per_px is None:
        sample = replace(sample, mm_per_px=said["mm_per_px"])
    if sample.group is None and found.keys is None and said.get("patient"):
        found.unkept_patients += 1
    if sample.group is None and found.keys is not None and said.get("patient"):
        group = found.keys.of_patient(said["patient"])
        split = sample.split
        if settings.val_fraction:
            split = folder_split(group, settings.split or "train", settings.val_fraction, settings.seed)
        sample = replace(sample, group=group, split=split)
    return sample
