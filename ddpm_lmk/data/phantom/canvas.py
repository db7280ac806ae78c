"""Drawing an anatomy: where it lies in the picture, curves through its points, and the attenuation that they add up to.

An anatomy is described in millimetres, x to the right and y down. `Frame.px` gives it the proportions of this person
(`warp`), bends it with a smooth low-frequency ripple, turns and shifts it. The same function moves what is drawn and
what is labelled, so landmarks are exact. `pose` draws the frame so that every landmark stays inside with a margin.

A canvas holds the line integral of mu along each ray; materials carry attenuation coefficients at roughly 60 keV.
Random textures come from lattices of a fixed number of cells, so an image shows the same anatomy at every size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

Move = Callable[[np.ndarray], np.ndarray]  # points `[N, 2]` in mm to points in mm
Points = Sequence[Any] | np.ndarray  # (x, y) in mm, `[N, 2]` or `[2]`: an array, or sequences of that shape
Region = tuple[slice, slice]

MARGIN = 0.04  # least distance of a landmark from the border, as a share of that side
MU = {"soft": 0.020, "air": -0.015, "bone": 0.048, "metal": 0.700}  # 1/mm; air: lung in place of soft tissue
SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class PoseRange:
    """Bounds of the uniform draws of a pose.

    `height_mm`: physical height of the picture, at least. `turn_deg`: largest rotation. `aspect`: width / height.
    `shift`: largest move of the landmarks' box from `centre`; both are shares of the picture's sides.
    """

    height_mm: tuple[float, float]
    turn_deg: float
    aspect: tuple[float, float]
    centre: tuple[float, float]
    shift: tuple[float, float]
    ripple_mm: float


@dataclass(frozen=True)
class Frame:
    """Map from anatomy (mm) to a picture of `shape` (rows, columns), pixel centres at integers."""

    bend: Move  # proportions and ripple
    turn: np.ndarray  # [2, 2] rotation
    offset_mm: np.ndarray  # [2] added after rotation: picture coordinates in mm from its top-left corner
    size_mm: np.ndarray  # [2] width and height of the picture
    shape: tuple[int, int]

    @property
    def px_per_mm(self) -> float:
        return float(max(self.shape) / self.size_mm.max())

    def px(self, points: np.ndarray) -> np.ndarray:
        """Pixels `[N, 2]` of anatomical points `[N, 2]` in mm."""
        inside = self.bend(np.asarray(points, dtype=np.float64)) @ self.turn.T + self.offset_mm
        return inside / self.size_mm * np.array([self.shape[1], self.shape[0]]) - 0.5


def pose(landmarks: np.ndarray, warp: Move, bounds: PoseRange, rng: np.random.Generator, *, size: int) -> Frame:
    """Draw a frame that keeps all `landmarks` (mm, before `warp`) inside; the draws do not depend on `size`."""
    ripple = _draw_ripple(rng, bounds.ripple_mm)

    def bend(points: np.ndarray) -> np.ndarray:
        return ripple(warp(points))

    turn = rotation(rng.uniform(-bounds.turn_deg, bounds.turn_deg))
    aspect, height = rng.uniform(*bounds.aspect), rng.uniform(*bounds.height_mm)
    placed = bend(landmarks) @ turn.T
    low, high = placed.min(axis=0), placed.max(axis=0)
    room = (high - low) / (1 - 2 * MARGIN)
    height = max(height, room[1], room[0] / aspect)
    sides = np.array([height * aspect, height])
    middle = sides * (np.array(bounds.centre) + rng.uniform(-1, 1, 2) * np.array(bounds.shift))
    start = np.clip(middle - (high - low) / 2, MARGIN * sides, (1 - MARGIN) * sides - (high - low))
    shape = (size, max(1, round(size * aspect))) if aspect <= 1 else (max(1, round(size / aspect)), size)
    return Frame(bend, turn, start - low, sides, shape)


def _draw_ripple(rng: np.random.Generator, amplitude_mm: float, count: int = 3) -> Move:
    """A smooth displacement field: a sum of plane waves, each with its own direction and phase."""
    angles, lengths = rng.uniform(0, 2 * np.pi, count), rng.uniform(140, 320, count)
    waves = (2 * np.pi / lengths)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)  # radians per mm
    phases, push = rng.uniform(0, 2 * np.pi, count), rng.uniform(-amplitude_mm, amplitude_mm, (count, 2))
    return lambda points: points + np.sin(points @ waves.T + phases) @ push


def rotation(degrees: float) -> np.ndarray:
    """Matrix `[2, 2]` that turns column vectors clockwise, as seen: y points down."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def smooth(controls: Points, *, closed: bool = False, steps: int = 8) -> np.ndarray:
    """Catmull-Rom curves `[..., M, 2]` through all control points `[..., K, 2]`, `steps` samples per span."""
    points = np.asarray(controls, dtype=np.float64)
    first, last = points[..., :1, :], points[..., -1:, :]
    ends = (last, points[..., :2, :]) if closed else (2 * first - points[..., 1:2, :], 2 * last - points[..., -2:-1, :])
    padded = np.concatenate([ends[0], points, ends[1]], axis=-2)[..., None, :]
    spans = points.shape[-2] if closed else points.shape[-2] - 1
    before, start, stop, after = (padded[..., shift : shift + spans, :, :] for shift in range(4))
    t = (np.arange(steps) / steps)[:, None]
    cubic = 3 * (start - stop) + after - before
    curve = start + 0.5 * t * (stop - before + t * (2 * before - 5 * start + 4 * stop - after + t * cubic))
    flat = curve.reshape(*points.shape[:-2], -1, 2)
    return flat if closed else np.concatenate([flat, last], axis=-2)


