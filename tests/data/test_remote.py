"""Shards behind real servers on this machine: the same stream, whatever the server does, and errors that say which."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_lmk.cli.app import run
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.preview import show
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.remote import CacheSettings, ShardCache
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import ConfigError, DataError, LaunchError, StoppedError
from tests.data.dot_packs import corrupt, pack_dots
from tests.data.streams import assert_same, config, stream
from tests.data.web import Server, serve
from tests.extras import needs_extra

pytestmark = needs_extra("cloud")

BOTH = pytest.mark.parametrize("cache_gib", [1.0, 0.0], ids=["whole shards", "ranges"])
SHARD_BYTES = 25_000  # somewhat more than one shard of the packs below


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = pack_dots(tmp_path_factory.mktemp("remote") / "dots", {"train": 24, "test": 4})
    write_fingerprints(Manifest.open(out))  # as packing does; without them a pool has to read every image first
    return out


@pytest.fixture
def server(pack: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "STALL_S", 0.5)
    with serve(pack.parent) as running:
        yield running


@pytest.mark.parametrize("workers", [0, 2])
@BOTH
def test_a_web_server_gives_the_stream_of_the_local_folder(server, pack, tmp_path, cache_gib, workers):
    cfg = config(f"{server.url}/dots", tmp_path, cache_gib=cache_gib, workers=workers)
    assert_same(stream(cfg), stream(config(pack, tmp_path)))
    shards = [(name, wanted) for name, wanted in server.requests if name.endswith(".tar")]
    assert all((wanted is None) == (cache_gib > 0) for _, wanted in shards)
    if cache_gib:
        assert len(shards) == len({name for name, _ in shards})
        server.requests.clear()
        stream(cfg)
        assert [name for name, _ in server.requests if name.endswith(".tar")] == []


@pytest.mark.parametrize(
    ("fault", "task"),
    [
        *(("drop", "denoise"), ("500", "landmarks"), ("503", "denoise"), ("hang", "denoise"), ("slow", "denoise")),
        *(("flip", "denoise"), ("flip", "landmarks")),
    ],
)
@BOTH
def test_what_fails_for_a_while_is_tried_again_and_changes_nothing(server, pack, tmp_path, cache_gib, fault, task):
    every = {"flip": 2, "hang": 12, "slow": 6}.get(fault, 3)
    server.fault = lambda name, number: fault if name.endswith(".tar") and number % every == 0 else None
    cfg = config(f"{server.url}/dots", tmp_path, cache_gib=cache_gib, task=task)
    assert_same(stream(cfg, 3), stream(config(pack, tmp_path, task=task), 3))
    assert len(server.requests) > 3


@BOTH
def test_a_server_that_stays_away_stops_the_run_resumably_and_makes_no_sample_corrupt(server, tmp_path, cache_gib):
    loader = open_loader(config(f"{server.url}/dots", tmp_path, cache_gib=cache_gib), stage="train")
    server.fault = lambda name, number: "500" if name.endswith(".tar") else None
    with pytest.raises(StoppedError, match="after 5 tries") as caught:
        next(loader.global_batches(0))
    assert caught.value.exit_code == 75
    assert loader.quarantine.entries == []


def test_reading_all_of_a_pack_for_its_prints_survives_failures_too(server, tmp_path):
    pack = pack_dots(server.root / "bare", {"train": 12, "test": 2}, labels=False, seed=5)
    server.fault = lambda name, number: "500" if name.endswith(".tar") and number % 2 else None
    found = stream(config(f"{server.url}/bare", tmp_path), 2)
    server.fault = lambda name, number: None
    assert_same(found, stream(config(pack, tmp_path), 2))


@pytest.mark.parametrize("fault", ["404", "403"])
def test_what_is_not_there_is_told_at_once(server, tmp_path, fault):
    server.fault = lambda name, number: fault if name.endswith(".tar") else None
    loader = open_loader(config(f"{server.url}/dots", tmp_path), stage="train")
    with pytest.raises(DataError, match=r"shard-0000\d\d.tar is not there or not for us") as caught:
        next(loader.global_batches(0))
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=r"nowhere/manifest.json is not there"):
        Manifest.open(f"{server.url}/nowhere", CacheSettings(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_missing_or_shortened_shard_is_found_when_the_pack_is_opened(tmp_path, damage):
    pack = pack_dots(tmp_path / "dots", {"train": 8, "test": 2})
    shard = sorted(pack.glob("*.tar"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut off":
        shard.write_bytes(content[:-512])
    with (
        serve(tmp_path) as server,
        pytest.raises(DataError, match=r"shard-000001.tar (is not there|has \d+ bytes, \d+ wanted)"),
    ):
        Manifest.open(f"{server.url}/dots", CacheSettings(tmp_path / "cache"))


def test_a_sample_that_is_corrupt_at_its_origin_is_replaced_as_it_is_locally(tmp_path):
    pack = pack_dots(tmp_path / "dots", {"train": 16, "test": 2})
    bad = int(Manifest.open(pack).rows(["train"])[5])
    corrupt(pack, [bad])
    with serve(tmp_path) as server:
        found = stream(config(f"{server.url}/dots", tmp_path / "cache"))
    wanted = stream(config(pack, tmp_path))
    assert [batch.ids for group in found for batch in group.micro_batches] == [
        batch.ids for group in wanted for batch in group.micro_batches
    ]
    assert {sample.row for group in found for sample in group.bad} == {bad}


@BOTH
def test_a_server_that_tells_no_lengths_gives_the_same_stream(server, pack, tmp_path, cache_gib):
    server.tells_length = False
    assert_same(stream(config(f"{server.url}/dots", tmp_path, cache_gib=cache_gib)), stream(config(pack, tmp_path)))


def test_a_copy_that_was_damaged_on_this_disk_is_fetched_again(server, pack, tmp_path):
    cfg = config(f"{server.url}/dots", tmp_path)
    stream(cfg)
    for copy in tmp_path.glob("*/*.tar"):
        copy.write_bytes(bytes(copy.stat().st_size))
    assert_same(stream(cfg), stream(config(pack, tmp_path)))


def test_the_cache_stays_below_its_limit_and_drops_what_was_used_longest_ago(tmp_path):
    cache = ShardCache(tmp_path / "pack", 3 * 1000)

    def want(name: str) -> None:
        cache.get(name, 1000, lambda path: path.write_bytes(bytes(1000)))
        os.utime(tmp_path / "pack" / name, ns=(next(clock), next(clock)))

    clock = itertools.count(10**9)
    for name in ("a.tar", "b.tar", "c.tar", "a.tar", "d.tar"):
        want(name)
    assert {path.name for path in tmp_path.glob("*/*.tar")} == {"a.tar", "c.tar", "d.tar"}


def test_what_others_are_fetching_stays_and_what_a_killed_process_left_goes(tmp_path):
    caches = {name: ShardCache(tmp_path / name, 1000) for name in ("one", "two")}
    left = tmp_path / "one" / ".unfinished-1000-left.tar"
    left.write_bytes(b"cut off")
    both_fetch = threading.Barrier(2, timeout=30)

    def fetch(path: Path) -> None:
        path.write_bytes(bytes(1000))
        both_fetch.wait()

    with ThreadPoolExecutor(2) as pool:
        copies = [pool.submit(cache.get, "a.tar", 1000, fetch) for cache in caches.values()]
        assert [copy.result().stat().st_size for copy in copies] == [1000, 1000]
    assert not left.exists()


def test_a_cache_of_two_windows_serves_a_pack_that_is_larger(server, pack, tmp_path):
    limit = 4.2 * SHARD_BYTES
    cfg = config(f"{server.url}/dots", tmp_path, cache_gib=limit / 2**30)
    assert_same(stream(cfg, 9), stream(config(pack, tmp_path), 9))
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= limit


READ_ALL = """\
import hashlib, sys
from pathlib import Path
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.data.shards.manifest import Manifest
manifest = Manifest.open(sys.argv[1], CacheSettings(Path(sys.argv[2])))
print(hashlib.sha256(b"".join(manifest.read_bytes(row) for row in range(len(manifest)))).hexdigest())
"""


def test_processes_that_start_together_fetch_every_shard_once(server, tmp_path):
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/dots", str(tmp_path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [rank.communicate()[0] for rank in ranks]
    assert printed[0] == printed[1] != b""
    shards = [name for name, _ in server.requests if name.endswith(".tar")]
    assert len(shards) == len(set(shards)) > 3


def test_a_url_with_a_password_or_of_a_kind_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="environment") as caught:
        Manifest.open("https://me:hunter2@example.org/pack", CacheSettings(tmp_path))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(LaunchError, match=r"ddpm-lmk\[cloud\]"):
        Manifest.open("gopher://example.org/pack", CacheSettings(tmp_path))


# --- `shards verify` and `shards show` of a URL: what lies there now is checked, whatever the cache holds


@pytest.fixture
def site(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of a copy that may be damaged."""
    shutil.copytree(pack, tmp_path / "web" / "dots")
    monkeypatch.setenv("LMK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    with serve(tmp_path / "web") as running:
        yield running


def test_good_shards_are_good_and_nothing_stays_on_this_disk(site, pack, tmp_path, capsys):
    assert run(["shards", "verify", f"{site.url}/dots"]) == 0
    printed = capsys.readouterr()
    assert f"{site.url}/dots: good; 28 samples (train 24, test 4)" in printed.out
    assert "foreign ones were not checked" in printed.out + printed.err
    assert sum(name.endswith(".tar") for name, _ in site.requests) == verify(pack).shards
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("fault", ["drop", "500", "slow"])
def test_what_fails_for_a_while_is_no_damage(site, tmp_path, fault):
    site.fault = lambda name, number: fault if number % 2 else None
    report = verify(f"{site.url}/dots", CacheSettings(tmp_path / "cache"))
    assert report.is_good
    assert not report.is_listed


def test_damage_is_found_though_the_cache_still_holds_a_good_copy(site, tmp_path):
    manifest = Manifest.open(f"{site.url}/dots", CacheSettings(tmp_path / "cache"))
    manifest.read_bytes(4)
    manifest.close()
    corrupt(site.root / "dots", [4])
    refused = site.root / "dots" / "refused.jsonl"
    refused.write_bytes(refused.read_bytes() + b" ")
    assert run(["shards", "verify", f"{site.url}/dots"]) == 3
    report = verify(f"{site.url}/dots", CacheSettings(tmp_path / "cache"))
    assert report.problems[0] == "refused.jsonl: missing, or sha256 differs from the manifest"
    assert f"row 4 of {site.url}/dots: the image is not what was packed" in report.problems[1]


def test_a_url_is_shown_as_a_local_folder(site, pack, tmp_path):
    here = show(pack, tmp_path / "here", count=4)
    assert run(["shards", "show", f"{site.url}/dots", "--out", str(tmp_path / "there"), "--count", "4"]) == 0
    assert (tmp_path / "there" / here.sheet.name).read_bytes() == here.sheet.read_bytes()
    assert (tmp_path / "there" / here.page.name).is_file()
