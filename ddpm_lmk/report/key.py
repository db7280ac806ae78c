"""One key for all figures of a study, as part of the page: it wraps with the screen, unlike a legend in a figure."""

from __future__ import annotations

from html import escape

from ddpm_lmk.report.collect import Study, paper_rows
from ddpm_lmk.report.figures import PAPER_COLOUR, PAPER_DASHES, SHAPE_COLOUR, Dash, Look, looks

# Outlines of matplotlib's markers around (0, 0), in pixels.
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
    "": "",
}


def html(study: Study, *, paper: bool = False, shape: bool = False) -> str:
    """The starts of a study, and on demand the mean shape and the paper's rows."""
    entries = [_entry(looks(study)[start], study.title(start)) for start in study.starts]
    if shape:
        entries.append(_entry(Look(SHAPE_COLOUR, "", (0, (5, 3))), "mean shape (no picture)"))
    if paper:
        names = dict.fromkeys(row.method for row in paper_rows(study.spec))
        entries += [
            _entry(Look(PAPER_COLOUR, "D", dash), f"{name} (right figure only)")
            for name, dash in zip(names, PAPER_DASHES)
        ]
    return f'<p class="legend">{"".join(entries)}</p>'


def _entry(look: Look, title: str) -> str:
    """A piece of the line, with its marker, and the name."""
    line = f'<path d="M1,5H31" stroke="{look.colour}" stroke-width="1.8"{_dashes(look.dash)} fill="none"/>'
    mark = f'<path d="{MARKS[look.marker]}" transform="translate(16,5)" fill="{look.colour}"/>' if look.marker else ""
    drawn = f'<svg width="32" height="10" viewBox="0 0 32 10" aria-hidden="true">{line}{mark}</svg>'
    return f"<span>{drawn}{escape(title)}</span>"


def _dashes(dash: Dash) -> str:
    """What SVG calls a dash of matplotlib, which counts in widths of the line."""
    if isinstance(dash, str):
        return ""
    return f' stroke-dasharray="{" ".join(f"{1.8 * part:g}" for part in dash[1])}"'
