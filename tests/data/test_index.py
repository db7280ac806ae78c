"""The index: opened in pieces, checked against the manifest, rebuilt from the shards; rows are never listed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.cli.app import run
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.loading.order import SampleOrder
from ddpm_lmk.data.shards.index import ListedRows, SplitRows, rebuild_index
from ddpm_lmk.data.shards.manifest import Manifest, read_header
from ddpm_lmk.errors import DataError
from tests.data.dot_packs import pack_dots, run_config


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_dots(tmp_path_factory.mktemp("index") / "dots", {"train": 21, "val": 5, "test": 9}, size=32)


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    shutil.copytree(pack, tmp_path / "dots")
    return tmp_path / "dots"


def test_shards_and_splits_are_counted_while_the_index_is_read(pack: Path) -> None:
    manifest = Manifest.open(pack)
    assert manifest.count_per_split() == {"train": 21, "val": 5, "test": 9}
    assert manifest.starts.tolist() == [0, *np.cumsum([shard["count"] for shard in manifest.shards]).tolist()]
    assert manifest.shard_of(np.arange(35)).tolist() == manifest.index["shard"].tolist()


def rows_of(pack: Path, *splits: str, without: np.ndarray | None = None) -> tuple[SplitRows, np.ndarray]:
    manifest = Manifest.open(pack)
    codes = [manifest.splits.index(split) for split in splits]
    listed = np.flatnonzero(np.isin(manifest.index["split"], codes))
    return manifest.rows(splits, without=without), np.setdiff1d(listed, [] if without is None else without)


@pytest.mark.parametrize("splits", [("train",), ("val", "test"), ("train", "val", "test")])
@pytest.mark.parametrize("without", [None, np.array([0, 3, 3, 20, 34]), np.arange(12)])
def test_rows_that_are_not_listed_are_those_that_would_be(
    pack: Path, splits: tuple[str, ...], without: np.ndarray | None
) -> None:
    rows, listed = rows_of(pack, *splits, without=without)
    assert len(rows) == len(listed)
    assert list(rows) == rows.tolist() == listed.tolist()
    for places in (0, -1, np.array([2, 0, 2]), slice(1, 4), np.arange(len(listed)) % 3 == 0):
        assert np.array_equal(rows[places], listed[places])
    with pytest.raises(IndexError):
        rows[len(listed)]


def test_the_order_is_that_of_listed_rows(pack: Path) -> None:
    rows, listed = rows_of(pack, "train", "test", without=np.array([6]))
    shards = Manifest.open(pack).index["shard"][listed]
    orders = [SampleOrder(4, [each], None, 2) for each in (rows, ListedRows(listed, shards))]
    positions = np.arange(100)
    assert np.array_equal(orders[0].at(positions)[1], orders[1].at(positions)[1])


def test_drawing_from_a_large_set_lists_nothing(tmp_path: Path) -> None:
    """A million rows in four thousand shards: what is kept grows with the shards."""
    starts = np.arange(4001) * 250
    index = np.zeros(1_000_000, [("split", "u1")])
    index["split"][::10] = 1
    rows = SplitRows(index, starts, np.full(4000, 225), [0])
    kept = sum(value.nbytes for value in vars(rows).values() if isinstance(value, np.ndarray) and value is not index)
    assert kept < 60 * 4001
    drawn = SampleOrder(1, [rows], None, 16).at(np.arange(5000))[1]
    assert len(np.unique(drawn)) == 5000
    assert (index["split"][drawn] == 0).all()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "emptied", "foreign"])
def test_a_damaged_index_is_refused_and_rebuilt_as_it_was(copy: Path, damage: str) -> None:
    path = copy / "index.npy"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[-9] ^= 4
    broken = {"cut": content[:-53], "flipped": changed, "emptied": b"", "foreign": b"\x93NUMPY\x03\x00 what"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(broken[damage])
    with pytest.raises(DataError, match="shards index"):
        Manifest.open(copy)
    assert run(["shards", "index", str(copy)]) == 0
    assert path.read_bytes() == content
    assert len(Manifest.open(copy)) == 35


def test_no_index_is_written_for_shards_that_changed(copy: Path) -> None:
    (copy / "index.npy").unlink()
    shard = copy / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # a pixel of its first image
    shard.write_bytes(content)
    with pytest.raises(DataError, match="not those its manifest"):
        rebuild_index(copy, read_header(copy))
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        rebuild_index(copy, read_header(copy))
    assert not (copy / "index.npy").exists()


def test_fewer_shards_than_processes_and_workers_do_not_matter(tmp_path: Path) -> None:
    """One shard for four processes of three workers: the samples that one process reads alone (docs/faults.md, B23)."""
    pack = pack_dots(tmp_path / "few", {"train": 2}, size=32)
    assert len(Manifest.open(pack).shards) == 1
    cfg = run_config(pack, task="denoise", data={"image_size": 32}, runtime={"workers": 3, "cache_pixels": "stream"})
    assert read(cfg, 4) == read(cfg, 1)
    assert len(read(cfg, 1)) == 24  # three groups of eight, of two films: they repeat (B22)


def read(cfg: RunConfig, world: int) -> list[str]:
    """Names of the samples of three steps, in order of position."""
    found: dict[int, str] = {}
    for rank in range(world):
        loader = open_loader(cfg, stage="train", rank=rank, world=world)
        for _, group in zip(range(3), loader.global_batches()):
            for batch in group.micro_batches:
                found |= dict(zip(batch.positions.tolist(), batch.ids, strict=True))
        loader.close()
    return [found[position] for position in sorted(found)]
