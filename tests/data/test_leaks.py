"""Copies and leaks: planted ones are found after re-encoding, resizing and rotation, and different films are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.cli.app import run
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates import leakage, search
from ddpm_lmk.data.duplicates.fingerprints import FILE_NAME, PRINT_DTYPE, check_prints, prints_of
from ddpm_lmk.data.duplicates.leakage import Source, compare, exclusion, seen
from ddpm_lmk.data.duplicates.search import copies_of, first_of_its_kind
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.dot_packs import pack_dots, run_config

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
    cfg = run_config([pool["corpus"], pool["set"]], task="denoise", data={"image_size": 64})
    corpora = training_corpora(cfg)
    assert named(corpora[0].manifest, corpora[0].rows) == [f"own-{number}" for number in range(6)]
    assert named(corpora[1].manifest, corpora[1].rows) == ["s4", "s5"]
    record = exclusion([corpus.manifest for corpus in corpora], cfg.data).record
    assert sum(record["leaks"].values()) == 4
    # Inside a pack the same pixels were refused when it was packed: the identical file and the one turned by EXIF.
    assert record["copies"] == {"same pixels": 0, "near copy": 2, "same patient": 0}
    assert record["overlap"] == 0


def test_a_protected_set_that_is_not_in_the_pool_is_kept_out_too(pool: dict[str, Path]) -> None:
    kept = run_config(pool["corpus"], task="denoise", data={"protect": [str(pool["set"])]})
    assert len(training_corpora(kept)[0].rows) == 6
    alone = run_config(pool["corpus"], task="denoise")
    assert len(training_corpora(alone)[0].rows) == 10


def test_keeping_them_is_a_setting_and_is_recorded(pool: dict[str, Path]) -> None:
    data = {"protect": [str(pool["set"])], "leaks": "keep", "copies": "keep"}
    cfg = run_config(pool["corpus"], task="denoise", data=data)
    corpora = training_corpora(cfg)
    assert len(corpora[0].rows) == 12
    assert exclusion([corpora[0].manifest], cfg.data).record["overlap"] == 4


def test_the_stream_never_shows_what_is_left_out(pool: dict[str, Path]) -> None:
    cfg = run_config([pool["corpus"], pool["set"]], task="denoise", data={"image_size": 32, "residency": "stream"})
    loader = open_loader(cfg, stage="train")
    groups = loader.groups()
    shown = {name for _ in range(6) for batch in next(groups).micro_batches for name in batch.ids}
    loader.close()
    corpora = training_corpora(cfg)
    assert shown == {f"{c.manifest.dataset}:{row}" for c in corpora for row in c.rows.tolist()}


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
    prints = {name: random_prints(2, seed=seed) for seed, name in enumerate(("train", "test"))}
    prints["train"]["low"] = prints["test"]["low"][0]
    prints["train"]["detail"] = prints["test"]["detail"][0]
    prints["train"]["low"][0] ^= np.uint64(0b1111)
    prints["train"]["low"][1] ^= np.uint64(0b11111111)
    monkeypatch.setattr("ddpm_lmk.data.duplicates.leakage.prints_of", lambda manifest: prints[manifest.dataset])
    sources = [Source(Manifest.open(path), (path.name,)) for path in (train, test)]
    found = compare(sources[:1], sources[1:])
    assert [(each.kind, each.film, each.of) for each in found.leaks] == [
        ("near copy", (0, 0), (1, 0)),
        ("near copy", (0, 1), (1, 0)),
    ]
    assert [each.film for each in seen(sources[1], sources[:1])] == [(0, 0)]


def random_prints(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    prints = np.zeros(count, PRINT_DTYPE)
    for name in ("pixels", "low", "detail"):
        prints[name] = rng.integers(1, 2**64, prints[name].shape, np.uint64)
    return prints


@pytest.mark.parametrize("at_once", [1 << 22, 7])
def test_the_search_finds_what_comparing_everything_with_everything_finds(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(search, "_PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    prints = random_prints(600, seed=4)
    prints["low"] &= np.uint64(0xFFFF_0000_0FFF_0000)  # crowded, as films of one kind are
    for place in range(200):
        prints["detail"][400 + place] = prints["detail"][place]
        flips = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
        prints["low"][400 + place] = prints["low"][place] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
    prints["pixels"][390:400] = prints["pixels"][:10]
    low = np.bitwise_count(prints["low"][:, None] ^ prints["low"]) <= 4
    near = low & (np.bitwise_count(prints["detail"][:, None] ^ prints["detail"]).sum(-1) <= 24)
    same = (prints["pixels"][:, None, 0] == prints["pixels"][:, 0]) | near
    for _ in range(3):  # copies of copies
        same = (same.astype(int) @ same.astype(int)) > 0
    first, is_exact = first_of_its_kind(prints)
    assert np.array_equal(first, same.argmax(1))
    assert np.flatnonzero(is_exact).tolist() == list(range(390, 400))
    found, of = copies_of(prints[:400], prints[400:])
    assert sorted(found.tolist()) == np.flatnonzero(near[:400, 400:].any(1)).tolist()
    assert near[found, 400 + of].all()


def test_what_was_found_in_a_large_pool_is_kept_for_the_next_process(
    pool: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = run_config(
        pool["corpus"], task="denoise", data={"protect": [str(pool["set"])], "cache_dir": str(tmp_path)}
    ).data
    manifests = [Manifest.open(pool["corpus"])]
    known = exclusion(manifests, data)
    assert not list(tmp_path.iterdir())  # a small pool is compared anew
    monkeypatch.setattr(leakage, "_REMEMBER_FROM", 0)
    calls = []
    monkeypatch.setattr(leakage, "_exclusion", lambda *given: calls.append(given) or known)
    for _ in range(2):
        kept = exclusion(manifests, data)
        assert kept.record == known.record
        assert kept.rows[0].tolist() == known.rows[0].tolist()
    assert len(calls) == 1
    (path,) = (tmp_path / "compared").glob("*.json")
    path.write_text(path.read_text().replace('"left_out": 6', '"left_out": 7'))
    assert exclusion(manifests, data).record == known.record  # damaged: found again
    assert len(calls) == 2
    exclusion(manifests, data.model_copy(update={"leaks": "keep"}))  # another question
    assert len(calls) == 3
    monkeypatch.setenv("LMK_CACHE", str(path))  # a file: nothing can be kept there
    exclusion(manifests, data.model_copy(update={"cache_dir": None}))
    assert len(calls) == 4


def test_samples_that_cannot_be_read_are_nobodys_copies() -> None:
    prints = random_prints(4, seed=0)
    prints[1:3] = np.zeros(1, PRINT_DTYPE)
    assert first_of_its_kind(prints)[0].tolist() == [0, 1, 2, 3]
    assert copies_of(prints, prints[1:3])[0].tolist() == []


def test_prints_are_kept_beside_the_manifest_and_bound_to_it(pool: dict[str, Path], tmp_path: Path) -> None:
    manifest = Manifest.open(pool["set"])
    kept = prints_of(manifest)
    content = (pool["set"] / FILE_NAME).read_bytes()
    computed = prints_of(Manifest.open(pack_again(pool["set"], tmp_path / "bare")))
    assert np.array_equal(kept, computed)
    bare = Manifest.open(tmp_path / "bare")
    for position in (0, 30, 255, 256, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "bare" / FILE_NAME).write_bytes(changed)
        with pytest.raises(DataError, match="damaged or belongs to another pack"):
            check_prints(bare)
    (tmp_path / "bare" / FILE_NAME).write_bytes((pool["corpus"] / FILE_NAME).read_bytes())
    with pytest.raises(DataError, match="damaged or belongs to another pack"):
        prints_of(bare)


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
    first, _ = first_of_its_kind(prints_of(Manifest.open(tmp_path / "packed")))
    assert np.array_equal(first, np.arange(243))
