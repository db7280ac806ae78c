"""Which checkpoints stay: the rules add up, and the newest is always among what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.rundir import retention
from ddpm_lmk.rundir.retention import Keep, kept, retain


@pytest.mark.parametrize(
    ("keep", "pinned", "wanted"),
    [
        (Keep(2), (), {50, 60}),
        (Keep(1, every=20), (), {20, 40, 60}),
        (Keep(1), {10, None}, {10, 60}),
        (Keep(2, every=30), {20}, {20, 30, 50, 60}),
        (Keep(1), {99}, {60}),
        (Keep(1, interval=25), (), {50, 60}),
        (Keep(2, interval=60), (), {50, 60}),
        (Keep(1, interval=70), (), {60}),
        (Keep(9), (), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_any_rule_wants_is_kept(keep: Keep, pinned: set[int | None], wanted: set[int]) -> None:
    assert kept(range(10, 70, 10), keep, pinned) == wanted


def folders(place: Path, *names: str) -> None:
    for name in names:
        (place / name).mkdir()
        (place / name / "file").touch()


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_only_complete_checkpoints_count_and_go(tmp_path: Path) -> None:
    folders(tmp_path, *(f"step-{step:08d}" for step in (1, 2, 9, 10)), ".tmp-step-00000011-a", ".bad-step-00000003-0")
    folders(tmp_path, "step-best", "step-1")
    (tmp_path / "step-00000099").symlink_to(tmp_path / "step-00000001")
    (tmp_path / "step-00000098").touch()
    retain(tmp_path, Keep(2), ())
    left = [".bad-step-00000003-0", ".tmp-step-00000011-a", "step-00000009", "step-00000010"]
    assert names(tmp_path) == sorted([*left, "step-00000098", "step-00000099", "step-1", "step-best"])


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path: Path) -> None:
    folders(tmp_path, "step-99999999", "step-100000000")
    assert [path.name for path in retention.complete(tmp_path)] == ["step-100000000", "step-99999999"]


def test_a_directory_leaves_its_name_before_its_content_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, "step-00000001")
    seen: list[str] = []
    monkeypatch.setattr(retention.shutil, "rmtree", lambda path: seen.append(path.name))
    retention.drop(tmp_path / "step-00000001")
    assert [name[:21] for name in seen] == [".trash-step-00000001-"]
    assert names(tmp_path) == seen
