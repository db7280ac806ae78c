"""Shards in object stores: emulators of S3 and of Google's on this machine, with s3fs and gcsfs, and their failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import DataError, StoppedError
from tests.data.dot_packs import pack_dots
from tests.data.streams import assert_same, config, stream
from tests.extras import needs_extra

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google what kind of bucket each is
pytestmark = needs_extra("cloud", "cloud-dev")

BOTH = pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole shards", "ranges"])


@dataclass
class Faults:
    """What befalls the answers with content of a shard: `meets(number)` names it."""

    meets: Callable[[int], str | None] = lambda number: None
    answers: int = 0
    met: list[str] = field(default_factory=list)

    def next(self) -> str | None:
        self.answers += 1
        fault = self.meets(self.answers)
        self.met += [fault] if fault else []
        return fault


@dataclass
class Store:
    """A local dataset, the same in a bucket, and what goes wrong there."""

    local: Path
    url: str
    system: Any
    faults: Faults


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pack_dots(tmp_path_factory.mktemp("stores") / "dots", {"train": 24, "test": 4})
    write_fingerprints(Manifest.open(folder))  # as packing does; without them a pool has to read every image first
    return folder


@pytest.fixture(scope="module", params=["s3", "gs"])
def running(request: pytest.FixtureRequest, local: Path) -> Iterator[Store]:
    """The emulator of a store, with the dataset in a bucket."""
    import fsspec

    faults = Faults()
    with pytest.MonkeyPatch.context() as patch:
        stop = {"s3": start_s3, "gs": start_gs}[request.param](patch, faults)
        system = fsspec.filesystem(request.param)
        for path in local.iterdir():
            system.pipe_file(f"films/dots/{path.name}", path.read_bytes())
        yield Store(local, f"{request.param}://films/dots", system, faults)
        stop()


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same; nobody waits between tries, and afterwards nothing goes wrong any more."""
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    vars(running.faults).update(vars(Faults()))
    yield running
    vars(running.faults).update(vars(Faults()))


def start_s3(patch: pytest.MonkeyPatch, faults: Faults) -> Callable[[], None]:
    import fsspec
    from moto import server

    started = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in {"ACCESS_KEY_ID": "nobody", "SECRET_ACCESS_KEY": "none", "DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)
    # Both outlive the server of an earlier test: buckets, and fsspec's connection.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("films")
    app = started._server.app

    def faulty(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        is_shard = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar")
        fault = faults.next() if is_shard else None
        if fault in ("403", "404", "500", "503"):
            start_response(f"{fault} it is down", [("Content-Length", "0")])
            return [b""]
        body = b"".join(app(environ, start_response))
        if fault == "slow":
            time.sleep(0.3)
        return [body[: len(body) // 2] if fault == "drop" else body]

    patch.setattr(started._server, "app", faulty)
    return started.stop


def start_gs(patch: pytest.MonkeyPatch, faults: Faults) -> Callable[[], None]:
    import asyncio

    import fsspec
    from gcp_storage_emulator import server as emulator

    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="films")
    server.start()
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    patch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    close = emulator.Response.close

    def close_badly(response: Any) -> None:
        handler = response._handler
        is_content = "alt=media" in handler.path or "/download/" in handler.path
        fault = faults.next() if is_content and ".tar" in handler.path else None
        if fault == "drop":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(response._content)))
            handler.end_headers()
            handler.wfile.write(response._content[: len(response._content) // 2])
        elif fault not in (None, "slow"):
            handler.send_error(int(fault))
        else:
            time.sleep(0.3 if fault else 0)
            close(response)

    patch.setattr(emulator.Response, "close", close_badly)
    return server.stop


@BOTH
def test_an_object_store_gives_the_stream_of_the_local_folder(store, tmp_path, cache_gib):
    cfg = config(store.url, tmp_path, cache_gib=cache_gib, workers=2)
    assert_same(stream(cfg), stream(config(store.local, tmp_path)))


@BOTH
def test_what_fails_for_a_while_is_tried_again_and_changes_nothing(store, tmp_path, cache_gib):
    plan = {1: "drop", 3: "500", 5: "slow", 6: "503", 8: "drop"}
    store.faults.meets = plan.get
    assert_same(stream(config(store.url, tmp_path, cache_gib=cache_gib)), stream(config(store.local, tmp_path)))
    assert store.faults.met == list(plan.values())


@BOTH
def test_a_store_that_stays_away_stops_the_run_resumably(store, tmp_path, cache_gib):
    loader = open_loader(config(store.url, tmp_path, cache_gib=cache_gib), stage="train")
    store.faults.meets = lambda number: "503"
    with pytest.raises(StoppedError, match=r"after \d tries") as caught:
        next(loader.global_batches(0))
    loader.close()
    assert caught.value.exit_code == 75
    assert loader.quarantine.entries == []


def test_a_client_that_itself_tries_for_long_is_not_asked_again(store, tmp_path, monkeypatch):
    loader = open_loader(config(store.url, tmp_path, cache_gib=0.0), stage="train")
    store.faults.meets = lambda number: "500"
    monkeypatch.setattr(remote, "GIVE_UP_S", 0.0)
    with pytest.raises(StoppedError, match="after 1 tries"):
        next(loader.global_batches(0))
    loader.close()


def test_verify_reads_the_store_and_finds_what_does_not_belong_there(store, tmp_path):
    report = verify(store.url, CacheSettings(tmp_path))
    assert (report.is_good, report.is_listed, report.samples) == (True, True, 28)
    store.system.pipe_file("films/dots/model.pkl", b"never opened")
    assert verify(store.url, CacheSettings(tmp_path)).foreign == ["model.pkl"]
    store.system.rm("films/dots/model.pkl")


@pytest.mark.parametrize("fault", ["403", "404"])
def test_what_is_not_there_or_not_for_us_is_told_at_once(store, tmp_path, fault):
    loader = open_loader(config(store.url, tmp_path, cache_gib=0.0), stage="train")
    store.faults.meets = lambda number: fault
    with pytest.raises(DataError, match=r"shard-0000\d\d.tar is not there or not for us"):
        next(loader.global_batches(0))
    loader.close()
    assert store.faults.answers == 1
    nowhere = store.url.replace("films", "nowhere")
    with pytest.raises(DataError, match=rf"{nowhere}/manifest.json is not there or not for us"):
        Manifest.open(nowhere, CacheSettings(tmp_path))
