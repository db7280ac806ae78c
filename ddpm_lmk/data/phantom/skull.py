"""A head from the side, looking right: the geometry of one person, and what its x-ray shows, layer by layer.

The 19 landmarks are the cephalometric ones, in the order of the ISBI 2015 set; mean positions are those of its images,
in mm from their top-left corner. Three parts move apart from one another (cranial base, upper jaw, lower jaw, which
also turns about its joint), and the soft profile follows the bones. Every landmark is a control point of a curve drawn
here. Numbers are mm: offsets from landmarks, or thicknesses along the ray.
"""
# ruff: noqa: RUF005  (points are arrays: + adds, it does not join)

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, Points, PoseRange, band, ellipse, loop, ring, rotation, smooth
from ddpm_lmk.data.phantom.exposure import Anatomy, ExposureRange


def flesh(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Head and neck with the face's profile; a shoulder that may reach into the picture."""
    nape = smooth([(-40, 470), (-12, 300), (2, 236), (2, 190), (-19, 150), (-34, 96), (-17, 42),
                   (32, 8) + 0.5 * head.crown, (86, 5) + head.crown])  # fmt: skip
    canvas.body([np.concatenate([profile(head), nape[:-1]])], rng.uniform(32, 42))
    shoulder = loop([(-140, 262), (-60, 244), (0, 262), (50, 300), (60, 470), (-140, 470)])
    canvas.body([shoulder + (0, rng.uniform(-25, 25))], 60)


def profile(head: Skull) -> np.ndarray:
    """Soft outline from the crown down the face to under the chin, through every soft landmark."""
    at = head.at
    subnasale, upper, lower = (at[name] for name in ("subnasale", "upper_lip", "lower_lip"))
    chin = at["soft_tissue_pogonion"]
    mouth = (upper + lower) / 2 + (-6, 0)
    front = [(86, 5) + head.crown, (128, 28) + 0.5 * head.crown, (143 + head.forehead, 62), at["nasion"] + (6, -14),
             at["nasion"] + (4.5, 1), head.nose + (-7, -17), head.nose + (-0.5, -3), head.nose + (-1.5, 3),
             subnasale + (6, 0.8)]  # fmt: skip
    lip = [front[-1], subnasale, (subnasale + upper) / 2 + (-1.6, -0.5), upper, upper + (-1.5, 4), mouth]
    low = [mouth, lower + (-1.5, -4), lower, (lower + chin) / 2 + (-5.5, -0.5), chin, at["menton"] + (10, 7.5),
           at["menton"] + (-2, 9.5), at["menton"] + (-30, 6), (88, 220), (84, 262), (86, 470)]  # fmt: skip
    return np.concatenate([smooth(front)[:-1], smooth(lip, steps=6)[:-1], smooth(low)])


def vault(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """The two tables of the skull and what they hold, frontal sinus, grooves of vessels."""
    nasion, crown = head.at["nasion"], head.crown
    outer = loop([nasion, nasion + (-0.5, -12), (138 + head.forehead, 62), (122, 31) + 0.5 * crown, (84, 10) + crown,
                    (34, 13) + 0.5 * crown, (-10, 46), (-25, 98), (-9, 141), (24, 150), (50, 140), (66, 126), (82, 116),
                    (112, 102)])  # fmt: skip
    inward = outer.mean(axis=0) - outer
    inner = outer + inward / np.linalg.norm(inward, axis=1, keepdims=True) * rng.uniform(5.0, 8.0)
    density = rng.uniform(0.8, 1.2)
    canvas.bone([outer], 5 * density, 17 * density, wall_mm=1.6)
    canvas.bone([inner], 0, 7 * density, wall_mm=1.2)
    canvas.fill([inner], "soft", rng.uniform(12, 26), soften_mm=6)
    sinus = loop([nasion + (-4, -6), nasion + (-1.5, -16), nasion + (-4, -25), nasion + (-9, -14)])
    canvas.fill([sinus], "bone", -rng.uniform(5, 11), soften_mm=0.8)
    starts = rng.uniform((0, 30), (90, 110), (5, 1, 2))
    grooves = smooth(starts + np.cumsum(rng.uniform((-4, -14), (14, 4), (5, 5, 2)), axis=1))
    canvas.fill(list(band(grooves, rng.uniform(0.5, 1.1))), "bone", -2.0, soften_mm=0.5)


def base(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Planum, sella turcica and clivus as one line; sphenoid sinus; orbit; nasal bone; thin walls of the midface."""
    sella, nasion, orbitale = (head.at[name] for name in ("sella", "nasion", "orbitale"))
    strength, r = rng.uniform(0.8, 1.2), rng.uniform(4.2, 6.2)  # r: radius of the fossa around the sella point
    line = smooth([nasion + (-7, 3), 0.45 * nasion + 0.55 * sella + (0, -1), sella + (r + 4, -r + 0.5),
                   sella + (r, -r + 1.5), sella + (0.95 * r, 0.4 * r), sella + (0, r), sella + (-r, 0.3 * r),
                   sella + (-r, -0.9 * r), sella + (-r - 2.2, -0.9 * r), sella + (-r - 3.2, 0.2 * r), sella + (-15, 18),
                   sella + (-22, 34)])  # fmt: skip
    canvas.fill([band(line, 0.95)], "bone", 13 * strength, soften_mm=0.3)
    sinus = [sella + (r + 2, r), sella + (22, 12), sella + (14, 24), sella + (-5, 16), sella + (-r, r + 2)]
    canvas.fill([loop(sinus)], "soft", -rng.uniform(6, 16), soften_mm=1.5)
    midface = loop([nasion + (-4, 1), orbitale + (3, 0), head.at["ANS"] + (-6, -1), head.at["PNS"] + (0, -1),
                      sella + (10, 18), sella + (8, 8)])  # fmt: skip
    canvas.bone([midface], 2.5, 4, wall_mm=1.5)
    rim = smooth([nasion + (-6, 7), nasion + (-15, 10), orbitale + (-13, -8), orbitale + (-9, -2), orbitale,
                  orbitale + (4.5, -3), orbitale + (6.5, -7)])  # fmt: skip
    canvas.fill([band(rim, 1.0)], "bone", 14 * strength, soften_mm=0.3)
    socket = [orbitale + (-26, -20), nasion + (-10, 6), orbitale + (2, -6), orbitale + (-10, -4)]
    canvas.fill([loop(socket)], "soft", -rng.uniform(4, 12), soften_mm=2)
    nasal = [nasion + (-3, 0), nasion, nasion + (3.5, 9), nasion + (7.5, 18), nasion + (4.5, 17), nasion + (-1, 8)]
    canvas.bone([loop(nasal)], 7, 6)
    walls = smooth(rng.uniform((88, 104), (128, 138), (6, 1, 2)) + rng.uniform(-11, 11, (6, 5, 2)))
    for wall in band(walls, 0.5):
        canvas.fill([wall], "bone", rng.uniform(3, 8), soften_mm=0.4)


def temporal(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Petrous bone and mastoid cells, ear canal whose upper edge is the porion, zygomatic arch."""
    porion, strength, canal = head.at["porion"], rng.uniform(0.8, 1.2), rng.uniform(3.6, 5.0)
    for _ in range(5):
        lump = ellipse(porion + rng.uniform((-22, -10), (12, 8)), rng.uniform(6, 17, 2), rng.uniform(-30, 30), count=24)
        canvas.fill([lump], "bone", rng.uniform(1, 3.8) * strength, soften_mm=rng.uniform(1, 4))
    for _ in range(8):
        cell = ellipse(porion + rng.uniform((-26, -4), (-8, 18)), rng.uniform(1.5, 4, 2), count=12)
        canvas.fill([cell], "bone", rng.uniform(-6, 4), soften_mm=0.7)
    middle = porion + (0, canal)
    canvas.fill([ellipse(middle, (canal, canal))], "bone", -13 * strength, soften_mm=0.3)
    canvas.fill([ring(middle, canal, 0.7)], "bone", 20 * strength, soften_mm=0.2)
    arch = smooth([porion + (8, -1), (80, 122), (104, 123), head.at["orbitale"] + (-7, 4)])
    canvas.fill([band(arch, 2.4)], "bone", 5 * strength, soften_mm=0.8)


def neck(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Airway, vertebrae with their spines, hyoid."""
    bend, density = rng.uniform(-10, 10), rng.uniform(0.8, 1.3)
    airway = smooth([(91, 128), (83, 150), (79, 172), (77 + 0.4 * bend, 200), (78 + bend, 260), (78 + bend, 420)])
    canvas.fill([band(airway, rng.uniform(4, 7))], "soft", -rng.uniform(10, 22), soften_mm=1.2)
    box = loop([(-9, -7.5), (0, -6.8), (8.5, -6), (8, 0), (9, 7.5), (0, 6.6), (-8.5, 6.5), (-8, 0)])
    spine = loop([(-9, -5), (-20, 0), (-33, 9), (-31, 12), (-18, 6), (-9, 5)])
    centres = [np.array([46 + bend * (number / 4) ** 2 - 1.2 * number, 158 + 18.5 * number]) for number in range(9)]
    canvas.bone([box + centre for centre in centres], 6 * density, 6 * density, wall_mm=1.4)
    canvas.bone([spine + centre for centre in centres], 3.5 * density, 4.5 * density)
    hyoid = band(smooth([(84, 196), (95, 204), (103, 203)]), np.linspace(1.2, 3, 17))
    canvas.bone([head.lower(hyoid)], 4, 4)


def upper_jaw(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Maxillary sinus; alveolar bone with the hollow at A; the palate, a plate from PNS to the spike of ANS."""
    ans, pns, a, incisal = (head.at[name] for name in ("ANS", "PNS", "subspinale_A", "upper_incisal"))
    cavity = head.upper([(104, 121), (127, 123), (131, 134), (128, 141), (104, 140), (99, 131)])
    canvas.fill([loop(cavity)], "soft", -rng.uniform(12, 28), soften_mm=1.6)
    gum = incisal + (-3.5, -10)
    front = smooth([ans, (ans + a) / 2 + (-1.2, 0), a, 0.55 * gum + 0.45 * a + (0.4, 0), gum])
    back = smooth([gum, *head.upper([(128, 164), (108, 163), (97, 158)]), pns + (3, 4), pns], steps=5)
    canvas.bone([np.concatenate([front[:-1], back])], 4.5, 6, wall_mm=1.0)
    floor = smooth([pns, 0.67 * pns + 0.33 * ans + (0, 1.6), 0.3 * pns + 0.7 * ans + (0, 0.4), ans])
    plate = band(floor, np.interp(np.arange(len(floor)), [0, 3, 16, 22, 24], [0.3, 1.3, 1.5, 1.3, 0.2]))
    canvas.bone([plate], 9, 8, wall_mm=0.6)
    fissure = [pns + (-3, -16), pns + (1.5, -20), pns + (0.5, -8), pns + (-0.8, -1.5), pns + (-2, -7)]
    canvas.fill([loop(fissure)], "soft", -14, soften_mm=0.5)


def lower_jaw(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Condyle, ramus through articulare, angle at gonion, lower border, chin from menton over gnathion to B."""
    gonion, menton, articulare = (head.at[name] for name in ("gonion", "menton", "articulare"))
    gnathion, pogonion, b = (head.at[name] for name in ("gnathion", "pogonion", "supramentale_B"))
    gum, density = head.at["lower_incisal"] + (-4, 9.5), rng.uniform(0.8, 1.25)
    top = head.lower([(128, 176), (108, 176), (100, 170), (97, 150), (92, 137), (84, 146), (78, 140), (76, 127),
                      (70, 123), (66, 125)])  # fmt: skip
    rear = smooth([*top[-2:], articulare, (articulare + gonion) / 2 + (1.8, 2), gonion + (-0.2, -9), gonion,
                   gonion + (7.5, 7.5), (gonion + menton) / 2 + (2, 1.5), menton + (-9, -1.2), menton])  # fmt: skip
    chin = smooth([menton, gnathion, pogonion, b, gum])
    canvas.bone([np.concatenate([rear[8:-1], chin, smooth(top[:-1])])], 6.5 * density, 10 * density, wall_mm=1.5)
    symphysis = [gum, b, pogonion, gnathion, menton, menton + (-6, -3), b + (-9, 3), gum + (-5, 4)]
    canvas.bone([loop(symphysis)], 3 * density, 9 * density, wall_mm=1.0)
    canal = band(smooth([(84, 156), (96, 180), (124, 190)]), 1.2)
    canvas.fill([head.lower(canal)], "bone", -3, soften_mm=0.5)


def teeth(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """Incisors whose tips are landmarks, then two rows of premolars and molars, some missing, some filled."""
    incisor = loop([(0, 0), (2.0, -4), (3.6, -9.5), (2.4, -17), (0.3, -23), (-2.0, -17), (-3.3, -9.5), (-1.3, -4)])
    molar = loop([(-4.5, 0), (-2, 0.8), (0, 0.2), (2, 0.8), (4.5, 0), (4.4, -6), (3.2, -9), (3.2, -18), (0.8, -12),
                    (-0.8, -12), (-3.2, -18), (-3.2, -9), (-4.4, -6)], steps=4)  # fmt: skip
    for name, up, move in (("upper_incisal", 1, head.upper), ("lower_incisal", -1, head.lower)):
        turn = rotation(-up * rng.uniform(8, 28)).T
        canvas.bone([(incisor * (1, up)) @ turn + head.at[name]], 9, 11, wall_mm=0.9)
        crowns = []
        for number in range(5):
            has_tooth, has_filling = rng.random(2) < (0.92, 0.16)
            centre = (132.5 - 8.0 * number - 2 * (number > 2), 170.1 + 0.2 * number - 0.5 * up)
            size = (0.82, up) if number < 2 else (1.08, 0.95 * up)
            filling = ellipse((centre[0], centre[1] - 2.5 * up), rng.uniform(1.5, 3.8, 2), count=12)
            if has_tooth:
                crowns.append(move(molar * size + centre))
            if has_tooth and has_filling:
                canvas.fill([move(filling)], "metal", 3, soften_mm=0.3)
        if crowns:
            canvas.bone(crowns, 8, 8, wall_mm=0.9)


def holder(head: Skull, canvas: Canvas, rng: np.random.Generator) -> None:
    """The head holder: a ruler in front of the face, rings of the ear rods."""
    has_ruler, has_rods = rng.random(2) < (0.6, 0.4)
    if has_ruler:
        x, end = head.nose[0] + rng.uniform(8, 26), rng.uniform(60, 110)
        ruler = np.array([(x - 2, -160), (x + 2, -160), (x + 2, end), (x - 2, end)])
        canvas.fill([ruler], "metal", rng.uniform(0.6, 2.5))
        tick = np.array([(x + 2, end), (x + 5, end), (x + 5, end - 1), (x + 2, end - 1)])
        canvas.fill([tick - (0, 3.0 * k) for k in range(10)], "metal", 1.5)
    if has_rods:
        middle = head.at["porion"] + rng.uniform((-4, 3), (4, 10))
        for radius in rng.uniform(4, 9, 2):
            canvas.fill([ring(middle, radius, 0.6)], "metal", 0.5)


LAYERS = (flesh, vault, base, temporal, neck, upper_jaw, lower_jaw, teeth, holder)

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
Move = Callable[[Points], np.ndarray]
CENTRE = np.array([90.0, 120.0])  # what proportions stretch about


class Skull(Anatomy):
    """Geometry of one head in mm; `at[name]` is a landmark, `landmarks [19, 2]` all of them in ISBI order."""

    names, layers = NAMES, LAYERS
    pose_range = PoseRange(
        height_mm=(205, 285), turn_deg=11, aspect=(0.76, 0.88), centre=(0.56, 0.6), shift=(0.12, 0.1), ripple_mm=1.2
    )
    exposure = ExposureRange(
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


def _similarity(
    rng: np.random.Generator,
    *,
    about: np.ndarray,
    turn_deg: tuple[float, float],
    shift_mm: tuple[float, float],
    size: float,
) -> Move:
    """A random turn and scaling about a point, then a shift, as a function of points `[N, 2]`."""
    turn = rotation(rng.uniform(*turn_deg))
    matrix = rng.uniform(1 - size, 1 + size) * turn
    target = about + rng.uniform(-1, 1, 2) * shift_mm
    return lambda points: (np.array(points, dtype=np.float64) - about) @ matrix.T + target
