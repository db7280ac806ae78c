"""Tars of others behind a server: the dataset and the stream of the same tars in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.in_place import find_tars, index_in_place
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.foreign import LABELLED, index, write_tars
from tests.data.streams import assert_same, config, stream
from tests.data.web import Server, serve
from tests.extras import needs_extra

pytestmark = needs_extra("cloud")

BOTH = pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole tars", "ranges"])
SETTINGS = PackSettings(kind="folder", size=32)
NAMES = "x-{000000..000002}.tar"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_tars(folder / "tars", 18)
    return index(folder / "tars", folder / "local", size=32).root


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    with serve(local.parent) as running:
        yield running


@BOTH
def test_a_web_server_gives_the_dataset_and_the_stream_of_the_folder(server, local, tmp_path, cache_gib):
    server.fault = lambda name, number: "drop" if number % 2 else None  # tried again
    cache = CacheSettings(tmp_path / "cache")
    index_in_place(f"{server.url}/tars/{NAMES}", tmp_path / "out", SETTINGS, LABELLED, workers=1, cache=cache)
    assert list((tmp_path / "cache").iterdir()) == []
    for path in local.iterdir():
        if path.name != "tars.txt":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    places = [f"{server.url}/tars/x-{number:06d}.tar" for number in range(3)]
    assert (tmp_path / "out" / "tars.txt").read_text().splitlines() == places
    server.fault = lambda name, number: None
    server.requests.clear()
    cfg = config(tmp_path / "out", tmp_path / "cache", cache_gib=cache_gib)
    assert_same(stream(cfg), stream(config(local, tmp_path)))
    assert all((wanted is None) == (cache_gib > 0) for _, wanted in server.requests)
    assert len(server.requests) >= 3


def test_verify_reads_what_lies_there_now_and_opening_looks_for_sizes(local, tmp_path, monkeypatch):
    monkeypatch.setenv("LMK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(local.parent / "tars", tmp_path / "web")
    with serve(tmp_path / "web") as server:
        index_in_place(f"{server.url}/{NAMES}", tmp_path / "out", SETTINGS, LABELLED, workers=1)
        manifest = Manifest.open(tmp_path / "out")
        manifest.decode(0)  # a copy is in the cache
        assert verify(tmp_path / "out").is_good
        tar = tmp_path / "web" / "x-000000.tar"
        content = bytearray(tar.read_bytes())
        content[int(manifest.index[0]["offset"]) + 30] ^= 0xFF
        tar.write_bytes(content)
        report = verify(tmp_path / "out")
        assert "row 0" in report.problems[0]
        assert report.problems[1] == "x-000000.tar: sha256 differs from the manifest"
        (tmp_path / "web" / "x-000002.tar").write_bytes(bytes(512))
        with pytest.raises(DataError, match=r"x-000002.tar has 512 bytes, \d+ wanted: .*tars.txt"):
            Manifest.open(tmp_path / "out")


def test_a_folder_of_a_web_server_and_an_index_behind_one_are_refused(server, local, tmp_path):
    with pytest.raises(ConfigError, match="web servers do not list folders; name the tars"):
        find_tars(f"{server.url}/tars")
    with pytest.raises(DataError, match=r"nothing.tar is not there or not for us"):
        find_tars(f"{server.url}/tars/nothing.tar")
    with pytest.raises(DataError, match="copy it here and name the copy"):
        Manifest.open(f"{server.url}/local", CacheSettings(tmp_path))


@pytest.mark.extra("cloud-dev")
def test_folders_of_a_bucket_give_the_stream_of_the_local_tars(local, tmp_path, monkeypatch):
    from tests.data.test_object_stores import Faults, start_s3

    stop = start_s3(monkeypatch, Faults())
    try:
        store = fsspec.filesystem("s3")
        for tar in sorted((local.parent / "tars").iterdir()):
            store.pipe_file(f"films/{'a' if tar.name < 'x-000002' else 'b'}/{tar.name}", tar.read_bytes())
        cache = CacheSettings(tmp_path / "cache")
        source = "s3://films/a::s3://films/b/x-{000002..000002}.tar"  # a folder, and a name
        index_in_place(source, tmp_path / "out", SETTINGS, LABELLED, workers=1, cache=cache)
        manifest = Manifest.open(tmp_path / "out", cache)
        assert [manifest.read_record(row).id for row in (0, 17)] == ["a/x-000000/0000", "b/x-000002/0017"]
        wanted = stream(config(local, tmp_path))
        for cache_gib in (1.0, 0.0):  # whole tars, ranges
            found = stream(config(tmp_path / "out", tmp_path / "cache", cache_gib=cache_gib))
            pairs = [(a.micro_batches[0].images, b.micro_batches[0].images) for a, b in zip(found, wanted, strict=True)]
            assert all(torch.equal(*pair) for pair in pairs)
    finally:
        stop()
