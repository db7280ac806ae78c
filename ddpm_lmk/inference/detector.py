"""A landmark run in Python: `ddpm_lmk.load(RUN).predict(image)`; docs/python.md is its manual.

Points are those that `ddpm-lmk predict` writes for the same file: a file goes the same way, through a decoding process
of its own, and pixels that are in memory join it where a file has been decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ddpm_lmk.data.images.decode import read_opened
from ddpm_lmk.data.images.image import DecodedImage, RefusedImageError, check_information, check_shape
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.inference.load import LoadedRun
from ddpm_lmk.inference.predict import Picture, Predicted, predict_decoded, predict_files
from ddpm_lmk.inference.predictions import ImagePrediction

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    Input = str | PathLike[str] | PillowImage | np.ndarray

DTYPES = ("uint8", "uint16", "float32", "float64")


@dataclass(frozen=True)
class Detection:
    """The landmarks of one image, in pixels of it: (x, y), and the centre of the top-left pixel is (0, 0)."""

    names: tuple[str, ...]  # of the K landmarks
    points: np.ndarray  # [K, 2] float64
    spread_px: np.ndarray  # [K] how wide the map around a point is: larger is less sure
    failed: np.ndarray  # [K] bool, where nothing could be read from the map and the point means nothing
    size: tuple[int, int]  # width and height of the image as it is seen, after its EXIF rotation
    radius_px: np.ndarray | None  # [K] the true point lies within, with `coverage`; NaN where failed; None: not learnt
    coverage: float | None  # 0.9 after `ddpm-lmk calibrate RUN`
    mm_per_px: float | None  # as the caller or the DICOM file states it; none is guessed

    @property
    def points_mm(self) -> np.ndarray | None:
        """Points `[K, 2]` in millimetres from the centre of the top-left pixel."""
        return self._in_mm(self.points)

    @property
    def spread_mm(self) -> np.ndarray | None:
        """Spreads `[K]` in millimetres."""
        return self._in_mm(self.spread_px)

    @property
    def radius_mm(self) -> np.ndarray | None:
        """Radii `[K]` in millimetres."""
        return self._in_mm(self.radius_px)

    def _in_mm(self, pixels: np.ndarray | None) -> np.ndarray | None:
        return None if pixels is None or self.mm_per_px is None else pixels * self.mm_per_px


class Detector:
    """Finds the landmarks that a run has learnt; `ddpm_lmk.load` makes one."""

    def __init__(self, run: LoadedRun) -> None:
        """`run`: a landmark run, of a mixture the view of one dataset (`LoadedRun.for_dataset`)."""
        self._run, self._radius = run, run.radius
        run.pixel_settings()  # a run that cannot say how its pictures were prepared is refused here

    @property
    def names(self) -> tuple[str, ...]:
        """Its landmarks, in the order of the points."""
        return self._run.spec.landmark_names

    def __repr__(self) -> str:
        return f"<Detector {self._run.cfg.name}: {len(self.names)} landmarks of {self._run.spec.name}>"

    @overload
    def predict(self, image: Input, *, mm_per_px: float | None = None, frame: int | None = None) -> Detection: ...
    @overload
    def predict(
        self, image: list[Input], *, mm_per_px: float | None = None, frame: int | None = None
    ) -> list[Detection]: ...
    def predict(
        self, image: Input | list[Input], *, mm_per_px: float | None = None, frame: int | None = None
    ) -> Detection | list[Detection]:
        """Landmarks of one image, or of each of a list, which are computed in batches of `evaluate.batch`.

        Args:
            image: the path of a PNG, JPEG, BMP, TIFF or DICOM file; a Pillow image; or grey pixels `[H, W]` as uint8,
                uint16, float32 or float64, black below white. Pixels are scaled as the run's training images were.
            mm_per_px: spacing of the pixels, where it is known; goes before what a DICOM file states.
            frame: which frame of files with several, from 0.

        Raises:
            ConfigError: something else than an image, or a spacing that is none.
            DataError: an image that cannot be read, or is no x-ray by its shape and grey levels.
        """
        spacing: Any = mm_per_px
        is_number = isinstance(spacing, Real) and not isinstance(spacing, bool)
        if spacing is not None and not (is_number and np.isfinite(spacing) and spacing > 0):
            raise ConfigError(f"mm_per_px={mm_per_px!r}: wanted a positive number of millimetres")
        images = image if isinstance(image, list) else [image]
        found = [self._detection(*each, mm_per_px=mm_per_px) for each in self._predicted(images, frame)]
        return found if isinstance(image, list) else found[0]

    def _predicted(self, images: list[Any], frame: int | None) -> Iterator[Predicted]:
        """All of a list in order; files that follow one another share a decoding process."""
        begin = 0
        while begin < len(images):
            is_file = _is_path(images[begin])
            end = next((i for i in range(begin, len(images)) if _is_path(images[i]) != is_file), len(images))
            part = images[begin:end]
            if is_file:
                yield from predict_files(self._run, [fspath(each) for each in part], frame)
            else:
                named = ((f"image {begin + number}", _decoded(each)) for number, each in enumerate(part))
                yield from predict_decoded(self._run, named)
            begin = end

    def _detection(
        self,
        name: str,
        picture: Picture | RefusedImageError,
        found: ImagePrediction | None,
        *,
        mm_per_px: float | None,
    ) -> Detection:
        if isinstance(picture, RefusedImageError):
            raise DataError(f"{name}: {picture}")
        assert found is not None
        learnt = self._radius
        return Detection(
            names=self.names,
            points=found.points,
            spread_px=found.spread_px,
            failed=found.failed,
            size=picture.size,
            radius_px=None if learnt is None else found.radius_px(learnt["factor"]),
            coverage=None if learnt is None else learnt["coverage"],
            mm_per_px=mm_per_px or picture.mm_per_px,
        )


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, PathLike))


def _decoded(image: Any) -> DecodedImage | RefusedImageError:
    """Grey pixels of an image in memory, or why it is refused; raises ConfigError for what is none."""
    from PIL import Image

    try:
        if isinstance(image, Image.Image):
            return read_opened(image)
        if not isinstance(image, np.ndarray):
            raise ConfigError(
                f"found {type(image).__name__}; wanted a path, a Pillow image or a numpy array, or a list of them"
            )
        if image.ndim != 2 or image.dtype.name not in DTYPES:
            raise ConfigError(
                f"found an array {list(image.shape)} of {image.dtype.name}; wanted grey pixels [H, W] of "
                f"{', '.join(DTYPES)}"
            )
        check_shape(image.shape[1], image.shape[0])
        with np.errstate(over="ignore"):  # what is beyond float32 is not finite, and refused for it
            pixels = image.astype(np.float32) if image.dtype.kind == "f" else image
        check_information(pixels)
    except RefusedImageError as error:
        return error
    return DecodedImage(np.ascontiguousarray(pixels))
