"""COCO keypoints: one JSON file for all images, three numbers for each landmark.

x and y count pixels from 0 at the centre of the top-left one (cocodataset.org/#format-data: "0-indexed"; detectron2
adds half a pixel where it wants corners). The third number, v, is 0 where there is no label (x and y are 0 then), 1
where the landmark is hidden and 2 where it is seen. `mm_per_px` of an image is ours; other programs pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_lmk.data.annotations.image import AnnotatedImage

_SEEN = 2
_CATEGORY = 1  # one for all: the landmarks of an image belong together


def to_coco(images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> dict[str, Any]:
    """The content of a COCO file; every image has one annotation with all `landmarks`, in this order."""
    category = {"id": _CATEGORY, "name": "landmarks", "supercategory": "", "keypoints": [*landmarks], "skeleton": []}
    listed, annotations = [], []
    for number, image in enumerate(images, 1):
        width, height = image.size or (0, 0)
        facts: dict[str, Any] = {"id": number, "file_name": image.name, "width": width, "height": height}
        listed.append(facts if image.mm_per_px is None else facts | {"mm_per_px": image.mm_per_px})
        annotations.append(_annotation(number, [image.points.get(name) for name in landmarks]))
    return {"images": listed, "annotations": annotations, "categories": [category]}


def _annotation(number: int, points: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    there = np.array([point for point in points if point is not None]).reshape(-1, 2)
    low, high = (there.min(0), there.max(0)) if len(there) else (np.zeros(2), np.zeros(2))
    return {
        "id": number,
        "image_id": number,
        "category_id": _CATEGORY,
        "keypoints": [value for point in points for value in ((0, 0, 0) if point is None else (*point, _SEEN))],
        "num_keypoints": len(there),
        "bbox": [*map(float, low), *map(float, high - low)],  # of the points: evaluations want one
        "area": float(np.prod(high - low)),
        "iscrowd": 0,
    }
