"""Facts of a dataset: its landmarks, how millimetres are found, and the thresholds its papers report.

Files are described in `sources`, single samples in `shards.records`. The three public sets are the paper's
(docs/method.md, sections 3 and 4); phantoms mirror them; a table of one's own makes its own spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from ddpm_lmk.config import Section
from ddpm_lmk.errors import ConfigError


class NoSpacing(Section):
    """Millimetres are unknown: errors are pixels."""

    kind: Literal["none"] = "none"


class FixedSpacing(Section):
    """One pixel size for the whole set, unless a sample states its own."""

    kind: Literal["fixed"] = "fixed"
    mm_per_px: float = Field(gt=0, allow_inf_nan=False, description="millimetres per native pixel")


class PairSpacing(Section):
    """Two landmarks lie a known distance apart: mm/px of an image = mm / |p_i - p_j|, in native pixels."""

    kind: Literal["pair"] = "pair"
    i: int = Field(ge=0, description="index of the first landmark, from 0")
    j: int = Field(ge=0, description="index of the second landmark, from 0")
    mm: float = Field(gt=0, allow_inf_nan=False, description="distance between them, millimetres")


class FileSpacing(Section):
    """Every sample states its own pixel size."""

    kind: Literal["file"] = "file"


Spacing = Annotated[NoSpacing | FixedSpacing | PairSpacing | FileSpacing, Field(discriminator="kind")]


class DatasetSpec(Section):
    """What a labelled (or, with no landmark names, unlabelled) dataset is."""

    name: str = Field(
        min_length=1, max_length=80, description="shown in tables; specs of the public sets are found by it"
    )
    landmark_names: tuple[str, ...] = Field(
        (), description="one name per landmark, in the order of the labels; empty: no labels"
    )
    unit: Literal["mm", "px"] = Field("px", description="unit of errors and thresholds")
    sdr_thresholds: tuple[float, ...] = Field(
        (), description="distances within which a detection counts as a success, in `unit`"
    )
    spacing: Spacing = Field(default_factory=NoSpacing, description="how millimetres are found")
    paper_factor: Literal["none", "swapped", "pair_squeezed"] = Field(
        "none", description="how the released code turns 256-grid pixels into millimetres (docs/method.md, section 3)"
    )
    paper_pair: PairSpacing | None = Field(
        None, description="the pair that `pair_squeezed` measures in the squeezed frame"
    )
    parts: tuple[DatasetSpec, ...] = Field(
        (), description="the datasets of a mixture, whose landmarks follow one another; empty: one dataset"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSpec:
        if len(set(self.landmark_names)) != len(self.landmark_names):
            raise ValueError("landmark names must differ from one another")
        if any(not np.isfinite(value) or value <= 0 for value in self.sdr_thresholds):
            raise ValueError(f"thresholds must be finite and positive, found {self.sdr_thresholds}")
        if self.unit == "mm" and self.spacing.kind == "none":
            raise ValueError("unit mm needs a spacing rule")
        for pair in (self.spacing, self.paper_pair):
            if isinstance(pair, PairSpacing) and (pair.i == pair.j or max(pair.i, pair.j) >= self.num_landmarks):
                raise ValueError(f"spacing pair {pair.i}, {pair.j} must be two of the {self.num_landmarks} landmarks")
        return self

    @property
    def num_landmarks(self) -> int:
        """Number of landmarks; 0 for an unlabelled set."""
        return len(self.landmark_names)

    @property
    def domains(self) -> tuple[DatasetSpec, ...]:
        """The datasets whose landmarks these are: the parts of a mixture, or this one."""
        return self.parts or (self,)

    def columns(self, domain: int) -> slice:
        """Where the landmarks of a part of a mixture stand among all of them."""
        begin = sum(part.num_landmarks for part in self.domains[:domain])
        return slice(begin, begin + self.domains[domain].num_landmarks)

    def resolve_spacing(self, points: np.ndarray | None, stated: float | None) -> float | None:
        """Millimetres per native pixel of one image, or None where they cannot be known.

        Args:
            points: `[N, 2]` native px, or None.
            stated: what the sample itself says, mm per native px.
        """
        if isinstance(self.spacing, NoSpacing):
            return stated  # kept for whoever reads the shards, though errors are in pixels
        if isinstance(self.spacing, PairSpacing) and points is not None:
            distance = float(np.linalg.norm(points[self.spacing.i] - points[self.spacing.j]))
            return self.spacing.mm / distance if distance > 0 else None  # one point twice: a placeholder
        if isinstance(self.spacing, FixedSpacing) and stated is None:
            return self.spacing.mm_per_px
        return stated


def pair_spacing(pair: tuple[int, int]) -> PairSpacing:
    """Spacing by two landmarks that are taken to lie 50 mm apart: the width of a wrist, as in the hand atlas."""
    return PairSpacing(i=pair[0], j=pair[1], mm=50.0)


def unlabelled(name: str) -> DatasetSpec:
    """The spec of a set without labels."""
    return DatasetSpec(name=name)


def mixture(specs: Sequence[DatasetSpec]) -> DatasetSpec:
    """One spec over the labelled sets of a pool; sets with the same spec share their landmarks. One alone is itself.

    Raises:
        ConfigError: two different specs have one name.
    """
    parts = list({spec.name: spec for spec in specs}.values())  # in order of first mention, which orders the maps
    for spec in specs:
        if spec not in parts:
            raise ConfigError(
                f"data.path has two sets called {spec.name} whose landmarks, unit or spacing differ; "
                "pack one of them with a spec of another name"
            )
    if len(parts) == 1:
        return parts[0]
    # Two sets may both have a `gonion`, which their annotators do not place alike.
    names = tuple(f"{part.name}.{name}" for part in parts for name in part.landmark_names)
    return DatasetSpec(name="+".join(part.name for part in parts)[:80], landmark_names=names, parts=tuple(parts))


_CHEST_NAMES = tuple(
    f"{side}_{place}" for side in ("right", "left") for place in ("apex", "costophrenic", "cardiophrenic")
)
_CEPH_NAMES = (  # in the order of the challenge's label files, whose lines have no names
    *(
        "sella",
        "nasion",
        "orbitale",
        "porion",
        "subspinale_A",
        "supramentale_B",
        "pogonion",
        "menton",
        "gnathion",
        "gonion",
    ),
    *("lower_incisal", "upper_incisal", "upper_lip", "lower_lip", "subnasale", "soft_tissue_pogonion", "PNS", "ANS"),
    "articulare",
)
_HAND_NAMES = (
    *("ulna_outer_corner", "ulna_styloid", "ulna_inner_corner"),
    *("radius_inner_corner", "radius_outer_corner", "radius_styloid"),
    *("triquetrum", "lunate", "scaphoid", "hamate", "capitate", "trapezoid", "trapezium"),
    *(f"metacarpal{ray}_base" for ray in (5, 4, 3, 2, 1)),
    *("thumb_base", "thumb_joint", "thumb_tip"),
    *(f"{finger}_{part}" for finger in ("index", "middle", "ring", "little") for part in ("base", "pip", "dip", "tip")),
)

# The annotators of the hand atlas wrote 50 mm / |p1 - p5| into their image headers (9 of 9 files agree); the paper's
# code measures 0 to 4, which differs by 7 % on average. `--spacing-pair` changes the first; the second stays.
_ANNOTATORS_PAIR = pair_spacing((1, 5))
_PAPER_PAIR = pair_spacing((0, 4))

SPECS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(name="chest", landmark_names=_CHEST_NAMES, unit="px", sdr_thresholds=(3, 6, 9)),  # no spacing known
        DatasetSpec(
            name="cephalometric",
            landmark_names=_CEPH_NAMES,
            unit="mm",
            sdr_thresholds=(2, 2.5, 3, 4),
            spacing=FixedSpacing(mm_per_px=0.1),
            paper_factor="swapped",
        ),
        DatasetSpec(
            name="hand",
            landmark_names=_HAND_NAMES,
            unit="mm",
            sdr_thresholds=(2, 4, 10),
            spacing=_ANNOTATORS_PAIR,
            paper_factor="pair_squeezed",
            paper_pair=_PAPER_PAIR,
        ),
        DatasetSpec(name="phantom-chest", landmark_names=_CHEST_NAMES, unit="px", sdr_thresholds=(3, 6, 9)),
        DatasetSpec(
            name="phantom-skull",
            landmark_names=_CEPH_NAMES,
            unit="mm",
            sdr_thresholds=(2, 2.5, 3, 4),
            spacing=FileSpacing(),
        ),
        DatasetSpec(
            name="phantom-hand", landmark_names=_HAND_NAMES, unit="mm", sdr_thresholds=(2, 4, 10), spacing=FileSpacing()
        ),
    )
}
