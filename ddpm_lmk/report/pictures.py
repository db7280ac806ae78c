"""The x-rays of a report: best, median and worst, and one film as every method sees it with few and with many labels.

Pictures are drawn anew from the packed data, where it is still there; where it is not, the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import cv2
import numpy as np

from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.drawing import draw_overlay, encode_jpeg, to_uint8
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.errors import DataError
from ddpm_lmk.report import html
from ddpm_lmk.report.collect import Run, Study
from ddpm_lmk.report.figures import colours

FEATURED = 3  # numbers of labels that are shown where there is no room for all
SIDE, PANEL_SIDE = 760, 640
MARGIN = 0.15  # of the extent of the landmarks, around them
KEY = '<span class="key"><i style="color:#d07300">×</i> found, <i style="color:#2f9e44">○</i> annotated.</span>'


def featured_shots(shots: Sequence[int]) -> list[int]:
    """At most three numbers of labels: the smallest, the middle one and the largest."""
    if len(shots) <= FEATURED:
        return list(shots)
    return [shots[0], shots[len(shots) // 2], shots[-1]]


def overlays(study: Study, start: str) -> str:
    """Best, median and worst picture of the best start with most labels (its first seed)."""
    run = study.select(start, max(labels for labels in study.shots if study.select(start, labels)))[0]
    errors = sorted(run.image_errors().items(), key=lambda item: item[1])
    if not errors:
        return ""
    heading = "<h2>Best, median and worst</h2>"
    text = f"Starting from {escape(study.title(start))} with {run.labels} labels, seed {run.results['seed']}. {KEY}"
    chosen = {"best": errors[0], "median": errors[len(errors) // 2], "worst": errors[-1]}
    try:
        drawn = [
            html.figure(
                html.image(_draw(run, name, SIDE), f"x-ray {name} with landmarks"),
                f"<strong>{which}</strong> {escape(name)}: {error:.2f} {run.unit} on average",
            )
            for which, (name, error) in chosen.items()
        ]
    except DataError as error:
        return f'{heading}<p class="note">The pictures are not at hand: {escape(str(error))}</p>'
    return f'{heading}<p class="note">{text}</p><div class="figures three">{"".join(drawn)}</div>'


def panels(study: Study) -> str:
    """One film (the median one of the best start with most labels) as each start sees it, with few and many labels."""
    shots = featured_shots(study.shots)
    best = study.best_start(shots[-1])
    ranked = sorted(study.select(best, shots[-1])[0].image_errors().items(), key=lambda item: item[1])
    if not ranked or len(study.starts) < 2:
        return ""
    name = ranked[len(ranked) // 2][0]
    blocks = []
    try:
        for start in study.starts:
            cells = "".join(_panel(next(iter(study.select(start, labels)), None), name, labels) for labels in shots)
            title = f"{html.swatch(colours(study)[start])}{escape(study.title(start))}"
            blocks.append(f'<div class="method"><h3>{title}</h3><div class="panels">{cells}</div></div>')
    except DataError as error:
        return f'<h2>One film, every method</h2><p class="note">The pictures are not at hand: {escape(str(error))}</p>'
    text = (
        f"Film {escape(name)}, the median one of {escape(study.title(best))} with {shots[-1]} labels, around its "
        f"landmarks; first seed of every row. Below each picture its mean radial error. {KEY}"
    )
    grid = f'<div class="methods" style="--columns:{len(shots)}">{"".join(blocks)}</div>'
    return f'<h2>One film, every method</h2><p class="note">{text}</p>{grid}'


def _panel(run: Run | None, name: str, labels: int) -> str:
    """A small picture with its error; a gap where there is no such run."""
    told = f"{labels} {'label' if labels == 1 else 'labels'}"
    if run is None:
        return f'<div class="gap">{told}: not run</div>'
    error = run.image_errors()[name]
    picture = html.image(_draw(run, name, PANEL_SIDE, cropped=True), f"x-ray {name}, {run.start}, {told}")
    return f'<div class="panel">{picture}<span>{told}: {error:.2f} {run.unit}</span></div>'


def _draw(run: Run, name: str, longest: int, *, cropped: bool = False) -> bytes:
    """JPEG of one test picture in its native aspect with found and annotated points, whole or around the landmarks."""
    cfg = load_run(run.home / "config.yaml")
    packs = open_datasets(cfg.data)
    manifest = next((pack for pack in packs if pack.dataset == run.results["dataset"]), packs[0])
    for row in manifest.rows([run.results["split"]]):
        record = manifest.read_record(int(row))
        if record.id == name:
            break
    else:
        raise DataError(f"{manifest.root} has no image {name}")
    native = np.array(record.native_size)
    side = longest if longest < SIDE else max(longest, manifest.stored_size)
    scale = side / native.max()
    size = tuple(int(value) for value in np.maximum(1, np.rint(native * scale)))
    to_shown = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5], [0, 0, 1]])
    from_stored = np.linalg.inv(np.vstack([record.to_stored, [0, 0, 1]]))
    matrix = (to_shown @ from_stored)[:2]
    stored = to_uint8(manifest.decode(int(row)))
    shown = cv2.warpAffine(stored, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    rows = run.predictions[name]
    points, true = (
        (np.array([[float(line[x]), float(line[y])] for line in rows]) + 0.5) * scale - 0.5
        for x, y in (("x", "y"), ("true_x", "true_y"))
    )
    drawn = draw_overlay(shown, points, true=true, side=max(size))
    return encode_jpeg(_around(drawn, true) if cropped else drawn)


def _around(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The part of a picture that holds all annotated points, with a margin."""
    margin = MARGIN * float(np.ptp(points, axis=0).max())
    low = np.maximum(points.min(0) - margin, 0).astype(int)
    high = np.minimum(points.max(0) + margin, picture.shape[1::-1]).astype(int)
    return np.ascontiguousarray(picture[low[1] : high[1] + 1, low[0] : high[0] + 1])
