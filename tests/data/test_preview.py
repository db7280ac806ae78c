"""A look at packs: the pictures hold films, landmarks and findings, and the page says what they are, by itself."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.preview import show
from ddpm_lmk.data.preview.sheet import CAPTION, COLUMNS, GAP, TILE, TITLE, fitted
from ddpm_lmk.data.shards.pack import pack
from tests.data.test_leaks import HEAD, chests, save


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("show") / "hands"
    pack("hand", out, PackSettings(kind="phantom", size=64, counts={"train": 3, "test": 2}), workers=1)
    return out


def test_the_sheet_shows_films_with_coloured_landmarks(hands: Path, tmp_path: Path) -> None:
    shown = show(hands, tmp_path, count=4)
    sheet = cv2.imread(str(shown.sheet))
    assert sheet.shape == (TITLE + TILE + CAPTION + GAP, GAP + 4 * (TILE + GAP), 3)
    film = sheet[TITLE : TITLE + TILE, GAP : GAP + TILE].astype(int)
    assert len(np.unique(film)) > 100
    assert (np.ptp(film, axis=-1) > 100).sum() > 300  # rings in colour on a grey film


def test_the_page_holds_everything_and_points_nowhere(hands: Path, tmp_path: Path) -> None:
    shown = show(hands, tmp_path, count=4)
    page = shown.page.read_text()
    assert "train 3, test 2" in page
    assert page.count("data:image/png;base64,") == 2
    assert "No training image is in another split too" in page
    assert "Every file was packed." in page
    assert "http" not in page
    assert ("images", "5 (train 3, test 2)") in shown.lines
    assert ("copies of an earlier one", "0") in shown.lines


def test_a_pool_is_shown_with_its_leaks_and_what_was_refused(hands: Path, tmp_path: Path) -> None:
    first, *rest = chests(3)
    for name, film in (("a", first), ("b", rest[0]), ("c", rest[1])):
        save(tmp_path / "set" / name, film)
    (tmp_path / "set" / "images.csv").write_text(HEAD + "a,a.png,test,\nb,b.png,train,\nc,c.png,train,\n")
    save(tmp_path / "more" / "again", first, "jpeg")
    save(tmp_path / "more" / "new", chests(1, first=9)[0])
    (tmp_path / "more" / "broken<b>.png").write_bytes(b"nothing")
    packs = [tmp_path / "packs" / name for name in ("set", "more")]
    pack(tmp_path / "set", packs[0], PackSettings(kind="table", size=64), workers=1)
    pack(tmp_path / "more", packs[1], PackSettings(kind="folder", size=64), workers=1)
    shown = show([*packs, hands], tmp_path / "look")
    assert ("also in a protected split", "1 (1 near copy)") in shown.lines
    pairs = cv2.imread(str(tmp_path / "look" / "copies.png"))
    left, right = (pairs[TITLE : TITLE + TILE, x : x + TILE].astype(float).ravel() for x in (GAP, GAP + TILE + 2))
    assert np.corrcoef(left, right)[0, 1] > 0.99
    page = shown.page.read_text()
    refusal = json.loads((packs[1] / "refused.jsonl").read_text())
    assert refusal["reason"] in page
    assert "broken&lt;b&gt;" in page
    assert "<b>" not in page


def test_many_films_make_several_lines(hands: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    pack("chest", films, PackSettings(kind="phantom", size=32, counts={"train": COLUMNS + 1}), workers=1)
    sheet = cv2.imread(str(show(films, tmp_path / "look").sheet))
    assert sheet.shape[0] == TITLE + 2 * (TILE + CAPTION + GAP)


def test_long_names_keep_their_ends() -> None:
    class Font:
        def getlength(self, text: str) -> float:
            return 10.0 * len(text)

    assert fitted("short", Font(), 60) == "short"
    assert fitted("patient-0000012", Font(), 80) == "...00012"
