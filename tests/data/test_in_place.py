"""A WebDataset indexed in place gives what packing its tars gives: pixels, order, leaks; its faults are found."""

import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

from ddpm_lmk.cli.app import run
from ddpm_lmk.config import DataConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates.fingerprints import read_fingerprints
from ddpm_lmk.data.duplicates.leakage import exclusion
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.in_place import find_tars, index_in_place
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.data.sources.webdataset import Roles
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.foreign import LABELLED, film, index, refusals, write_tars
from tests.data.streams import assert_same, config, stream

ANY = Roles()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "tars"
    write_tars(folder, 18)
    return folder


@pytest.fixture(scope="module")
def in_place(tars):
    return index(tars, tars.parent / "in_place").root


def ids(manifest):
    return [manifest.read_record(row).id for row in range(len(manifest))]


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32},
        {"size": 48, "aspect": "pad", "bits": 16, "filter": "gaussian", "window": "minmax"},
        {"size": 128, "filter": "linear"},
    ],
)
def test_pixels_records_and_fingerprints_are_those_of_the_packed_tars(tars, tmp_path, settings):
    found = index(tars, tmp_path / "in_place", ANY, **settings)
    pack(tars, tmp_path / "packed", PackSettings(kind="folder", name="x", **settings), workers=1)
    wanted = Manifest.open(tmp_path / "packed")
    assert ids(found) == ids(wanted)
    assert len(found) == 18
    for row in range(18):
        assert np.array_equal(found.decode(row), wanted.decode(row))
        mine, theirs = found.read_record(row), wanted.read_record(row)
        assert (mine.native_size, mine.source, mine.split) == (theirs.native_size, theirs.source, theirs.split)
        assert np.array_equal(mine.to_stored, theirs.to_stored)
    assert read_fingerprints(found).tobytes() == read_fingerprints(wanted).tobytes()
    assert not list((tmp_path / "in_place").glob("*.png"))
    assert sum(path.stat().st_size for path in (tmp_path / "in_place").glob("shard-*")) == 3 * 10240


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pixels", ["stream", "ram"])
def test_batches_are_those_of_the_packed_tar_bit_by_bit(tmp_path, workers, pixels):
    """One tar and one shard: the order of samples follows from the number of images in each shard."""
    write_tars(tmp_path / "tars", 18, per_tar=18)
    index(tmp_path / "tars", tmp_path / "in_place", ANY)
    pack(tmp_path / "tars", tmp_path / "packed", PackSettings(kind="folder", name="x", size=32), workers=1)
    both = [config(tmp_path / name, tmp_path, workers=workers, cache_pixels=pixels) for name in ("in_place", "packed")]
    both = [cfg.model_copy(update={"data": cfg.data.model_copy(update={"image_size": 32})}) for cfg in both]
    found, wanted = (stream(cfg, 7) for cfg in both)
    assert_same(found, wanted)
    assert len({name for group in found for batch in group.micro_batches for name in batch.ids}) == 18


def test_a_resumed_run_and_two_processes_see_the_same_stream(in_place, tmp_path):
    cfg = config(in_place, tmp_path)
    whole = stream(cfg, 6)
    loader = open_loader(cfg, stage="train")
    assert_same(list(itertools.islice(loader.global_batches(4), 2)), whole[4:])
    loader.close()
    halves = [open_loader(cfg, stage="train", rank=rank, world=2) for rank in (0, 1)]
    parts = [next(loader.global_batches(2)).micro_batches[0] for loader in halves]
    assert torch.equal(torch.cat([part.images for part in parts]), whole[2].micro_batches[0].images)


def test_splits_and_patients_of_the_samples_are_used_and_leaks_left_out(in_place, tars, tmp_path):
    manifest = Manifest.open(in_place)
    assert manifest.count_per_split() == {"train": 15, "test": 3}
    assert manifest.read_record(4).group == "patient-2"
    record = exclusion([manifest], DataConfig(path=(str(in_place),))).record
    assert record["leaks"] == {"same pixels": 0, "near copy": 0, "same patient": 3}
    pack(tars / "x-000001.tar", tmp_path / "test", PackSettings(kind="folder", split="test", size=64), workers=1)
    data = DataConfig(path=(str(in_place),), protect=(str(tmp_path / "test"),))
    found = exclusion([manifest], data)
    assert found.record["leaks"] == {"same pixels": 0, "near copy": 5, "same patient": 2}
    assert {*range(6, 11)} <= {*found.rows[0].tolist()}


