"""The kinds of sources, and which options of `shards pack` mean something to which; imports nothing, for `--help`."""

from __future__ import annotations

from typing import Literal, get_args

# labels of other tools
Annotated = Literal["coco", "labelme", "cvat", "datumaro", "label-studio", "spreadsheet", "dicom-sr"]
Kind = Literal["folder", "dicom", "table", Annotated, "phantom", "chest", "cephalometric", "hand"]

KINDS: tuple[str, ...] = get_args(Kind)
ANNOTATED: tuple[str, ...] = get_args(Annotated)
_WITH_LABELS = ("table", *ANNOTATED)
_OF_FILES = tuple(kind for kind in KINDS if kind != "phantom")  # any of them may be DICOM by its content

# Options that are not listed mean something to every kind; a listed one is refused for kinds that it does not name.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "convention": ("chest", "cephalometric", "hand"),
    "split": ("folder", "dicom", *_WITH_LABELS),
    "val_fraction": ("folder", "dicom", *ANNOTATED),
    "hashed_ids": ("folder", "dicom", *_WITH_LABELS),
    "allow_burned_in": _OF_FILES,
    "frame": _OF_FILES,
    "annotator": ("cephalometric", "table", "label-studio", "spreadsheet"),
    "spec": _WITH_LABELS,
    "unit": _WITH_LABELS,
    "thresholds": _WITH_LABELS,
    "spacing_pair": ("hand", *_WITH_LABELS),
    "keep_unlabelled": _WITH_LABELS,
    "landmarks": ANNOTATED,
    "pixel_origin": ANNOTATED,
    "mm_per_px": ANNOTATED,
    "columns": ("spreadsheet",),
    "counts": ("phantom",),
}
