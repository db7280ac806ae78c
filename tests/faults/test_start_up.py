"""Odd places and private outputs: paths of every kind, data that may not be written, no network, no one else's eyes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import ROOT, write_run

AWKWARD = "Röntgen 一 two\nlines"


def pretrain(run_file: Path, out: Path, *words: object, prefix: tuple[str, ...] = (), **environment: str) -> str:
    """Run it as a user does, in a process of its own; returns what it said."""
    command = [*prefix, sys.executable, "-m", "ddpm_lmk.cli", "pretrain", run_file, "--cpu", "1", "--out", out, *words]
    done = subprocess.run(
        [os.fsencode(str(word)) for word in command],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stderr.decode("utf-8", "surrogateescape")


def modes(out: Path) -> set[tuple[str, str]]:
    """Kind and permissions of everything in a run directory, and of itself."""
    paths = [out, *out.rglob("*")]
    return {("folder" if path.is_dir() else "file", oct(stat.S_IMODE(path.stat().st_mode))) for path in paths}


def test_awkward_paths_and_read_only_data_give_a_private_run_without_a_network(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    """One run (A19-A21, E10, E11). A run file is UTF-8 and cannot name other bytes; a directory of output can."""
    folder = tmp_path / AWKWARD / ("x" * 200)
    folder.mkdir(parents=True)
    data = folder / "data"
    shutil.copytree(packed_phantoms, data)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.rglob("*") if path.is_file()}
    for path in [data, *data.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = folder / os.fsdecode(b"not \xff utf-8") / "a run"
    out.parent.mkdir()
    run_file = write_run(tmp_path, packed_phantoms, duration="4 steps", checkpoint_every="2 steps")
    alone = ("unshare", "--user", "--map-root-user", "--net")
    can_be_alone = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    words = (f"data.path={json.dumps(str(data), ensure_ascii=True)}",)
    os.umask(0o022)
    pretrain(run_file, out, *words, prefix=alone if can_be_alone else ())
    assert json.loads((out / "results.json").read_text())["train"]["steps"] == 4
    assert modes(out) == {("folder", "0o700"), ("file", "0o600")}
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert {path for path in data.rglob("*") if path.is_file()} == before.keys()
    pretrain(out / "config.yaml", out)  # the written run file holds the awkward paths, and is the same run
    if not can_be_alone:
        pytest.skip("all but the network was tried: no rights to take it away here")


@pytest.mark.slow
def test_a_shared_run_is_open_to_the_group_and_to_nobody_else(tmp_path: Path, packed_phantoms: Path) -> None:
    run_file = write_run(tmp_path, packed_phantoms, duration="4 steps", checkpoint_every="2 steps")
    os.umask(0o022)
    pretrain(run_file, tmp_path / "run", "--share-group")
    assert modes(tmp_path / "run") == {("folder", "0o770"), ("file", "0o660")}
