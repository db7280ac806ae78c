"""Label Studio: its export "JSON", with `keypointlabels` in percent of the image's sides.

100 % is the outer edge (`x / 100 * original_width`), so the centre of the top-left pixel is half a pixel from 0 %.
Only annotations that somebody has submitted are labels; `predictions` are drafts of a model, and that is what is
written, so that nothing is taken for corrected that nobody has seen. `mm_per_px` and `split` are in `data`, which the
tool keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

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

CONFIG = "label_config.xml"

_TYPE = "keypointlabels"
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what the tool puts before the name of an uploaded file
_PICTURE = re.compile(r"\.(png|jpe?g|bmp|tiff?|dcm|dicom)$", re.IGNORECASE)
_POINT_PCT = 0.5  # size of the dots that are drawn


def read_label_studio(files: Sequence[Path], root: Path) -> Annotations:
    """Read exports; a task has an `AnnotatedImage` for each of its annotators, or one without points.

    The order of landmarks is that of `label_config.xml` in the folder `root`, where it is there.
    """
    found = Annotations()
    if (root / CONFIG).is_file():  # results have the alias of a label that has one
        labels = read_xml(root / CONFIG).iterfind(".//KeyPointLabels/Label")
        found.landmarks = tuple(name for label in labels if (name := label.get("alias") or label.get("value")))
    for path in files:
        content = read_json(path)
        if not isinstance(content, list) or not all(isinstance(task, dict) for task in content):
            found.passed_over["JSON files of something else"] += 1
            continue
        for task in content:
            found.images += _read_task(task, path, found)
    if not found.images:
        raise DataError(f"{files[0]} holds no task of Label Studio; export the project as 'JSON'")
    return found


def _read_task(task: dict[str, Any], path: Path, found: Annotations) -> list[AnnotatedImage]:
    where = f"{path}: task {task.get('id')!r:.40}"
    data = task.get("data")
    if not isinstance(data, dict):
        raise DataError(f"{where} has no `data`; export the project as 'JSON', not as 'JSON-MIN'")
    name = _file_of(data, where)
    facts: dict[str, Any] = {"mm_per_px": as_spacing(data.get("mm_per_px"), where), "split": data.get("split")}
    images = []
    for annotator, annotation in _chosen(task, where).items():
        marks, size = _points(require(annotation.get("result"), list, where, "a result"), where, found)
        images.append(AnnotatedImage(name, dict(marks), size, annotator=annotator, **facts))
    drafts: dict[str, Point | str] = {}
    for prediction in objects(task, "predictions", where) if not images else ():
        for region in objects(prediction, "result", where):
            for label in require(mapping(region, "value", where).get(_TYPE) or [], list, where, "a list of labels"):
                drafts[str(label)] = "is a draft: nobody has submitted the task"
    return images or [AnnotatedImage(name, drafts, **facts)]


def _chosen(task: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """One annotation for each annotator: the latest; or the one that is marked as ground truth, for all of them."""
    listed = require(task.get("annotations") or task.get("completions") or [], list, where, "a list of annotations")
    submitted = [each for each in listed if isinstance(each, dict) and not each.get("was_cancelled")]
    submitted.sort(key=lambda each: (str(each.get("updated_at") or each.get("created_at") or ""), str(each.get("id"))))
    truth = [each for each in submitted if each.get("ground_truth")]
    by_annotator = {}
    for annotation in submitted:
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        by_annotator["" if who is None else str(who)] = annotation
    return {"": truth[-1]} if truth else by_annotator


def _points(result: list[Any], where: str, found: Annotations) -> tuple[Marks, tuple[int, int] | None]:
    marks, size = Marks(where), None
    for region in result:
        require(region, dict, where, "a result of objects")
        if region.get("type") != _TYPE:
            found.passed_over[f"results of type {region.get('type')!r:.40}"] += 1
            continue
        if region.get("image_rotation"):
            raise DataError(f"{where}: the image was rotated in the tool; turn it back there and export again")
        value = require(region.get("value"), dict, where, "a value")
        size = as_size(region.get("original_width"), region.get("original_height"), where)
        labels = value.get(_TYPE)
        if size is None or not isinstance(labels, list) or len(labels) != 1:
            raise DataError(f"{where}: a point without the size of its image, or without just one label")
        percent = as_point(value.get("x"), value.get("y"), where)
        place: Point | str = percent
        if not isinstance(percent, str):
            place = percent[0] / 100 * size[0], percent[1] / 100 * size[1]
        marks.put(labels[0], place)
    return marks, size


def _file_of(data: dict[str, Any], where: str) -> str:
    """The name of the picture of a task: from an upload, local files, a bucket or the web."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    named = [value for key, value in texts.items() if key == "image"] or [
        value for value in texts.values() if _PICTURE.search(urlsplit(value).path) or "?d=" in value
    ]
    if len(named) != 1:
        raise DataError(f"{where}: {len(named)} of its data look like a picture; wanted one, called `image`")
    parts = urlsplit(named[0])
    path = (parse_qs(parts.query).get("d") or [unquote(parts.path)])[0]
    file = PurePosixPath(path)
    return str(file.with_name(_UPLOADED.sub("", file.name))) if "/upload/" in path else str(file)


def write_label_studio(folder: Path, images: Sequence[AnnotatedImage], landmarks: Sequence[str]) -> None:
    """Write `tasks.json`, with points as predictions, and `label_config.xml` for the project's labelling interface."""
    tasks = []
    for number, image in enumerate(images, 1):
        width, height = image.size or (0, 0)
        results = [
            {
                "id": f"p{number}-{index}",
                "type": _TYPE,
                "from_name": "landmarks",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "x": point[0] * 100 / width,
                    "y": point[1] * 100 / height,
                    "width": _POINT_PCT,
                    _TYPE: [name],
                },
            }
            for index, name in enumerate(landmarks)
            if not isinstance(point := image.points[name], str)
        ]
        data: dict[str, Any] = {"image": f"/data/local-files/?d={quote(f'{folder.name}/images/{image.name}')}"}
        if image.mm_per_px is not None:
            data["mm_per_px"] = image.mm_per_px
        tasks.append({"id": number, "data": data, "predictions": [{"model_version": "ddpm-lmk", "result": results}]})
    atomic.write_json(folder / "tasks.json", tasks)
    # model_index: without it the tool's own converters to COCO and YOLO refuse key points
    lines = (f'    <Label value={quoteattr(name)} model_index="{n}"/>\n' for n, name in enumerate(landmarks))
    labels = "".join(lines)
    atomic.write_text(
        folder / CONFIG,
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <KeyPointLabels name="landmarks" toName="image">\n{labels}  </KeyPointLabels>\n</View>\n',
    )
