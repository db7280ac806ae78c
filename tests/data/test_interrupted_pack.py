"""Packing that was killed resumes after its last finished shard, to the same bytes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.data.shards.writer import ShardWriter
from ddpm_lmk.errors import ResourceError, RunConflictError
from tests.data.sets import picture, write

COUNT, KILL_AT, SHARD_BYTES = 45, 40, 60_000  # about 20 squares of 32 pixels each
SETTINGS = PackSettings(kind="folder", name="set", size=32, val_fraction=0.2)
KILLED = """
import os, signal, sys
from tests.data.test_interrupted_pack import SETTINGS, SHARD_BYTES, ShardWriter, pack
ShardWriter.__init__.__kwdefaults__["shard_bytes"] = SHARD_BYTES
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], sys.argv[2], SETTINGS, workers=1, progress=progress)
"""


@pytest.fixture(scope="module", autouse=True)
def _small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ShardWriter.__init__.__kwdefaults__, "shard_bytes", SHARD_BYTES)
        yield


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
    pack(source, out, SETTINGS, workers=1)
    return out


def kill(source, out, at):
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()


def test_a_killed_packing_goes_on_to_the_same_bytes(source, undisturbed, tmp_path):
    """It was killed in the midst of a shard, whose rows and refusals were not committed."""
    out = tmp_path / "out"
    kill(source, out, KILL_AT)
    summary = pack(source, out, SETTINGS, workers=1)
    assert 0 < summary.resumed_at < KILL_AT
    assert (summary.packed, dict(summary.reasons)) == (COUNT - 3, {"NOT_AN_IMAGE": 2, "DUPLICATE": 1})
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    for path in undisturbed.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert verify(out).is_good
    assert list(tmp_path.iterdir()) == [out]


def rename(mine, partial):
    (mine / "03.png").rename(mine / "zz.png")


def replace(mine, partial):
    """Another picture of the same name and size, in the place of one that was packed."""
    replaced, content = mine / "03.png", (mine / "04.png").read_bytes()
    length = replaced.stat().st_size
    replaced.unlink()
    replaced.write_bytes(content[:length].ljust(length, b"\0"))


def damage(mine, partial):
    """What was noted does not read."""
    (partial / "progress.sqlite").write_bytes(b"no database at all")


def shorten(mine, partial):
    """A finished shard is not as it was noted."""
    os.truncate(partial / "pack" / "shard-000000.tar", 512)


@pytest.mark.parametrize("change", [rename, replace, damage, shorten])
def test_a_source_that_changed_meanwhile_is_begun_anew(source, tmp_path, change):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    for path in source.iterdir():
        os.link(path, mine / path.name)
    kill(mine, out, KILL_AT)
    change(mine, tmp_path / ".out.partial")
    summary = pack(mine, out, SETTINGS, workers=1)
    assert (summary.resumed_at, summary.packed + summary.num_refused) == (0, COUNT)
    assert ("begun anew" in "".join(summary.warnings)) == (change in (rename, replace))
    assert verify(out).is_good


def test_two_packings_into_one_folder_do_not_meet(source, tmp_path):
    refused = []

    def progress(done, total):
        if done == 1:
            with pytest.raises(RunConflictError, match="another process is packing") as caught:
                pack(source, tmp_path / "out", SETTINGS, workers=1)
            refused.append(caught.value)

    pack(source, tmp_path / "out", SETTINGS, workers=1, progress=progress)
    assert len(refused) == 1
    assert verify(tmp_path / "out").is_good


def test_an_error_of_the_data_leaves_nothing_and_a_full_disk_what_is_finished(source, tmp_path):
    def stop(done, total):
        if done == KILL_AT:
            raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="No space left on device; make room and give the same command"):
        pack(source, tmp_path / "out", SETTINGS, workers=1, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert pack(source, tmp_path / "out", SETTINGS, workers=1).resumed_at > 0


def test_a_disk_that_is_full_when_small_images_leave_their_buffer_is_told_in_a_line(tmp_path):
    def drawn(number, bits):
        if number == 0:
            (tmp_path / ".out.partial" / "pack" / "shard-000000.tar").symlink_to("/dev/full")
        return picture(number, bits)

    with pytest.raises(ResourceError, match="No space left on device; make room and give the same command"):
        write(tmp_path / "out", drawn=drawn)
    assert not list(tmp_path.iterdir())
