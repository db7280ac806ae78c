"""A decoder that crashes, hangs, eats memory or wants more than pixels costs one file; answers stay in order."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.images import sandbox
from ddpm_lmk.data.images.image import ReadOptions, RefusedImageError
from ddpm_lmk.data.images.resize import encode
from ddpm_lmk.data.images.sandbox import LIMITS, decode_sandboxed, decoders
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system.sandbox import Sandbox
from tests.data.dot_packs import pack_dots, run_config

QUICK = replace(LIMITS, deadline_s=2.0)


@pytest.fixture
def bad_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decoding processes that do what an image says, ended with the test."""
    monkeypatch.setattr(sandbox, "_MODULE", "tests.data.bad_decoders")
    monkeypatch.setattr(sandbox, "_refused", {})
    with decoders(1, QUICK) as quick:
        monkeypatch.setattr(sandbox, "_shard_decoders", lambda: quick)
        yield


def job(path: Path) -> dict[str, Any]:
    return {"path": str(path), "options": asdict(ReadOptions())}


def good(folder: Path, name: str = "good.png", seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30), np.uint8)).save(folder / name)
    return folder / name


def codes_of(folder: Path, *words: str, count: int = 1) -> list[str | None]:
    """Codes of the answers to files that say these words, a good picture before and after each."""
    jobs = [job(good(folder))]
    for number, word in enumerate(words):
        (folder / f"{number}").write_text(word)
        jobs += [job(folder / f"{number}"), job(folder / "good.png")]
    with decoders(count, QUICK) as processes:
        answers = list(processes.answers(jobs))
    assert [content for _, content in answers[::2]] == [answers[0][1]] * (len(words) + 1)
    assert len(answers[0][1]) == 1200
    return [fields.get("code") for fields, _ in answers[1::2]]


@pytest.mark.parametrize("count", [1, 2])
def test_whatever_a_decoder_does_costs_one_file(bad_decoders: None, tmp_path: Path, count: int) -> None:
    words = ["crash", "memory", "stop", "exit", "print", "hang"]
    codes = ["CRASH", "MEMORY", "BROKEN", "CRASH", "BROKEN", "TIMEOUT"]
    assert codes_of(tmp_path, *words, count=count) == codes


