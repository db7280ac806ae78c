"""The page: what the pictures show, and facts, findings and refusals in words. Nothing in it points outside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from ddpm_lmk.data.duplicates.leakage import KINDS, Leakage, count_kinds
from ddpm_lmk.data.preview.samples import DatasetSample


def render(samples: Sequence[DatasetSample], leakage: Leakage, pictures: Mapping[str, bytes]) -> str:
    """The whole page; `pictures` are PNGs by file name."""
    names = ", ".join(sample.manifest.dataset for sample in samples)
    body = [
        f'<header><p class="eyebrow">packed x-rays</p><h1>{escape(names)}</h1></header>',
        _cards(samples, leakage),
        '<div class="packs">' + "".join(_facts(sample) for sample in samples) + "</div>",
        "<h2>Statistics</h2>",
        _picture(
            "statistics.png", pictures, "Of an even sample of up to 512 images a dataset; mean shapes are ± 1 SD."
        ),
        "<h2>Duplicates and leakage</h2>",
        _findings(leakage),
        _picture("copies.png", pictures, "Left: the image that would be left out. Right: the one it repeats."),
        "<h2>Refused files</h2>",
        _refused(samples),
        "<h2>Contact sheet</h2>",
        _picture("contact_sheet.png", pictures, "Evenly chosen, as they are stored; rings are landmarks."),
        _landmarks(samples),
    ]
    template = resources.files("ddpm_lmk").joinpath("data/preview/page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(names), body="".join(body))


def duplicate_lines(leakage: Leakage) -> list[tuple[str, str]]:
    """Copies and leaks as (label, value), for the command line."""
    return [
        ("also in a protected split", _counted(count_kinds(leakage.leaks))),
        ("copies of an earlier one", _counted(count_kinds(leakage.copies))),
        *(("not compared", str(pair)) for pair in leakage.uncompared),
    ]


def _counted(counts: Mapping[str, int]) -> str:
    parts = [f"{number} {kind}" for kind, number in counts.items() if number]
    return f"{sum(counts.values())} ({', '.join(parts)})" if parts else "0"


def _cards(samples: Sequence[DatasetSample], leakage: Leakage) -> str:
    images = sum(len(sample.manifest) for sample in samples)
    refused = sum(sample.refusals.total() for sample in samples)
    labelled = sum(len(sample.manifest) for sample in samples if sample.manifest.spec.num_landmarks)
    cards = [
        (images, "images", f"in {len(samples)} {'dataset' if len(samples) == 1 else 'datasets'}"),
        (labelled, "in labelled datasets", "with landmarks"),
        (len(leakage.leaks), "leaks", "training images that are in a protected split too"),
        (len(leakage.copies), "duplicates", "training images that repeat an earlier one"),
        (refused, "refused files", "left out when packing"),
    ]
    shown = (
        f'<div class="card"><div class="number">{number:,}</div><div class="what">{what}</div>'
        f'<div class="more">{more}</div></div>'
        for number, what, more in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _facts(sample: DatasetSample) -> str:
    (_, name), *lines = sample.lines()
    rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in lines)
    return f'<section class="card"><h3>{escape(name)}</h3><table class="facts">{rows}</table></section>'


def _findings(leakage: Leakage) -> str:
    missing = "".join(f'<p class="note">Note: {escape(str(pair))}.</p>' for pair in leakage.uncompared)
    if not leakage.leaks and not leakage.copies:
        return '<p class="note">No training image is in another split too, and none comes twice.</p>' + missing
    rows = []
    for what, findings in (("also in a protected split", leakage.leaks), ("copies of an earlier one", leakage.copies)):
        rows.append((what, str(len(findings)), *map(str, count_kinds(findings).values())))
    return (
        '<p class="note">Pre-training leaves these out unless it is told otherwise (data.dedup). '
        "Protected is every split but train.</p>" + _table(("", "images", *KINDS), rows, kind="") + missing
    )


def _refused(samples: Sequence[DatasetSample]) -> str:
    parts = [_refused_of(sample) for sample in samples if sample.refusals]
    return "".join(parts) or '<p class="note">Every file was packed.</p>'


def _refused_of(sample: DatasetSample) -> str:
    """Counts by code with a first example, and the list, folded."""
    example = {line["code"]: line["reason"] for line in reversed(sample.refused)}  # the first of a code stays
    counts = [(code, str(number), example.get(code, "")) for code, number in sample.refusals.most_common()]
    listed = [(line["id"], line["code"], line["reason"]) for line in sample.refused]
    total = sample.refusals.total()
    summary = f"the first {len(listed)} of {total} files" if len(listed) < total else f"all {total} files"
    return (
        f"<h3>{escape(sample.manifest.dataset)}</h3>{_table(('code', 'files', 'for example'), counts)}"
        f"<details><summary>{summary}</summary>{_table(('id', 'code', 'reason'), listed)}</details>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "words") -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    # Ids and reasons may hold whatever a file was called.
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _landmarks(samples: Sequence[DatasetSample]) -> str:
    parts = []
    for sample in samples:
        if names := sample.manifest.spec.landmark_names:
            listed = ", ".join(f"{number} {escape(name)}" for number, name in enumerate(names, 1))
            parts.append(f"<p><strong>Landmarks of {escape(sample.manifest.dataset)}:</strong> {listed}</p>")
    return "".join(parts)


def _picture(name: str, pictures: Mapping[str, bytes], caption: str) -> str:
    if name not in pictures:
        return ""
    content = base64.b64encode(pictures[name]).decode("ascii")  # inside, so that the page can be sent as one file
    words = name.removesuffix(".png").replace("_", " ")
    image = f'<img src="data:image/png;base64,{content}" alt="{words}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
