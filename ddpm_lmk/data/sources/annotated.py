"""Labels of other tools (`data.annotations`), and the images they belong to.

A label file names an image as its tool knew it: a PNG copy of a DICOM file, a path on another machine, an upload. No
such name is opened. The images below one folder are listed, and each label is given to the one whose path it fits best;
what fits two is an error, because a label on the wrong image is worse than none.
"""

from __future__ import annotations

import difflib
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from ddpm_lmk.data.annotations.formats import LABEL_FORMATS
from ddpm_lmk.data.annotations.image import CORNER_PX, AnnotatedImage, Annotations, Point
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import RawDataset, RawSample, check_split_name, folder_split
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.labelled import LabelSet, Marks, check_annotator, check_pixels, hashed, label, landmark_title
from ddpm_lmk.data.sources.walk import images_below, unique_ids, walk, without_suffix
from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError

_SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


def read_annotated(
    source: Path, settings: PackSettings, keys: KeyedIds | None, images: Path | None = None
) -> RawDataset:
    """Read label files and find their images.

    Args:
        source: a label file, or a folder of them.
        images: the folder of the images; None: that of the labels.

    Splits are `settings.split`, else what the tool says, else the folder `train`, `val` or `test` of an image. Where
    there is none of these it is train, of which a share `val_fraction` goes to val by patient or id.

    Raises:
        DataError: files that do not read, labels that contradict themselves, fit two images or have unknown names.
        ConfigError: an annotator, spec or spacing pair that is not there, or a validation share beside stated splits.
        LaunchError: a decoding process cannot be started.
    """
    kind = LABEL_FORMATS[settings.kind]
    root = source if source.is_dir() else source.parent
    files = [source] if source.is_file() else _label_files(source, kind.suffixes)
    found = kind.read(files, root, settings)
    if kind.find_images is not None:
        found = kind.find_images(found, images or root)
    dataset = RawDataset(DatasetSpec(name=settings.name), [], keys=keys, warnings=list(found.warnings))
    if settings.val_fraction:  # both, whatever is in them: files may name patients, by whom the share is taken then
        dataset.splits = (settings.split or "train", "val")
    if found.passed_over:
        counts = ", ".join(f"{what} {count}" for what, count in found.passed_over.most_common(5))
        dataset.warnings.append(f"no landmarks, so not looked at: {counts}")
    if not found.images:
        raise DataError(f"{source} has no labelled image{''.join(f'; {line}' for line in dataset.warnings)}")
    listing = _Listing(images or root, [image.name for image in found.images])
    origin = settings.pixel_origin or kind.origin
    by_file = _by_file(found.images, listing, dataset)
    names = _landmarks(found, source, settings, dataset)
    labels = LabelSet(source, names)
    samples: dict[str, RawSample] = {}
    for file, annotated in by_file.items():
        sample_id = listing.ids[file]
        samples[sample_id] = _sample(sample_id, file, annotated, listing.root, settings)
        marks = _marks(annotated, names, CORNER_PX if origin == "corner" else 0.0)
        if marks:
            labels.add(sample_id, marks, settings.annotator)
    check_annotator(source, settings.annotator, {image.annotator for image in found.images})
    places = (place for image in found.images for place in image.points.values())
    check_pixels(source, [place for place in places if not isinstance(place, str)])
    if num_hidden := sum(image.num_hidden for image in found.images):
        dataset.warnings.append(f"{num_hidden} points are marked as hidden; shards keep them as any other")
    _add_unlabelled(samples, listing, settings, dataset)
    label(dataset, samples, labels, settings)
    return dataset if keys is None else hashed(dataset, keys, listing.root)


def _label_files(source: Path, suffixes: frozenset[str] | None) -> list[Path]:
    if not source.is_dir():
        raise DataError(f"{source} is not there; wanted a file of labels, or a folder of them")
    files = sorted(source / name for name in walk(source, suffixes, Counter()))
    if not files:
        raise DataError(f"no label file below {source}; looked for {' '.join(sorted(suffixes or ()))}")
    return files


