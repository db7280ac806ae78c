"""What `predict --format` writes beside predictions.csv: files of other programs, in a folder of the format's name.

`FORMATS` is the one table of them. A format of labels is a folder that its tool opens and `shards pack` reads again:
the label files of `data.annotations`, and pictures to draw on, of 8 bits of grey, since most tools show no DICOM files.
Those of DICOM are documents beside the films themselves (`inference.dicom_documents`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from ddpm_lmk.data.annotations.formats import LABEL_FORMATS, LabelFormat
from ddpm_lmk.data.annotations.image import CORNER_PX, AnnotatedImage, Point
from ddpm_lmk.data.drawing import encode_png
from ddpm_lmk.errors import ConfigError, RunConflictError
from ddpm_lmk.inference.dicom_documents import DicomWriter, measurement_report, presentation_state
from ddpm_lmk.inference.predictions import PredictedFile
from ddpm_lmk.system import files as atomic


class PredictionWriter(Protocol):
    """Writes predictions in one format, file by file as they are computed."""

    def add(self, predicted: PredictedFile) -> None:
        """Take one file that was predicted; its picture is large and not kept.

        Raises:
            RefusedImageError: the format cannot hold this file.
        """

    def finish(self) -> None:
        """Write what can be written only when all files are known; called once, also where there were none."""


class LabelWriter:
    """The pictures and label files of a tool in which predictions are corrected."""

    def __init__(self, kind: LabelFormat, folder: Path) -> None:
        self._folder, self._kind = folder, kind
        self._images: list[AnnotatedImage] = []
        self._landmarks: Sequence[str] = ()

    def add(self, predicted: PredictedFile) -> None:
        name = f"{predicted.id}.png"
        atomic.write_bytes(self._folder / self._kind.pictures / name, encode_png(predicted.grey))
        self._landmarks, prediction = predicted.landmark_names, predicted.prediction
        shift = CORNER_PX if self._kind.origin == "corner" else 0.0
        rows = zip(self._landmarks, (prediction.points + shift).tolist(), prediction.failed, strict=True)
        points: dict[str, Point | str] = {
            landmark: "was not found" if is_failed else (x, y) for landmark, (x, y), is_failed in rows
        }
        self._images.append(AnnotatedImage(name, points, predicted.size, predicted.mm_per_px))

    def finish(self) -> None:
        if self._images and self._kind.write is not None:
            self._kind.write(self._folder, self._images, self._landmarks)


# A writer is made of its folder, before any weights are read: it raises LaunchError where its extra is missing.
FORMATS: dict[str, Callable[[Path], PredictionWriter]] = {
    **{name: partial(LabelWriter, kind) for name, kind in LABEL_FORMATS.items() if kind.write},
    "dicom-sr": lambda folder: DicomWriter(folder, measurement_report),
    "dicom-gsps": lambda folder: DicomWriter(folder, presentation_state),
}


def open_writers(names: Sequence[str], out: Path) -> list[PredictionWriter]:
    """A writer for each of the formats, in folders of these names below `out`.

    Raises:
        ConfigError: a format is not known.
        RunConflictError: such a folder is there already: it may hold points that somebody has corrected.
    """
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format {name}: wanted one of {', '.join(FORMATS)}")
        if (out / name).exists():
            raise RunConflictError(f"{out / name} is there already and may hold corrections; name another --out")
    return [FORMATS[name](out / name) for name in dict.fromkeys(names)]
