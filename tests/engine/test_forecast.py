"""How long a run takes: what it has left to do, counted, times what was timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.engine.forecast import Forecast, Timing, Work, steps_done


def run(place: Path, kind: str = "landmarks", **sections: dict[str, object]) -> RunConfig:
    """A run of 12 steps of 4 images."""
    base: dict[str, dict[str, object]] = {
        "data": {"path": str(place), "image_size": 32},
        "task": {"kind": kind},
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "train": {"length": "12 steps", "group_size": 4},
    }
    return RunConfig.model_validate(
        {"name": "tiny", **{name: facts | sections.get(name, {}) for name, facts in base.items()}}
        | {name: facts for name, facts in sections.items() if name not in base}
    )


def count(data: Path, split: str) -> int:
    return len(Manifest.open(data).rows([split]))


def test_the_work_of_a_run_is_its_steps_validations_and_score(packed_phantoms: Path) -> None:
    cfg = run(packed_phantoms, data={"validation_split": "val"}, train={"evaluate_every": "5 steps"})
    val, test = (count(packed_phantoms, split) for split in ("val", "test"))

    assert Work.of(cfg) == Work(12, 4, evaluations=3, validated=val, scored=test)  # after steps 5, 10 and 12
    assert Work.of(cfg, done=6) == Work(6, 4, evaluations=2, validated=val, scored=test)
    assert Work.of(cfg, done=12).steps == 0


def test_pretraining_draws_samples_and_is_not_scored(packed_phantoms: Path) -> None:
    assert Work.of(run(packed_phantoms, "denoise", evaluate={"samples": 9})) == Work(12, 4, drawn=9)


def test_few_shots_in_epochs_count_images_and_not_places_in_a_group(packed_phantoms: Path) -> None:
    train = {"length": "10 epochs", "group_size": 8, "windows": "epoch"}

    assert Work.of(run(packed_phantoms, data={"shots": 3}, train=train), done=4).steps == 6
    assert Work.of(run(packed_phantoms, data={"shots": 3}, train=train)).group == 3


def test_packs_that_are_not_made_yet_are_counted_by_what_they_will_hold(tmp_path: Path) -> None:
    cfg = run(tmp_path / "nowhere", train={"length": "2 epochs", "group_size": 5})

    assert Work.of(cfg, counts={"train": 20, "test": 7}) == Work(8, 5, scored=7)


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    for name in ("step-00000250", "step-00001000", ".bad-step-00002000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_done(tmp_path) == 1000


def test_seconds_are_those_of_the_images_a_process_has() -> None:
    work = Work(steps=100, group=8, evaluations=2, validated=5, scored=10, drawn=3)
    alone = Timing(0.5, 1.0, images=8, of=8, steps=3, validate_s=0.1, score_s=2.0, draw_s=7.0)
    two = Timing(0.5, 1.0, images=4, of=4, steps=3, validate_s=0.1, score_s=2.0, draw_s=7.0, processes=2)

    assert alone.forecast(work).step_s == pytest.approx(5.0)
    assert alone.forecast(work).total_s == pytest.approx(100 * 5.0 + 2 * 0.5 + 20.0 + 21.0)
    assert "then 41 s of drawing samples" in str(alone.forecast(work))
    assert two.forecast(work).total_s == pytest.approx(100 * 3.0 + 2 * 0.3 + 10.0 + 14.0)  # 3 of 5, 2 of 3 images


def test_a_forecast_says_how_long_and_what_it_is_from() -> None:
    found = Forecast(20_000, 90.5, 0, 0.0, 600.0, "from 1 of the 32 images of a step, timed here")

    assert str(found) == (
        "about 21 days here: 20,000 steps of 90 s, then 10 min of scoring "
        "(from 1 of the 32 images of a step, timed here)"
    )
    assert str(Forecast(1, 0.123, 0, 0.0, 0.0, "from 3 steps timed here")) == (
        "less than a second here: 1 step of 0.12 s (from 3 steps timed here)"
    )
    timing = Timing(0.5, 1.0, images=8, of=8, steps=3)
    assert timing.source == "from 3 steps timed here"
