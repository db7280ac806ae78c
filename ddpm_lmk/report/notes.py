"""The footnotes of the table beside the paper's: everything a reader has to know before believing a difference.

Each is made from what the runs say of themselves; none is written for a certain study.
"""

from __future__ import annotations

from collections.abc import Iterable

from ddpm_lmk.config.load import load_stored
from ddpm_lmk.report.collect import Study, paper_tables

PAPER_NETWORK = "558.5 M parameters at 256² pixels"


def footnotes(study: Study) -> list[str]:
    """What differs between the two tables, one sentence or two each."""
    published = paper_tables()["datasets"][study.spec]
    return [
        "Rounding is the paper's. ± is the standard deviation over runs; the paper's three runs share one seed, which "
        "is why its own is near zero; those of success rates (SDR) are in the CSV. Bold in the column of ours: the "
        "lowest error of ours with as many labels.",
        _protocol(study),
        _films(study, published["test_images"]),
        _labels(study, published["validation_labels"]),
        _networks(study),
        _significance(study),
        _leakage(study),
        f"The paper's numbers: {paper_tables()['source']}. {paper_tables()['note']}",
    ]


def _significance(study: Study) -> str:
    """How differences were tested, and how many of them chance alone would make bold."""
    count = (len(study.starts) - 1) * len(study.shots)
    return (
        "Differences are paired by seed (the same shots), with Student's interval of 95 %, and by film, with a "
        "bootstrap interval over films. Bold where the interval over seeds leaves out zero, not corrected for their "
        f"number: of {count} differences of equal methods about {0.05 * count:.1f} would be bold. “All” is the mean "
        "over numbers of labels of the change of the error, in per cent, with its interval over seeds. Few seeds give "
        "wide intervals; what is clear over films alone says nothing about other shots. The paper's rows come without "
        "single runs, so no test is possible against them."
    )


def _protocol(study: Study) -> str:
    text = (
        "Columns under protocol paper compute what the released code computes: both points on an integer 256 grid, "
        "labels read back from their masks"
    )
    if study.spec == "cephalometric":
        text += ", millimetre factors of x and y swapped"
    return f"{text}. Protocol original measures in pixels of the original film with the right spacing."


def _films(study: Study, paper_films: int) -> str:
    ours = f"{study.num_images} films of split {study.split} ({study.dataset})"
    if study.num_images == paper_films:
        return f"Both score as many films: ours {ours}."
    return f"Ours are scored on {ours}, the paper's on {paper_films}: not the same test set."


def _labels(study: Study, validation: int) -> str:
    used = sorted({run.results["labels"]["validation"] for run in study.runs})
    draws = sorted({run.results["draw"] for run in study.runs})
    how = {"random": "drawn at random from the seed", "first": "the first by name, as in the paper"}
    return (
        f"All labels counts validation labels too: the paper used {validation} in every row, ours "
        f"{_listed(used)}. Our shots are {_listed(how[draw] for draw in draws)}."
    )


def _networks(study: Study) -> str:
    """What our networks are, where run files are still there."""
    found = dict.fromkeys(
        load_stored(run.home).model.kind + f" at {load_stored(run.home).data.image_size}²"
        for run in {run.start: run for run in study.runs}.values()
        if (run.home / "config.yaml").is_file()
    )
    ours = _listed(found) if found else "not recorded"
    return f"Networks of ours: {ours} (sizes under The runs); the paper's own has {PAPER_NETWORK}."


def _leakage(study: Study) -> str:
    """Whether anything that is scored was seen before."""
    blocks = [block for run in study.runs for block in (run.results.get("leakage") or {}).values()]
    seen = max((block.get("images") or 0 for block in blocks if block.get("status") == "overlap"), default=0)
    if seen:
        return f"Pre-training or fine-tuning of some rows saw {seen} of the scored films; see the top of the page."
    unknown = any(block.get("status") not in ("none", "clean") for block in blocks)
    if not blocks or unknown:
        return "For some rows it is not known whether pre-training saw scored films (weights from elsewhere)."
    compared = not any(block.get("patients_not_compared") for block in blocks)
    by = "pixels, near copies and patients" if compared else "pixels and near copies; not all patients were compared"
    return f"No scored film was in pre-training or among the training labels, by {by}."


def _listed(words: Iterable[object]) -> str:
    return ", ".join(str(word) for word in words)
