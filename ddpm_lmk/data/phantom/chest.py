"""A frontal chest: the geometry of one person, and what its x-ray shows, layer by layer.

The 6 landmarks are those labelled on the Shenzhen set (docs/method.md, section 4), in its order: apex, costophrenic
angle and cardiophrenic angle of the lung on the picture's left, then of the other. Numbers are mm: positions before
the person's proportions are applied, origin at the middle of the thorax, or thicknesses along the ray.
"""
# ruff: noqa: RUF005  (points are arrays: + adds, it does not join)

from __future__ import annotations

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, PoseRange, band, ellipse, loop, smooth
from ddpm_lmk.data.phantom.exposure import Anatomy, ExposureRange

MIRROR = np.array([-1.0, 1.0])


def trunk(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Neck, shoulders, arms and trunk; breasts or chest muscles."""
    fat, drop = rng.uniform(0.92, 1.25), rng.uniform(-25, 25)
    half = smooth([(0, -420), (52, -420), (56, -215), (80, -192), (145, -178 + drop), (208, -160 + drop),
                   (248, -80 + drop), (262, 120), (285, 300), (238, 310), (208, 120), (176 * fat, 10), (168 * fat, 90),
                   (172 * fat, 190), (185 * fat, 420), (0, 420)], steps=5)  # fmt: skip
    canvas.body([np.concatenate([half, half[::-1] * MIRROR])], rng.uniform(70, 92))
    for side in (-1, 1):
        if rng.random() < 0.6:
            breast = ellipse((side * 85, rng.uniform(25, 75)), rng.uniform(45, 75, 2))
            canvas.fill([breast], "soft", rng.uniform(5, 22), soften_mm=rng.uniform(2, 10))


def air(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Lungs; trachea and its two branches; gas in stomach and bowel."""
    canvas.body(chest.lungs, rng.uniform(42, 58), material="air")
    canvas.fill(chest.lungs, "soft", -rng.uniform(14, 30), soften_mm=1.0)
    windpipe = smooth([(0, -215), (1, -150), (3, -95), (5, -62)])
    canvas.fill([band(windpipe, 8.5)], "soft", -rng.uniform(12, 22), soften_mm=1.5)
    branches = [band(smooth([(4, -66), end]), 5.5) for end in ((-32, -32), (36, -28))]
    canvas.fill(branches, "soft", -12, soften_mm=1.5)
    for _ in range(rng.integers(0, 4)):
        gas = ellipse(rng.uniform((35, 120), (120, 190)), rng.uniform(8, 32, 2), rng.uniform(-40, 40))
        canvas.fill([gas], "soft", -rng.uniform(15, 50), soften_mm=2.5)


def mediastinum(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Heart, great vessels, aortic knob, and the roots of the lungs."""
    swell = chest.heart
    heart = loop([(-42, 30), (-30, -20), (0, -40), (38, -20), (66 * swell, 30), (72 * swell, 68), (30, 96),
                    (-30, 80)])  # fmt: skip
    canvas.fill([heart], "soft", rng.uniform(5, 14), soften_mm=4)
    column = loop([(-24, -130), (-28, -60), (-32, 0), (-28, 120), (28, 120), (34, 0), (31, -60), (22, -130)])
    canvas.fill([column], "soft", rng.uniform(4, 12), soften_mm=3)
    canvas.fill([ellipse((24, -62), (14, 17))], "soft", rng.uniform(8, 18), soften_mm=1.2)
    for side in (-1, 1):
        canvas.fill([ellipse((side * 44, -18), (12, 24), -side * 15)], "soft", rng.uniform(10, 26), soften_mm=4)


def ribs(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Ten pairs: arcs behind fall from the spine to the side; seven return in front, lower and fainter."""
    pitch, slope, strength = rng.uniform(23.5, 27), rng.uniform(0.75, 1.25), rng.uniform(0.6, 1.3)
    number, side = np.arange(20) // 2, np.where(np.arange(20) % 2, 1.0, -1.0)
    y = -150 + pitch * number + rng.uniform(-2, 2, 20)
    reach = np.interp(number, [0, 1, 3, 6, 9], [66, 96, 124, 138, 146])
    drop = slope * np.interp(number, [0, 4, 9], [26, 42, 62])
    start = np.full(20, 16.0)
    falls = [(start, y), (0.35 * reach + 8, y - 7), (0.78 * reach, y + 0.35 * drop), (reach, y + drop)]
    returns = [(reach, y + drop), (0.86 * reach, y + 1.6 * drop), (0.45 * reach + 14, y + 1.95 * drop)]
    back, front = (
        smooth(np.stack([np.stack([side * across, down], axis=1) for across, down in line], axis=1))  # [20, M, 2]
        for line in (falls, returns)
    )
    behind = band(back, np.interp(np.arange(25), [0, 4, 20, 24], [3.5, 5.0, 6.4, 5.0]))
    before = band(front[:14], np.interp(np.arange(17), [0, 6, 12, 16], [5.5, 6.2, 6.6, 2.5]))
    canvas.bone(list(behind), 4.2 * strength, 5.2 * strength, wall_mm=1.3)
    canvas.bone(list(before), 2.6 * strength, 2.6 * strength, wall_mm=1.3)


def spine(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Vertebral bodies, wider further down, and their spinous processes."""
    box = loop([(-1, 0), (0, 0.07), (1, 0), (0.88, 0.5), (1, 1), (0, 0.93), (-1, 1), (-0.88, 0.5)])
    levels = [(-260 + 25.5 * number, 12.5 + 0.4 * number) for number in range(26)]
    density = rng.uniform(0.5, 1.0)
    canvas.bone([box * (half, 23.0) + (0, y) for y, half in levels], 9 * density, 9 * density, wall_mm=1.6)
    processes = [ellipse((0, y + 14), (3, 6), count=12) for y, _ in levels]
    canvas.bone(processes, 5 * density, 8 * density)


def shoulders(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Collar bones, shoulder blades and upper arms, lifted and spread."""
    lifts, spread = rng.uniform(-24, 16) + rng.uniform(-8, 8, 2), rng.uniform(0.9, 1.15)
    for side, lift in zip((-1, 1), lifts, strict=True):
        place = np.array([side * spread, 1.0])
        collar = smooth([(side * 14, -112), (side * 50, -124 + 0.3 * lift), (side * 100 * spread, -142 + lift),
                         (side * 160 * spread, -146 + lift)])  # fmt: skip
        canvas.bone([band(collar, np.linspace(8.5, 5.5, len(collar)))], 6, 8, wall_mm=1.5)
        blade = loop([(128, -128), (176, -140), (182, -112), (168, -60), (150, 8), (139, 6), (132, -60)])
        canvas.bone([blade * place + (0, lift)], 4, 7, wall_mm=1.6)
        arm = loop([(196, -136), (222, -128), (224, -100), (232, 60), (236, 240), (216, 240), (208, 60), (196, -98)])
        canvas.bone([arm * place + (0, lift)], 12, 12, wall_mm=2.2)


def vessels(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Tapering lines from each root of the lung, seen only against the air."""
    strength = rng.uniform(8, 20)
    for side, lung in zip((-1, 1), chest.lungs, strict=True):
        first, length = rng.uniform(-1.45, 1.45, 22), rng.uniform(15, 48, (22, 1))
        then = first + rng.uniform(-0.5, 0.5, 22)
        start = rng.uniform((side * 42 - 14, -28), (side * 42 + 14, 0), (22, 2))
        middle = start + length * np.stack([side * np.cos(first), np.sin(first)], axis=1)
        end = middle + length * np.stack([side * np.cos(then), np.sin(then)], axis=1)
        lines = smooth(np.stack([start, middle, end], axis=1), steps=4)
        twigs = band(lines, np.linspace(rng.uniform(1.4, 3.2, 22), 0.4, lines.shape[1], axis=1))
        for part in (twigs[:11], twigs[11:]):
            canvas.fill(list(part), "soft", strength, soften_mm=0.6, within=lung)


def disease(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Nodules, and now and then a hazy opacity."""
    sides = rng.choice([-1, 1], 8)
    for side in sides[: rng.poisson(1.2)]:
        centre = rng.uniform((55, -100), (110, 60)) * (side, 1)
        nodule = ellipse(centre, rng.uniform(3, 12, 2), rng.uniform(0, 90))
        canvas.fill([nodule], "soft", rng.uniform(8, 35), soften_mm=rng.uniform(0.6, 3))
    if rng.random() < 0.35:
        centre = rng.uniform((60, -80), (95, 50)) * (sides[7], 1)
        haze = ellipse(centre, rng.uniform(20, 45, 2), rng.uniform(0, 90))
        canvas.cloud([haze], "soft", rng.uniform(15, 45), soften_mm=11)


def tubes(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> None:
    """Leads with their electrodes, a pacemaker with its wire."""
    has_leads, has_pacemaker = rng.random(2) < (0.3, 0.08)
    for _ in range(rng.integers(1, 4) if has_leads else 0):
        points = np.stack([np.sort(rng.uniform(-170, 170, 5)), rng.uniform(-200, 190, 5)], axis=1)
        canvas.fill([band(smooth(points, steps=10), 0.7), ellipse(points[0], (5, 5))], "metal", 0.5)
    if has_pacemaker:
        case = loop([(80, -100), (115, -105), (122, -75), (100, -58), (78, -72)])
        canvas.fill([case], "metal", 2)
        canvas.fill([band(smooth([(82, -90), (30, -105), (-14, -70), (-20, 30), (40, 66)]), 0.9)], "metal", 1)


LAYERS = (trunk, air, mediastinum, ribs, spine, shoulders, vessels, disease, tubes)

NAMES: tuple[str, ...] = (
    "right_apex", "right_costophrenic", "right_cardiophrenic", "left_apex", "left_costophrenic", "left_cardiophrenic",
)  # fmt: skip


class Chest(Anatomy):
    """Geometry of one thorax in mm; `landmarks [6, 2]`; `lungs` are two outlines with sharp lower corners."""

    names, layers = NAMES, LAYERS
    pose_range = PoseRange(
        height_mm=(345, 455), turn_deg=9, aspect=(0.84, 1.14), centre=(0.5, 0.46), shift=(0.1, 0.09), ripple_mm=3.0
    )
    exposure = ExposureRange(
        texts=("L", "R", "L pa", "R AP", "PORTABLE", "PA 12"),
        scatter=(0.15, 0.5),
        dark_pct=(0.5, 8),
        bright_pct=(90, 99.7),
        gamma=(0.75, 1.5),
    )

    def __init__(self, rng: np.random.Generator) -> None:
        self.width, self.height = rng.uniform(0.82, 1.15), rng.uniform(0.78, 1.18)
        self.scoliosis, self.sag = rng.uniform(-14, 14), rng.uniform(-0.07, 0.07)
        self.heart = rng.uniform(0.72, 1.35)  # width of its left half, 1: normal
        apex, corner = rng.uniform(-7, 7, (2, 2)), rng.uniform((-8, -13), (8, 13), (2, 2))
        foot, dome = rng.uniform(-10, 10, 2), rng.uniform(0.3, 1.15, 2)
        border = np.array([(66, 42), (46, 2)]) * (self.heart, 1)
        right = np.array([(-47, -146) + apex[0], (-134, 104) + corner[0], (-38, 60 + foot[0])])
        left = np.array([(47, -146) + apex[1], (134, 104) + corner[1], (74 * self.heart, 76 + foot[1])])
        self.lungs = [
            _lung(right, np.array([(-40, 25), (-36, -15), (-30, -55), (-25, -100)]), rise=28 * dome[0]),
            _lung(left, np.array([*border, (34, -32), (33, -62), (24, -100)]), rise=20 * dome[1]),
        ]
        self.landmarks = np.concatenate([right, left])

    def warp(self, points: np.ndarray) -> np.ndarray:
        """Proportions of this person: width, height, a bent spine, one side lower than the other."""
        x, y = points[..., 0], points[..., 1]
        bent = self.width * x + self.scoliosis * np.sin(y / 110)
        return np.stack([bent, self.height * y + self.sag * x], axis=-1)


def _lung(marks: np.ndarray, medial: np.ndarray, *, rise: float) -> np.ndarray:
    """Outline through apex, corner and foot (`marks`), along `medial` points and a diaphragm that is `rise` mm high."""
    apex, corner, foot = marks
    side = np.sign(corner[0])
    up = smooth([foot, *medial, apex + (-14 * side, 13), apex, apex + (25 * side, 5), apex + (51 * side, 31),
                 (119 * side, -62), (130 * side, -5), corner + (2 * side, -42), corner])  # fmt: skip
    share, lift = np.array([0.28, 0.6, 0.88])[:, None], np.array([0.75 * rise + 6, rise + 4, 0.5 * rise])
    arch = corner + share * (foot - corner) - np.stack([0 * lift, lift], axis=1)
    floor = smooth([corner, corner + (-8 * side, -17), *arch, foot])
    return np.concatenate([up[:-1], floor[:-1]])
