"""The loader on real packs: what it hands out, the same from every residency, world size and micro-batch."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.augment import draw_changes
from ddpm_lmk.data.loading.backend import choose_backend
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.errors import ConfigError, DataError, LaunchError
from tests.data.dot_packs import NATIVE, pack_dots, run_config

MOVES = {"probability": 0.7, "shift": 0.05, "rotate_deg": 10, "scale": 0.1, "gamma": 0.2, "noise": 0.02}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_dots(tmp_path_factory.mktemp("packs") / "dots", {"train": 21, "test": 7})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pool")
    wide = pack_dots(folder / "wide", {"train": 9, "val": 3}, size=96, bits=16, labels=False)
    return [pack_dots(folder / "narrow", {"train": 13, "test": 2}, labels=False, seed=1), wide]


def steps(cfg: RunConfig, count: int, *, start: int = 0, **place: int) -> list[list[Batch]]:
    loader = open_loader(cfg, stage="train", **place)
    groups = [group.micro_batches for group in itertools.islice(loader.global_batches(start), count)]
    loader.close()
    return groups


def samples(batches: list[Batch]) -> list[tuple[torch.Tensor, ...]]:
    """The weighted samples, each as a tuple of its tensors, in order of position."""
    rows = [
        (b.positions[i], b.images[i], b.to_native[i], b.mm_per_px[i], *(() if b.points is None else (b.points[i],)))
        for b in batches
        for i in range(len(b))
        if b.weight[i] > 0
    ]
    return sorted(rows, key=lambda row: int(row[0]))


def same(left: list[tuple[torch.Tensor, ...]], right: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def test_a_batch_has_the_promised_fields(pack):
    batch = steps(run_config(pack), 1)[0][0]
    assert (batch.images.shape, batch.images.dtype) == ((8, 1, 64, 64), torch.float32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert batch.points is not None
    assert (batch.points.shape, batch.to_native.shape) == ((8, 3, 2), (8, 2, 3))
    assert batch.native_size.tolist() == [[300.0, 200.0]] * 8
    assert batch.positions.tolist() == list(range(8))
    assert batch.weight.tolist() == [1.0] * 8
    assert len(set(batch.ids)) == 8
    assert all(name.startswith("train-") for name in batch.ids)


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_points_lie_on_the_dots_of_the_augmented_image_and_lead_back_to_native_pixels(pack, image_size):
    moves = {"probability": 1, "shift": 0.05, "rotate_deg": 15, "scale": 0.1, "scale_axes": "independent"}
    cfg = run_config(pack, data={"image_size": image_size, "augment": moves}, train={"global_batch_size": 21})
    batch = steps(cfg, 1)[0][0]
    truth = {r.id: r.points for r in open_loader(cfg, stage="train").records}
    assert batch.points is not None
    homogeneous = torch.cat([batch.points, torch.ones(21, 3, 1)], dim=2)
    native = homogeneous @ batch.to_native.transpose(1, 2)
    assert np.allclose(native.numpy(), np.stack([truth[name] for name in batch.ids]), atol=1e-3)
    spacing = [50 / np.linalg.norm(truth[name][0] - truth[name][2]) for name in batch.ids]  # of its own pair
    assert np.allclose(batch.mm_per_px.numpy(), spacing, rtol=1e-6)
    radius, errors = image_size // 10, []
    for image, points in zip(batch.images[:, 0].double(), batch.points, strict=True):
        for x, y in points[_far_apart(points, 3 * radius)].tolist():
            x0, y0 = round(x) - radius, round(y) - radius
            patch = (image[y0 : y0 + 2 * radius + 1, x0 : x0 + 2 * radius + 1] - 0.05).clamp(min=0)
            side = torch.arange(2 * radius + 1)
            errors.append(
                [(patch * side).sum() / patch.sum() + x0 - x, (patch * side[:, None]).sum() / patch.sum() + y0 - y]
            )
    assert len(errors) > 8
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02  # a half-pixel slip would be 0.25 or more
    assert np.abs(errors).max() < 0.2


def _far_apart(points: torch.Tensor, distance: float) -> torch.Tensor:
    between = torch.cdist(points, points) + 1e6 * torch.eye(len(points))
    return between.amin(1) > distance


@pytest.mark.parametrize("task", ["landmarks", "denoise"])
def test_every_residency_gives_the_same_batches(pack, pool, task):
    path = pack if task == "landmarks" else pool
    by_kind = []
    for residency, workers in (("stream", 0), ("stream", 2), ("ram", 2), ("device", 0)):
        data = {"augment": MOVES, "splits": ["train"]}
        cfg = run_config(path, task=task, data=data, runtime={"cache_pixels": residency, "workers": workers})
        by_kind.append([samples(group) for group in steps(cfg, 4)])
    for other in by_kind[1:]:
        assert all(same(left, right) for left, right in zip(by_kind[0], other, strict=True))


@pytest.mark.parametrize("windows", ["straddle", "epoch"])
def test_worlds_of_1_2_and_4_and_any_micro_batch_see_the_same_samples_and_warps(pack, windows):
    def cfg(micro_batch: int | None) -> RunConfig:
        train = {"global_batch_size": 8, "micro_batch": micro_batch, "epoch_boundary": windows}
        return run_config(pack, data={"augment": MOVES}, train=train)

    wanted = [samples(group) for group in steps(cfg(None), 4)]
    assert windows == "straddle" or [len(group) for group in wanted] == [8, 8, 5, 8]
    for world, micro_batch in ((1, 2), (2, None), (2, 1), (4, 2), (4, None), (8, 1)):
        ranks = [steps(cfg(micro_batch), 4, rank=rank, world=world) for rank in range(world)]
        for step, group in enumerate(wanted):
            shapes = {tuple(len(batch) for batch in rank[step]) for rank in ranks}
            assert len(shapes) == 1
            assert same(samples([batch for rank in ranks for batch in rank[step]]), group)


def test_starting_later_continues_the_same_stream(pack):
    cfg = run_config(pack, data={"augment": MOVES}, runtime={"workers": 1})
    everything, later = steps(cfg, 6), steps(cfg, 2, start=4)
    assert all(same(samples(a), samples(b)) for a, b in zip(everything[4:], later, strict=True))


def test_an_epoch_sees_every_image_once_and_fewer_images_than_a_group_wrap_round(pack):
    ids = [
        name for group in steps(run_config(pack, train={"global_batch_size": 7}), 3) for b in group for name in b.ids
    ]
    assert sorted(ids) == [f"train-{i:03d}" for i in range(21)]
    cfg = run_config(pack, data={"shots": 3, "augment": MOVES})
    few = steps(cfg, 1)[0][0]
    assert sorted(set(few.ids)) == [f"train-{i:03d}" for i in range(3)]
    moved = draw_changes(cfg.data.augment, cfg.seed, np.arange(8), 64).is_moved  # by position, not by sample
    assert np.array_equal((few.to_native[:, 0, 1] != 0).numpy(), moved)


def test_a_pool_draws_by_weight_and_without_labels(pool):
    cfg = run_config(
        pool, task="denoise", data={"weights": [1, 3], "splits": ["train", "val"]}, train={"global_batch_size": 16}
    )
    groups = steps(cfg, 16)
    assert all(batch.points is None for group in groups for batch in group)
    ids = [name.split(":")[0] for group in groups for batch in group for name in batch.ids]
    assert ids.count("wide") == 192


def test_eight_bit_images_of_a_mixed_pool_keep_their_share_of_the_range(pool):
    data = {"intensity": "full_range", "augment": {"probability": 0}}
    batch = steps(run_config(pool, task="denoise", data=data, train={"global_batch_size": 22}), 1)[0][0]
    manifest = Manifest.open(pool[0])
    for image, name in zip(batch.images[:, 0], batch.ids, strict=True):
        if name.startswith("narrow"):
            pixels = torch.from_numpy(manifest.decode(int(name.split(":")[1])).astype(np.float32))
            assert torch.allclose(image, pixels / 255, atol=1e-7)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_sample_exactly_once_over_all_ranks(pack, world):
    ranks = [list(open_loader(run_config(pack), stage="evaluate", rank=rank, world=world)) for rank in range(world)]
    assert len({tuple(len(batch) for batch in rank) for rank in ranks}) == 1
    seen = [
        (int(p), name)
        for rank in ranks
        for b in rank
        for p, name, w in zip(b.positions, b.ids, b.weight, strict=True)
        if w
    ]
    assert sorted(seen) == [(i, f"test-{i:03d}") for i in range(7)]


def test_evaluation_does_not_augment_and_may_take_any_split(pack):
    loader = open_loader(run_config(pack, data={"augment": MOVES}), stage="evaluate", split="train")
    batch = next(iter(loader))
    manifest = Manifest.open(pack)
    row = int(manifest.rows(["train"])[0])
    pixels = torch.from_numpy(manifest.decode(row).astype(np.float32))
    assert torch.equal(batch.images[0, 0], (pixels - pixels.min()) / (pixels.max() - pixels.min()))
    assert loader.num_images == 21
    assert [record.id for record in loader.records] == [f"train-{i:03d}" for i in range(21)]
    assert tuple(batch.native_size[0].tolist()) == NATIVE


def test_unlabelled_images_are_not_used_for_landmarks(tmp_path):
    partly = pack_dots(tmp_path / "partly", {"train": 6, "test": 2}, unlabelled_ids=("train-000", "test-001"))
    first = open_loader(run_config(partly, data={"shots": 2}), stage="train")
    assert [record.id for record in first.records] == ["train-001", "train-002"]
    assert open_loader(run_config(partly), stage="evaluate").num_images == 1


def test_a_cache_keeps_pixels_for_the_next_run_and_changes_nothing(pack):
    cache: dict = {}
    few, more = (
        run_config(pack, data={"shots": shots, "draw": "random"}, runtime={"cache_pixels": "ram"}) for shots in (3, 9)
    )
    open_loader(few, stage="train", cache=cache)
    kept = next(iter(cache.values()))
    cached = open_loader(more, stage="train", cache=cache)
    assert list(cache.values()) == [kept]
    group = next(cached.global_batches(0))
    assert same(samples(group.micro_batches), samples(steps(more, 1)[0]))


def test_auto_keeps_small_data_in_memory_and_says_so(pack, caplog):
    with caplog.at_level("INFO", logger="ddpm_lmk"):
        assert open_loader(run_config(pack), stage="train").residency == "ram"
    assert "pixels: ram" in caplog.text


def test_without_dali_auto_takes_torch_and_asking_for_it_names_the_extra(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if it were not installed
    chosen = choose_backend(run_config(pack), device="cuda")
    assert (chosen.name, chosen.reason) == ("torch", "DALI is not installed (extra dali)")
    with pytest.raises(LaunchError, match=r"pip install 'ddpm-lmk\[dali\]'") as caught:
        open_loader(run_config(pack, runtime={"loader": "dali"}), stage="train")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"splits": ["training"]}}, DataError, "no split 'training'.*train, test"),
        ({"data": {"shots": 22}}, ConfigError, r"shots=22.*21 labelled"),
        ({"data": {"splits": ["train", "test"]}}, ConfigError, "evaluate.split=test is also in data.splits"),
        ({"data": {"validation_split": "train"}}, ConfigError, "validation_split=train is also in data.splits"),
        ({"train": {"global_batch_size": 9}}, ConfigError, "cannot be shared by 2 processes; use 1, 3, 9"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(pack, sections, error, message):
    with pytest.raises(error, match=message):
        open_loader(run_config(pack, **sections), stage="train", world=2)


def test_landmarks_need_labels(pack, pool, tmp_path):
    for path in ([pack, pool[0]], pool[0]):
        with pytest.raises(DataError, match="without landmarks"):
            open_loader(run_config(path), stage="train")
    bare = pack_dots(tmp_path / "bare", {"train": 1, "test": 1}, unlabelled_ids=("train-000",))
    with pytest.raises(DataError, match="no labelled image in train"):
        open_loader(run_config(bare), stage="train")
    with pytest.raises(ConfigError, match="same packed set twice"):
        open_loader(run_config([pool[0], pool[0]], task="denoise"), stage="train")
