"""A left hand: forearm, carpals and five articulated rays, with 37 landmarks in the order of Payer's hand atlas.

Lengths, angles and positions are means over the hands whose labels are public, in mm, the origin above the wrist.
"""
# ruff: noqa: RUF005  (points are arrays: + adds, it does not join)

from __future__ import annotations

import itertools

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, Points, PoseRange, band, ellipse, loop, rotation, smooth
from ddpm_lmk.data.phantom.exposure import Anatomy, ExposureRange

NAMES: tuple[str, ...] = (
    "ulna_outer_corner", "ulna_styloid", "ulna_inner_corner", "radius_inner_corner", "radius_outer_corner",
    "radius_styloid",
    "triquetrum", "lunate", "scaphoid", "hamate", "capitate", "trapezoid", "trapezium",
    "metacarpal5_base", "metacarpal4_base", "metacarpal3_base", "metacarpal2_base", "metacarpal1_base",
    "thumb_base", "thumb_joint", "thumb_tip",
    *(f"{finger}_{part}" for finger in ("index", "middle", "ring", "little") for part in ("base", "pip", "dip", "tip")),
)  # fmt: skip
Widths = tuple[float, float, float]

# ray: base of the metacarpal, direction (deg from straight up), lengths of its bones, half-widths (base, shaft, head)
RAYS: dict[str, tuple[tuple[float, float], float, tuple[float, ...], tuple[Widths, ...]]] = {
    "thumb": ((29.5, -11), 34, (48, 31, 25), ((7.0, 4.0, 6.6), (6.8, 3.7, 5.0), (6.0, 2.3, 3.2))),
    "index": ((14.5, -17), 8, (74, 42, 24, 20),
              ((7.8, 3.5, 6.8), (7.0, 3.7, 5.0), (5.8, 2.9, 4.1), (4.8, 1.9, 3.0))),
    "middle": ((-0.5, -18), -1, (73, 47, 30, 21),
               ((7.2, 3.5, 6.8), (7.1, 3.8, 5.1), (6.0, 3.1, 4.3), (4.9, 2.0, 3.1))),
    "ring": ((-14, -18), -9, (64, 44, 28, 21),
             ((6.0, 3.0, 6.0), (6.6, 3.5, 4.8), (5.7, 2.9, 4.1), (4.7, 1.9, 3.0))),
    "little": ((-23, -15), -21, (59, 33, 18.5, 18.5),
               ((6.0, 3.0, 5.6), (6.0, 3.0, 4.2), (4.9, 2.5, 3.5), (4.1, 1.7, 2.6))),
}  # fmt: skip
GAP_MM = 2.6  # cartilage between two bones of a ray
BASE_INDEX = {"little": 13, "ring": 14, "middle": 15, "index": 16, "thumb": 17}
FIRST_INDEX = {"thumb": 18, "index": 21, "middle": 25, "ring": 29, "little": 33}

# carpals 6..12: the first point of each outline is its landmark
CARPALS = (
    ((-22.6, 14.2), (-16.5, 8.5), (-17, 0.5), (-24, -3), (-29, 2), (-28, 9)),
    ((-10.6, 21.3), (-4, 18), (-4, 12.5), (-11, 11), (-17, 13), (-17, 19)),
    ((5.4, 18.4), (12, 15), (19, 7), (16, 2), (9.5, 4.5), (0.5, 11.5), (-1, 16)),
    ((-12.7, 5.5), (-10, -4), (-10, -13), (-17, -14), (-24.5, -11), (-20, -3)),
    ((-1.8, 10), (3.5, 5), (5, -5), (4.5, -14), (-2, -16), (-8, -14), (-8, -4), (-6.5, 6)),
    ((13.6, -3.4), (18, -8), (17, -14), (10, -14), (7, -10), (8, -4.5)),
    ((21.7, 1.6), (27.5, -4), (26, -9), (21, -11.5), (18.5, -6), (18.5, -1)),
)
FOREARM = np.array([(-34.5, 32.6), (-31, 21.8), (-16.3, 34), (-12.3, 31.5), (18.6, 32.3), (18.6, 14.5)])


WRIST = np.array([0.0, 12.0])  # what the forearm turns about


