"""Decoders of PNGs and JPEGs out of shards that hang or crash cost their sample, in every loader, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.images import sandbox
from ddpm_lmk.data.images import sandbox as guarded
from ddpm_lmk.data.images.decode import RefusedImageError
from ddpm_lmk.data.images.resize import encode
from ddpm_lmk.data.images.sandbox import decode_guarded
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.verify import verify
from tests.data.dot_packs import pack_dots, run_config

TOLD = {
    "hang": "takes more than 2 s",
    "crash": r"crashed \(SIGSEGV\)",
    "memory": "more memory than",
    "stop": "StopIteration",
}


@pytest.fixture
def bad_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decoding processes that do what a picture says, ended with the test."""
    monkeypatch.setattr(sandbox, "_ENTRY", "from tests.data.bad_decoders import main; main()")
    monkeypatch.setattr(guarded, "FILE_DEADLINE_S", 2.0)
    monkeypatch.setattr(guarded, "_idle", [])
    monkeypatch.setattr(guarded, "_refused", {})
    with ExitStack() as ending:
        monkeypatch.setattr(guarded, "_ending", ending)
        yield


def picture(seed: int = 0, word: str = "") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
    return encode(pixels, "png", 90) + (b"END OF PICTURE" + word.encode() if word else b"")


def test_a_decoder_that_misbehaves_is_told_once_and_the_next_picture_comes_out_right(bad_decoders, monkeypatch):
    for word, told in TOLD.items():
        with pytest.raises(RefusedImageError, match=told):
            decode_guarded(picture(word=word), size=64, bits=8)
    with monkeypatch.context() as nobody_decodes:
        nobody_decodes.setattr(guarded, "_idle", [])
        nobody_decodes.setattr(guarded, "Isolation", None)
        with pytest.raises(RefusedImageError, match=TOLD["hang"]):
            decode_guarded(picture(word="hang"), size=64, bits=8)
    wanted = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
    assert np.array_equal(decode_guarded(picture(1), size=64, bits=8), wanted)


def test_pictures_of_any_size_come_out_whole_whoever_asks():
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 65536, (side, side)).astype(np.uint16) for side in (16, 256, 1024)] * 3
    with ThreadPoolExecutor(3) as threads:
        found = list(
            threads.map(lambda image: decode_guarded(encode(image, "png", 90), size=len(image), bits=16), pixels)
        )
    assert all(np.array_equal(a, b) for a, b in zip(found, pixels, strict=True))
    with pytest.raises(RefusedImageError, match="does not decode to 16 x 16 uint8"):
        decode_guarded(encode(pixels[0], "png", 90), size=16, bits=8)


@pytest.mark.parametrize(("residency", "workers"), [("stream", 2), ("ram", 1)])
def test_training_goes_on_without_samples_whose_decoders_hang_or_crash(tmp_path, bad_decoders, residency, workers):
    pack = pack_dots(tmp_path / "dots", {"train": 12, "test": 2}, encoding="png", suffixes={3: "hang", 8: "crash"})
    rows = Manifest.open(pack).rows(["train"])
    cfg = run_config(pack, data={"residency": residency, "workers": workers})
    loader = open_loader(cfg, stage="train")
    groups = list(itertools.islice(loader.groups(0), 3))
    loader.close()
    met = {bad.row: bad.reason for group in groups for bad in group.bad}
    assert set(met) == {int(rows[3]), int(rows[8])}
    assert f"row {rows[3]}: " in met[int(rows[3])]
    assert "takes more than" in met[int(rows[3])]
    assert "SIGSEGV" in met[int(rows[8])]
    names = [name for group in groups for batch in group.micro_batches for name in batch.ids]
    assert len(names) == 24
    assert not {"train-003", "train-008"} & set(names)


def test_verify_names_the_samples_that_no_decoder_gets_through(tmp_path: Path, bad_decoders: None) -> None:
    pack = pack_dots(tmp_path / "dots", {"train": 6}, encoding="png", suffixes={2: "hang", 4: "crash"})
    problems = verify(pack).problems
    assert len(problems) == 2
    assert "takes more than" in problems[0]
    assert "SIGSEGV" in problems[1]
