"""Makes the label files of this folder with the tools themselves: points in the middle of the first and the last pixel.

    pip install labelme==6.3.1 && QT_QPA_PLATFORM=offscreen python make.py labelme      # clicks on its canvas
    pip install datumaro==1.13.12 && python make.py datumaro                            # both of its formats

The picture has 64 x 48 pixels. Made on 2026-11-30; nothing here is of a patient.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, ZOOM = 64, 48, 8
GREY = np.add.outer(3 * np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8)
HERE = Path(__file__).resolve().parent


def make_labelme() -> None:
    """Click into the middle of two pixels, eight times enlarged, and save."""
    from labelme._label_file import LabelFile
    from labelme.widgets.canvas import Canvas
    from PyQt5 import QtCore, QtGui, QtWidgets
    from PyQt5.QtTest import QTest

    application = QtWidgets.QApplication(sys.argv[:1])
    tools = ("polygon", "rectangle", "circle", "line", "point", "linestrip", "ai_polygon", "ai_mask")
    canvas = Canvas(epsilon=10.0, double_click="close", num_backups=10, crosshair=dict.fromkeys(tools, False))
    image = QtGui.QImage(WIDTH, HEIGHT, QtGui.QImage.Format_Grayscale8)
    image.fill(100)
    canvas.load_pixmap(QtGui.QPixmap.fromImage(image))
    canvas.scale = float(ZOOM)
    canvas.resize(WIDTH * ZOOM, HEIGHT * ZOOM)
    canvas.create_mode = "point"
    canvas.set_editing(False)
    canvas.show()
    shapes = []
    for label, (x, y) in {"first": (0, 0), "last": (WIDTH - 1, HEIGHT - 1)}.items():
        place = QtCore.QPoint(x * ZOOM + ZOOM // 2, y * ZOOM + ZOOM // 2)
        QTest.mouseMove(canvas, place)
        QTest.mouseClick(canvas, QtCore.Qt.LeftButton, pos=place)
        application.processEvents()
        canvas.shapes[-1].label = label
        points = [[point.x(), point.y()] for point in canvas.shapes[-1].points]
        shapes.append({"label": label, "points": points, "group_id": None, "shape_type": "point", "flags": {}})
    LabelFile().save(str(HERE / "labelme.json"), shapes, "film.png", HEIGHT, WIDTH)


def make_datumaro() -> None:
    """Export one item as Datumaro's JSON and as CVAT's XML."""
    from datumaro.components.annotation import AnnotationType, LabelCategories, Points
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image

    labels = LabelCategories()
    labels.add("first")
    labels.add("last")
    points = [Points([0.5, 0.5], [2], label=0), Points([WIDTH - 0.5, HEIGHT - 0.5], [1], label=1)]
    item = DatasetItem("film", subset="val", media=Image.from_numpy(np.stack([GREY] * 3, -1)), annotations=points)
    dataset = Dataset.from_iterable([item], categories={AnnotationType.label: labels}, media_type=Image)
    for name in ("datumaro", "cvat"):
        dataset.export(str(HERE / "made" / name), name, save_media=True, image_ext=".png")
    shutil.move(HERE / "made" / "datumaro" / "annotations" / "val.json", HERE / "val.json")
    shutil.move(HERE / "made" / "cvat" / "val.xml", HERE / "val.xml")
    shutil.rmtree(HERE / "made")


if __name__ == "__main__":
    {"labelme": make_labelme, "datumaro": make_datumaro}[sys.argv[1]]()
