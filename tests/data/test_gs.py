"""Shards in Google's store: an emulator of it on this machine, with gcsfs as anybody would use it, and its failures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.data.shards.verify import Manifest, verify
from ddpm_lmk.errors import DataError, StoppedError
from tests.data.dot_packs import pack_dots
from tests.data.streams import assert_same, config, stream
from tests.extras import needs_extra

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google what kind of bucket each is
pytestmark = needs_extra("cloud", "cloud-dev")

BOTH = pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole shards", "ranges"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A local pack, and the same pack in a bucket."""
    import fsspec
    from gcp_storage_emulator import server as emulator

    pack = pack_dots(tmp_path_factory.mktemp("gs") / "dots", {"train": 24, "test": 4})
    write_fingerprints(Manifest.open(pack))
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="films")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        port = server._api._httpd.server_address[1]
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        system = fsspec.filesystem("gs")
        for path in pack.iterdir():
            system.pipe_file(f"films/dots/{path.name}", path.read_bytes())
        yield pack, "gs://films/dots"
        server.stop()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What befalls the answers with content of a shard: `fault(number)` names it; nobody waits between tries."""
    import asyncio

    from gcp_storage_emulator.server import Response

    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    plan: dict[str, Any] = {"fault": lambda number: None, "answers": 0, "met": []}
    close = Response.close

    def close_badly(response: Any) -> None:
        handler = response._handler
        is_content = "alt=media" in handler.path or "/download/" in handler.path
        plan["answers"] += is_content and ".tar" in handler.path
        fault = plan["fault"](plan["answers"]) if is_content and ".tar" in handler.path else None
        plan["met"] += [fault] if fault else []
        if fault is None:
            close(response)
        elif fault == "slow":
            time.sleep(0.3)
            close(response)
        elif fault == "drop":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(response._content)))
            handler.end_headers()
            handler.wfile.write(response._content[: len(response._content) // 2])
        else:
            handler.send_error(int(fault))

    monkeypatch.setattr(Response, "close", close_badly)
    return plan


@BOTH
def test_the_store_gives_the_stream_of_the_local_folder(store, tmp_path, cache_gib):
    pack, url = store
    cfg = config(url, tmp_path, cache_gib=cache_gib, workers=2)
    assert_same(stream(cfg), stream(config(pack, tmp_path)))


@BOTH
def test_what_fails_for_a_while_is_tried_again_and_changes_nothing(store, failing, tmp_path, cache_gib):
    pack, url = store
    faults = {1: "drop", 3: "500", 5: "slow", 6: "503", 8: "drop"}
    failing["fault"] = faults.get
    assert_same(stream(config(url, tmp_path, cache_gib=cache_gib)), stream(config(pack, tmp_path)))
    assert failing["met"] == list(faults.values())


@BOTH
def test_a_store_that_stays_away_stops_the_run_resumably(store, failing, tmp_path, cache_gib):
    loader = open_loader(config(store[1], tmp_path, cache_gib=cache_gib), stage="train")
    failing["fault"] = lambda number: "500"
    with pytest.raises(StoppedError, match="after 5 tries") as caught:
        next(loader.groups(0))
    loader.close()
    assert caught.value.exit_code == 75
    assert loader.quarantine.entries == []


def test_a_client_that_itself_tries_for_long_is_not_asked_again(store, failing, tmp_path, monkeypatch):
    loader = open_loader(config(store[1], tmp_path, cache_gib=0.0), stage="train")
    failing["fault"] = lambda number: "500"
    monkeypatch.setattr(remote, "GIVE_UP_S", 0.0)
    with pytest.raises(StoppedError, match="after 1 tries"):
        next(loader.groups(0))
    loader.close()


def test_verify_reads_the_store_and_sees_what_does_not_belong_there(store, tmp_path):
    import fsspec

    report = verify(store[1], CacheSettings(tmp_path))
    assert (report.is_good, report.is_listed, report.samples) == (True, True, 28)
    system = fsspec.filesystem("gs")
    system.pipe_file("films/dots/model.pkl", b"never opened")
    assert verify(store[1], CacheSettings(tmp_path)).foreign == ["model.pkl"]
    system.rm("films/dots/model.pkl")


@pytest.mark.parametrize("fault", ["403", "404"])
def test_what_is_not_there_or_not_for_us_is_told_at_once(store, failing, tmp_path, fault):
    loader = open_loader(config(store[1], tmp_path, cache_gib=0.0), stage="train")
    failing["fault"] = lambda number: fault
    with pytest.raises(DataError, match=r"shard-0000\d\d.tar is not there or not for us"):
        next(loader.groups(0))
    loader.close()
    assert failing["answers"] == 1
    with pytest.raises(DataError, match=r"gs://nowhere/dots/manifest.json is not there"):
        Manifest.open("gs://nowhere/dots", CacheSettings(tmp_path))
