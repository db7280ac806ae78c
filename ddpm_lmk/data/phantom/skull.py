"""A head from the side, looking right: where the bones and the soft profile of one person are.

The 19 landmarks are the cephalometric ones, in the order of the ISBI 2015 set; mean positions are those of its films,
in mm from a film's top-left corner. Three groups move apart from one another (cranial base, upper jaw, lower jaw, which
also turns about its joint), and the soft profile follows the bones. `skull_layers` draws it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, Points
from ddpm_lmk.data.phantom.film import FilmStyle
from ddpm_lmk.data.phantom.pose import PoseRange
from ddpm_lmk.data.phantom.skull_layers import LAYERS

MEAN = {
    "sella": (80.9, 104.2), "nasion": (139.3, 97.2), "orbitale": (128.3, 122.2), "porion": (60.0, 121.4),
    "subspinale_A": (138.2, 152.6), "supramentale_B": (135.6, 185.8), "pogonion": (135.7, 199.0),
    "menton": (127.7, 205.6), "gnathion": (133.0, 203.8), "gonion": (72.8, 173.5), "lower_incisal": (142.6, 168.2),
    "upper_incisal": (145.0, 171.4), "upper_lip": (155.6, 161.3), "lower_lip": (153.0, 182.2),
    "subnasale": (150.0, 149.8), "soft_tissue_pogonion": (145.8, 201.0), "PNS": (97.5, 143.3), "ANS": (141.8, 145.0),
    "articulare": (67.1, 132.7),
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(MEAN)
UPPER = ("subspinale_A", "upper_incisal", "PNS", "ANS", "subnasale", "upper_lip")
LOWER = ("supramentale_B", "pogonion", "menton", "gnathion", "gonion", "lower_incisal", "lower_lip",
         "soft_tissue_pogonion", "articulare")  # fmt: skip
PALATE, JOINT = np.array([100.0, 140.0]), np.array([66.0, 126.0])  # what the jaws turn about
CENTRE = np.array([90.0, 120.0])  # what proportions stretch about
Move = Callable[[Points], np.ndarray]


class Skull:
    """Geometry of one head in mm; `at[name]` is a landmark, `landmarks [19, 2]` all of them in ISBI order."""

    names = NAMES
    pose_range = PoseRange(
        height_mm=(205, 285), turn_deg=11, aspect=(0.76, 0.88), centre=(0.56, 0.6), shift=(0.12, 0.1), ripple_mm=1.2
    )
    film = FilmStyle(
        texts=("SN 4711", "L", "R", "CEPH 07", "12 MAR"),
        scatter=(0.05, 0.35),
        dark_pct=(1, 16),
        bright_pct=(93, 99.9),
        gamma=(0.6, 1.3),
    )

    def __init__(self, rng: np.random.Generator) -> None:
        self.at = {name: np.array(place) + rng.uniform(-1.0, 1.0, 2) for name, place in MEAN.items()}
        self.upper = _similarity(rng, about=PALATE, turn_deg=(-5, 5), shift_mm=(5, 5), size=0.08)
        jaw = _similarity(rng, about=JOINT, turn_deg=(-2.5, 9), shift_mm=(3, 2), size=0.1)
        drop = 0.8 * (self.upper([(120, 150)])[0] - (120, 150))  # the lower teeth follow the upper ones
        self.lower: Move = lambda points: jaw(points) + drop * np.clip((np.array(points)[:, :1] - 66) / 60, 0, 1)
        for names, move in ((UPPER, self.upper), (LOWER, self.lower)):
            self.at.update({name: move([self.at[name]])[0] for name in names})
        self._vary_profile(rng)
        self.proportions = rng.uniform(0.9, 1.1, 2)
        self.landmarks = np.array([self.at[name] for name in NAMES])

    def _vary_profile(self, rng: np.random.Generator) -> None:
        """Lips thick or thin, chin strong or weak; nose, forehead and crown are free."""
        at = self.at
        at["upper_lip"] = at["upper_lip"] + rng.uniform((-2.5, -2), (3.5, 2))
        at["lower_lip"] = at["lower_lip"] + rng.uniform((-2.5, -2), (3.5, 2))
        at["lower_lip"][1] = max(at["lower_lip"][1], at["upper_lip"][1] + 11)
        at["soft_tissue_pogonion"] = at["soft_tissue_pogonion"] + rng.uniform((-1.5, -2), (3, 2))
        at["subnasale"] = at["subnasale"] + rng.uniform((-2, -1.5), (2.5, 1.5))
        self.nose = at["subnasale"] + rng.uniform((11, -16), (20, -7))
        self.forehead = rng.uniform(-6, 7)
        self.crown = rng.uniform((-8, -10), (8, 8))

    def warp(self, points: np.ndarray) -> np.ndarray:
        """Length and height of this head."""
        return (points - CENTRE) * self.proportions + CENTRE

    def paint(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Draw every layer, flesh first."""
        for layer in LAYERS:
            layer(self, canvas, rng)


def _similarity(
    rng: np.random.Generator,
    *,
    about: np.ndarray,
    turn_deg: tuple[float, float],
    shift_mm: tuple[float, float],
    size: float,
) -> Move:
    """A random turn and scaling about a point, then a shift, as a function of points `[N, 2]`."""
    angle, scale = np.deg2rad(rng.uniform(*turn_deg)), rng.uniform(1 - size, 1 + size)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = about + rng.uniform(-1, 1, 2) * shift_mm
    return lambda points: (np.array(points, dtype=np.float64) - about) @ matrix.T + target