class Hand(Anatomy):
    """Geometry of one hand in mm; `landmarks [37, 2]`."""

    names = NAMES
    pose_range = PoseRange(
        height_mm=(255, 330), turn_deg=13, aspect=(0.64, 0.76), centre=(0.5, 0.5), shift=(0.13, 0.1), ripple_mm=1.5
    )
    exposure = ExposureRange(
        texts=("L", "R", "L 07", "PA", "28 OCT"),
        scatter=(0.03, 0.25),
        dark_pct=(0.5, 30),
        bright_pct=(97, 99.9),
        gamma=(0.6, 1.3),
    )

    def __init__(self, rng: np.random.Generator) -> None:
        self.landmarks = np.zeros((37, 2))
        self.youth = rng.uniform(0, 1)  # 1: open growth plates, 0: adult
        self.girth = rng.uniform(0.85, 1.15)  # width of finger bones and flesh
        self.growth = rng.uniform(0.86, 1.12, 2)  # of the whole hand, in x and y
        self.bones: list[np.ndarray] = []
        self.wrist: list[np.ndarray] = []
        self.plates: list[np.ndarray] = []
        self.flesh: list[np.ndarray] = []
        spread, lean = rng.uniform(0.5, 1.45), rng.uniform(-8, 8)
        for ray in RAYS:
            self._build_ray(ray, spread, lean, rng)
        self._build_carpals(rng)
        self._build_forearm(rng)
        self._build_palm()

    def _build_ray(self, ray: str, spread: float, lean: float, rng: np.random.Generator) -> None:
        """A chain of bones, each turned a little against the one before; fingers fan out at the knuckles."""
        base, direction, lengths, widths = RAYS[ray]
        at, angle = np.array(base) + rng.uniform(-1.2, 1.2, 2), direction * (0.7 + 0.3 * spread) + 0.3 * lean
        angle += rng.uniform(-16, 14) if ray == "thumb" else 0.0
        bends, stretch = rng.uniform(-7, 7, 4), rng.uniform(0.9, 1.1) * rng.uniform(0.95, 1.05, 4)
        bends[:2] = 0.0, bends[1] + (spread - 1) * direction * 0.7 + 0.7 * lean
        ends = []  # of each bone: middle of its base, middle of its head
        for number, (length, width) in enumerate(zip(lengths * stretch[: len(lengths)], widths, strict=True)):
            angle += bends[number]
            outline = _long_bone(length, self.girth * np.array(width), is_tip=number == len(lengths) - 1)
            self.bones.append(_turned(outline, angle) + at)
            level = -0.11 * length if number else -0.88 * length
            plate = [(-1.15 * width[0], level), (0, level - 0.5), (1.15 * width[0], level)]
            self.plates.append(_turned(plate, angle) + at)
            head, after = _turned([(0, -length), (0, -length - GAP_MM)], angle) + at
            ends.append((at, head))
            at = after
        self.landmarks[BASE_INDEX[ray]] = ends[0][0]
        first = FIRST_INDEX[ray]
        self.landmarks[first : first + len(ends)] = [ends[1][0], *(head for _, head in ends[1:])]
        joints = [ends[0][0], *((head + following) / 2 for (_, head), (following, _) in itertools.pairwise(ends))]
        self._cover_ray(ray, [*joints, ends[-1][1] + _turned([(0, -1)], angle)[0]], angle)

    def _cover_ray(self, ray: str, joints: list[np.ndarray], angle: float) -> None:
        """Flesh around a ray: a tapering tube, round at both ends."""
        chain = smooth(joints, steps=6)
        thick = {"thumb": 11.5, "little": 9.0}.get(ray, 10.5) * self.girth
        self.flesh.append(band(chain, np.linspace(thick, 0.78 * thick, len(chain))))
        self.flesh.append(ellipse(joints[0], (thick, thick)))
        self.flesh.append(ellipse(joints[-1], (0.78 * thick, 0.86 * thick), angle))

    def _build_carpals(self, rng: np.random.Generator) -> None:
        swell = 1.06 - 0.22 * max(self.youth - 0.5, 0)
        for number, controls in enumerate(CARPALS):
            outline = np.array(controls) + rng.uniform(-0.8, 0.8, (len(controls), 2))
            middle = outline.mean(axis=0)
            outline = middle + (outline - middle) * swell * rng.uniform(0.95, 1.05) + rng.uniform(-1.0, 1.0, 2)
            self.landmarks[6 + number] = outline[0]
            self.wrist.append(loop(outline, steps=6))

    def _build_forearm(self, rng: np.random.Generator) -> None:
        """Ulna and radius, each a shaft with two labelled corners and a cap beyond its growth plate; flesh."""
        corners = FOREARM + rng.uniform(-1.2, 1.2, FOREARM.shape)
        corners[:3, 1] += rng.uniform(-4, 4)  # ulnar variance
        u0, u1, u2, r3, r4, r5 = corners
        gap = np.array([0.0, -1.6])
        ulna = np.array([u0, u2, u2 + (-1.5, 14), u2 + (-2, 60), u2 + (-2, 420), u0 + (5, 420), u0 + (5, 60),
                         u0 + (2.5, 14)])  # fmt: skip
        radius = np.array([r3, r4, r4 + (-3.5, 16), r4 + (-7, 60), r4 + (-7, 420), r3 + (8, 420), r3 + (8, 60),
                           r3 + (4, 16)])  # fmt: skip
        ulna_cap = smooth([u0 + gap, u1 + (-1.2, 3), u1, u1 + (2, 4.5), (u0 + u2) / 2 + (2, -8), u2 + (0.5, -5),
                           u2 + gap], steps=5)  # fmt: skip
        radius_cap = smooth([r4 + gap, r4 + (1.0, -8), r5, r5 + (-4, 2.5), (r3 + r5) / 2 + (-1, 1.2), r3 + (2.5, -8),
                             r3 + gap], steps=5)  # fmt: skip
        flesh = smooth([u1 + (-6, -24), u1 + (-9, -8), u0 + (-7.5, 4), u0 + (-10, 40), u0 + (-14, 100), u0 + (-22, 420),
                        r4 + (22, 420), r4 + (14, 100), r4 + (10, 40), r4 + (7.5, 4), r5 + (9, -6), r5 + (12, -22)],
                       steps=6)  # fmt: skip
        bend = rng.uniform(-14, 14)
        self.landmarks[:6] = _turned(corners, bend, WRIST)
        self.wrist += [_turned(shape, bend, WRIST) for shape in (ulna, radius, ulna_cap, radius_cap)]
        self.arm = _turned(flesh, bend, WRIST)

    def _build_palm(self) -> None:
        """Flesh from the wrist to the knuckles, with the web of the thumb."""
        marks = self.landmarks
        self.palm = loop([
            self.arm[0], marks[13] + (-12, -8), (marks[13] + marks[33]) / 2 + (-13, 0), marks[33] + (-9, 3),
            marks[29] + (0, -4), marks[25] + (0, -4), marks[21] + (9, 3), (2 * marks[21] + marks[16]) / 3 + (13, 0),
            (marks[18] + marks[16]) / 2 + (8, -8), marks[18] + (6, 6), (marks[17] + marks[18]) / 2 + (10, 7),
            marks[17] + (11, 6), self.arm[-1],
        ], steps=6)  # fmt: skip

    def warp(self, points: np.ndarray) -> np.ndarray:
        """Size of this hand."""
        return points * self.growth

    def paint(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Add up attenuation. Bones are drawn one by one, so that overlaps add up as they do in a radiograph."""
        canvas.body([*self.flesh, self.palm, self.arm], 9.0)
        canvas.fill([self.palm], "soft", rng.uniform(4, 9), soften_mm=7)
        canvas.fill([self.arm], "soft", rng.uniform(8, 16), soften_mm=8)
        density = rng.uniform(0.75, 1.2)
        for bone in self.bones:
            canvas.bone([bone], 4.5 * density, 5.0 * density, wall_mm=1.1)
        for bone in self.wrist:
            canvas.bone([bone], 5.2 * density, 4.5 * density, wall_mm=1.0)
        if self.youth > 0.3:
            plates = [band(plate, 0.6) for plate in self.plates]
            canvas.fill(plates, "bone", -5.5 * density * self.youth, soften_mm=0.3)
        self._add_findings(canvas, rng)

    def _add_findings(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Cysts and dense islands in bones, now and then a ring on a finger."""
        for _ in range(rng.integers(0, 4)):
            bone = self.bones[rng.integers(len(self.bones))]
            spot = ellipse(bone.mean(axis=0) + rng.uniform(-3, 3, 2), rng.uniform(1.0, 3.5, 2))
            canvas.fill([spot], "bone", rng.uniform(-5, 5), soften_mm=0.5)
        finger, has_ring = rng.choice([4, 8, 12]), rng.random() < 0.12
        if has_ring:
            bone = self.bones[finger]
            axis = bone[len(bone) // 2] - bone[0]
            across = np.array([-axis[1], axis[0]]) / np.linalg.norm(axis) * 9.5
            canvas.fill([band(bone.mean(axis=0) + np.outer([-1, 0, 1], across), 1.6)], "metal", 3.0)


def _turned(points: Points, degrees: float, about: Points = (0.0, 0.0)) -> np.ndarray:
    """Points `[N, 2]` turned clockwise, as seen, about a point."""
    return (np.asarray(points, dtype=np.float64) - about) @ rotation(degrees).T + about


def _long_bone(length: float, widths: np.ndarray, *, is_tip: bool) -> np.ndarray:
    """Outline along -y from (0, 0), the middle of the base, to (0, -length), the middle of the head."""
    base, shaft, head = widths
    side = [(0.72 * base, -0.4), (base, -0.09 * length), (1.1 * shaft, -0.30 * length), (shaft, -0.52 * length),
            (1.12 * shaft, -0.74 * length), (head, -(0.90 if is_tip else 0.92) * length),
            (0.7 * head, -0.985 * length)]  # fmt: skip
    mirrored = [(-x, y) for x, y in reversed(side)]
    return loop([(0, 0), *side, (0, -length), *mirrored], steps=5)
