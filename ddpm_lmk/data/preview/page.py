"""The page: what the pictures show, and facts, findings and refusals in words. Nothing in it points outside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from ddpm_lmk.data.duplicates.leakage import KINDS, Leakage, count_kinds
from ddpm_lmk.data.preview.samples import Look


def render(looks: Sequence[Look], found: Leakage, pictures: Mapping[str, bytes]) -> str:
    """The whole page; `pictures` are PNGs by file name."""
    names = ", ".join(look.manifest.dataset for look in looks)
    body = [
        f'<header><p class="eyebrow">packed x-rays</p><h1>{escape(names)}</h1></header>',
        _cards(looks, found),
        '<div class="packs">' + "".join(_facts(look) for look in looks) + "</div>",
        "<h2>Statistics</h2>",
        _picture("statistics.png", pictures, "Of an even sample of up to 512 images a pack; mean shapes are ± 1 SD."),
        "<h2>Copies and leaks</h2>",
        _findings(found),
        _picture("copies.png", pictures, "Left: the film that would be left out. Right: the one it repeats."),
        "<h2>Refused files</h2>",
        _refused(looks),
        "<h2>Contact sheet</h2>",
        _picture("contact_sheet.png", pictures, "Evenly chosen, as they are stored; rings are landmarks."),
        _landmarks(looks),
    ]
    template = resources.files("ddpm_lmk").joinpath("data/preview/page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(names), body="".join(body))


def found_lines(found: Leakage) -> list[tuple[str, str]]:
    """Copies and leaks as (label, value), for the command line."""
    return [
        ("also in a protected split", _counted(count_kinds(found.leaks))),
        ("copies of an earlier one", _counted(count_kinds(found.copies))),
        *(("not compared", str(pair)) for pair in found.uncompared),
    ]


def _counted(counts: Mapping[str, int]) -> str:
    parts = [f"{number} {kind}" for kind, number in counts.items() if number]
    return f"{sum(counts.values())} ({', '.join(parts)})" if parts else "0"


def _cards(looks: Sequence[Look], found: Leakage) -> str:
    images = sum(len(look.manifest) for look in looks)
    refused = sum(look.refusals.total() for look in looks)
    labelled = sum(len(look.manifest) for look in looks if look.manifest.spec.num_landmarks)
    cards = [
        (f"{images:,}", "images", f"in {len(looks)} {'pack' if len(looks) == 1 else 'packs'}"),
        (f"{labelled:,}", "in labelled packs", "with landmarks"),
        (f"{len(found.leaks):,}", "leaks", "training images that are in a protected split too"),
        (f"{len(found.copies):,}", "copies", "training images that repeat an earlier one"),
        (f"{refused:,}", "refused files", "left out when packing"),
    ]
    shown = (
        f'<div class="card"><div class="number">{number}</div><div class="what">{what}</div>'
        f'<div class="more">{more}</div></div>'
        for number, what, more in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _facts(look: Look) -> str:
    (_, name), *lines = look.lines()
    rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in lines)
    return f'<section class="card"><h3>{escape(name)}</h3><table class="facts">{rows}</table></section>'


def _findings(found: Leakage) -> str:
    missing = "".join(f'<p class="note">Note: {escape(str(pair))}.</p>' for pair in found.uncompared)
    if not found.leaks and not found.copies:
        return '<p class="note">No training image is in another split too, and none comes twice.</p>' + missing
    rows = []
    for what, findings in (("also in a protected split", found.leaks), ("copies of an earlier one", found.copies)):
        counts = count_kinds(findings)
        cells = "".join(f"<td>{counts[kind]}</td>" for kind in KINDS)
        rows.append(f"<tr><td>{what}</td><td>{len(findings)}</td>{cells}</tr>")
    heads = "".join(f"<th>{kind}</th>" for kind in KINDS)
    return (
        '<p class="note">Pre-training leaves these out unless it is told otherwise (data.dedup). '
        "Protected is every split but train.</p>"
        f'<div class="scroll"><table><thead><tr><th></th><th>images</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>" + missing
    )


def _refused(looks: Sequence[Look]) -> str:
    parts = [_refused_of(look) for look in looks if look.refusals]
    return "".join(parts) or '<p class="note">Every file was packed.</p>'


def _refused_of(look: Look) -> str:
    """Counts by code with a first example, and the list, folded."""
    example = {line["code"]: line["reason"] for line in reversed(look.refused)}
    counts = [(code, str(number), example.get(code, "")) for code, number in look.refusals.most_common()]
    listed = [(line["id"], line["code"], line["reason"]) for line in look.refused]
    total = look.refusals.total()
    summary = f"the first {len(listed)} of {total} files" if len(listed) < total else f"all {total} files"
    return (
        f"<h3>{escape(look.manifest.dataset)}</h3>{_table(('code', 'files', 'for example'), counts)}"
        f"<details><summary>{summary}</summary>{_table(('id', 'code', 'reason'), listed)}</details>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words."""
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="words"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _landmarks(looks: Sequence[Look]) -> str:
    parts = []
    for look in looks:
        names = look.manifest.spec.landmark_names
        if names:
            listed = ", ".join(f"{number} {escape(name)}" for number, name in enumerate(names, 1))
            parts.append(f"<p><strong>Landmarks of {escape(look.manifest.dataset)}:</strong> {listed}</p>")
    return "".join(parts)


def _picture(name: str, pictures: Mapping[str, bytes], caption: str) -> str:
    if name not in pictures:
        return ""
    content = base64.b64encode(pictures[name]).decode("ascii")
    words = name.removesuffix(".png").replace("_", " ")
    image = f'<img src="data:image/png;base64,{content}" alt="{words}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
