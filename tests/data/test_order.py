"""Order and keyed randomness: pure functions of (seed, position), checked against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_lmk.data.loading.order import BatchPlan, SampleOrder, few_shot_rows, keyed_seed, keyed_uniform
from ddpm_lmk.data.shards.index import ListedRows
from ddpm_lmk.errors import ConfigError

POSITIONS = np.arange(100_000)


def corpus(count: int, per_shard: int, first_row: int = 0) -> ListedRows:
    return ListedRows(first_row + np.arange(count), np.arange(count) // per_shard)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a, b)[0, 1]))


def test_keyed_numbers_are_uniform():
    counts = np.histogram(keyed_uniform(3, "test", POSITIONS, 2), bins=100, range=(0, 1))[0]
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: five standard deviations


def test_keyed_numbers_of_neighbours_columns_streams_and_seeds_are_independent():
    bound = 5 / np.sqrt(len(POSITIONS))
    one = keyed_uniform(3, "test", POSITIONS, 2)
    assert correlation(one[:-1, 0], one[1:, 0]) < bound
    assert correlation(one[:, 0], one[:, 1]) < bound
    assert correlation(one[:-1, 1], one[1:, 0]) < bound
    assert correlation(one[:, 0], keyed_uniform(3, "other", POSITIONS, 1)[:, 0]) < bound
    assert correlation(one[:, 0], keyed_uniform(4, "test", POSITIONS, 1)[:, 0]) < bound


def test_a_keyed_number_does_not_depend_on_what_else_is_asked_for():
    together = keyed_uniform(3, "test", POSITIONS, 4)
    assert np.array_equal(keyed_uniform(3, "test", np.array([77_777]), 2)[0], together[77_777, :2])


def test_keyed_seeds_fit_torch_and_differ():
    seeds = {keyed_seed(seed, stream, position) for seed in (0, 1) for stream in "ab" for position in range(500)}
    assert len(seeds) == 2000
    assert 2**61 < max(seeds) < 2**63


@pytest.mark.parametrize(("count", "per_shard", "window"), [(1, 1, 1), (5, 2, 1), (97, 10, 3), (1000, 7, 16)])
def test_every_epoch_uses_each_sample_exactly_once(count, per_shard, window):
    order = SampleOrder(0, [corpus(count, per_shard, first_row=10)], None, window)
    _, rows = order.at(np.arange(3 * count))
    for epoch in rows.reshape(3, count):
        assert np.array_equal(np.sort(epoch), 10 + np.arange(count))


def test_epochs_and_seeds_are_in_different_orders_and_no_sample_comes_first_more_often():
    rows = SampleOrder(0, [corpus(50, 5)], None, 4).at(np.arange(100))[1]
    assert not np.array_equal(rows[:50], rows[50:])
    first = [int(SampleOrder(seed, [corpus(5, 1)], None, 2).at(np.array([0]))[1][0]) for seed in range(500)]
    assert np.bincount(first, minlength=5).min() > 55  # expected 100, five standard deviations are 45


def test_any_position_can_be_asked_for_at_once():
    pool = [corpus(97, 10), corpus(31, 4), corpus(200, 64)]
    everything = np.stack(SampleOrder(5, pool, None, 3).at(np.arange(2000)))
    picked = np.array([1999, 3, 700, 3, 328, 0])
    assert np.array_equal(np.stack(SampleOrder(5, pool, None, 3).at(picked)), everything[:, picked])


def test_reads_stay_inside_a_window_of_shards():
    drawn = SampleOrder(0, [corpus(1000, 10)], None, 4).at(np.arange(1000))[1] // 10
    touched = [len(np.unique(drawn[begin : begin + 40])) for begin in range(0, 1000, 40)]
    assert max(touched) == 4
    assert not np.array_equal(np.sort(drawn[:40]), drawn[:40])


def test_a_pool_by_size_uses_every_sample_once_per_epoch_and_mixes_its_sets():
    pool = [corpus(700, 50), corpus(1, 1), corpus(299, 50)]
    which, rows = SampleOrder(1, pool, None, 2).at(np.arange(3000))
    for epoch in range(3):
        part = slice(epoch * 1000, (epoch + 1) * 1000)
        assert len(set(zip(which[part], rows[part], strict=True))) == 1000
    thirds = (which[:900] == 0).reshape(9, 100).mean(1)
    assert np.abs(thirds - 0.7).max() < 0.15
    assert len({tuple(which[begin : begin + 10]) for begin in range(0, 1000, 10)}) > 30


def test_a_pool_by_weight_honours_it_and_consumes_each_set_in_epochs():
    pool = [corpus(900, 50), corpus(40, 8)]
    which, rows = SampleOrder(1, pool, [1.0, 3.0], 2).at(np.arange(24 * 256))
    assert (which == 1).mean() == pytest.approx(0.75, abs=1e-3)
    for c, count in ((0, 900), (1, 40)):
        uses = np.bincount(rows[which == c], minlength=count)
        assert uses.max() - uses.min() == 1  # whole epochs and a begun one


@pytest.mark.parametrize(
    ("name", "images", "steps", "last", "epochs", "passes"),
    [("chest", 229, 8, 4, 750, 171_000), ("ceph", 150, 5, 20, 1600, 236_800), ("hand", 609, 19, 32, 421, 255_968)],
)
def test_epoch_windows_are_the_papers(name, images, steps, last, epochs, passes):
    plan = BatchPlan(images, 32, 4, "epoch")  # the paper's 256,000 for hands is 421.05 epochs
    assert plan.steps_per_epoch == steps
    assert [plan.size(step) for step in (0, steps - 1, steps)] == [32, last, 32]
    assert sum(plan.size(step) for step in range(steps * epochs)) == passes
    assert plan.start(steps) == images


def test_labelled_epochs_keep_an_unfilled_micro_batch():
    plan = BatchPlan(25, 16, 2, "epoch", drop_last=False)
    assert [plan.size(step) for step in range(3)] == [16, 9, 16]
    assert BatchPlan(1, 16, 2, "epoch", drop_last=False).size(0) == 1


def test_straddling_groups_are_always_full():
    plan = BatchPlan(10, 16, None, "straddle")
    assert [(plan.start(step), plan.size(step)) for step in range(3)] == [(0, 16), (16, 16), (32, 16)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("windows", "micro_batch"), [("straddle", None), ("straddle", 2), ("epoch", 4), ("epoch", None)]
)
def test_ranks_share_out_each_group_in_the_same_shapes(world, windows, micro_batch):
    plan = BatchPlan(29, 16, micro_batch, windows)
    for step in range(5):
        shares = [plan.share(step, rank, world) for rank in range(world)]
        assert len({(len(positions), micro) for positions, _, micro in shares}) == 1
        assert all(len(positions) % micro == 0 for positions, _, micro in shares)
        real = np.concatenate([positions[weights > 0] for positions, weights, _ in shares])
        assert np.array_equal(real, plan.start(step) + np.arange(plan.size(step)))


def test_a_world_that_cannot_share_the_group_is_refused_with_those_that_can():
    plan = BatchPlan(100, 24, 4, "straddle")
    with pytest.raises(ConfigError, match="use 1, 2, 3, 6 processes"):
        plan.check_world(4)
    with pytest.raises(ConfigError, match="not a multiple of"):
        BatchPlan(100, 24, 5, "straddle")


def test_few_shots_are_the_first_or_a_nested_draw():
    rows = np.arange(100, 150)
    assert np.array_equal(few_shot_rows(rows, "ceph", 5, "first", 3), rows[:5])
    ten, five = few_shot_rows(rows, "ceph", 10, "random", 3), few_shot_rows(rows, "ceph", 5, "random", 3)
    assert np.array_equal(ten[:5], five)
    assert len(set(ten)) == 10
    assert not np.array_equal(five, few_shot_rows(rows, "ceph", 5, "random", 4))
    assert not np.array_equal(five, few_shot_rows(rows, "hand", 5, "random", 3))
    assert np.array_equal(few_shot_rows(rows, "ceph", None, "random", 3), rows)


def test_more_shots_than_images_are_refused():
    with pytest.raises(ConfigError, match=r"shots=51.*50 labelled.*1\.\.50"):
        few_shot_rows(np.arange(50), "ceph", 51, "first", 0)
