"""One image and its landmarks, as a label file of another tool has them; every format is read into this and back."""

from __future__ import annotations

from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """What a label file says of one image.

    Points are (x, y) in pixels of the image as it is seen, and the centre of its top-left pixel is (0, 0), as
    everywhere here: a tool that counts from the corner of that pixel says 0.5 more, which its module takes and adds.
    """

    name: str  # of the picture, as the file names it
    points: dict[str, Point | None]  # by name of the landmark; None: it is said not to be there
    size: tuple[int, int] | None = None  # width and height that were annotated
    mm_per_px: float | None = None
