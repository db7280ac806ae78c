"""DALI against torch on the CPU: the same samples, coordinates and pixels, whatever is packed and whoever asks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.batch import Batch, GlobalBatch
from ddpm_lmk.data.loading.backend import choose_backend, measure_backends
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.errors import ConfigError
from tests.data.dot_packs import corrupt, pack_dots, run_config
from tests.extras import needs_extra

pytestmark = needs_extra("dali")

GREY_LEVEL = 1 / 255
MOVES = {"probability": 0.7, "shift": 0.1, "rotate_deg": 20, "scale": 0.2, "scale_axes": "independent"}
TONES = {"gamma": 0.3, "contrast": 0.2, "brightness": 0.1, "noise": 0.05}
SIZE = 64


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Noise, the hardest to interpolate alike, in every lossless way to store it."""
    folder = tmp_path_factory.mktemp("parity")
    kinds: list[tuple[Any, int]] = [("raw", 8), ("png", 8), ("raw", 16), ("png", 16)]
    counts = {"train": 10, "test": 5}
    return {
        f"{encoding}{bits}": pack_dots(
            folder / f"{encoding}{bits}", counts, size=SIZE, bits=bits, encoding=encoding, noise=1.0, seed=seed
        )
        for seed, (encoding, bits) in enumerate(kinds)
    }


def config(path: Path | list[Path], loader: str, **sections: dict[str, Any]) -> RunConfig:
    data = {"augment": MOVES, **sections.pop("data", {})}
    runtime = {"loader": loader, "cache_pixels": "stream", **sections.pop("runtime", {})}
    return run_config(path, data=data, runtime=runtime, **sections)


def groups(cfg: RunConfig, count: int = 3, *, start: int = 0, **place: int) -> list[GlobalBatch]:
    loader = open_loader(cfg, stage="train", **place)
    made = list(itertools.islice(loader.global_batches(start), count))
    loader.close()
    return made


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    for torch_batch, dali_batch in zip(left, right, strict=True):
        assert dali_batch.ids == torch_batch.ids
        assert dali_batch.images.dtype == torch_batch.images.dtype == torch.float32
        assert dali_batch.images.shape == torch_batch.images.shape
        assert dali_batch.images.is_contiguous(memory_format=torch.channels_last)
        for name in ("points", "to_native", "native_size", "mm_per_px", "positions", "weight"):
            pair = getattr(torch_batch, name), getattr(dali_batch, name)
            assert (pair[0] is None) == (pair[1] is None)
            assert pair[0] is None or torch.equal(pair[0].nan_to_num(), pair[1].nan_to_num())
        assert (dali_batch.images - torch_batch.images).abs().max() < 0.01 * GREY_LEVEL


def batches(made: list[GlobalBatch]) -> list[Batch]:
    return [batch for group in made for batch in group.micro_batches]


@pytest.mark.parametrize("augment", [{"probability": 0}, MOVES, MOVES | TONES], ids=["as is", "moved", "toned"])
@pytest.mark.parametrize("kind", ["raw8", "png8", "raw16", "png16"])
def test_images_differ_by_less_than_a_hundredth_of_a_grey_level(packs, kind, augment):
    data = {"augment": augment}
    wanted, found = (groups(config(packs[kind], loader, data=data)) for loader in ("torch", "dali"))
    assert_same(batches(wanted), batches(found))
    assert len(np.unique(batches(found)[0].images)) > 200


@pytest.mark.parametrize("intensity", ["per_image", "full_range"])
def test_a_pool_of_8_and_16_bit_sets_mixes_them_in_one_batch(packs, intensity):
    pool = [packs["png8"], packs["raw16"], packs["png16"]]
    data = {"intensity": intensity}
    wanted, found = (groups(config(pool, loader, data=data, task="denoise")) for loader in ("torch", "dali"))
    assert_same(batches(wanted), batches(found))


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (2, None), (4, 2)])
def test_any_number_of_processes_and_any_micro_batch_see_the_same(packs, world, micro_batch):
    train = {"global_batch_size": 8, "micro_batch": micro_batch, "epoch_boundary": "epoch"}
    for rank in range(world):
        wanted, found = (
            groups(config(packs["png8"], loader, train=train), 2, rank=rank, world=world)
            for loader in ("torch", "dali")
        )
        assert_same(batches(wanted), batches(found))


