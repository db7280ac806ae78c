"""Colours, markers and dashes of starting weights, the same in every figure and in the legend of the page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from ddpm_lmk.report.collect import SCRATCH, Study, paper_rows

Dash = str | tuple[int, tuple[float, ...]]

INK, MUTED, HAIRLINE = "#1c2733", "#6b7785", "#dfe4ea"
SCRATCH_COLOUR, SHAPE_COLOUR, PAPER_COLOUR = "#d55e00", "#8a94a0", "#7d4fa3"
# Okabe and Ito's colours, and from the fifth on Tol's: told apart with every kind of colour blindness, and in grey with
# the help of markers and dashes.
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#332288", "#6f7d1c", "#44aa99", "#4a5a6b")
DASHES: tuple[Dash, ...] = ("solid", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
PAPER_DASHES: tuple[Dash, ...] = ((0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
SHAPE_DASH: Dash = (0, (5, 3))
# Outlines of matplotlib's markers around (0, 0) in pixels, for the legend, which is HTML.
MARKS = {
    "o": "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
    "s": "M-3,-3H3V3H-3Z",
    "D": "M0,-3.4L3.4,0L0,3.4L-3.4,0Z",
    "^": "M0,-3.4L3.4,3H-3.4Z",
    "v": "M0,3.4L3.4,-3H-3.4Z",
    "<": "M-3.4,0L3,3.4V-3.4Z",
    ">": "M3.4,0L-3,3.4V-3.4Z",
    "P": "M-1.2,-3.4H1.2V-1.2H3.4V1.2H1.2V3.4H-1.2V1.2H-3.4V-1.2H-1.2Z",
    "X": "M-3.4,-1.8L-1.8,-3.4L0,-1.6L1.8,-3.4L3.4,-1.8L1.6,0L3.4,1.8L1.8,3.4L0,1.6L-1.8,3.4L-3.4,1.8L-1.6,0Z",
    "p": "M0,-3.5L3.3,-1.1L2.1,2.8H-2.1L-3.3,-1.1Z",
    "*": "M0,-4.2L1,-1.3H4L1.6,0.5L2.5,3.4L0,1.6L-2.5,3.4L-1.6,0.5L-4,-1.3H-1Z",
}
MARKERS = ("o", "^", "v", "P", "X", "<", ">", "p", "*")  # "s" is that of random weights, "D" the paper's
RC: Any = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """How a start is drawn."""

    colour: str
    marker: str
    dash: Dash


def looks(study: Study) -> dict[str, Look]:
    """A look for each start of a study; random weights have the same one in every study."""
    # also where a study has no such runs, so that the others look the same in studies that do
    by_start = {SCRATCH: Look(SCRATCH_COLOUR, "s", "solid")}
    for index, start in enumerate(start for start in study.starts if start != SCRATCH):
        dash = DASHES[index % len(DASHES)]
        by_start[start] = Look(PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)], dash)
    return by_start


def swatch(colour: str) -> str:
    """A small square of a curve's colour, as HTML."""
    return f'<span class="swatch" style="background:{colour}"></span>'


def method_name(study: Study, start: str) -> str:
    """The title of a start behind its swatch, as HTML."""
    return f"{swatch(looks(study)[start].colour)}{escape(study.title(start))}"


def legend(study: Study, *, paper: bool = False, shape: bool = False) -> str:
    """One legend for all figures of a study, as HTML: it wraps with the screen, unlike a legend inside a figure.

    Args:
        paper: with the paper's curves.
        shape: with the mean shape.
    """
    entries = [_entry(looks(study)[start], study.title(start)) for start in study.starts]
    if shape:
        entries.append(_entry(Look(SHAPE_COLOUR, "", SHAPE_DASH), "mean shape (no picture)"))
    if paper:
        names = dict.fromkeys(row.method for row in paper_rows(study.spec))
        entries += [
            _entry(Look(PAPER_COLOUR, "D", dash), f"{name} (right figure only)")
            for name, dash in zip(names, PAPER_DASHES)
        ]
    return f'<p class="legend">{"".join(entries)}</p>'


def _entry(look: Look, title: str) -> str:
    """A piece of the line with its marker, and the name."""
    # matplotlib counts dashes in widths of the line, SVG in pixels
    pattern = "" if isinstance(look.dash, str) else " ".join(f"{1.8 * part:g}" for part in look.dash[1])
    dashes = f' stroke-dasharray="{pattern}"' if pattern else ""
    line = f'<path d="M1,5H31" stroke="{look.colour}" stroke-width="1.8"{dashes} fill="none"/>'
    mark = f'<path d="{MARKS[look.marker]}" transform="translate(16,5)" fill="{look.colour}"/>' if look.marker else ""
    drawn = f'<svg width="32" height="10" viewBox="0 0 32 10" aria-hidden="true">{line}{mark}</svg>'
    return f"<span>{drawn}{escape(title)}</span>"
