"""labelme: a JSON file beside each image, with a shape of type `point` for each landmark, which its label names.

Its canvas draws the image over [0, width] x [0, height] and keeps the place of the mouse (labelme 6.3,
`widgets/canvas.py`), so the centre of the top-left pixel is (0.5, 0.5). A list of labels in order is `labels.txt`
(`labelme --labels`), whose lines that begin with `_` are none.

`mm_per_px` and the flag `checked` are ours; labelme keeps the one when it saves, and shows the other as a box to tick.
Drafts of a model are written with an empty box, and are no labels until somebody has ticked it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ddpm_lmk.data.annotations.image import (
    AnnotatedImage,
    Annotations,
    Marks,
    Origin,
    Point,
    as_point,
    as_size,
    as_spacing,
    mapping,
    objects,
    read_bytes,
    read_json,
    require,
)
from ddpm_lmk.errors import DataError
from ddpm_lmk.system import files as atomic

ORIGIN: Origin = "corner"
LABELS = "labels.txt"
_CHECKED = "checked"


def read_labelme(files: Sequence[Path], root: Path) -> Annotations:
    """Read the files of a folder `root`."""
    found = Annotations()
    for path in files:
        content = read_json(path)
        if not isinstance(content, dict) or "shapes" not in content:
            found.passed_over["JSON files without shapes"] += 1
            continue
        marks = Marks(str(path))
        for shape in objects(content, "shapes", str(path)):
            if shape.get("shape_type") != "point":
                found.passed_over[f"shapes of type {shape.get('shape_type')!r:.40}"] += 1
                continue
            marks.put(shape.get("label"), _place(shape, path))
        # Windows writes backslashes. A path may begin with `..` where the JSON files are in a folder of their own.
        named = PureWindowsPath(require(content.get("imagePath"), str, f"{path}: imagePath", "a name")).as_posix()
        here = PurePosixPath(path.relative_to(root).parent.as_posix())
        size = as_size(content.get("imageWidth"), content.get("imageHeight"), str(path))
        spacing = as_spacing(content.get("mm_per_px"), str(path))
        points: dict[str, Point | str] = dict(marks)
        if mapping(content, "flags", str(path)).get(_CHECKED) is False:
            points = dict.fromkeys(points, f"is a draft: `{_CHECKED}` is not ticked")
        found.images.append(AnnotatedImage(str(here / named), points, size, spacing, content.get("split")))
    if not found.images:
        raise DataError(f"no labelme file among {len(files)} JSON files in {root}; each has `shapes` and `imagePath`")
    if (root / LABELS).is_file():
        lines = read_bytes(root / LABELS).decode("utf-8-sig", "replace").splitlines()
        found.landmarks = tuple(line.strip() for line in lines if line.strip() and not line.startswith("_"))
    return found


def _place(shape: dict[str, Any], path: Path) -> Any:
    where = f"{path}: shape {shape.get('label')!r:.80}"
    points = shape.get("points")
    if not isinstance(points, list) or len(points) != 1 or not isinstance(points[0], list) or len(points[0]) != 2:
        raise DataError(f"{where}: a point has one pair of coordinates")
    x, y = points[0]
    return as_point(x, y, where)


def write_labelme(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write a file beside each picture, which lies in `folder`, and `labels.txt`."""
    for image in images:
        width, height = image.size or (None, None)
        shapes = [_shape(name, *point) for name in landmarks if not isinstance(point := image.points[name], str)]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {_CHECKED: False},
            "shapes": shapes,
            "imagePath": PurePosixPath(image.name).name,
        }
        content |= {"imageData": None, "imageHeight": height, "imageWidth": width}
        if image.mm_per_px is not None:
            content["mm_per_px"] = image.mm_per_px
        atomic.write_json(folder / PurePosixPath(image.name).with_suffix(".json"), content)
    atomic.write_text(folder / LABELS, "".join(f"{name}\n" for name in landmarks))


def _shape(name: str, x: float, y: float) -> dict[str, Any]:
    return {"label": name, "points": [[x, y]], "group_id": None, "description": "", "shape_type": "point", "flags": {}}
