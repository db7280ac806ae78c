"""The settings of `shards pack`: what is read from a source and how it is stored; written to the manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from ddpm_lmk.config import Fraction, Positive, Section
from ddpm_lmk.data.images.resize import Filter, Window
from ddpm_lmk.data.shards.records import Aspect, Encoding
from ddpm_lmk.data.sources.kinds import ANNOTATED, ONLY_FOR, Kind
from ddpm_lmk.errors import ConfigError

Convention = Literal["paper", "published"]

_LATER = ("landmarks", "pixel_origin", "mm_per_px", "columns")

PHANTOM_COUNTS = {"train": 400, "val": 40, "test": 100}


class PackSettings(Section):
    """Everything that decides what is written. A setting that cannot be honoured is a ConfigError that names it.

    An empty `name` or `counts` and a null `window` are filled in by `filled_for`; the manifest holds what came of it.
    """

    kind: Kind
    name: str = Field(
        "", max_length=80, pattern=r"^[A-Za-z0-9._-]*$", description="name of the dataset; empty: from the source"
    )
    size: Annotated[int, Field(ge=16, le=4096)] = Field(256, description="side of the stored square, pixels")
    aspect: Aspect = Field("squeeze", description="fill the square (paper), or keep the aspect ratio and pad")
    filter: Filter = Field("area", description="resize filter: area averages, linear aliases, gaussian blurs first")
    bits: int = Field(8, description="8 or 16 bits per stored pixel")
    window: Window | None = Field(
        None,
        description="black and white of sources deeper than 8 bits; voi: the DICOM file's own, else percentile; "
        "null: voi for kinds dicom and dicom-sr, else percentile",
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
    spec: str | None = Field(None, description="known set whose landmarks and rules the labels follow")
    unit: str | None = Field(None, description="mm or px, of errors")
    thresholds: tuple[Positive, ...] = Field((), description="SDR thresholds in `unit`")
    spacing_pair: tuple[int, int] | None = Field(None, description="the two landmarks that lie 50 mm apart")
    clip_landmarks: bool = Field(False, description="move points that lie outside onto the edge instead of stopping")
    keep_unlabelled: bool = Field(False, description="keep the images of a labelled set that have no label")
    landmarks: tuple[str, ...] = Field((), description="names in order; empty: as the tool of the labels lists them")
    pixel_origin: Literal["centre", "corner"] | None = Field(
        None, description="where labels have (0, 0): centre or corner of the top-left pixel; null: as their tool does"
    )
    mm_per_px: Annotated[Positive, Field(allow_inf_nan=False)] | None = Field(
        None, description="spacing of all images, mm per pixel, where it is known"
    )
    columns: dict[str, str] = Field({}, description="columns of a spreadsheet by their role, e.g. image: Datei")
    counts: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="phantoms per split")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="root of phantoms and of the validation share")

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, validate: ModelWrapValidatorHandler[PackSettings]) -> PackSettings:
        try:
            settings = validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"shards pack: {key}={first['input']!r}: {first['msg']}") from error
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        if self.bits not in (8, 16):
            raise ConfigError(f"shards pack: bits={self.bits}, wanted 8 or 16")
        if self.encoding == "jpeg" and self.bits == 16:
            raise ConfigError("shards pack: JPEG holds 8 bits; use encoding=raw or png with bits=16")
        if self.unit not in (None, "mm", "px"):
            raise ConfigError(f"shards pack: unit={self.unit!r}, wanted mm or px")
        for option, kinds in ONLY_FOR.items():
            is_given = getattr(self, option) != type(self).model_fields[option].default
            if is_given and self.kind not in kinds:
                raise ConfigError(
                    f"shards pack: {option} means nothing for kind {self.kind}; it is for {', '.join(kinds)}"
                )

    def stated(self) -> dict[str, Any]:
        """What a manifest says of them; options of a later date are there where they are used: prints stay the same."""
        unused = {name for name in _LATER if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=unused)

    def filled_for(self, source: str | Path, *, has_key: bool) -> PackSettings:
        """The same with everything stated that depends on the source and on whether a key for ids is given."""
        is_dicom = self.kind in ("dicom", "dicom-sr")
        filled = {
            "name": self.name or _default_name(source, self.kind),
            "window": self.window or ("voi" if is_dicom else "percentile"),
            "counts": self.counts or (PHANTOM_COUNTS if self.kind == "phantom" else {}),
            "hashed_ids": is_dicom or has_key,  # names of exported DICOM files are often names of patients
        }
        return type(self).model_validate(self.model_dump() | filled)  # checked anew: a key may not fit the kind


def _default_name(source: str | Path, kind: Kind) -> str:
    if kind in ("folder", "table", *ANNOTATED) and kind != "dicom-sr":
        path = Path(source).absolute()
        is_label_file = kind in ANNOTATED and path.is_file()  # lists and tars keep the suffix in their names, as ever
        return re.sub("[^A-Za-z0-9._-]+", "-", path.stem if is_label_file else path.name)[:80] or "dataset"
    return f"phantom-{source}" if kind == "phantom" else kind  # a DICOM folder may be named after a patient