class _Listing:
    """The images below a folder: their ids, and which of them a name of the labels means."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is no folder; wanted the folder of the images")
        self.root = root
        self.files, _ = images_below(root)
        self.ids = dict(zip(self.files, unique_ids(self.files)))
        self._by_stem: dict[str, list[str]] = {}
        for file in self.files:
            self._by_stem.setdefault(_stem(file), []).append(file)
        # Names are mostly paths below one folder: where there is just one that has all of them, it is that.
        places = [places for name in names if (places := {place for place, _, _ in self._fits(name)})]
        common = set.intersection(*places) - {None} if places else set()
        self._place = common.pop() if len(common) == 1 else None

    def _fits(self, name: str) -> list[tuple[str | None, int, str]]:
        """Files with the stem of a name: the folder in which it is the whole path, how many parts agree, the file."""
        parts = _parts(name)
        fits = []
        for file in self._by_stem.get(_stem(name), ()):
            there = _parts(file)
            shared = _shared(parts[:-1], there[:-1])
            place = "/".join(there[: len(there) - len(parts)]) if shared == len(parts) - 1 else None
            # a suffix that agrees counts less than a folder
            fits.append((place, 2 * shared + (there[-1] == parts[-1]), file))
        return fits

    def find(self, name: str) -> str | None:
        """The file that fits a name best: by its folders from the last one up, then by its suffix; None: none does.

        Raises:
            DataError: several fit it equally well.
        """
        fits = self._fits(name)
        if self._place is not None:
            fits = [fit for fit in fits if fit[0] == self._place] or fits
        best = [file for _, agreement, file in fits if agreement == max(fit[1] for fit in fits)]
        if len(best) > 1:
            raise DataError(
                f"image {name!r:.200} of the labels may be {best[0]} or {best[1]} below {self.root}; "
                "give the folder that holds one of them, or write paths into the labels"
            )
        return best[0] if best else None


def _parts(name: str) -> list[str]:
    parts = posixpath.normpath(unicodedata.normalize("NFC", name)).split("/")
    return [part for part in parts if part not in ("", "..")] or [""]


def _stem(name: str) -> str:
    return without_suffix(_parts(name)[-1])


def _shared(folders: Sequence[str], others: Sequence[str]) -> int:
    """How many folders of two paths are the same, counted from the last."""
    pairs = zip(reversed(folders), reversed(others))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _by_file(
    images: Sequence[AnnotatedImage], listing: _Listing, dataset: RawDataset
) -> dict[str, list[AnnotatedImage]]:
    """What is said of each image file; images that are not there are refused."""
    by_file: dict[str, list[AnnotatedImage]] = {}
    names: dict[str, str] = {}
    elsewhere = []
    for image in images:
        file = listing.find(image.name)
        if file is None:
            dataset.refuse(image.name, "MISSING", f"no image of this name below {listing.root}")
            continue
        if names.setdefault(file, image.name) != image.name or image.annotator in {
            other.annotator for other in by_file.get(file, ())
        }:
            raise DataError(
                f"image {file} is labelled twice, as {names[file]!r:.200} and {image.name!r:.200}; keep one"
            )
        by_file.setdefault(file, []).append(image)
        folders = _parts(image.name)[:-1]
        if folders and not _shared(folders, _parts(file)[:-1]):
            elsewhere.append(f"{image.name} is {file}")
    if not by_file:
        first = images[0].name if images else ""
        raise DataError(
            f"none of the {len(images)} labelled images is below {listing.root}, first {first!r:.200}; "
            "give the folder of the images with --images"
        )
    if elsewhere:
        dataset.warnings.append(f"{len(elsewhere)} images were found by their name in another folder: {elsewhere[0]}")
    return by_file


def _landmarks(found: Annotations, source: Path, settings: PackSettings, dataset: RawDataset) -> tuple[str, ...]:
    """Names of the landmarks in order: as told, as the tool lists them, as a known set has them, or as they come.

    Raises:
        DataError: a point has another name, or there is no point at all.
    """
    seen = dict.fromkeys(
        landmark_title(name, str(source))
        for image in found.images
        for name, place in image.points.items()
        if not isinstance(place, str)
    )
    if not seen:
        gaps = (f", first {name} {place}" for image in found.images for name, place in image.points.items())
        raise DataError(f"{source} has no point of any landmark{next(gaps, '')}; nothing to train on")
    declared = settings.landmarks or tuple(landmark_title(name, str(source)) for name in found.landmarks)
    unknown = [name for name in seen if declared and name not in declared]
    if unknown:
        near = difflib.get_close_matches(unknown[0], declared, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"wanted {', '.join(declared[:8])}"
        raise DataError(f"{source}: point {unknown[0]!r:.80} is none of the {len(declared)} landmarks; {hint}")
    never = [name for name in declared if name not in seen]
    if never and not settings.landmarks:
        dataset.warnings.append(f"{len(never)} landmarks have no point in any image and are left out: {never[0]}")
    names = settings.landmarks or tuple(name for name in declared if name in seen) or tuple(seen)
    known = SPECS[settings.spec].landmark_names if settings.spec in SPECS else ()
    return known if set(known) == set(names) else names


def _marks(images: Sequence[AnnotatedImage], names: Sequence[str], shift: float) -> Marks:
    """Landmarks of one image, of every annotator, in our pixels."""
    marks: Marks = {}
    for image in images:
        titled = {landmark_title(name, image.name): place for name, place in image.points.items()}
        for index, name in enumerate(names if titled else ()):
            place: Point | str = titled.get(name, "is not labelled")
            marks[index, image.annotator] = place if isinstance(place, str) else (place[0] - shift, place[1] - shift)
    return marks


def _sample(
    sample_id: str, file: str, annotated: Sequence[AnnotatedImage], root: Path, settings: PackSettings
) -> RawSample:
    first = annotated[0]
    group = next((image.patient for image in annotated if image.patient), None)
    return RawSample(
        id=sample_id,
        path=root / file,
        split=_split(first.split, file, group or sample_id, settings),
        native_size=next((image.size for image in annotated if image.size), None),
        mm_per_px=settings.mm_per_px or first.mm_per_px,
        group=group,
    )


def _split(stated: str | None, file: str, key: str, settings: PackSettings) -> str:
    folder = _SPLITS.get(file.split("/", maxsplit=1)[0].lower()) if "/" in file else None
    split = _SPLITS.get(stated.lower(), stated) if isinstance(stated, str) and stated else folder
    if settings.split is None and split is not None:
        if settings.val_fraction:
            raise ConfigError(f"val_fraction={settings.val_fraction}, but {file} is of split {split} already; drop one")
        return check_split_name(split, file)
    return folder_split(key, settings.split or "train", settings.val_fraction, settings.seed)


def _add_unlabelled(
    samples: dict[str, RawSample], listing: _Listing, settings: PackSettings, dataset: RawDataset
) -> None:
    """The images that no label file names: kept without label if that is wanted, else counted."""
    others = [file for file in listing.files if listing.ids[file] not in samples]
    labelled = {without_suffix(str(sample.path)) for sample in samples.values()}
    copies = [file for file in others if without_suffix(str(listing.root / file)) in labelled]
    if copies:
        dataset.warnings.append(f"{len(copies)} images have the name of a labelled one and are left out: {copies[0]}")
        others = [file for file in others if file not in set(copies)]
    if others and not settings.keep_unlabelled:
        dataset.warnings.append(f"{len(others)} images have no label and are left out; --keep-unlabelled takes them")
        return
    for file in others:
        sample_id = listing.ids[file]
        samples[sample_id] = RawSample(sample_id, listing.root / file, _split(None, file, sample_id, settings))
