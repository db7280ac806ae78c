"""Error against the length of pre-training (figure 2 of the paper): starts that are snapshots of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter

from ddpm_lmk.report.collect import Study
from ddpm_lmk.report.figures import MARKERS, PALETTE, STYLE, WIDE, blank, to_svg, unit_name
from ddpm_lmk.system.durable import read_json

Source = tuple[str, str]  # run directory and kind of weights


def by_step(study: Study) -> dict[Source, dict[int, str]]:
    """Starts by step of the pre-training run they come from; only runs that several steps were taken of."""
    found: dict[Source, dict[int, str]] = {}
    for start in study.starts:
        run = next(run for run in study.runs if run.start == start)
        parent: dict[str, Any] = (read_json(run.home / "run.json") or {}).get("parent") or {}
        if parent.get("step") is not None and parent.get("path"):
            folder = Path(parent["path"])
            root = folder.parents[1] if folder.parent.name == "snapshots" else folder
            found.setdefault((str(root), str(parent.get("use"))), {}).setdefault(int(parent["step"]), start)
    return {source: dict(sorted(starts.items())) for source, starts in found.items() if len(starts) > 1}


def curve(study: Study, shots: Sequence[int]) -> str | None:
    """MRE (protocol original) against pre-training steps, a line per number of labels; None without such starts."""
    sources = by_step(study)
    if not sources:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = blank(WIDE)
        for (folder, use), starts in sources.items():
            for index, labels in enumerate(shots):
                scores = [(step, study.score(start, labels, "original")) for step, start in starts.items()]
                steps = [step for step, score in scores if score is not None]
                means = np.array([score.mre[0] for _, score in scores if score is not None])
                spread = np.array([score.mre[1] or 0.0 for _, score in scores if score is not None])
                colour = PALETTE[index % len(PALETTE)]
                name = f"{labels} {'label' if labels == 1 else 'labels'}"
                name += f", {Path(folder).name} {use}" if len(sources) > 1 else ""
                axes.fill_between(steps, means - spread, means + spread, color=colour, alpha=0.13, linewidth=0)
                axes.plot(steps, means, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pre-training, optimizer steps")
        axes.set_ylabel(f"mean radial error, {unit_name(study, 'original')}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, f"steps-{study.dataset}", "Mean radial error by length of pre-training")
