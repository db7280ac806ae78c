"""The films that the pages of the documents take for granted, drawn: `python -m tests.docs.films FOLDER`.

films/          chests without labels, in folders
pacs-export/    the same as DICOM files, with patients
labelled/       images.csv, landmarks.csv and the files they name: splits train and test
new-films/      three more
configs/        the `cpu` run files at toy size; a file of that name wins over the shipped one
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_lmk.data.phantom import LANDMARK_NAMES, render

SIZE = 96
TOYS = {
    "pretrain/cpu.yaml": "extends: configs/smoke/pretrain.yaml\n",
    "finetune/cpu.yaml": "extends: configs/smoke/finetune.yaml\ndata: {shots: 10, draw: random}\n",
    "sweep/cpu.yaml": """\
name: few-shot-cpu
run: ../finetune/cpu.yaml
grids:
  - {shots: [10], seeds: [0], start: {scratch: null, pretrained: runs/pretrain}}
""",
}


def chest(index: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Pixels of 8 bits, points (x, y), and mm of a pixel."""
    film = render("chest", 3, index, SIZE)
    return (film.image >> 8).astype(np.uint8), film.points, film.mm_per_px


def save(path: Path, pixels: np.ndarray) -> None:
    """One film as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_table(folder: Path, *, train: int, test: int) -> None:
    """images.csv and landmarks.csv, two films a patient."""
    images, landmarks = [], []
    for index in range(train + test):
        pixels, points, mm_per_px = chest(100 + index)
        name, split = f"case-{index:02}", "train" if index < train else "test"
        save(folder / "images" / f"{name}.png", pixels)
        images.append([name, f"images/{name}.png", split, f"patient-{index // 2:02}", round(mm_per_px, 4)])
        names = zip(LANDMARK_NAMES["chest"], points.round(2), strict=True)
        landmarks += [[name, number, label, *point] for number, (label, point) in enumerate(names)]
    heads = {
        "images.csv": ["image_id", "file", "split", "patient_id", "mm_per_pixel"],
        "landmarks.csv": ["image_id", "landmark_index", "landmark_name", "x", "y"],
    }
    for (name, head), rows in zip(heads.items(), (images, landmarks), strict=True):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])


def main(folder: Path) -> None:
    """Draw all of it."""
    from tests.data.dicoms import dataset, to_bytes

    for index in range(16):
        pixels, _, _ = chest(index)
        save(folder / "films" / f"ward-{index % 2}" / f"{index:03}.png", pixels)
        if index < 4:
            path = folder / "pacs-export" / f"IM{index:04}"
            path.parent.mkdir(parents=True, exist_ok=True)
            film = dataset(pixels, bits=8, PatientID=f"MRN-{index}", SOPInstanceUID=f"1.2.3.{index}")
            path.write_bytes(to_bytes(film))
    write_table(folder / "labelled", train=12, test=6)
    for index in range(200, 203):
        save(folder / "new-films" / f"{index}.png", chest(index)[0])
    for name, text in TOYS.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
