"""The films of docs/labels.md, drawn: `python -m tests.data.labelme_films FOLDER`, and a clinician who corrects them.

dicoms/     chests as DICOM files with their spacing, 20 of which are labelled
films/      PNG copies of those, with the files that labelme wrote beside them
configs/    the `cpu` run files at toy size; a file of that name wins over the shipped one
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np

from ddpm_lmk.data.phantom import LANDMARK_NAMES, render

SIZE, LABELLED, ALL = 96, 20, 26
MOVED_PX = (1.25, -0.75)
TOYS = {
    "pretrain/cpu.yaml": "extends: configs/smoke/pretrain.yaml\n",
    "finetune/cpu.yaml": "extends: configs/smoke/finetune.yaml\ndata: {shots: 10, draw: random}\n",
}


def draw(folder: Path) -> None:
    """Films, DICOM files and run files."""
    from tests.data.dicoms import dataset, to_bytes

    for name in ("dicoms", "films"):
        (folder / name).mkdir(parents=True)
    for index in range(ALL):
        film = render("chest", 5, index, SIZE)
        tags = {"PatientID": f"MRN-{index}", "SOPInstanceUID": f"1.2.3.{index}"}
        content = dataset(film.image, bits=16, PixelSpacing=[film.mm_per_px] * 2, **tags)
        (folder / "dicoms" / f"film-{index:02}.dcm").write_bytes(to_bytes(content))
        if index < LABELLED:
            cv2.imwrite(str(folder / "films" / f"film-{index:02}.png"), (film.image >> 8).astype(np.uint8))
            write_labelme(folder / "films" / f"film-{index:02}.json", film.points, film.image.shape)
    for name, text in TOYS.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_labelme(path: Path, points: np.ndarray, shape: tuple[int, ...]) -> None:
    """As labelme 5.5 does: the centre of the first pixel is (0.5, 0.5)."""
    shapes = [
        {"label": name, "points": [[x + 0.5, y + 0.5]], "group_id": None, "shape_type": "point", "flags": {}}
        for name, (x, y) in zip(LANDMARK_NAMES["chest"], points.tolist(), strict=True)
    ]
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.png", "imageData": None}
    path.write_text(json.dumps(content | {"imageHeight": shape[0], "imageWidth": shape[1]}))


def correct(folder: Path) -> None:
    """What a clinician does in labelme: moves the first point of each draft, and ticks `checked`."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        point = content["shapes"][0]["points"][0]
        content["shapes"][0]["points"] = [[value + step for value, step in zip(point, MOVED_PX, strict=True)]]
        content["flags"]["checked"] = True
        path.write_text(json.dumps(content))


if __name__ == "__main__":
    correct(Path(sys.argv[2])) if sys.argv[1] == "correct" else draw(Path(sys.argv[1]))
