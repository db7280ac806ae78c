"""What a WebDataset's names and members mean is what the package `webdataset` makes of them."""

import io
import tarfile

import pytest
import webdataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from ddpm_lmk.data.sources.base import TarMember
from ddpm_lmk.data.sources.webdataset import Roles, TarReader, expand_names, key_of
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.foreign import film, write_tars


@pytest.mark.parametrize(
    "text",
    [
        *("a.tar", "x-{000000..000012}.tar", "{0..3}/y{08..11}.tar", "{3..1}.tar", "{1..9..3}.tar", "{-1..2}.tar"),
        *("s3://b/{train,val}-{00..01}.tar", "a.tar::b-{1..2}.tar::c", "{a,}.tar", "{single}.tar", "{}.tar"),
        *("{01..3}", "{1..03}", "{-01..1}", "{0..0}", "{10..1..4}", "{5..1..0}", "{a,b}{1..2}c{x,y}", "{1..2,5}"),
    ],
)
def test_braces_and_lists_mean_what_the_package_makes_of_them(text):
    assert expand_names(text) == expand_urls(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a{1..2", "single one"),
        ("{a,{1..2}}.tar", "braces in braces"),
        ("{a..c}.tar", "no range of numbers"),
        ("pipe:curl http://x/a.tar", "would run a program"),
        ("{0..999999999999}.tar", "means 1000000000000 tars"),
        ("{0..999}{0..999}.tar", "more than 100000"),
    ],
)
def test_names_that_mean_nothing_here_or_far_too_much_are_refused_in_a_line(text, message):
    with pytest.raises(ConfigError, match=message):
        expand_names(text)


@pytest.mark.parametrize(
    "name",
    [
        *("a.png", "a.seg.png", "d/e.f/g.h.JPG", "a", ".hidden", "d/.hidden.png", "d/a", "./a.cls", "a..png"),
        *("a b.json", "über.png", "d.e/f", "a.", "x/y/", "a\nb.png"),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_file_name(name):
    key, extension = base_plus_ext(name)
    assert (key_of(name) or (None, None)) == (key, extension and extension.lower())


def test_members_about_the_tar_belong_to_no_sample():
    assert key_of("__meta__.png") == ("__meta__", "png")
    assert key_of("__about__/a.png") is None


ANY = Roles()


def samples(path, roles=ANY, **options):
    refused = []
    options = {"split": "train", "val_fraction": 0.0, "seed": 0, "keys": None, **options}
    found = list(TarReader(roles, **options).samples(path, "x", lambda *line: refused.append(line)))
    return found, refused


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the package leaves its last file open
def test_samples_are_those_that_the_package_reads(tmp_path):
    path = tmp_path / "y.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("d/1.png", "d/1.cls", "README", "d/2.JPG", "e/1.png", "__about__/x.png", f"{'n' * 150}.png"):
            add(tar, name, film(len(name)))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    ours, refused = samples(path)
    assert [f"x/{sample['__key__']}" for sample in theirs] == [sample.id for sample in ours]
    assert refused == []
    for sample, wanted in zip(ours, theirs, strict=True):
        assert isinstance(sample.path, TarMember)
        content = path.read_bytes()[sample.path.offset : sample.path.offset + sample.path.size]
        assert content in (wanted.get("png"), wanted.get("jpg"))


def test_split_and_patient_come_from_the_members_that_are_named(tmp_path):
    [path] = write_tars(tmp_path, 6)
    found, _ = samples(path, Roles(split="json:split", patient="json:patient"))
    assert [(each.id, each.split, each.group) for each in found[:3]] == [
        ("x/0000", "train", "patient-0"),
        ("x/0001", "train", "patient-0"),
        ("x/0002", "train", "patient-1"),
    ]
    assert [each.split for each in samples(path, Roles(split="cls"))[0]] == ["0", "1", "2", "3", "0", "1"]
    halves = samples(path, Roles(patient="json:patient"), val_fraction=0.5, seed=3)[0]
    assert {each.split for each in halves} == {"train", "val"}
    assert [each.split for each in halves[::2]] == [each.split for each in halves[1::2]]  # pairs are of one patient


def test_what_names_no_split_is_left_out_and_what_names_no_patient_is_nobodys(tmp_path):
    path = tmp_path / "y.tar"
    with tarfile.open(path, "w") as tar:
        texts = [b'{"s": "train"}', b"[1]", b"not json", b'{"s": "a/b"}', b'{"s": null}', b"9" * 6000]
        for number, text in enumerate(texts):
            add(tar, f"{number}.png", film(number))
            add(tar, f"{number}.json", text)
        add(tar, "6.png", film(6))
        add(tar, "7.png", film(7))
        add(tar, "7.json", b'{"s": "train", "x": "' + b" " * (2 << 20) + b'"}')
    found, refused = samples(path, Roles(split="json:s"))
    assert [each.id for each in found] == ["x/0"]
    assert [line[:2] for line in refused] == [(f"x/{number}", "NO_SPLIT") for number in range(1, 8)]
    found, refused = samples(path, Roles(patient="json:s"))
    assert [each.group for each in found] == ["train", None, None, "a/b", None, None, None, None]


def test_of_several_images_one_has_to_be_named(tmp_path):
    [path] = write_tars(tmp_path, 3, **{"mask.png": film(99)})
    with pytest.raises(ConfigError, match=r"'x/0000' has 2 images \(mask.png, png\); say which: --image mask.png"):
        samples(path)
    found, refused = samples(path, Roles(image=("jpg", "png")))
    assert [each.id for each in found] == ["x/0000", "x/0001", "x/0002"]
    found, refused = samples(path, Roles(image=("jpg",)))
    assert [line[2] for line in refused] == ["no member .jpg; it has cls, json, mask.png, png"] * 2


def test_hostile_members_are_listed_and_their_samples_are_not_guessed(tmp_path):
    path = tmp_path / "y.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "a.png", film(0))
        add(tar, "b.png", film(1))
        add(tar, "b.PNG", film(2))
        add(tar, "../up.png", film(3))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "sparse.png", b"", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)})
        add(tar, "code.pyd", b"cos\nsystem\n(S'touch pwned'\ntR.")
        add(tar, "text.txt", b"x")
        add(tar, "a.jpg", film(4))  # its key was there before
        add(tar, "z.png", film(5))
    found, refused = samples(path)
    assert [each.id for each in found] == ["x/a", "x/z"]
    assert {line[0]: line[1] for line in refused} == {
        **{f"x/{name}": "TAR_MEMBER" for name in ("b", "../up.png", "link.png", "hard.png", "sparse.png", "a")},
        "x/code": "NO_IMAGE",
        "x/text": "NO_IMAGE",
    }


@pytest.mark.parametrize("damage", ["cut", "compressed", "trailing"])
def test_a_damaged_tar_is_an_error_where_the_package_reads_a_shorter_one(tmp_path, damage):
    import gzip

    [path] = write_tars(tmp_path, 3)
    content = path.read_bytes()
    changed = {"cut": content[:9000], "compressed": gzip.compress(content), "trailing": content + b"x" * 512}
    path.write_bytes(changed[damage])
    with pytest.raises(DataError, match=r"x\.tar: .*restore it, decompress it"):
        samples(path)


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
