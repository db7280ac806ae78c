"""The settings of packing: checked once, kept in the manifest."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from ddpm_lmk.config import Fraction, Positive, Section
from ddpm_lmk.data.images.resize import Filter, Window
from ddpm_lmk.data.shards.records import Aspect, Encoding
from ddpm_lmk.data.sources.base import Convention, Kind
from ddpm_lmk.errors import ConfigError


class PackSettings(Section):
    """Everything that decides what is written; kept in the manifest."""

    kind: Kind
    name: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._-]+$", description="name of the dataset")
    size: Annotated[int, Field(ge=16, le=4096)] = Field(256, description="side of the stored square, pixels")
    aspect: Aspect = Field("squeeze", description="fill the square (paper), or keep the aspect ratio and pad")
    filter: Filter = Field("area", description="resize filter: area averages, linear aliases, gaussian blurs first")
    bits: int = Field(8, description="8 or 16 bits per stored pixel")
    window: Window = Field(
        "percentile",
        description="black and white of sources deeper than 8 bits; voi: the DICOM file's own, else percentile",
    )
    frame: Annotated[int, Field(ge=0)] | None = Field(None, description="of files with several; null: they are refused")
    allow_burned_in: bool = Field(False, description="take DICOM files that say text is burned into the picture")
    hashed_ids: bool = Field(False, description="ids are keyed hashes of paths")
    key_id: str | None = Field(None, description="which key made them, for comparing patients; says nothing of it")
    encoding: Encoding = Field("raw", description="raw array, png, or jpeg (lossy)")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="JPEG quality")
    convention: Convention = Field(
        "paper", description="splits of the public sets: the released code's, or the papers'"
    )
    split: str | None = Field(None, description="split of every image (folder: train)")
    val_fraction: Fraction = Field(0.0, description="share of a folder's images that goes to split val")
    annotator: str = Field("mean", description="whose labels: mean, or one reader")
    spec: str | None = Field(None, description="known set whose landmarks and rules a table follows")
    unit: str | None = Field(None, description="mm or px, for a table")
    thresholds: tuple[Positive, ...] = Field((), description="SDR thresholds in `unit`, for a table")
    spacing_pair: tuple[int, int] | None = Field(None, description="the two landmarks that lie 50 mm apart")
    clip_landmarks: bool = Field(False, description="move points that lie outside onto the edge instead of stopping")
    keep_unlabelled: bool = Field(False, description="keep a labelled table's images that have no label")
    counts: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="phantoms per split")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="root of phantoms and of the validation share")


def checked_settings(values: dict[str, Any]) -> PackSettings:
    """Build settings from plain values; ConfigError names the setting, what was found and what is wanted."""
    try:
        settings = PackSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"shards pack: {key}={first['input']!r}: {first['msg']}") from error
    if settings.bits not in (8, 16):
        raise ConfigError(f"shards pack: bits={settings.bits}, wanted 8 or 16")
    if settings.encoding == "jpeg" and settings.bits == 16:
        raise ConfigError("shards pack: JPEG holds 8 bits; use encoding=raw or png with bits=16")
    if settings.unit not in (None, "mm", "px"):
        raise ConfigError(f"shards pack: unit={settings.unit!r}, wanted mm or px")
    for option, kinds in _ONLY_FOR.items():
        given = getattr(settings, option) != type(settings).model_fields[option].default
        if given and settings.kind not in kinds:
            raise ConfigError(
                f"shards pack: {option} means nothing for kind {settings.kind}; it is for {', '.join(kinds)}"
            )
    return settings


_OF_FILES = ("folder", "dicom", "table", "chest", "cephalometric", "hand")  # any of them may be DICOM by its content
_ONLY_FOR: dict[str, tuple[str, ...]] = {
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