def test_a_decoder_can_neither_write_nor_run_nor_unpickle(bad_decoders: None, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("as it was")
    codes = codes_of(tmp_path, f"write {target}", f"run {target}.new", "unpickle")
    assert codes == ["BROKEN", "BROKEN", "BROKEN"]
    assert target.read_text() == "as it was"
    assert not (tmp_path / "target.new").exists()


def test_a_process_killed_from_outside_is_started_again_with_the_same_file(tmp_path: Path) -> None:
    jobs = [job(good(tmp_path, f"{number}.png", number)) for number in range(40)]
    others = set(psutil.Process().children())
    with decoders(2) as processes:
        wanted = list(processes.answers(jobs))
        answers = []
        for number, answer in enumerate(processes.answers(jobs)):
            answers.append(answer)
            if number in (3, 20):
                (set(psutil.Process().children()) - others).pop().kill()
    assert answers == wanted


def test_the_second_try_does_not_depend_on_processes_that_die_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(psutil.Process().children())
    with decoders(2) as processes:
        list(processes.answers([job(good(tmp_path))] * 8))
        for child in set(psutil.Process().children()) - others:
            child.kill()
        with monkeypatch.context() as at_that_moment:
            at_that_moment.setattr("ddpm_lmk.system.sandbox._Process.is_running", lambda process: True)
            assert "code" not in processes.ask(job(tmp_path / "good.png"))[0]


def test_time_in_which_the_parent_does_not_listen_does_not_count(tmp_path: Path) -> None:
    with decoders(1, replace(LIMITS, deadline_s=1.0)) as processes:
        codes = []
        for fields, _ in processes.answers([job(good(tmp_path))] * 9):
            codes.append(fields.get("code"))
            time.sleep(0.15)
    assert codes == [None] * 9


def test_a_pipe_that_looks_like_a_picture_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with decoders(1) as processes:
        assert processes.ask(job(tmp_path / "x.png"))[0]["code"] == "UNREADABLE"


def test_processes_end_with_their_parent_and_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # tests that ran before may have left some
    others = set(psutil.Process().children())
    with decoders(2) as processes:
        list(processes.answers([job(good(tmp_path))] * 8))
        children = set(psutil.Process().children()) - others
        assert 1 <= len(children) <= 2  # a second starts where the first is busy
    assert not any(child.is_running() for child in children)
    assert set(threading.enumerate()) <= before


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Sandbox("no_such_module", LIMITS) as processes, pytest.raises(LaunchError, match="no_such_module"):
        list(processes.answers([job(good(tmp_path))]))


# --- PNGs and JPEGs out of shards

REASONS = {
    "hang": "takes more than 2 s",
    "crash": r"crashed \(SIGSEGV\)",
    "memory": "more memory than",
    "stop": "StopIteration",
}


def member(seed: int = 0, word: str = "") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
    return encode(pixels, "png", 90) + (b"END OF PICTURE" + word.encode() if word else b"")


def test_a_decoder_that_misbehaves_is_told_once_and_the_next_picture_comes_out_right(
    bad_decoders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word, reason in REASONS.items():
        with pytest.raises(RefusedImageError, match=reason):
            decode_sandboxed(member(word=word), size=64, bits=8)
    with monkeypatch.context() as nobody_decodes:
        nobody_decodes.setattr(sandbox, "_shard_decoders", None)
        with pytest.raises(RefusedImageError, match=REASONS["hang"]):
            decode_sandboxed(member(word="hang"), size=64, bits=8)
    wanted = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
    assert np.array_equal(decode_sandboxed(member(1), size=64, bits=8), wanted)


def test_pictures_of_any_size_come_out_whole_whoever_asks() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 65536, (side, side)).astype(np.uint16) for side in (16, 256, 1024)] * 3
    with ThreadPoolExecutor(3) as threads:
        decoded = threads.map(lambda it: decode_sandboxed(encode(it, "png", 90), size=len(it), bits=16), images)
        assert all(np.array_equal(a, b) for a, b in zip(decoded, images, strict=True))
    with pytest.raises(RefusedImageError, match="does not decode to 16 x 16 uint8"):
        decode_sandboxed(encode(images[0], "png", 90), size=16, bits=8)


@pytest.mark.parametrize(("residency", "workers"), [("stream", 2), ("ram", 1)])
def test_training_goes_on_without_samples_whose_decoders_hang_or_crash(
    tmp_path: Path, bad_decoders: None, residency: str, workers: int
) -> None:
    pack = pack_dots(tmp_path / "dots", {"train": 12, "test": 2}, encoding="png", suffixes={3: "hang", 8: "crash"})
    rows = Manifest.open(pack).rows(["train"])
    loader = open_loader(run_config(pack, runtime={"cache_pixels": residency, "workers": workers}), stage="train")
    groups = list(itertools.islice(loader.global_batches(0), 3))
    loader.close()
    reasons = {bad.row: bad.reason for group in groups for bad in group.bad}
    assert set(reasons) == {int(rows[3]), int(rows[8])}
    assert f"row {rows[3]}: " in reasons[int(rows[3])]
    assert "takes more than" in reasons[int(rows[3])]
    assert "SIGSEGV" in reasons[int(rows[8])]
    names = [name for group in groups for batch in group.micro_batches for name in batch.ids]
    assert len(names) == 24
    assert not {"train-003", "train-008"} & set(names)


def test_verify_names_the_samples_that_no_decoder_gets_through(tmp_path: Path, bad_decoders: None) -> None:
    pack = pack_dots(tmp_path / "dots", {"train": 6}, encoding="png", suffixes={2: "hang", 4: "crash"})
    problems = verify(pack).problems
    assert len(problems) == 2
    assert "takes more than" in problems[0]
    assert "SIGSEGV" in problems[1]
