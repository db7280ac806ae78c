"""Which images the splits and shots of the released code are (docs/method.md, section 3, Splits)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.loading.order import few_shot_rows
from ddpm_lmk.data.sources.base import RawDataset
from ddpm_lmk.data.sources.public import read_cephalometric, read_chest, read_hand
from ddpm_lmk.data.spec import SPECS

RealData = Callable[[str], Path]


def first(found: RawDataset, shots: int) -> list[str]:
    """Names of the first shots, as a run draws them: rows are in order of id."""
    names = np.array(sorted(sample.id for sample in found.samples if sample.split == "train"))
    return names[few_shot_rows(np.arange(len(names)), "set", shots, "first", seed=42)].tolist()


def linked(root: Path, names: list[str]) -> None:
    """One picture under many names."""
    root.mkdir(parents=True)
    cv2.imwrite(str(root.parent / "one.png"), np.zeros((30, 20), np.uint8))
    for name in names:
        (root / name).hardlink_to(root.parent / "one.png")


@pytest.fixture(scope="module")
def chests(real_data: RealData, tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    root = tmp_path_factory.mktemp("chests")
    shutil.copytree(real_data("raw_samples") / "chest_shenzhen" / "labels", root / "labels")
    linked(root / "pngs", [f"{label.stem}.png" for label in (root / "labels").iterdir()])
    return read_chest(root, convention="paper")


@pytest.mark.parametrize(
    ("shots", "last"), [(1, "0001"), (5, "0005"), (10, "0010"), (25, "0026"), (50, "0056")], ids=str
)
def test_first_k_chests(chests: RawDataset, shots: int, last: str) -> None:
    names = first(chests, shots)
    assert len(names) == shots
    assert (names[0], names[-1]) == ("CHNCXR_0001_0", f"CHNCXR_{last}_0")
    assert "CHNCXR_0025_0" not in names


def test_first_k_cephalograms(tmp_path: Path) -> None:
    linked(tmp_path / "raw" / "jpg", [f"{number:03d}.png" for number in range(1, 401)])
    for reader in ("junior", "senior"):
        folder = tmp_path / "raw" / f"400_{reader}"
        folder.mkdir()
        for number in range(1, 401):
            (folder / f"{number:03d}.txt").write_text("\n".join(["5,6"] * 19 + ["1"] * 8))
    found = read_cephalometric(tmp_path / "raw" / "", convention="paper", annotator="mean")
    counts = [sum(sample.split == name for sample in found.samples) for name in ("train", "val", "test")]
    assert counts == [130, 20, 250]
    assert first(found, 25) == [f"{number:03d}" for number in range(1, 26)]


def test_hands_are_sorted_as_text(tmp_path: Path) -> None:
    numbers = [9, 10, 100, 3128, 31]
    linked(tmp_path / "raw" / "jpg", [f"{number}.png" for number in numbers])
    (tmp_path / "raw" / "labels").mkdir()
    point = ",".join(["5,6"] * 37)
    (tmp_path / "raw" / "labels" / "all.csv").write_text("".join(f"{number},{point}\n" for number in numbers))
    found = read_hand(tmp_path / "raw", spacing_pair=None)
    assert first(found, 3) == ["10", "100", "31"]


def test_the_hand_is_measured_between_the_papers_landmarks() -> None:
    """docs/method.md, section 3, Metrics: 50 mm between 0 and 4 there; 1 and 5 is what the annotators wrote."""
    spec = SPECS["hand"]
    assert spec.paper_factor == "pair_squeezed"
    assert spec.paper_pair is not None
    assert (spec.paper_pair.i, spec.paper_pair.j, spec.paper_pair.mm) == (0, 4, 50.0)
    assert (SPECS["cephalometric"].paper_factor, SPECS["chest"].paper_factor) == ("swapped", "none")
