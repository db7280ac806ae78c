"""From what label files say to a labelled set: whole labels and gaps, millimetres, and the spec made of them.

An image whose label is not whole is left out by name, or kept without; positions that look like placeholders are told.
Where the files are and how they are written is decided by the readers: `table`, and `annotated` for other tools.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.data.images.decode import ReadOptions
from ddpm_lmk.data.images.sandbox import decoders
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import RawDataset, RawSample
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.walk import Listing, begins_as_dicom
from ddpm_lmk.data.spec import SPECS, DatasetSpec, FileSpacing, NoSpacing, pair_spacing
from ddpm_lmk.errors import ConfigError, DataError

SDR_THRESHOLDS_MM = (2.0, 2.5, 3.0, 4.0)  # of the ISBI 2015 challenge, which cephalometric papers report since

_OFTEN, _OFTEN_SHARE = 3, 0.05  # images in which a landmark lies at the very same place, before that is told

Marks = dict[tuple[int, str], tuple[float, float] | str]  # by landmark and annotator: a place, or why there is none


@dataclass
class LabelSet:
    """What label files say.

    Attributes:
        points: `[N, 2]` native px of every image whose label is whole.
        gaps: of every other image, the landmark that it lacks, and why.
    """

    path: Path
    names: tuple[str, ...]
    points: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, image: str, marks: Marks, annotator: str) -> None:
        """The label of an image: of one annotator, or the mean over all of them, of whom each gives all landmarks.

        A mean over other readers for each landmark would move the shape, so a gap of one reader costs the image. With
        one annotator, images that this one did not label fall out.
        """
        readers = sorted({reader for _, reader in marks if annotator in ("mean", reader)})
        places = np.zeros((len(readers), len(self.names), 2))
        for index, name in enumerate(self.names):
            for number, reader in enumerate(readers):
                mark = marks.get((index, reader), f"has no row in {self.path.name}")
                if isinstance(mark, str):
                    self.gaps[image] = index, f"landmark {name} {mark}" + (f" of {reader}" if reader else "")
                    return
                places[number, index] = mark
        if readers:
            self.points[image] = places.mean(0)


def one_spelling(text: str) -> str:
    """A name in one spelling: the same letters may be composed or not, as systems like it."""
    return unicodedata.normalize("NFC", text)


def landmark_title(name: str, where: str) -> str:
    """The name of a landmark without blanks too many; raises DataError where it cannot be printed."""
    title = " ".join(one_spelling(name).split())
    if any(unicodedata.category(letter) == "Cc" for letter in title):  # it will be printed on terminals
        raise DataError(f"{where}: landmark_name {title!r} has control characters; give it plain letters")
    return title


def check_annotator(path: Path, annotator: str, annotators: set[str]) -> None:
    """Raise ConfigError where labels of one annotator are wanted who gave none."""
    if annotator != "mean" and annotator not in annotators:
        raise ConfigError(f"annotator={annotator!r}, but {path.name} has {', '.join(sorted(annotators))}; or mean")


def check_pixels(path: Path, points: Sequence[tuple[float, float]]) -> None:
    """Raise DataError for points that are shares of the sides, as some tools write them."""
    if points and all(0 <= value <= 1 for point in points for value in point):  # all in the corner pixel
        raise DataError(f"{path}: all x and y lie from 0 to 1, which look like shares; wanted pixels: multiply them")


def label(dataset: RawDataset, samples: dict[str, RawSample], labels: LabelSet, settings: PackSettings) -> None:
    """Make `samples` those of the dataset, each with its label; images without one are refused, or kept.

    Raises:
        DataError: millimetres are wanted and cannot be known, or the landmarks are not those of the known spec.
        ConfigError: a spec or spacing pair that is not there.
        LaunchError: a decoding process cannot be started.
    """
    labelled = _join(dataset, samples, labels, keep_unlabelled=settings.keep_unlabelled)
    dataset.samples, num_without = _with_spacing_of_files(labelled)
    num_labelled = sum(sample.points is not None for sample in labelled)
    dataset.spec = _spec_of(labels, settings, num_without, num_labelled)
    if not dataset.spec.sdr_thresholds:
        dataset.warnings.append(
            f"errors will be in {dataset.spec.unit}, and no success rate (SDR) is known for them; "
            "give --threshold, once for each, to have it in reports"
        )


def id_of(sample: RawSample) -> str:
    """By which samples are sorted."""
    return sample.id


def hashed(dataset: RawDataset, keys: KeyedIds, root: Path) -> RawDataset:
    """The same with pseudonymous ids and patients."""
    samples, files = [], []
    for sample in dataset.samples:
        group = None if sample.group is None else keys.of_patient(sample.group)
        samples.append(replace(sample, id=keys.of_path(sample.id), group=group))
        files.append((samples[-1].id, os.path.relpath(str(sample.path), root)))
    refused = [line | {"id": keys.of_path(line["id"])} for line in dataset.refused]
    return replace(dataset, samples=sorted(samples, key=id_of), refused=refused, listing=Listing(files))


def _join(
    dataset: RawDataset, samples: dict[str, RawSample], labels: LabelSet, *, keep_unlabelled: bool
) -> list[RawSample]:
    """Give every image its label; those without are refused, or kept."""
    joined, gaps = [], Counter[int]()
    for sample_id in sorted(samples):
        if sample_id in labels.points:
            joined.append(replace(samples[sample_id], points=labels.points[sample_id]))
            continue
        index, reason = labels.gaps.get(sample_id, (-1, f"no row in {labels.path.name}"))
        gaps.update((index,) if index >= 0 else ())
        if keep_unlabelled:
            joined.append(samples[sample_id])
        else:
            dataset.refuse(sample_id, "NO_LABEL" if index < 0 else "INCOMPLETE_LABEL", reason)
    if gaps:
        which = ", ".join(f"{labels.names[index]} in {count}" for index, count in sorted(gaps.items()))
        what = "kept without label" if keep_unlabelled else "left out"
        dataset.warnings.append(f"{gaps.total()} images are {what} because a landmark is missing or not seen: {which}")
    points = {sample.id: sample.points for sample in joined if sample.points is not None}
    dataset.warnings += _repeated_points(labels.names, points)
    return joined


def _with_spacing_of_files(samples: list[RawSample]) -> tuple[list[RawSample], int]:
    """The samples with the spacing that their DICOM files state, and how many labelled ones stay without.

    Whether errors can be millimetres must be known before anything is decoded. Only headers are read, in a process of
    their own, and only of labelled files whose labels state no spacing. Files that will be refused do not count.
    """
    unknown = [sample for sample in samples if sample.points is not None and sample.mm_per_px is None]
    files = [sample for sample in unknown if isinstance(sample.path, Path) and begins_as_dicom(sample.path)]
    if not files:
        return samples, len(unknown)
    options = asdict(ReadOptions(frame=0, allow_burned_in=True))  # of all that may be taken
    jobs = (
        {"path": str(sample.path), "options": options, "native_size": sample.native_size, "only_spacing": True}
        for sample in files
    )
    stated: dict[str, float] = {}
    num_refused = 0  # whoever decodes them will say why
    with decoders(1) as processes:
        for sample, (fields, _) in zip(files, processes.answers(jobs), strict=True):
            num_refused += "mm_per_px" not in fields
            if fields.get("mm_per_px") is not None:
                stated[sample.id] = fields["mm_per_px"]
    completed = [replace(sample, mm_per_px=stated.get(sample.id, sample.mm_per_px)) for sample in samples]
    return completed, len(unknown) - len(stated) - num_refused


def _repeated_points(names: Sequence[str], points: dict[str, np.ndarray]) -> list[str]:
    """Warnings: positions that repeat to the last digit are placeholders more often than landmarks."""
    lines = []
    twice: dict[tuple[int, int], list[str]] = {}  # pairs of landmarks at one place, and the images
    places: list[Counter[tuple[float, float]]] = [Counter() for _ in names]
    for sample_id, positions in points.items():
        first: dict[tuple[float, float], int] = {}
        for index, (x, y) in enumerate(positions.tolist()):
            places[index][x, y] += 1
            before = first.setdefault((x, y), index)
            if before != index:
                twice.setdefault((before, index), []).append(sample_id)
    for name, counts in zip(names, places):
        ((x, y), count), *_ = counts.most_common(1) or [((0.0, 0.0), 0)]
        if count >= max(_OFTEN, _OFTEN_SHARE * len(points)):
            lines.append(
                f"landmark {name} lies at the same place ({x:g}, {y:g}) in {count} of {len(points)} images; "
                "where that stands for not seen, leave the cells empty"
            )
    for (one, other), ids in twice.items():
        lines.append(
            f"landmarks {names[one]} and {names[other]} lie at the same place in {len(ids)} images, "
            f"first {ids[0]!r}; check that neither is a placeholder"
        )
    return lines


def _spec_of(labels: LabelSet, settings: PackSettings, num_without: int, num_labelled: int) -> DatasetSpec:
    """The spec of a known set with what the settings change, or one made from the table.

    Millimetres only where none of the labelled images is without its spacing: it is never guessed.
    """
    changes: dict[str, object] = {}
    if settings.spacing_pair is not None:
        changes["spacing"] = pair_spacing(settings.spacing_pair)
    if settings.unit:
        changes["unit"] = settings.unit
    if settings.thresholds:
        changes["sdr_thresholds"] = settings.thresholds
    if settings.spec is not None:
        return _checked_spec(dict(_known_spec(settings.spec, labels)) | changes)
    spacing = changes.setdefault("spacing", NoSpacing() if num_without else FileSpacing())
    if settings.unit == "mm" and isinstance(spacing, NoSpacing):
        raise DataError(
            f"unit=mm, but {num_without} of {num_labelled} labelled images have no mm_per_pixel, nor are they DICOM "
            "files that state it; fill it in or use px"
        )
    unit = changes.setdefault("unit", "px" if isinstance(spacing, NoSpacing) else "mm")
    changes.setdefault("sdr_thresholds", SDR_THRESHOLDS_MM if unit == "mm" else ())
    return _checked_spec({"name": settings.name, "landmark_names": labels.names} | changes)


def _known_spec(key: str, labels: LabelSet) -> DatasetSpec:
    if key not in SPECS:
        raise ConfigError(f"spec={key!r} is not known; wanted one of {', '.join(SPECS)}")
    spec, names = SPECS[key], labels.names
    if len(names) != spec.num_landmarks:
        raise DataError(f"{labels.path} has {len(names)} landmarks, spec {key} has {spec.num_landmarks}")
    # Other names are fine, in another language; the same names elsewhere would be scored as other landmarks.
    if names != spec.landmark_names and set(names) == set(spec.landmark_names):
        raise DataError(f"{labels.path} has the landmarks of spec {key} in another order; renumber landmark_index")
    return spec


def _checked_spec(values: dict[str, object]) -> DatasetSpec:
    try:
        return DatasetSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"shards pack: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
