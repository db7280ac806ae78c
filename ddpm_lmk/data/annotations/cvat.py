"""CVAT: its XML 1.1 "CVAT for images", and the JSON of datumaro, the library by which it converts.

The canvas of CVAT draws an image over [0, width] x [0, height], so the centre of the top-left pixel is (0.5, 0.5), and
both formats hold the numbers of the canvas; the XML has two digits after the point. A landmark is a shape `points` of
one point whose label is its name, alone or as an element of a `skeleton`; it is missing where it is `outside` (XML) or
of visibility 0 (datumaro), and hidden where it is `occluded`, or of visibility 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    read_json,
    read_xml,
    require,
)
from ddpm_lmk.errors import DataError
from ddpm_lmk.system import files as atomic

ORIGIN: Origin = "corner"

_ABSENT, _HIDDEN, _SEEN = 0, 1, 2  # datumaro's visibilities
_WHOLE_SET = "default"  # how both call the subset where there are none


def read_cvat(files: Sequence[Path]) -> Annotations:
    """Read XML files."""
    found = Annotations()
    for path in files:
        root = read_xml(path)
        if root.tag != "annotations":
            found.passed_over["XML files of something else"] += 1
            continue
        if root.find("track") is not None:
            raise DataError(f"{path} is of a video (it has tracks); export it as 'CVAT for images 1.1'")
        found.landmarks = _joined(found.landmarks, _declared(root), path)
        for image in root.iter("image"):
            found.images.append(_read_image(image, path, found))
    if not found.images:
        raise DataError(f"{files[0]} holds no image of CVAT; export the task as 'CVAT for images 1.1'")
    return found


def _declared(root: ElementTree.Element) -> list[str]:
    """Names of the labels in the order of the task, without skeletons, which are made of them."""
    names = []
    for label in root.iterfind("meta//label"):
        name = label.findtext("name")
        if name and label.findtext("type") in (None, "", "any", "points"):
            names.append(name)
    return names


def _joined(names: Sequence[str], more: Sequence[str], path: Path) -> tuple[str, ...]:
    if names and more and [name for name in more if name in names] != [name for name in names if name in more]:
        raise DataError(f"{path} lists its labels in another order than the files before it; pack them in two calls")
    return tuple(dict.fromkeys((*names, *more)))


def _read_image(image: ElementTree.Element, path: Path, found: Annotations) -> AnnotatedImage:
    name = image.get("name") or ""
    where = f"{path}: image {name!r:.200}"
    marks, num_hidden = Marks(where), 0
    for shape, parent in _points(image, found):
        places = [_pair(text, where) for text in (shape.get("points") or "").split(";")]
        num_hidden += len(places) if shape.get("occluded") == "1" and shape.get("outside") != "1" else 0
        label = shape.get("label")
        # several points of one label have no names but their order
        names = [label] if len(places) == 1 else [f"{label}_{number}" for number in range(1, len(places) + 1)]
        for each, place in zip(names, places):
            is_outside = "1" in (shape.get("outside"), parent.get("outside"))
            marks.put(each, "is outside" if is_outside else place)
    size = as_size(_whole(image.get("width")), _whole(image.get("height")), where)
    subset = image.get("subset")
    return AnnotatedImage(
        name, dict(marks), size, split=None if subset == _WHOLE_SET else subset, num_hidden=num_hidden
    )


def _points(
    image: ElementTree.Element, found: Annotations
) -> Iterator[tuple[ElementTree.Element, ElementTree.Element]]:
    """Shapes of points with what they are part of."""
    for shape in image:
        if shape.tag == "points":
            yield shape, image
        elif shape.tag == "skeleton":
            yield from ((element, shape) for element in shape.iterfind("points"))
        elif shape.tag != "tag":
            found.passed_over[f"shapes {shape.tag}"] += 1


def _pair(text: str, where: str) -> Point | str:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise DataError(f"{where}: {text!r:.80} is not a point; wanted x,y") from None
    return as_point(x, y, where)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def write_cvat(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write `annotations.xml`, a label for each landmark, and `labels.json` for the constructor of a task's labels."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for name in landmarks:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "type").text = "points"
        ElementTree.SubElement(label, "attributes")
    for number, image in enumerate(images):
        width, height = image.size or (0, 0)
        facts = {"id": str(number), "name": image.name, "width": str(width), "height": str(height)}
        element = ElementTree.SubElement(root, "image", facts)
        for name in landmarks:
            if not isinstance(point := image.points[name], str):
                shape = {"label": name, "source": "auto", "occluded": "0"}
                # more digits than CVAT writes: it reads them
                shape |= {"points": f"{point[0]:.4f},{point[1]:.4f}", "z_order": "0"}
                ElementTree.SubElement(element, "points", shape)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    atomic.write_bytes(folder / "annotations.xml", text + b"\n")
    atomic.write_json(
        folder / "labels.json", [{"name": name, "type": "points", "attributes": []} for name in landmarks]
    )


def read_datumaro(files: Sequence[Path]) -> Annotations:
    """Read JSON files of datumaro; the name of each is that of its subset."""
    found = Annotations()
    for path in files:
        content = read_json(path)
        if not isinstance(content, dict) or "items" not in content:
            found.passed_over["JSON files of something else"] += 1
            continue
        categories = mapping(content, "categories", str(path))
        labels = _names(categories, path)
        elements = _elements(categories, path)
        parts = [name for names in elements.values() for name in names]
        whole = _skeletons(categories, path) | {labels[number] for number in elements if number in range(len(labels))}
        declared = dict.fromkeys([*parts, *(name for name in labels if name not in whole)])
        found.landmarks = _joined(found.landmarks, list(declared), path)
        for item in objects(content, "items", str(path)):
            found.images.append(_read_item(item, path, labels, elements, found))
    if not found.images:
        raise DataError(f"{files[0]} holds no item of datumaro; export the task as 'Datumaro 1.0'")
    return found


def _names(categories: dict[str, Any], path: Path) -> list[str]:
    """Names of all labels, by their numbers."""
    labels = objects(mapping(categories, "label", str(path)), "labels", str(path))
    return [require(each.get("name"), str, f"{path}: labels", "a name") for each in labels]


def _skeletons(categories: dict[str, Any], path: Path) -> set[str]:
    """Labels that others are part of."""
    labels = objects(mapping(categories, "label", str(path)), "labels", str(path))
    return {str(each["parent"]) for each in labels if each.get("parent")}


def _elements(categories: dict[str, Any], path: Path) -> dict[int, list[str]]:
    """Names of the points of a label that has several, by its number."""
    found, where = {}, f"{path}: points"
    for item in objects(mapping(categories, "points", str(path)), "items", where):
        names = require(item.get("labels") or [], list, where, "a list of labels")
        number = require(item.get("label_id"), int, where, "a number as label_id")
        found[number] = [require(name, str, where, "names") for name in names]
    return found


def _read_item(
    item: dict[str, Any], path: Path, labels: Sequence[str], elements: dict[int, list[str]], found: Annotations
) -> AnnotatedImage:
    name = str(item.get("id"))
    where = f"{path}: item {name!r:.200}"
    marks, num_hidden = Marks(where), 0
    for shape in objects(item, "annotations", where):
        for part in objects(shape, "elements", where) if shape.get("type") == "skeleton" else [shape]:
            if part.get("type") != "points":
                found.passed_over[f"shapes {part.get('type')!r:.40}"] += 1
                continue
            number, points = part.get("label_id"), require(part.get("points") or [], list, where, "a list of points")
            if not isinstance(number, int) or not 0 <= number < len(labels) or len(points) % 2:
                raise DataError(f"{where}: points without a label, or an odd number of coordinates")
            count = len(points) // 2
            names = [labels[number]] if count == 1 else elements.get(number) or []
            names = names or [f"{labels[number]}_{place}" for place in range(1, count + 1)]
            if len(names) != count:
                raise DataError(f"{where}: {count} points of {labels[number]}, which has {len(names)}")
            facts = mapping(part, "attributes", where)
            seen = part.get("visibility") or [_HIDDEN if facts.get("occluded") else _SEEN] * count
            if len(require(seen, list, where, "a list of visibilities")) != count:
                raise DataError(f"{where}: {len(seen)} visibilities of {count} points")
            for index, (each, visibility) in enumerate(zip(names, seen)):
                is_outside = visibility == _ABSENT or bool(facts.get("outside"))
                num_hidden += visibility == _HIDDEN and not is_outside
                place = as_point(points[2 * index], points[2 * index + 1], where)
                marks.put(each, "is outside" if is_outside else place)
    image = mapping(item, "image", where) or mapping(item, "media", where)
    size = require(image.get("size") or [None, None], list, where, "a list of two sides")
    if len(size) != 2:
        raise DataError(f"{where}: {len(size)} sides of an image")
    picture, subset = str(image.get("path") or name), None if path.stem == _WHOLE_SET else path.stem
    return AnnotatedImage(
        name=picture if subset is None else f"{subset}/{picture}",  # images of each subset have a folder
        points=dict(marks),
        size=as_size(size[1], size[0], where),
        mm_per_px=as_spacing(mapping(item, "attr", where).get("mm_per_px"), where),
        split=subset,
        num_hidden=num_hidden,
    )


def write_datumaro(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write `annotations/default.json`, a label for each landmark."""
    labels = [{"name": name, "parent": "", "attributes": []} for name in landmarks]
    items = []
    for image in images:
        width, height = image.size or (0, 0)
        shapes = [
            {
                "id": number,
                "type": "points",
                "attributes": {},
                "group": 0,
                "label_id": number,
                "points": list(point),
                "visibility": [_SEEN],
                "z_order": 0,
            }
            for number, name in enumerate(landmarks)
            if not isinstance(point := image.points[name], str)
        ]
        item = {"id": image.name.removesuffix(".png"), "annotations": shapes, "attr": {}}
        if image.mm_per_px is not None:
            item["attr"] = {"mm_per_px": image.mm_per_px}
        items.append(item | {"image": {"path": image.name, "size": [height, width]}})
    categories = {"label": {"labels": labels, "attributes": []}}
    content = {"info": {}, "categories": categories, "items": items}
    atomic.write_json(folder / "annotations" / f"{_WHOLE_SET}.json", content)
