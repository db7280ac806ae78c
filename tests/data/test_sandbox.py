"""A decoder that crashes, hangs, eats memory or wants more than pixels costs one file; answers stay in order."""

import os
import threading
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from ddpm_lmk.data.images import sandbox
from ddpm_lmk.data.images.sandbox import Isolation
from ddpm_lmk.errors import LaunchError

OPTIONS = {"frame": None, "voi": False, "allow_burned_in": False, "only_dicom": False}


@pytest.fixture
def bad_decoders(monkeypatch):
    monkeypatch.setattr(sandbox, "_ENTRY", "from tests.data.bad_decoders import main; main()")


def job(path):
    return {"path": str(path), "options": OPTIONS}


def good(folder, name="good.png", seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30), np.uint8)).save(folder / name)
    return folder / name


def told(folder, *words, workers=1, **limits):
    """Answers to files that say these words, a good picture before and after each."""
    jobs = [job(good(folder))]
    for number, word in enumerate(words):
        (folder / f"{number}").write_text(word)
        jobs += [job(folder / f"{number}"), job(folder / "good.png")]
    with Isolation(workers, **limits) as isolated:
        answers = list(isolated.answers(jobs))
    assert [content for _, content in answers[::2]] == [answers[0][1]] * (len(words) + 1)
    assert len(answers[0][1]) == 1200
    return [said.get("code") for said, _ in answers[1::2]]


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_a_decoder_does_costs_one_file(bad_decoders, tmp_path, workers):
    words = ["crash", "memory", "stop", "exit", "print", "hang"]
    codes = ["CRASH", "MEMORY", "BROKEN", "CRASH", "BROKEN", "TIMEOUT"]
    assert told(tmp_path, *words, workers=workers, deadline_s=2.0) == codes


def test_a_decoder_can_neither_write_nor_run_nor_unpickle(bad_decoders, tmp_path):
    target = tmp_path / "target"
    target.write_text("as it was")
    codes = told(tmp_path, f"write {target}", f"run {target}.new", "unpickle")
    assert codes == ["BROKEN", "BROKEN", "BROKEN"]
    assert target.read_text() == "as it was"
    assert not (tmp_path / "target.new").exists()


def test_a_process_killed_from_outside_is_started_again_with_the_same_file(tmp_path):
    jobs = [job(good(tmp_path, f"{number}.png", number)) for number in range(40)]
    others = set(psutil.Process().children())
    with Isolation(2) as isolated:
        wanted = list(isolated.answers(jobs))
        found = []
        for number, answer in enumerate(isolated.answers(jobs)):
            found.append(answer)
            if number in (3, 20):
                (set(psutil.Process().children()) - others).pop().kill()
    assert found == wanted


def test_time_in_which_the_parent_does_not_listen_does_not_count(tmp_path):
    with Isolation(1, deadline_s=1.0) as isolated:
        answers = isolated.answers([job(good(tmp_path))] * 9)
        codes = []
        for said, _ in answers:
            codes.append(said.get("code"))
            time.sleep(0.15)
    assert codes == [None] * 9


def test_a_pipe_that_looks_like_a_picture_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with Isolation(1) as isolated:
        assert next(isolated.answers([job(tmp_path / "x.png")]))[0]["code"] == "UNREADABLE"


def test_processes_end_with_their_parent_and_no_thread_is_left(tmp_path):
    before = set(threading.enumerate())  # tests that ran before may have left some
    others = set(psutil.Process().children())
    with Isolation(2) as isolated:
        list(isolated.answers([job(good(tmp_path))] * 8))
        children = set(psutil.Process().children()) - others
        assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert set(threading.enumerate()) <= before


def test_a_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_ENTRY", "import no_such_module")
    with Isolation(1) as isolated, pytest.raises(LaunchError, match="no_such_module"):
        list(isolated.answers([job(good(tmp_path))]))
