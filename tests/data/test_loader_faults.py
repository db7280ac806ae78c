"""Bytes that changed, decoders that misbehave and file systems that stall (docs/faults.md B3, B26, B27, A22)."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.loading.loader import TrainLoader
from ddpm_lmk.data.shards import manifest, remote
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.errors import DataError, StoppedError
from tests.data.dot_packs import corrupt, pack_dots, run_config


def ids(loader: TrainLoader, count: int) -> list[str]:
    """Names of the samples of the first groups; bad ones are listed as the training loop does it."""
    names = []
    for step, group in enumerate(itertools.islice(loader.global_batches(0), count), start=1):
        names += [name for batch in group.micro_batches for name in batch.ids]
        loader.quarantine.merge(group.bad, step=step)
        loader.quarantine.check()
    return names


@pytest.mark.parametrize("residency", ["stream", "ram", "device"])
def test_a_corrupt_sample_is_replaced_by_the_same_neighbour_everywhere_and_listed(tmp_path, residency):
    pack = pack_dots(tmp_path / "dots", {"train": 16, "test": 2})
    clean = ids(open_loader(run_config(pack), stage="train"), 4)
    bad = Manifest.open(pack).rows(["train"])[[3, 8]].tolist()
    corrupt(pack, bad)
    loaders = [
        open_loader(run_config(pack, runtime={"cache_pixels": kind}), stage="train") for kind in (residency, "stream")
    ]
    streams = [ids(loader, 4) for loader in loaders]
    assert streams[0] == streams[1]
    changed = [(old, new) for old, new in zip(clean, streams[0], strict=True) if old != new]
    assert {old for old, _ in changed} == {"train-003", "train-008"}
    assert not {new for _, new in changed} & {"train-003", "train-008"}
    assert sorted(entry["row"] for entry in loaders[0].quarantine.entries) == bad
    assert "sha256" in loaders[0].quarantine.entries[0]["reason"]


def test_labels_follow_the_substitute(tmp_path):
    pack = pack_dots(tmp_path / "dots", {"train": 2, "test": 1})
    corrupt(pack, Manifest.open(pack).rows(["train"])[:1].tolist())
    cfg = run_config(pack, data={"augment": {"probability": 0}}, train={"global_batch_size": 2})
    batch = next(open_loader(cfg, stage="train").global_batches(0)).micro_batches[0]
    assert batch.ids == ("train-001", "train-001")
    assert batch.points is not None
    assert batch.points[0].equal(batch.points[1])


@pytest.mark.parametrize("residency", ["stream", "ram"])
def test_too_many_corrupt_samples_stop_the_run(tmp_path, residency):
    pack = pack_dots(tmp_path / "dots", {"train": 40, "test": 2})
    rows = Manifest.open(pack).rows(["train"]).tolist()
    corrupt(pack, rows[::4])
    cfg = run_config(pack, runtime={"cache_pixels": residency})
    assert len(ids(open_loader(cfg, stage="train"), 5)) == 40
    corrupt(pack, rows[1:2])
    with pytest.raises(DataError, match="11 of 40 samples cannot be read"):
        ids(open_loader(cfg, stage="train"), 5)


def test_a_shard_without_any_readable_sample_stops_the_run(tmp_path):
    pack = pack_dots(tmp_path / "dots", {"train": 60, "test": 2}, per_shard=20)
    manifest = Manifest.open(pack)
    cfg = run_config(pack, data={"max_bad_fraction": 0.5}, runtime={"cache_pixels": "ram"})
    rows = np.flatnonzero(manifest.shard_of(np.arange(len(manifest))) == 2).tolist()
    assert len(rows) > 10
    corrupt(pack, rows[1:])
    assert ids(open_loader(cfg, stage="train"), 2)
    corrupt(pack, rows[:1])
    with pytest.raises(DataError, match=r"shard 2 of .* is wholly bad"):
        ids(open_loader(cfg, stage="train"), 2)


def test_a_position_without_any_readable_sample_stops_the_run(tmp_path):
    pack = pack_dots(tmp_path / "dots", {"train": 3, "test": 1})
    corrupt(pack, Manifest.open(pack).rows(["train"]).tolist())
    with pytest.raises(DataError, match="none of 17 samples drawn for position"):
        ids(open_loader(run_config(pack), stage="train"), 1)


def test_a_corrupt_image_is_never_left_out_of_a_score(tmp_path):
    pack = pack_dots(tmp_path / "dots", {"train": 3, "test": 5})
    corrupt(pack, Manifest.open(pack).rows(["test"])[2:3].tolist())
    with pytest.raises(DataError, match="sha256 differs"):
        list(open_loader(run_config(pack), stage="evaluate"))


class FlakyManifest(Manifest):
    """A manifest whose reads fail with EIO the first `failures` times."""

    failures = 0

    def read_bytes(self, row: int) -> bytes:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().read_bytes(row)


@pytest.fixture
def flaky_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(manifest, "Manifest", FlakyManifest)
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    return pack_dots(tmp_path / "dots", {"train": 8, "test": 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_system_that_comes_back_changes_nothing(flaky_pack, workers):
    cfg = run_config(flaky_pack, runtime={"cache_pixels": "stream", "workers": workers})
    wanted = ids(open_loader(cfg, stage="train"), 2)
    loader = open_loader(cfg, stage="train")
    FlakyManifest.failures = 4
    assert ids(loader, 2) == wanted
    assert FlakyManifest.failures == 0
    assert loader.quarantine.entries == []


def test_a_file_system_that_stays_away_stops_the_run_resumably(flaky_pack):
    loader = open_loader(run_config(flaky_pack, runtime={"cache_pixels": "stream"}), stage="train")
    FlakyManifest.failures = 1000
    try:
        with pytest.raises(StoppedError, match=r"Input/output error.*5 tries") as caught:
            ids(loader, 1)
    finally:
        FlakyManifest.failures = 0
    assert caught.value.exit_code == 75
    assert loader.quarantine.entries == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoder_that_leaks_stop_iteration_does_not_end_the_stream(tmp_path, monkeypatch, workers):
    pack = pack_dots(tmp_path / "dots", {"train": 8, "test": 1})
    decode, victim = Manifest.decode_bytes, Manifest.open(pack).read_bytes(4)

    def leaky(self: Manifest, data: bytes):
        if data == victim:
            raise StopIteration
        return decode(self, data)

    monkeypatch.setattr(Manifest, "decode_bytes", leaky)
    loader = open_loader(run_config(pack, runtime={"cache_pixels": "stream", "workers": workers}), stage="train")
    assert len(ids(loader, 3)) == 24
    assert [entry["row"] for entry in loader.quarantine.entries] == [4]
    assert "StopIteration" in loader.quarantine.entries[0]["reason"]
