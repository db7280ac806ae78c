"""Shards in an object store: an S3 server on this machine, with s3fs as anybody would use it, and its failures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.errors import DataError, StoppedError
from tests.data.dot_packs import pack_dots
from tests.data.streams import assert_same, config, stream
from tests.extras import needs_extra

pytestmark = needs_extra("cloud", "cloud-dev")

BOTH = pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole shards", "ranges"])


class Faulty:
    """The application of a server, whose answers to a GET of a shard meet `fault(number)`."""

    def __init__(self, app: Any) -> None:
        self.app, self.answers = app, 0
        self.met: list[str] = []
        self.faults: dict[int, str] = {}
        self.always: str | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault = None
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar"):
            self.answers += 1
            fault = self.always or self.faults.get(self.answers)
            self.met += [fault] if fault else []
        if fault in ("500", "503"):
            start_response(f"{fault} it is down", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.app(environ, start_response))
        if fault == "slow":
            time.sleep(0.3)
        return [body[: len(body) // 2] if fault == "drop" else body]


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """The server."""
    from moto import server

    started = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def store(running: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A local pack, and the same pack in a bucket."""
    import fsspec

    pack = pack_dots(tmp_path_factory.mktemp("s3") / "dots", {"train": 24, "test": 4})
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


@pytest.fixture
def faulty(store: tuple[Path, str], running: Any, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The server of the store, to be told what goes wrong."""
    wrapped = Faulty(running._server.app)
    monkeypatch.setattr(running._server, "app", wrapped)
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    return wrapped


@BOTH
def test_an_object_store_gives_the_stream_of_the_local_folder(store, tmp_path, cache_gib):
    pack, url = store
    cfg = config(url, tmp_path, cache_gib=cache_gib, workers=2)
    assert_same(stream(cfg), stream(config(pack, tmp_path)))


@BOTH
def test_what_fails_for_a_while_is_tried_again_and_changes_nothing(store, faulty, tmp_path, cache_gib):
    pack, url = store
    faulty.faults = {1: "drop", 3: "500", 5: "slow", 6: "503", 8: "drop"}
    assert_same(stream(config(url, tmp_path, cache_gib=cache_gib)), stream(config(pack, tmp_path)))
    assert faulty.met == list(faulty.faults.values())


@BOTH
def test_a_store_that_stays_away_stops_the_run_resumably(store, faulty, tmp_path, cache_gib):
    loader = open_loader(config(store[1], tmp_path, cache_gib=cache_gib), stage="train")
    faulty.always = "503"
    with pytest.raises(StoppedError, match=r"after \d tries") as caught:
        next(loader.groups(0))
    loader.close()
    assert caught.value.exit_code == 75
    assert loader.quarantine.entries == []


def test_a_bucket_that_is_not_there_is_told_at_once(store, tmp_path):
    with pytest.raises(DataError, match=r"s3://nowhere/dots/manifest.json is not there or not for us"):
        Manifest.open("s3://nowhere/dots", CacheSettings(tmp_path))
