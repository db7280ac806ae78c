"""`data`: where images come from, and which of them are used."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ddpm_lmk.config.values import ADVANCED, Fraction, NonNegative, Positive, Section, is_null


def _listed(value: Any) -> Any:
    """One name as a list of one."""
    return (value,) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


class AugmentConfig(Section):
    """Random changes of a training image, drawn from `(seed, position)`; the geometric ones move the points too."""

    probability: Fraction = Field(0.5, description="share of images that are changed at all (paper: 0.5)")
    shift: Fraction = Field(0.02, description="largest shift in x and in y, as a share of the image side (paper: 0.02)")
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = Field(2.0, description="largest rotation in degrees (paper: 2)")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="sizes are drawn from [1 - scale, 1 + scale]")
    scale_axes: Literal["shared", "independent"] = Field(
        "shared", description="one size factor, or one for x and one for y"
    )
    brightness: Fraction = Field(0.0, description="largest offset added to intensities in [0, 1]")
    contrast: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="contrast factor drawn from [1 - c, 1 + c], around the mean"
    )
    gamma: NonNegative = Field(0.0, description="exponent drawn from exp(uniform(-gamma, gamma))")
    noise: Fraction = Field(
        0.0, description="largest standard deviation of added Gaussian noise, intensities in [0, 1]"
    )


class HoldOutConfig(Section):
    """A part of the few shots that is not trained on: shots fold, fold + of, fold + 2 of, ... in the order drawn."""

    fold: Annotated[int, Field(ge=0)] = Field(0, description="which part, from 0")
    of: Annotated[int, Field(ge=2)] = Field(5, description="number of parts")

    @model_validator(mode="after")
    def _one_of_them(self) -> HoldOutConfig:
        if self.fold >= self.of:
            raise ValueError(f"fold={self.fold} is none of {self.of} parts; use 0..{self.of - 1}")
        return self


class PropagateConfig(Section):
    """Pseudo-labels: images without labels are trained on where both looks find the same (docs/method.md, section 10)."""

    path: tuple[str, ...] | None = Field(
        None,
        description="folder(s) or URL(s) of the images without labels; null: those of data.path less the shots",
        json_schema_extra=ADVANCED,
    )
    splits: tuple[str, ...] = Field(
        ("train",), min_length=1, description="their splits that are trained on", json_schema_extra=ADVANCED
    )
    rounds: Annotated[int, Field(ge=1, le=10)] = Field(
        2,
        description="how often a run makes pseudo-labels for the next one, which starts anew; this run is the last",
        json_schema_extra=ADVANCED,
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.625, description="share of the images of a batch that have pseudo-labels", json_schema_extra=ADVANCED
    )
    agree: Annotated[float, Field(gt=0, le=1)] = Field(
        0.02,
        description="largest distance of what both looks find, of which a pseudo-label is made, as a share of the image "
        "side",
        json_schema_extra=ADVANCED,
    )

    @field_validator("path", "splits", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return _listed(value)


class DedupConfig(Section):
    """What becomes of pre-training images that are found twice, by pixels, as a near copy, or by patient."""

    leakage: Literal["leave_out", "keep"] = Field(
        "leave_out", description="images that are in a protected split too: same pixels, near copy, or same patient"
    )
    duplicates: Literal["leave_out", "keep"] = Field(
        "leave_out", description="images that repeat an earlier one of the pool: same pixels or near copy"
    )


class DataConfig(Section):
    """Where images come from, and which of them are used."""

    path: tuple[str, ...] = Field(
        min_length=1,
        description="folder(s) or URL(s) (http, s3, gs) written by `ddpm-lmk shards pack`; several make a pool",
    )
    weights: tuple[Positive, ...] | None = Field(
        None, description="share of draws per folder; null: by number of images"
    )
    splits: tuple[str, ...] = Field(
        ("train",), min_length=1, description="splits trained on (the paper pre-trains on train and val)"
    )
    protect: tuple[str, ...] = Field(
        (), description="labelled sets whose held-out splits pre-training must not see, beside those of data.path"
    )
    dedup: DedupConfig = Field(default_factory=DedupConfig, description="pre-training images that are found twice")
    validation_split: str | None = Field(
        None, description="labelled split for early stopping and choice of weights; null: no validation labels are used"
    )
    shots: Annotated[int, Field(ge=1)] | None = Field(None, description="number of labelled training images; null: all")
    draw: Literal["first", "random", "listed"] = Field(
        "first", description="which images the shots are: first by name (paper), drawn from the seed, or data.images"
    )
    images: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="ids of labelled images, the first of which are the shots (draw: listed), or a CSV file that lists them",
        json_schema_extra=ADVANCED,
        exclude_if=lambda value: value is None,  # run files of before this key keep their hash
    )
    hold_out: HoldOutConfig | None = Field(
        None,
        description="part of the shots kept from training; it is split `held_out`, to validate or score on",
        json_schema_extra=ADVANCED,
    )
    propagate: PropagateConfig | None = Field(
        None,
        description="train on images without labels too, where both looks of task.refine find the same; null: on the shots alone",
        json_schema_extra=ADVANCED,
        exclude_if=is_null,
    )
    image_size: Annotated[int, Field(ge=16, le=4096)] = Field(
        256, description="side of the square network input, pixels"
    )
    fine_size: Annotated[int, Field(ge=32, le=8192)] | None = Field(
        None,
        description="side of the finer copy of each image that crops are cut from (task.refine, task.zoom), pixels; "
        "null: none is loaded. Pack with at least this --size",
        exclude_if=is_null,
    )
    require_dataset: dict[str, str | int | None] = Field(
        {},
        description="settings the shards must have been packed with, e.g. {filter: gaussian}; null: any",
        json_schema_extra=ADVANCED,
    )
    intensity: Literal["per_image", "full_range"] = Field(
        "per_image",
        description="scale to [0, 1] by each image's own minimum and maximum (paper), or by the range of its type",
    )
    # Not in `runtime`: it decides the order of samples, and so what is learnt.
    shuffle_window: Annotated[int, Field(ge=1)] = Field(
        16,
        description="shards whose samples are mixed with one another; reads stay inside the window",
        json_schema_extra=ADVANCED,
    )
    max_bad_fraction: Fraction = Field(
        0.001, description="share of undecodable samples after which the run stops", json_schema_extra=ADVANCED
    )
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @property
    def unlabelled_path(self) -> tuple[str, ...]:
        """Where images come from that are trained on without labels of their own; none without `propagate`."""
        return () if self.propagate is None else self.propagate.path or self.path

    @field_validator("path", "splits", "protect", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return _listed(value)

    @field_validator("images", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        # The ids, not the path, become part of the run: a file that changes later must not change what is learnt.
        if isinstance(value, str) and value.lower().endswith(".csv"):
            return read_image_ids(value)
        return cls._one_is_enough(value)

    @model_validator(mode="after")
    def _listed_shots(self) -> DataConfig:
        images = self.images
        if images is None or self.draw != "listed":
            if images is not None or self.draw == "listed":
                found = "no images" if images is None else f"images ({images[0]}, ...)"
                raise ValueError(f"draw={self.draw} with {found}; wanted draw=listed with images, or neither")
            return self
        if len(self.path) > 1:
            raise ValueError(f"draw=listed takes its shots from one dataset, path has {len(self.path)}")
        if self.shots is None or self.shots > len(images):
            given = "null" if self.shots is None else self.shots
            raise ValueError(f"images lists {len(images)}, shots={given}: wanted shots of 1..{len(images)}")
        if len(set(images)) < len(images):
            twice = next(name for number, name in enumerate(images) if name in images[:number])
            raise ValueError(f"images lists {twice} twice; name every image once")
        return self

    @model_validator(mode="after")
    def _weights_match(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.path):
            raise ValueError(
                f"weights has {len(self.weights)} entries, path has {len(self.path)}; give one weight per folder"
            )
        return self

    @model_validator(mode="after")
    def _fine_is_finer(self) -> DataConfig:
        if self.fine_size is not None and self.fine_size <= self.image_size:
            raise ValueError(
                f"fine_size={self.fine_size} is no finer than image_size={self.image_size}; use a larger one, e.g. "
                f"{4 * self.image_size}"
            )
        return self


def read_image_ids(path: str) -> list[str]:
    """The column image_id of a CSV file, each id once and in its order, as of `suggestions.csv` or `landmarks.csv`.

    Raises:
        ValueError: it cannot be read, or has no such column.
    """
    wanted = "wanted a CSV file with a column image_id"
    try:
        rows = list(csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {wanted}") from error
    ids = list(dict.fromkeys(row["image_id"] for row in rows if row.get("image_id")))
    if not ids:
        raise ValueError(f"{path} lists no image; {wanted}")
    return ids