def test_starting_later_continues_the_same_stream_to_the_bit(packs):
    cfg = config(packs["png16"], "dali", runtime={"workers": 1})
    everything, later = groups(cfg, 5), groups(cfg, 2, start=3)
    for left, right in zip(batches(everything[3:]), batches(later), strict=True):
        assert left.ids == right.ids
        assert torch.equal(left.images, right.images)


def test_evaluation_is_the_same(packs):
    wanted, found = (list(open_loader(config(packs["png16"], name), stage="evaluate")) for name in ("torch", "dali"))
    assert_same(wanted, found)


@pytest.mark.parametrize("image_size", [32, 48, 56, 96, 128])
@pytest.mark.parametrize("kind", ["png8", "raw16"])
def test_a_set_stored_at_another_size_is_resized_as_torch_does(packs, kind, image_size):
    data = {"image_size": image_size}
    wanted, found = (groups(config(packs[kind], loader, data=data), 2) for loader in ("torch", "dali"))
    assert_same(batches(wanted), batches(found))
    assert batches(found)[0].images.shape[-1] == image_size


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_dali_never_meets_changed_bytes(tmp_path, encoding):
    pack = pack_dots(tmp_path / "dots", {"train": 16, "test": 2}, size=SIZE, encoding=encoding)
    bad = Manifest.open(pack).rows(["train"])[[3, 8]].tolist()
    corrupt(pack, bad)
    wanted, found = (groups(config(pack, loader), 4) for loader in ("torch", "dali"))
    assert_same(batches(wanted), batches(found))
    assert {sample.row for group in found for sample in group.bad} == set(bad)


def test_bytes_as_packed_that_are_no_image_are_replaced_before_dali_sees_them(packs, monkeypatch):
    manifest = Manifest.open(packs["png8"])
    victim = int(manifest.rows(["train"])[4])
    read = Manifest.read_bytes
    monkeypatch.setattr(Manifest, "read_bytes", lambda self, row: b"GIF89a" if row == victim else read(self, row))
    found = groups(config(packs["png8"], "dali"), 4)
    assert {sample.row for group in found for sample in group.bad} == {victim}
    with pytest.raises(CorruptSampleError):
        manifest.decode(victim)


def test_jpeg_comes_out_as_the_other_decoder_reads_it_but_for_rounding(tmp_path):
    pack = pack_dots(tmp_path / "jpeg", {"train": 8, "test": 1}, size=SIZE, encoding="jpeg")
    data = {"augment": {"probability": 0}, "intensity": "full_range"}
    wanted, found = (groups(config(pack, loader, data=data), 1) for loader in ("torch", "dali"))
    assert (batches(wanted)[0].images - batches(found)[0].images).abs().max() < 1.01 * GREY_LEVEL


def test_auto_measures_where_it_matters_and_keeps_to_what_the_run_began_with(packs):
    cfg = config(packs["raw8"], "auto")
    assert choose_backend(cfg, device="cpu").name == "torch"
    assert choose_backend(cfg, device="cpu", before={"name": "dali"}).name == "dali"
    measured = measure_backends(cfg, training_corpora(cfg), device=torch.device("cpu"))
    assert measured.images_per_s is not None
    assert measured.name == max(measured.images_per_s, key=measured.images_per_s.__getitem__)
    with pytest.raises(ConfigError, match=r"cache_pixels=ram.*beforehand"):
        choose_backend(config(packs["raw8"], "dali", runtime={"cache_pixels": "ram"}), device="cpu")
