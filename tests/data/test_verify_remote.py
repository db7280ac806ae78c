"""`shards verify` and `shards show` of a URL: what lies there now is checked, whatever the cache holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.preview import show
from ddpm_lmk.data.shards import remote
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.data.shards.verify import verify
from tests.data.dot_packs import corrupt
from tests.data.web import Server, serve
from tests.extras import needs_extra

pytestmark = needs_extra("cloud")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "hands"
    pack("hand", out, PackSettings(kind="phantom", size=32, counts={"train": 6, "test": 3}, seed=3), workers=1)
    return out


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    shutil.copytree(packed, tmp_path / "web" / "hands")
    monkeypatch.setenv("LMK_CACHE", str(tmp_path / "cache"))
    with serve(tmp_path / "web") as running:
        yield running


def test_a_good_pack_is_good_and_nothing_stays_on_this_disk(server, packed, tmp_path, capsys):
    assert run(["shards", "verify", f"{server.url}/hands"]) == 0
    printed = capsys.readouterr()
    local = verify(packed)
    assert f"{server.url}/hands: good; 9 samples (train 6, test 3)" in printed.out
    assert "was not looked at" in printed.out + printed.err
    assert sum(name.endswith(".tar") for name, _ in server.requests) == local.shards
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("fault", ["drop", "500", "slow"])
def test_what_fails_for_a_while_is_no_damage(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0, 0.0, 0.0, 0.0))
    server.fault = lambda name, number: fault if number % 2 else None
    report = verify(f"{server.url}/hands", CacheSettings(tmp_path / "cache"))
    assert report.is_good
    assert not report.is_listed


def test_damage_is_found_though_the_cache_still_holds_a_good_copy(server, tmp_path, capsys):
    manifest = Manifest.open(f"{server.url}/hands", CacheSettings(tmp_path / "cache"))
    manifest.read_bytes(4)
    manifest.close()
    corrupt(server.root / "hands", [4])
    assert run(["shards", "verify", f"{server.url}/hands"]) == 3
    said = capsys.readouterr()
    assert f"row 4 of {server.url}/hands: the image is not what was packed" in said.out + said.err


def test_a_list_of_refusals_that_changed_is_found(server, tmp_path):
    path = server.root / "hands" / "refused.jsonl"
    path.write_bytes(path.read_bytes() + b" ")
    report = verify(f"{server.url}/hands", CacheSettings(tmp_path / "cache"))
    assert report.problems == ["refused.jsonl: missing, or sha256 differs from the manifest"]


def test_a_pack_behind_a_url_is_shown_as_a_local_one(server, packed, tmp_path):
    here = show(packed, tmp_path / "here", count=4)
    assert run(["shards", "show", f"{server.url}/hands", "--out", str(tmp_path / "there"), "--count", "4"]) == 0
    assert (tmp_path / "there" / here.sheet.name).read_bytes() == here.sheet.read_bytes()
    assert (tmp_path / "there" / here.page.name).is_file()
