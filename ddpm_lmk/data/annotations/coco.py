"""COCO keypoints: JSON files for many images each, three numbers for each landmark.

x and y count pixels from 0 at the centre of the top-left one (cocodataset.org/#format-data: "0-indexed"; detectron2
adds half a pixel where it wants corners). The third number, v, is 0 where there is no label (x and y are 0 then), 1
where the landmark is hidden and 2 where it is seen. `mm_per_px` and `split` of an image are ours; other programs pass
over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.annotations.image import (
    AnnotatedImage,
    Annotations,
    Marks,
    Origin,
    Point,
    as_point,
    as_size,
    as_spacing,
    objects,
    read_json,
    require,
)
from ddpm_lmk.errors import DataError
from ddpm_lmk.system import files as atomic

ORIGIN: Origin = "centre"

_NONE, _HIDDEN, _SEEN = 0, 1, 2
_CATEGORY = 1  # one for all: the landmarks of an image belong together


def read_coco(files: Sequence[Path]) -> Annotations:
    """Read files with categories that have keypoints; others, such as captions, are passed over."""
    found = Annotations()
    for path in files:
        content = read_json(path)
        categories = objects(content, "categories", str(path)) if isinstance(content, dict) else []
        named = [each for each in categories if each.get("keypoints")]
        if not named:
            found.passed_over["JSON files without keypoints"] += 1
            continue
        if len(named) > 1:
            names = ", ".join(str(each.get("name")) for each in named)
            raise DataError(f"{path}: {len(named)} categories have keypoints ({names}); export one of them")
        listed = require(named[0]["keypoints"], list, f"{path}: keypoints", "a list")
        landmarks = tuple(require(each, str, f"{path}: keypoints", "names") for each in listed)
        if found.landmarks not in ((), landmarks):
            raise DataError(f"{path} has other keypoints than the files before it; pack them in two calls")
        found.landmarks = landmarks
        _read_file(path, content, named[0].get("id"), found)
    if not found.landmarks:
        raise DataError(f"{files[0]} has no category with keypoints; wanted COCO keypoints, not boxes or masks")
    return found


def _read_file(path: Path, content: dict[str, Any], category: Any, found: Annotations) -> None:
    images: dict[Any, dict[str, Any]] = {}
    for image in objects(content, "images", str(path)):
        number = _id(image, "id", f"{path}: images")
        if number in images:
            raise DataError(f"{path}: image {number!r:.40} is there twice; ids must differ")
        images[number] = image
    marks: dict[Any, Marks] = {}
    hidden: dict[Any, int] = {}
    for annotation in objects(content, "annotations", str(path)):
        where = f"{path}: annotation {annotation.get('id')!r:.40}"
        number = _id(annotation, "image_id", where)
        if annotation.get("category_id") != category or not annotation.get("keypoints"):
            found.passed_over["annotations without keypoints"] += 1
            continue
        if number not in images:
            raise DataError(f"{where}: image {number!r:.40} is not in the list of images")
        if number in marks:
            name = images[number].get("file_name")
            raise DataError(f"{where}: image {name!r:.200} has two sets of keypoints; wanted one for each image")
        marks[number], hidden[number] = _keypoints(annotation["keypoints"], found.landmarks, where)
    for number, image in images.items():
        where = f"{path}: image {number!r:.40}"
        found.images.append(
            AnnotatedImage(
                name=require(image.get("file_name"), str, where, "a file_name"),
                points=marks.get(number, {}),
                size=as_size(image.get("width"), image.get("height"), where),
                mm_per_px=as_spacing(image.get("mm_per_px"), where),
                split=image.get("split"),
                num_hidden=hidden.get(number, 0),
            )
        )


def _id(content: dict[str, Any], key: str, where: str) -> int | str:
    number: int | str = require(content.get(key), (int, str), where, f"a number as {key}")
    return number


def _keypoints(values: Any, landmarks: Sequence[str], where: str) -> tuple[Marks, int]:
    """The landmarks, and how many of them are hidden."""
    if len(require(values, list, where, "a list of keypoints")) != 3 * len(landmarks):
        raise DataError(f"{where}: {len(values)} numbers of keypoints, wanted x, y, v for each of {len(landmarks)}")
    marks, num_hidden = Marks(where), 0
    for index, name in enumerate(landmarks):
        x, y, visibility = values[3 * index : 3 * index + 3]
        if visibility not in (_NONE, _HIDDEN, _SEEN):
            raise DataError(f"{where}: visibility {visibility!r:.40} of {name}; wanted 0, 1 or 2")
        num_hidden += visibility == _HIDDEN
        marks.put(name, "is not labelled (visibility 0)" if visibility == _NONE else as_point(x, y, where))
    return marks, num_hidden


def write_coco(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write `annotations.json`; every image has one annotation with all landmarks."""
    category = {"id": _CATEGORY, "name": "landmarks", "supercategory": "", "keypoints": [*landmarks], "skeleton": []}
    listed, annotations = [], []
    for number, image in enumerate(images, 1):
        width, height = image.size or (0, 0)
        facts: dict[str, Any] = {"id": number, "file_name": image.name, "width": width, "height": height}
        listed.append(facts if image.mm_per_px is None else facts | {"mm_per_px": image.mm_per_px})
        annotations.append(_annotation(number, [image.points[name] for name in landmarks]))
    content = {"images": listed, "annotations": annotations, "categories": [category]}
    atomic.write_json(folder / "annotations.json", content)


def _annotation(number: int, points: Sequence[Point | str]) -> dict[str, Any]:
    there = np.array([point for point in points if not isinstance(point, str)]).reshape(-1, 2)
    low, high = (there.min(0), there.max(0)) if len(there) else (np.zeros(2), np.zeros(2))
    triples = ((0, 0, _NONE) if isinstance(point, str) else (*point, _SEEN) for point in points)
    return {
        "id": number,
        "image_id": number,
        "category_id": _CATEGORY,
        "keypoints": [value for triple in triples for value in triple],
        "num_keypoints": len(there),
        "bbox": [*map(float, low), *map(float, high - low)],  # of the points: evaluations want one
        "area": float(np.prod(high - low)),
        "iscrowd": 0,
    }
