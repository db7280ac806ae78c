"""The kinds of sources, and which options of `shards pack` mean something to which; imports nothing, for `--help`."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["folder", "dicom", "table", "phantom", "chest", "cephalometric", "hand"]

KINDS: tuple[str, ...] = get_args(Kind)
_OF_FILES = tuple(kind for kind in KINDS if kind != "phantom")  # any of them may be DICOM by its content

# Options that are not listed mean something to every kind; a listed one is refused for kinds that it does not name.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "convention": ("chest", "cephalometric", "hand"),
    "split": ("folder", "dicom", "table"),
    "val_fraction": ("folder", "dicom"),
    "hashed_ids": ("folder", "dicom", "table"),
    "allow_burned_in": _OF_FILES,
    "frame": _OF_FILES,
    "annotator": ("cephalometric", "table"),
    "spec": ("table",),
    "unit": ("table",),
    "thresholds": ("table",),
    "spacing_pair": ("hand", "table"),
    "keep_unlabelled": ("table",),
    "counts": ("phantom",),
}