def band(line: Points, half_width: float | np.ndarray) -> np.ndarray:
    """Outlines `[..., 2M, 2]` of strokes along `line` `[..., M, 2]`; half-widths in mm broadcast to `[..., M]`."""
    line = np.asarray(line, dtype=np.float64)
    tangent = np.empty_like(line)
    tangent[..., 1:-1, :] = line[..., 2:, :] - line[..., :-2, :]
    tangent[..., 0, :], tangent[..., -1, :] = line[..., 1, :] - line[..., 0, :], line[..., -1, :] - line[..., -2, :]
    tangent /= np.maximum(np.sqrt((tangent**2).sum(axis=-1, keepdims=True)), 1e-9)
    offset = np.stack([-tangent[..., 1], tangent[..., 0]], axis=-1) * np.asarray(half_width)[..., None]
    return np.concatenate([line + offset, (line - offset)[..., ::-1, :]], axis=-2)


def loop(controls: Points, steps: int = 8) -> np.ndarray:
    """As `smooth`, back to the first point."""
    return smooth(controls, closed=True, steps=steps)


def ring(centre: Points, radius: float, half_width: float) -> np.ndarray:
    """Outline of a circular stroke."""
    circle = ellipse(centre, (radius, radius))
    return band(np.concatenate([circle, circle[:2]]), half_width)  # a second point gives the last one its tangent


def ellipse(centre: Points, radii: Points, turn_deg: float = 0.0, count: int = 40) -> np.ndarray:
    """Outline `[count, 2]` of a turned ellipse."""
    t, a = np.linspace(0, 2 * np.pi, count, endpoint=False), np.deg2rad(turn_deg)
    x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
    return np.stack([centre[0] + x * np.cos(a) - y * np.sin(a), centre[1] + x * np.sin(a) + y * np.cos(a)], axis=1)