def test_copies_inside_and_between_tars_are_listed_as_in_packing(tmp_path):
    write_tars(tmp_path / "tars", 4)
    with tarfile.open(tmp_path / "tars" / "y.tar", "w") as tar:
        for name, content in {
            "a.png": film(100),
            "b.png": film(100),
            "c.jpg": film(1, kind="jpg", size=(91, 70)),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = index(tmp_path / "tars", tmp_path / "out", ANY)
    assert refusals(tmp_path / "out") == {"DUPLICATE": ["y/b", "y/c"]}
    assert ids(manifest)[-1] == "y/a"


def test_images_that_cannot_be_used_are_listed_and_tars_without_any_leave_no_shard(tmp_path):
    folder = tmp_path / "tars"
    write_tars(folder, 2)
    for name, contents in {
        "w": [b"no image"],
        "y": [b"", b"\x89PNG\r\n\x1a\n cut off"],
        "z": [film(3), b"x" * 99],
    }.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number, content in enumerate(contents):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    manifest = index(folder, tmp_path / "out", ANY)
    assert ids(manifest) == ["x-000000/0000", "x-000000/0001", "z/0"]
    assert refusals(tmp_path / "out") == {"NOT_AN_IMAGE": ["w/0", "y/1", "z/1"], "EMPTY": ["y/0"]}
    assert [path.rpartition("/")[2] for path in (tmp_path / "out" / "tars.txt").read_text().split()] == [
        "x-000000.tar",
        "z.tar",
    ]
    assert verify(tmp_path / "out").is_good
    with pytest.raises(DataError, match=r"nothing to pack: 2 images were refused \(.*\), first 'y/0'"):
        index(folder / "y.tar", tmp_path / "none", ANY)
    assert not (tmp_path / "none").exists()


def test_a_byte_that_changed_is_noticed_in_training_and_by_verify(tmp_path):
    folder = tmp_path / "tars"
    write_tars(folder, 12)
    manifest = index(folder, tmp_path / "out", ANY)
    entry = manifest.index[7]
    with (folder / "x-000001.tar").open("r+b") as file:
        file.seek(int(entry["offset"]) + 40)
        file.write(b"XX")
    with pytest.raises(CorruptSampleError, match=r"row 7 of .*sha256 differs"):
        Manifest.open(tmp_path / "out").decode(7)
    found = stream(config(tmp_path / "out", tmp_path), 3)
    assert {sample.row for group in found for sample in group.bad} == {7}
    report = verify(tmp_path / "out")
    assert len(report.problems) == 2
    assert "row 7" in report.problems[0]
    assert report.problems[1] == "x-000001.tar: sha256 differs from the manifest"


def test_a_tar_that_is_gone_or_of_another_size_is_told_and_one_that_moved_is_the_same_set(tmp_path):
    folder, out = tmp_path / "tars", tmp_path / "out"
    write_tars(folder, 12)
    manifest = index(folder, out, ANY)
    (folder / "x-000001.tar").rename(tmp_path / "moved.tar")
    with pytest.raises(
        DataError, match=r"shard .*x-000001.tar is missing; correct its line in .*tars.txt if it was moved"
    ):
        Manifest.open(out)
    (out / "tars.txt").write_text(f"{folder}/x-000000.tar\n../moved.tar\n")  # relative to the folder of the index
    moved = Manifest.open(out)
    assert moved.fingerprint == manifest.fingerprint
    assert np.array_equal(moved.decode(8), index(tmp_path / "moved.tar", tmp_path / "again", ANY).decode(2))
    assert verify(out).is_good
    with (tmp_path / "moved.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"moved.tar has \d+ bytes, \d+ wanted: cut off or changed"):
        Manifest.open(out)
    (out / "tars.txt").write_text(f"{folder}/x-000000.tar\n")
    with pytest.raises(DataError, match="names 1 tars, 2 wanted"):
        Manifest.open(out)


def test_a_lost_index_is_rebuilt_without_the_tars_byte_for_byte(tars, in_place, capsys):
    before = (in_place / "index.npy").read_bytes()
    (in_place / "index.npy").unlink()
    with pytest.raises(DataError, match="shards index"):
        Manifest.open(in_place)
    assert run(["shards", "index", str(in_place)]) == 0
    assert (in_place / "index.npy").read_bytes() == before


def test_hashed_ids_leave_no_name_of_a_sample_or_a_patient(tmp_path):
    write_tars(tmp_path / "tars", 6)
    settings = PackSettings(kind="folder", size=32)
    for name in ("one", "two"):
        index_in_place(str(tmp_path / "tars"), tmp_path / name, settings, LABELLED, id_key=tmp_path / "key", workers=1)
    for path in (tmp_path / "one").iterdir():
        assert b"patient-" not in path.read_bytes()
        assert b"x-000000/" not in path.read_bytes()
    one, two = (Manifest.open(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    groups = [one.read_record(row).group for row in range(6)]
    assert groups[0] == groups[1] != groups[2]
    assert len(set(ids(one))) == 6


KILLED = """
import os, signal, sys
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards import in_place
from ddpm_lmk.data.sources.webdataset import Roles
take = in_place._Indexing._take
def counted(self, writer, sample, *rest):
    if sample.id == "x-000001/0009":
        os.kill(os.getpid(), signal.SIGKILL)
    take(self, writer, sample, *rest)
in_place._Indexing._take = counted
settings, roles = PackSettings(kind="folder", size=32), Roles(split="json:split", patient="json:patient")
in_place.index_in_place(sys.argv[1], sys.argv[2], settings, roles, workers=1)
"""


def test_a_killed_indexing_resumes_after_its_last_tar_to_the_same_bytes(tars, in_place, tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tars), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    shutil.copytree(partial, tmp_path / "kept")
    summary = index_in_place(str(tars), out, PackSettings(kind="folder", size=32), LABELLED, workers=1)
    assert (summary.resumed_at, summary.packed) == (6, 18)
    for path in in_place.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    shutil.rmtree(out)
    (tmp_path / "kept").rename(partial)
    os.utime(tars / "x-000002.tar")  # changed meanwhile: begun anew
    again = index_in_place(str(tars), out, PackSettings(kind="folder", size=32), LABELLED, workers=1)
    assert (again.resumed_at, again.packed) == (0, 18)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tars}/nothing.tar", "is not there; wanted a tar, a folder of tars"),
        ("{tars}/x-000000.tar::{tars}/x-000000.tar", "x-000000.tar twice"),
        ("{tars}/../in_place", "is a dataset of this tool already"),
        ("{tars}/x.tar.gz", "is compressed, so that no image"),
        ("{tars}/empty", "means no tar"),
        ("http://127.0.0.1/a.tar::{tars}/x-000000.tar", "tars of one server, or of this machine"),
        ("https://me:secret@example.org/a.tar", "credentials by the environment"),
        ("s3://b/a.tar?X-Amz-Signature=secret", "credentials by the environment"),
    ],
)
def test_sources_that_cannot_be_a_dataset_are_refused_in_a_line(in_place, tars, source, message):
    (tars / "empty").mkdir(exist_ok=True)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        find_tars(source.replace("{tars}", str(tars)))
    assert "secret" not in str(caught.value)


def test_the_command_says_what_it_did_and_refuses_options_that_mean_nothing(tars, tmp_path, capsys):
    command = ["shards", "index", f"{tars}/x-{{000000..000001}}.tar", "--out", str(tmp_path / "out"), "--size", "32"]
    assert run([*command, "--split-from", "json:split", "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 12 images (train 10, test 2), 0 refused" in printed.out
    assert run(["shards", "index", str(tmp_path / "out"), "--size", "64"]) == 2
    assert "--size is for the tars of a WebDataset, which need --out too" in capsys.readouterr().err
    other = [*command[:4], str(tmp_path / "other"), "--split-from", "json:split", "--split", "train"]
    assert run(other) == 2
    assert "leave out --split and --val-fraction" in capsys.readouterr().err
    assert run(["shards", "verify", str(tmp_path / "out")]) == 0


def test_a_member_that_names_no_patient_is_told_and_one_that_never_does_is_an_error(tars, tmp_path):
    with pytest.raises(DataError, match=r"--patient-from json:patinet names the patient of none of 6 images"):
        index(tars / "x-000000.tar", tmp_path / "out", Roles(patient="json:patinet"))
    assert len(index(tars / "x-000000.tar", tmp_path / "out", Roles(patient="json:patient"))) == 6
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate([b'{"p": "a"}', b'{"p": 7.0}', b"{}", b'{"p": 7}']):
            for suffix, content in (("png", film(number)), ("json", text)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    settings = PackSettings(kind="folder", size=32)
    summary = index_in_place(str(path), tmp_path / "some", settings, Roles(patient="json:p"), workers=1)
    assert summary.warnings == ["--patient-from json:p names no patient of 2 of 4 images"]
    manifest = Manifest.open(tmp_path / "some")
    assert [manifest.read_record(row).group for row in range(4)] == ["a", None, None, "7"]
