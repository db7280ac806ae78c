"""Duplicates and leaks: planted ones are found after re-encoding, resizing and rotation, different images are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.duplicates import leakage, search
from ddpm_lmk.data.duplicates.fingerprints import FILE_NAME, FINGERPRINT_DTYPE, check_fingerprints, read_fingerprints
from ddpm_lmk.data.duplicates.leakage import Source, compare, exclusion, find_seen
from ddpm_lmk.data.duplicates.search import find_matches, find_originals
from ddpm_lmk.data.loading.corpus import images_left_out, training_corpora
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.dot_packs import pack_dots, run_config
from tests.data.streams import stream

ROTATED_BY_EXIF = 6  # shown a quarter turn clockwise
HEAD = "image_id,file,split,patient_id\n"


def chests(count: int, first: int = 0) -> list[np.ndarray]:
    films = [render("chest", 5, first + number, 160).image for number in range(count)]
    return [np.interp(film, (film.min(), film.max()), (0, 255)).astype(np.uint8) for film in films]


def save(path: Path, film: np.ndarray, how: str = "png") -> None:
    """Write a film, or a planted copy of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(film)
    if how == "jpeg":
        image.save(path.with_suffix(".jpg"), quality=90)
    elif how == "half":
        image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR).save(path.with_suffix(".png"))
    elif how == "exif":
        exif = Image.Exif()
        exif[0x0112] = ROTATED_BY_EXIF
        image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)
    else:
        image.save(path.with_suffix(".png"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A labelled-like set with a test split, and a corpus that holds copies of its films and of its own."""
    root = tmp_path_factory.mktemp("leaks")
    tested, own = chests(6), chests(6, first=100)
    lines = []
    for number, film in enumerate(tested):
        save(root / "set" / f"{number}", film)
        lines.append(f"s{number},{number}.png,{'test' if number < 4 else 'train'},p{number}\n")
    (root / "set" / "images.csv").write_text(HEAD + "".join(lines))
    for number, film in enumerate(own):
        save(root / "corpus" / f"own-{number}", film)
    for number, how in enumerate(("png", "jpeg", "half", "exif")):
        save(root / "corpus" / f"leak-{number}-{how}", tested[number], how)
        save(root / "corpus" / f"zcopy-{number}-{how}", own[number], how)
    pack(root / "set", root / "packs" / "set", PackSettings(kind="table", size=64), workers=1)
    pack(root / "corpus", root / "packs" / "corpus", PackSettings(kind="folder", size=96), workers=1)
    return {name: root / "packs" / name for name in ("set", "corpus")}


def named(manifest: Manifest, rows: np.ndarray) -> list[str]:
    return [manifest.read_record(int(row)).id for row in rows]


def test_planted_copies_and_leaks_are_left_out_and_nothing_else(pool: dict[str, Path]) -> None:
    cfg = run_config(
        [pool["corpus"], pool["set"]], task="denoise", data={"image_size": 32}, runtime={"cache_pixels": "stream"}
    )
    corpora = training_corpora(cfg)
    assert named(corpora[0].manifest, corpora[0].rows) == [f"own-{number}" for number in range(6)]
    assert named(corpora[1].manifest, corpora[1].rows) == ["s4", "s5"]
    record = exclusion([corpus.manifest for corpus in corpora], cfg.data).record
    assert sum(record["leaks"].values()) == 4
    # Inside a pack the same pixels were refused when it was packed: the identical file and the one turned by EXIF.
    assert record["copies"] == {"same pixels": 0, "near copy": 2, "same patient": 0}
    assert record["overlap"] == 0
    shown = {name for group in stream(cfg) for batch in group.micro_batches for name in batch.ids}
    assert shown == {f"{c.manifest.dataset}:{row}" for c in corpora for row in c.rows.tolist()}


@pytest.mark.parametrize(
    ("settings", "images", "overlap"),
    [({}, 6, 0), ({"protect": []}, 10, 0), ({"leaks": "keep", "copies": "keep"}, 12, 4)],
    ids=["protected", "not protected", "kept on request"],
)
def test_a_protected_set_need_not_be_in_the_pool_and_keeping_leaks_is_a_recorded_setting(
    pool: dict[str, Path], settings: dict, images: int, overlap: int
) -> None:
    cfg = run_config(pool["corpus"], task="denoise", data={"protect": [str(pool["set"])], **settings})
    corpora = training_corpora(cfg)
    assert len(corpora[0].rows) == images
    assert exclusion([corpora[0].manifest], cfg.data).record["overlap"] == overlap


def test_a_rank_that_is_given_what_is_left_out_compares_nothing(
    pool: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config(pool["corpus"], task="denoise", data={"protect": [str(pool["set"])]})
    [asked], left_out = training_corpora(cfg), images_left_out(cfg)
    assert left_out is not None
    assert len(left_out[0]) == 6  # four leaks and two copies; two more had the same pixels and were refused by packing

    def refuse(*unused: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(leakage, "_KNOWN", {})
    monkeypatch.setattr(leakage, "compare", refuse)
    [given] = training_corpora(cfg, left_out)
    assert np.array_equal(np.asarray(given.rows), np.asarray(asked.rows))


def test_a_pack_whose_every_film_is_protected_says_so(pool: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path / "raw" / "a", chests(1)[0])
    pack(tmp_path / "raw", tmp_path / "packed", PackSettings(kind="folder", size=64), workers=1)
    cfg = run_config(tmp_path / "packed", task="denoise", data={"protect": [str(pool["set"])]})
    with pytest.raises(DataError, match="all 1 images of train are in protected splits"):
        training_corpora(cfg)
    with pytest.raises(ConfigError, match="name a set with a test split"):
        training_corpora(run_config(pool["set"], task="denoise", data={"protect": [str(tmp_path / "packed")]}))


def test_patients_of_test_films_are_left_out(tmp_path: Path) -> None:
    films, splits = chests(5), ("test", "train", "train", "train", "train")
    for number, film in enumerate(films):
        save(tmp_path / "raw" / f"{number}", film)
    rows = [f"i{n},{n}.png,{splits[n]},{('anna', 'anna', 'bert', '', '')[n]}\n" for n in range(5)]
    (tmp_path / "raw" / "images.csv").write_text(HEAD + "".join(rows))
    pack(tmp_path / "raw", tmp_path / "packed", PackSettings(kind="table", size=32), workers=1)
    corpus = training_corpora(run_config(tmp_path / "packed", task="denoise"))[0]
    assert named(corpus.manifest, corpus.rows) == ["i2", "i3", "i4"]


def test_a_copy_of_a_leak_is_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain: the second training film is like the first, only the first is like the protected one."""
    train, test = (pack_dots(tmp_path / name, {name: 2}, labels=False, seed=1) for name in ("train", "test"))
    fingerprints = {name: random_fingerprints(2, seed=seed) for seed, name in enumerate(("train", "test"))}
    fingerprints["train"]["low"] = fingerprints["test"]["low"][0]
    fingerprints["train"]["detail"] = fingerprints["test"]["detail"][0]
    fingerprints["train"]["low"][0] ^= np.uint64(0b1111)
    fingerprints["train"]["low"][1] ^= np.uint64(0b11111111)
    monkeypatch.setattr(
        "ddpm_lmk.data.duplicates.leakage.read_fingerprints", lambda manifest: fingerprints[manifest.dataset]
    )
    sources = [Source(Manifest.open(path), (path.name,)) for path in (train, test)]
    found = compare(sources[:1], sources[1:])
    assert [(each.kind, each.image, each.of) for each in found.leaks] == [
        ("near copy", (0, 0), (1, 0)),
        ("near copy", (0, 1), (1, 0)),
    ]
    assert [each.image for each in find_seen(sources[1], sources[:1])] == [(0, 0)]


def random_fingerprints(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fingerprints = np.zeros(count, FINGERPRINT_DTYPE)
    for name in ("pixels", "low", "detail"):
        fingerprints[name] = rng.integers(1, 2**64, fingerprints[name].shape, np.uint64)
    return fingerprints


@pytest.mark.parametrize("at_once", [1 << 22, 7])
def test_the_search_finds_what_comparing_everything_with_everything_finds(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(search, "_PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    fingerprints = random_fingerprints(600, seed=4)
    fingerprints["low"] &= np.uint64(0xFFFF_0000_0FFF_0000)  # crowded, as films of one kind are
    for place in range(200):
        fingerprints["detail"][400 + place] = fingerprints["detail"][place]
        flips = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
        fingerprints["low"][400 + place] = fingerprints["low"][place] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips, initial=0
        )
    fingerprints["pixels"][390:400] = fingerprints["pixels"][:10]
    low = np.bitwise_count(fingerprints["low"][:, None] ^ fingerprints["low"]) <= 4
    near = low & (np.bitwise_count(fingerprints["detail"][:, None] ^ fingerprints["detail"]).sum(-1) <= 24)
    same = (fingerprints["pixels"][:, None, 0] == fingerprints["pixels"][:, 0]) | near
    for _ in range(3):  # duplicates of duplicates
        same = (same.astype(np.float32) @ same.astype(np.float32)) > 0
    first, is_exact = find_originals(fingerprints)
    assert np.array_equal(first, same.argmax(1))
    assert np.flatnonzero(is_exact).tolist() == list(range(390, 400))
    found, of = find_matches(fingerprints[:400], fingerprints[400:])
    assert sorted(found.tolist()) == np.flatnonzero(near[:400, 400:].any(1)).tolist()
    assert near[found, 400 + of].all()


def test_samples_that_cannot_be_read_are_nobodys_copies() -> None:
    fingerprints = random_fingerprints(4, seed=0)
    fingerprints[1:3] = np.zeros(1, FINGERPRINT_DTYPE)
    assert find_originals(fingerprints)[0].tolist() == [0, 1, 2, 3]
    assert find_matches(fingerprints, fingerprints[1:3])[0].tolist() == []


def test_fingerprints_lie_beside_the_manifest_and_bound_to_it(pool: dict[str, Path], tmp_path: Path) -> None:
    manifest = Manifest.open(pool["set"])
    kept = read_fingerprints(manifest)
    content = (pool["set"] / FILE_NAME).read_bytes()
    computed = read_fingerprints(Manifest.open(pack_again(pool["set"], tmp_path / "bare")))
    assert np.array_equal(kept, computed)
    bare = Manifest.open(tmp_path / "bare")
    for position in (0, 30, 255, 256, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "bare" / FILE_NAME).write_bytes(changed)
        with pytest.raises(DataError, match="damaged or belongs to another dataset"):
            check_fingerprints(bare)
    (tmp_path / "bare" / FILE_NAME).write_bytes((pool["corpus"] / FILE_NAME).read_bytes())
    with pytest.raises(DataError, match="damaged or belongs to another dataset"):
        read_fingerprints(bare)


def pack_again(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        if path.name != FILE_NAME:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def test_the_command_lists_what_a_run_would_leave_out(
    pool: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = pack_again(pool["corpus"], tmp_path / "bare")
    words = ["shards", "compare", str(bare), "--protect", str(pool["set"]), "--out", str(tmp_path / "found.json")]
    assert run(words) == 0
    assert "6 images would be left out" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (sum(found["leaks"].values()), sum(found["copies"].values())) == (4, 2)
    assert "leak-0" not in json.dumps(found)  # films are named by row: ids may hold names
    assert (bare / FILE_NAME).read_bytes() == (pool["corpus"] / FILE_NAME).read_bytes()


def test_real_films_are_not_taken_for_one_another(real_data, tmp_path: Path) -> None:
    """Of 243 chests, many of one patient and hours apart, none repeats another."""
    pack(real_data("hannover_cxr"), tmp_path / "packed", PackSettings(kind="table", size=64))
    first, _ = find_originals(read_fingerprints(Manifest.open(tmp_path / "packed")))
    assert np.array_equal(first, np.arange(243))