class Canvas:
    """`path [H, W]`: the line integral of mu, growing with every shape drawn."""

    def __init__(self, frame: Frame, rng: np.random.Generator) -> None:
        self.frame, self.rng = frame, rng
        self.path = np.zeros(frame.shape, np.float32)
        self.samples = 4 if max(frame.shape) <= 384 else 2
        self.trabeculae = 1 + 0.10 * self.noise(240) + 0.07 * self.noise(90)

    def noise(self, cells: int) -> np.ndarray:
        """Standard normal values on a lattice of `cells` along the height, interpolated to the picture."""
        height, width = self.frame.shape
        across = max(2, round(cells * self.frame.size_mm[0] / self.frame.size_mm[1]))
        lattice = self.rng.standard_normal((cells, across), dtype=np.float32)
        method = cv2.INTER_AREA if cells > height else cv2.INTER_CUBIC
        return cv2.resize(lattice, (width, height), interpolation=method)

    def _add(
        self, outlines: Sequence[np.ndarray], pad_mm: float, path: Callable[[np.ndarray, Region], np.ndarray]
    ) -> None:
        """Add `path` of the outlines' coverage in [0, 1], on the region they touch, `pad_mm` larger, if it is in sight.

        Outlines of one call are one body: where they overlap, they are not twice as thick.
        """
        corners = self.frame.px(np.concatenate(list(outlines)))
        pad = 2 + int(np.ceil(pad_mm * self.frame.px_per_mm))
        height, width = self.frame.shape
        left, top = (int(v) for v in np.clip(np.floor(corners.min(axis=0)) - pad, 0, (width, height)))
        right, bottom = (int(v) for v in np.clip(np.ceil(corners.max(axis=0)) + pad + 1, 0, (width, height)))
        if left < right and top < bottom:
            region = (slice(top, bottom), slice(left, right))
            coverage = self._coverage(np.split(corners, np.cumsum([len(outline) for outline in outlines])[:-1]), region)
            self.path[region] += path(coverage, region)

    def _coverage(self, outlines_px: Sequence[np.ndarray], region: Region) -> np.ndarray:
        """Fill at `samples` times the resolution, then average."""
        origin = np.array([region[1].start, region[0].start])
        rows, columns = region[0].stop - region[0].start, region[1].stop - region[1].start
        fine = np.zeros((rows * self.samples, columns * self.samples), np.uint8)
        for points in outlines_px:
            scaled = ((points - origin + 0.5) * self.samples - 0.5) * 2**SUBPIXEL_BITS
            cv2.fillPoly(fine, [np.round(scaled).astype(np.int32)], 255, shift=SUBPIXEL_BITS)
        return cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    def blur(self, values: np.ndarray, sigma_mm: float) -> np.ndarray:
        """Gaussian blur; wide ones work on a reduced copy, which looks the same and costs little."""
        sigma = max(sigma_mm * self.frame.px_per_mm, 0.3)
        factor = int(sigma // 3)
        if factor < 2 or min(values.shape) < 4 * factor:
            return cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        height, width = values.shape
        small = cv2.resize(values, (max(1, width // factor), max(1, height // factor)), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), sigma / factor, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)

    def fill(
        self,
        outlines: Sequence[np.ndarray],
        material: str,
        mm: float,
        *,
        soften_mm: float = 0.0,
        within: np.ndarray | None = None,
    ) -> None:
        """Add `mm` of a material inside the outlines (negative: take away); edges may be soft, or cut by `within`."""

        def path(coverage: np.ndarray, region: Region) -> np.ndarray:
            if soften_mm:
                coverage = self.blur(coverage, soften_mm)
            if within is not None:
                coverage = coverage * self._coverage([self.frame.px(within)], region)
            return np.float32(MU[material] * mm) * coverage

        self._add(outlines, 3 * soften_mm, path)

    def cloud(self, outlines: Sequence[np.ndarray], material: str, mm: float, *, soften_mm: float) -> None:
        """Add about `mm` of a material, in flakes."""
        flakes = np.maximum(0.6 + 0.5 * self.noise(24), 0)  # drawn out of sight too: the next texture is the same
        amount = np.float32(MU[material] * mm)
        self._add(outlines, 3 * soften_mm, lambda cover, region: amount * self.blur(cover, soften_mm) * flakes[region])

    def bone(self, outlines: Sequence[np.ndarray], inside_mm: float, shell_mm: float, *, wall_mm: float = 1.2) -> None:
        """Add bones: a spongy inside with trabecular texture and a shell, seen edge-on, of about `wall_mm`."""

        def path(coverage: np.ndarray, region: Region) -> np.ndarray:
            rim = 2 * (1 - self.blur(coverage, wall_mm))
            return MU["bone"] * coverage * (inside_mm * self.trabeculae[region] + shell_mm * rim)

        self._add(outlines, 3 * wall_mm, path)

    def body(self, outlines: Sequence[np.ndarray], radius_mm: float, *, material: str = "soft") -> None:
        """Add a rounded body: 2 sqrt(d (2R - d)) thick at depth d < R from its edge, 2R beyond."""

        def path(coverage: np.ndarray, region: Region) -> np.ndarray:
            # Framed, so that what goes on outside of the picture is not thin at its border.
            framed = cv2.copyMakeBorder((coverage > 0.5).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
            depth_px = np.minimum(cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1], sum(framed.shape))
            depth = cv2.GaussianBlur(depth_px, (0, 0), 0.6, borderType=cv2.BORDER_REPLICATE) / self.frame.px_per_mm
            depth = np.minimum(depth, radius_mm)
            thickness = self.blur(2 * np.sqrt(depth * (2 * radius_mm - depth)), 0.8)
            return np.float32(MU[material]) * coverage * thickness

        self._add(outlines, 0.0, path)
