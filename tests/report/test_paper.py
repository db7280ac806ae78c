"""The table beside the paper's: the right rows side by side, the same rounding, honest intervals, and the footnotes."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from ddpm_lmk.report import paper
from ddpm_lmk.report.collect import SCRATCH, Study, collect, paper_rows, paper_tables
from ddpm_lmk.report.page import write_report
from ddpm_lmk.report.statistics import best_overall, difference, log_ratio, over_images, over_seeds
from tests.known_runs import write_sweep

T = TypeVar("T")
ROWS = {
    "discs": {"title": "Discs, pre-trained", "paper": "Our method", "note": "As in the paper."},
    "moco": {"title": "MoCo v3", "paper": "MoCoV3"},
}


def known(value: T | None) -> T:
    assert value is not None
    return value


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Scratch is off by 4, 5 and 6 mm with 5 labels, discs by 2, 2.1 and 2.2 mm, MoCo by 5, 3.5 and 6.5 mm."""
    cells = {("scratch", 5, seed): 40 + 10 * seed for seed in range(3)}
    cells |= {("discs", 5, seed): 20 + seed for seed in range(3)}
    cells |= {("moco", 5, 0): 50.0, ("moco", 5, 1): 35.0, ("moco", 5, 2): 65.0}
    write_sweep(tmp_path / "sweep", cells, dict.fromkeys(("scratch", "discs", "moco")), rows=ROWS)
    (found,) = collect([tmp_path / "sweep"])
    return found


def test_a_row_stands_beside_the_one_the_sweep_names_and_the_others_stand_alone(study: Study) -> None:
    found = {(pair.title, pair.training): pair for pair in paper.pairs(study)}
    discs = found["Discs, pre-trained", 5]
    assert discs.paper is not None
    assert discs.paper.scores["paper"].mre == (8.3, 0.0, 3)
    assert (discs.training + (discs.validation or 0), discs.paper.training + discs.paper.validation) == (5, 25)
    assert found["scratch", 5].paper is None
    alone = {title for (title, _), pair in found.items() if pair.ours is None}
    assert alone == {"the paper, contour-hugging", "ImageNet", "SimCLR v2", "DINO"}


def test_differences_are_paired_by_seed_with_students_interval(study: Study) -> None:
    discs, moco = (known(difference(study, start, SCRATCH, 5)[0]) for start in ("discs", "moco"))
    differences = np.array([2.0 - 4.0, 2.1 - 5.0, 2.2 - 6.0])
    reach = 4.3027 * differences.std(ddof=1) / 3**0.5
    assert discs.mean == pytest.approx(differences.mean())
    assert (discs.low, discs.high) == pytest.approx((differences.mean() - reach, differences.mean() + reach), abs=2e-3)
    assert discs.is_clear
    assert not moco.is_clear  # 1, -1.5 and 0.5: nothing that three seeds can tell
    assert difference(study, SCRATCH, SCRATCH, 5) == (None, None)


def test_every_method_is_held_against_the_best_one_too(study: Study, tmp_path: Path) -> None:
    assert best_overall(study) == "discs"
    assert known(difference(study, "moco", "discs", 5)[0]).mean == pytest.approx(np.mean([3.0, 1.4, 4.3]))
    found = known(log_ratio(study, "scratch", "discs"))
    assert found.mean == pytest.approx(np.mean(np.log([4 / 2, 5 / 2.1, 6 / 2.2])))
    assert found.count == 3
    page = write_report([tmp_path / "sweep"], tmp_path / "report.html", against_paper=True)[0].read_text()
    assert "Error minus that of “scratch”" in page
    assert "Error minus that of “Discs, pre-trained”" in page
    assert "of 2 differences of equal methods about 0.1 would be bold" in page


def test_the_mean_over_numbers_of_labels_is_that_of_seeds_with_all_of_them(tmp_path: Path) -> None:
    cells = {("scratch", labels, seed): 40.0 for labels in (1, 5) for seed in (0, 1)}
    cells |= {("ours", 1, 0): 20.0, ("ours", 5, 0): 10.0, ("ours", 1, 1): 20.0}
    write_sweep(tmp_path, cells, {"scratch": None, "ours": None})
    (found,) = collect([tmp_path])
    mean = known(log_ratio(found, "ours", "scratch"))
    assert mean.mean == pytest.approx(np.log(8) / -2)  # a half and a quarter; seed 1 lacks five labels
    assert mean.count == 1


def test_a_single_seed_has_no_interval_and_foreign_seeds_are_left_out() -> None:
    single = known(over_seeds({0: 1.0, 7: 9.0}, {0: 3.0, 8: 1.0}))
    assert (single.mean, single.low, single.count, single.is_clear) == (-2.0, None, 1, False)
    assert over_seeds({0: 1.0}, {1: 1.0}) is None


def test_the_interval_over_images_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        ours = dict(enumerate(rng.normal(1.0, 2.0, 60)))
        found = known(over_images({str(k): float(v) for k, v in ours.items()}, {str(k): 0.0 for k in ours}))
        hits += known(found.low) <= 1.0 <= known(found.high)
    assert hits >= 51  # 60 tosses of 0.95 stay above in all but 4 of 10,000 cases


def test_tables_4_and_5_are_there_and_shown_only_where_they_are_asked_for() -> None:
    (ours,) = [row for row in paper_rows("chest", ["Hand->"]) if row.training == 50]
    assert ours.scores["paper"].mre == (3.99, 0.0, 3)
    gu2net = {row.training: row.scores["paper"] for row in paper_rows("hand", ["YOLO+"])}
    assert (gu2net[10].mre, gu2net[10].sdr) == ((52.43, None, 3), {})
    assert set(paper_tables()["methods"]) >= {"YOLO+", "Hand->"}


def test_the_page_says_what_has_to_be_known(study: Study, tmp_path: Path) -> None:
    html = write_report([tmp_path / "sweep"], tmp_path / "report.html", against_paper=True)[0].read_text()
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())
    for words in (
        "Beside table 2 of the paper",
        "5 / 25",  # labels with those for validation
        "8.30",
        "4 images of split test (cephalometric), the paper's on 250: not the same test set",
        "millimetre factors of x and y swapped",
        "the paper used 20 in every row, ours 0",
        "no test is possible against them",
        "arXiv 2407.18125",
        "As in the paper.",
    ):
        assert words in text, words
    plain = write_report([tmp_path / "sweep"], tmp_path / "plain.html")[0].read_text()
    assert "Beside table" not in plain
