"""Foreign tars: what is no plain picture is refused and listed, nothing is extracted, no damage passes for an end."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.sources.tar import DamagedTarError, members
from ddpm_lmk.errors import DataError


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


@pytest.fixture
def hostile(tmp_path):
    """Two good pictures, and one of everything that has no business there, each of which is an image by its name."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.png", picture(0))
        add(tar, "../up.png", picture(1))
        add(tar, "/etc/absolute.png", picture(2))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a.png", size=0)
        add(tar, "device.png", type=tarfile.CHRTYPE, size=0)
        add(tar, "pipe.png", type=tarfile.FIFOTYPE, size=0)
        add(tar, "weights.pth", b"cos\nsystem\n(S'touch pwned'\ntR.")
        add(tar, "code.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
        add(tar, "arrays.npz")
        add(tar, "nested.png.gz", gzip.compress(picture(3)))
        add(tar, "a.png", picture(4))
        add(tar, "a.json", b"{}")
        add(tar, "sparse.png", b"", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)})
        add(tar, "z.png", picture(5))
    return path


def test_only_plain_pictures_are_packed_and_the_rest_is_listed(hostile, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    summary = pack(hostile, tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
    assert [Manifest.open(tmp_path / "out").read_record(row).id for row in range(summary.packed)] == ["a", "z"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {line["code"] for line in lines} == {"TAR_MEMBER"}
    assert sorted(path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)) == before


def test_a_size_that_lies_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        tar.fileobj.write(lying("b.png", 1 << 33).tobuf())
    found = members(tmp_path / "x.tar")
    assert next(found)[1] is None
    assert "more than there are" in next(found)[1]
    with pytest.raises(DamagedTarError):
        next(found)


def lying(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info


@pytest.mark.parametrize("damage", ["cut", "header", "compressed", "empty"])
def test_a_damaged_archive_is_an_error_and_not_a_shorter_one(tmp_path, damage):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", picture(number))
    data = bytearray((tmp_path / "x.tar").read_bytes())
    second = 512 + -(-len(picture(0)) // 512) * 512
    if damage == "cut":
        del data[second:]
    elif damage == "header":
        data[second + 148] ^= 0xFF
    elif damage == "compressed":
        data = gzip.compress(bytes(data))
    else:
        data = b""
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match="restore it"):
        pack(tmp_path / "x.tar", tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_tars_is_packed_whole_and_each_is_a_folder_of_its_own(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        with tarfile.open(source / f"set-{number}.tar", "w") as tar:
            for film in range(2):  # the same names in each
                add(tar, f"{film}.png", picture(10 * number + film))
            add(tar, "notes.txt")
    summary = pack(source, tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
    manifest = Manifest.open(tmp_path / "out")
    ids = [manifest.read_record(row).id for row in range(len(manifest))]
    assert ids == [f"set-{number}/{film}" for number in range(3) for film in range(2)]
    assert dict(summary.reasons) == {"TAR_MEMBER": 3}
    alone = pack(source / "set-1.tar", tmp_path / "alone", PackSettings(kind="folder", size=32), workers=1)
    assert alone.packed == 2
    assert Manifest.open(tmp_path / "alone").read_bytes(1) == manifest.read_bytes(3)


def test_one_damaged_tar_of_several_is_named_and_pictures_beside_tars_are_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        with tarfile.open(source / f"{number}.tar", "w") as tar:
            add(tar, "a.png", picture(number))
    (source / "x.png").write_bytes(picture(9))
    with pytest.raises(DataError, match=r"holds tars \(0.tar\) and pictures \(x.png\)"):
        pack(source, tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
    (source / "x.png").unlink()
    (source / "1.tar").write_bytes((source / "1.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"1\.tar: .*restore it"):
        pack(source, tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
