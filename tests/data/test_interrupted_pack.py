"""Packing that was killed goes on after its last finished shard, to the same bytes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import RunConflictError

COUNT, PER_SHARD, KILL_AT = 45, 32, 40  # 16-bit squares of 1024 px have 2 MiB, shards 64
OPTIONS = {"size": 1024, "bits": 16, "workers": 1, "val_fraction": 0.2}
KILLED = """
import os, signal, sys
from ddpm_lmk.data.shards.pack import pack
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], "folder", sys.argv[2], name="set", size=1024, bits=16, workers=1, val_fraction=0.2, progress=progress)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    for number in range(COUNT):
        seed = 2 if number == 38 else number  # a duplicate across the interruption
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 40), np.uint8)).save(
            root / f"{number:02}.png"
        )
    (root / "05.png").write_bytes(b"bad")
    (root / "41.png").write_bytes(b"bad")
    return root


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack(source, "folder", out, name="set", **OPTIONS)
    return out


def kill(source, out, at):
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()


def assert_same(found, wanted):
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for path in wanted.iterdir():
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name


def test_a_killed_packing_goes_on_to_the_same_bytes(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    kill(source, out, KILL_AT)
    (journal,) = tmp_path.glob(".out.partial/journal.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"shard": {"name": "sha')  # killed while writing a line
    summary = pack(source, "folder", out, name="set", **OPTIONS)
    assert summary.resumed_at >= PER_SHARD
    assert (summary.packed, dict(summary.reasons)) == (COUNT - 3, {"NOT_AN_IMAGE": 2, "DUPLICATE": 1})
    assert_same(out, undisturbed)
    assert verify(out).is_good
    assert list(tmp_path.iterdir()) == [out]


def rename(mine):
    (mine / "03.png").rename(mine / "zz.png")


def replace(mine):
    """Another picture of the same name and size, in the place of one that was packed."""
    replaced, content = mine / "03.png", (mine / "04.png").read_bytes()
    length = replaced.stat().st_size
    replaced.unlink()
    replaced.write_bytes(content[:length].ljust(length, b"\0"))


@pytest.mark.parametrize("change", [rename, replace])
def test_a_source_that_changed_meanwhile_is_begun_anew(source, undisturbed, tmp_path, change):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    for path in source.iterdir():
        os.link(path, mine / path.name)
    kill(mine, out, KILL_AT)
    change(mine)
    summary = pack(mine, "folder", out, name="set", **OPTIONS)
    assert (summary.resumed_at, summary.packed + summary.num_refused) == (0, COUNT)
    assert "begun anew" in summary.warnings[-1]
    assert verify(out).is_good


def test_two_packings_into_one_folder_do_not_meet(source, tmp_path):
    refused = []

    def progress(done, total):
        if done == 1:
            with pytest.raises(RunConflictError, match="another process is packing") as caught:
                pack(source, "folder", tmp_path / "out", size=16, workers=1)
            refused.append(caught.value)

    pack(source, "folder", tmp_path / "out", size=16, workers=1, progress=progress)
    assert len(refused) == 1
    assert verify(tmp_path / "out").is_good


def test_an_error_of_the_data_leaves_nothing_and_a_full_disk_what_is_finished(source, tmp_path):
    def stop(done, total):
        if done == KILL_AT:
            raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="make room and give the same command"):
        pack(source, "folder", tmp_path / "out", name="set", progress=stop, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert pack(source, "folder", tmp_path / "out", name="set", **OPTIONS).resumed_at >= PER_SHARD
