"""Names of files come in order of id whatever the source, and ids of private ones are pseudonyms."""

import os
import threading
from collections import Counter

import pytest

from ddpm_lmk.data.sources.ids import open_key, write_map
from ddpm_lmk.data.sources.walk import Listing, list_files, read_list, walk
from ddpm_lmk.errors import ConfigError, DataError, ResourceError, RunConflictError

PNG = frozenset({".png"})


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_any_number_of_names_comes_back_in_order_and_more_than_once():
    """In the order of strings, which for names that are no UTF-8 is another than that of their bytes on the disk."""
    ids = (f"{number * 7919 % 1009:x}" + "é\udcff\uffee"[number % 3] for number in range(1009))
    names = [(sample_id, f"p{number}\n\udcff") for number, sample_id in enumerate(ids)]
    listed = Listing(iter(names))
    assert len(listed) == 1009
    assert list(listed) == list(listed) == sorted(names)


def test_two_files_with_one_id_are_an_error(tmp_path):
    touch(tmp_path, "a.png", "a.jpg", "b.png")
    with pytest.raises(DataError, match="1 ids come twice, first 'a'"):
        list_files(tmp_path, None, lambda path: path.split(".")[0], Counter())


def test_hidden_names_are_skipped_and_others_counted(tmp_path):
    touch(tmp_path, "a.PNG", ".b.png", "sub/c.png", "sub/.hidden/d.png", "sub/e.txt", "f")
    others = Counter()
    assert sorted(walk(tmp_path, PNG, others)) == ["a.PNG", "sub/c.png"]
    assert others == {".txt": 1, "none": 1}


def test_linked_folders_are_followed_once_and_never_in_a_circle(tmp_path):
    """On another disk: pictures, a link back into the set, one to themselves, and one to a third disk and back."""
    touch(tmp_path, "set/a.png", "set/sub/b.png", "disk/c.png", "disk/sub/d.png", "third/e.png")
    links = {"set/images": "disk", "set/loop": "set", "set/again": "set/sub", "disk/me": "disk", "disk/back": "set"}
    links |= {"disk/third": "third", "third/disk": "disk/sub", "set/one.png": "third/e.png", "set/gone": "nowhere"}
    links["set/around.png"] = "set/around.png"
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    found = sorted(walk(tmp_path / "set", PNG, Counter()))
    linked = ["images/c.png", "images/sub/d.png", "images/third/e.png"]
    assert found == ["a.png", "around.png", *linked, "one.png", "sub/b.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.tar.gz", b"\x1f\x8b\x08", "is compressed.*unpack it"),
        ("set.zip", b"PK\x03\x04", "is compressed.*unpack it"),
        ("one.png", b"\x89PNG\r\n", "is one picture, not a list"),
        ("one.jpg", b"\xff\xd8\xff\xe0", "is one picture, not a list"),
        ("one.dcm", b"\0" * 128 + b"DICM", "is one DICOM file, not a list"),
        ("tar", b"a.png".ljust(257, b"\0") + b"ustar\0", "is a tar"),
        ("list.txt", "a.png\n".encode("utf-16"), "not text"),
    ],
)
def test_an_archive_or_a_picture_is_never_read_as_a_list_of_names(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list_files(tmp_path / name, None, str, Counter())


def test_a_list_may_come_through_a_pipe_and_its_names_may_be_like_a_mark(tmp_path):
    """`<(find ...)` gives its lines once, however long; a folder may be called as the mark of DICOM files is."""
    names = ["DICM/0.png", "/" + "x" * 116 + "/DICM/1.png", *(f"some/longer/folder/{n}.png" for n in range(20_000))]
    os.mkfifo(tmp_path / "pipe")
    text = "".join(f"{name}\n" for name in names)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    assert list(read_list(tmp_path / "pipe")) == names
    writer.join()


def test_a_list_names_its_files_without_remarks_and_marks(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n\n# a remark\nsub/b \xff.png\n")
    assert list(read_list(tmp_path / "list.txt")) == ["a.png", "sub/b \udcff.png"]


def test_archives_in_a_folder_are_named_as_what_was_passed_over(tmp_path):
    touch(tmp_path, "images_001.tar.gz", "images_002.tar.gz", "notes.txt")
    with pytest.raises(DataError, match=r"found \.gz 2, \.txt 1; archives are not looked into: unpack them"):
        list_files(tmp_path, PNG, str, Counter())


def test_a_key_is_made_once_for_its_owner_and_decides_the_ids(tmp_path):
    keys = open_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert open_key(tmp_path / "key").of_path("Doe/1") == keys.of_path("Doe/1")
    assert open_key(tmp_path / "other").of_path("Doe/1") != keys.of_path("Doe/1")
    assert keys.of_path("Doe") != keys.of_patient("Doe")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(ResourceError, match="name another one"):
        open_key(tmp_path / "link")
    (tmp_path / "key").write_text("secret")
    with pytest.raises(ConfigError, match="wanted 64 hexadecimal digits"):
        open_key(tmp_path / "key")


def test_the_list_of_ids_is_private_and_never_replaced(tmp_path):
    write_map(tmp_path / "map.csv", [("0a", 'Doe, "J"\n'), ("0b", "b")])
    assert (tmp_path / "map.csv").read_text() == 'id,path\n0a,"Doe, ""J""\n"\n0b,b\n'
    assert (tmp_path / "map.csv").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunConflictError, match="is there already"):
        write_map(tmp_path / "map.csv", [])
