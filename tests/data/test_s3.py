"""Shards in an object store: a real S3 server on this machine, with s3fs as anybody would use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_lmk.data.remote import CacheSettings
from ddpm_lmk.data.shards import Manifest
from ddpm_lmk.errors import DataError
from tests.data.dot_packs import pack_dots
from tests.data.test_remote import assert_same, config, stream

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A local pack, and the same pack in a bucket."""
    import fsspec

    pack = pack_dots(tmp_path_factory.mktemp("s3") / "dots", {"train": 24, "test": 4})
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3")
        system.mkdir("films")
        system.put(f"{pack}/", "films/dots/", recursive=True)
        yield pack, "s3://films/dots"
        running.stop()


@pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole shards", "ranges"])
def test_an_object_store_gives_the_stream_of_the_local_folder(store, tmp_path, cache_gib):
    pack, url = store
    cfg = config(url, tmp_path, cache_gib=cache_gib, workers=2)
    assert_same(stream(cfg), stream(config(pack, tmp_path)))


def test_a_bucket_that_is_not_there_is_told_at_once(store, tmp_path):
    with pytest.raises(DataError, match=r"s3://nowhere/dots/manifest.json is not there or not for us"):
        Manifest.open("s3://nowhere/dots", CacheSettings(tmp_path))
