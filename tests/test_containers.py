"""The container recipes: what they copy is there, the second stage needs no network, nobody is root; and the lines that
build and install run here, into a folder and a fresh environment instead of an image.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTAINERFILE = ROOT / "containers/Containerfile"
APPTAINER = ROOT / "containers/ddpm-lmk.def"
NEEDED = ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "ddpm_lmk", "configs", "launch", "benchmarks")

Instructions = list[tuple[str, str]]


def stages() -> dict[str, Instructions]:
    """Instructions of the Containerfile by stage; those before the first are of stage ''."""
    text = re.sub(r"^\s*#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Instructions] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "final"
            found[name] = []
        found[name].append((word, " ".join(rest.split())))
    return found


def lines_of(stage: str, word: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == word]


def section(name: str, stage: int) -> list[str]:
    """Lines of a section of the Apptainer definition, by number of the stage."""
    part = APPTAINER.read_text().split("Bootstrap:")[1 + stage]
    found = re.search(rf"^%{name}\n((?: .*\n)+)", part, flags=re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines()]


def test_stages_have_known_bases_and_the_last_is_the_one_that_was_asked_for() -> None:
    found = stages()
    assert list(found) == ["", "cuda", "cpu", "wheels", "final"]
    assert lines_of("", "ARG") == ["TORCH=cuda"]
    assert found["final"][0] == ("FROM", "${TORCH}")
    for name in ("cuda", "cpu"):
        assert re.fullmatch(rf"docker\.io/library/python:3\.11-\S*bookworm AS {name}", found[name][0][1])
    for name in ("wheels", "final"):  # an ARG before FROM is not seen behind it
        assert all(f"${arg}" in " ".join(lines_of(name, "RUN")) for arg in map(str, args(name)))


def args(stage: str) -> list[str]:
    return [line.partition("=")[0] for line in lines_of(stage, "ARG")]


def test_all_that_the_package_needs_is_copied_and_is_there() -> None:
    copied = [source.rstrip("/") for line in lines_of("wheels", "COPY") for source in line.split()[:-1]]
    in_apptainer = [line.split()[0] for line in section("files", 0)]
    assert sorted(copied) == sorted(in_apptainer) == sorted(NEEDED)
    assert all((ROOT / name).exists() for name in copied)
    ignored = CONTAINERFILE.with_name("Containerfile.dockerignore").read_text().split()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    included = re.findall(r'^(\w+) = "ddpm_lmk/\1"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert set(included) < set(copied), "the wheel needs folders that are not copied"


def test_versions_are_those_of_the_constraints_and_the_second_stage_has_no_network() -> None:
    for build in (lines_of("wheels", "RUN"), section("post", 0)):
        assert "-c constraints.txt" in " ".join(build)
    for install in (lines_of("final", "RUN"), section("post", 1)):
        assert "--no-index --find-links /wheels" in " ".join(install)
        assert not any(word in " ".join(install) for word in ("http", "apt", "curl", "git"))
    assert all(line.startswith("--network=none ") for line in lines_of("final", "RUN"))


def test_nobody_is_root_and_the_program_is_what_starts() -> None:
    (user,) = lines_of("final", "USER")
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user), "a number, so that a cluster can see that it is not root"
    assert stages()["final"][-2:] == [("ENTRYPOINT", '["ddpm-lmk"]'), ("CMD", '["--help"]')]
    assert section("runscript", 1) == ['exec ddpm-lmk "$@"']


def test_both_recipes_build_and_install_with_the_same_commands() -> None:
    """Those of Apptainer differ in how an argument is written."""
    (build,), (install,) = lines_of("wheels", "RUN"), lines_of("final", "RUN")
    commands = [re.sub(r"\{\{ (\w+) \}\}", r"$\1", line) for line in (*section("post", 0), *section("post", 1))]
    assert commands[1:3] == [line.strip() for line in build.split(";")]
    assert commands[3] == install.split("target=/wheels ")[1]


@pytest.mark.slow
def test_the_lines_run_and_what_they_install_answers_without_a_network(tmp_path: Path) -> None:
    """As a build does: the copied files alone, wheels of all that is needed, then an environment of nothing else."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("needs unshare, which takes the network away")
    source, wheels, venv = tmp_path / "src", tmp_path / "wheels", tmp_path / "venv"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    # Where pip is told of wheels of torch for processors, no further index is asked for them.
    is_offered = any(
        list(Path(place).glob("torch-*cpu*.whl")) for place in os.environ.get("PIP_FIND_LINKS", "").split()
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"TORCH": "cuda" if is_offered else "cpu", "EXTRAS": "dicom", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}

    def sh(command: str, *, offline: bool) -> str:
        words = ["sh", "-ec", command.replace("/wheels", str(wheels))]
        prefix = ["unshare", "-rn"] if offline else []
        done = subprocess.run(
            [*prefix, *words], cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    sh(lines_of("wheels", "RUN")[0], offline=False)
    sh(lines_of("final", "RUN")[0].split("target=/wheels ")[1], offline=True)
    shutil.rmtree(source / "ddpm_lmk")  # what answers now is what was installed
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = dict(line.split("==") for line in sh("python -m pip freeze", offline=True).split() if "==" in line)
    assert installed.pop("ddpm-lmk")
    for name, version in installed.items():
        pinned = pins.get(name.lower().replace("_", "-"))
        assert version.partition("+")[0] == pinned, name
    assert not [name for name in installed if fnmatch(name, "nvidia*")]
    run = " ".join(map(shlex.quote, ("ddpm-lmk", "doctor", "--json", "--out", str(tmp_path / "runs"))))
    assert '"torch"' in sh(run, offline=True)
    assert "configs/pretrain/base.yaml" in sh("ddpm-lmk init", offline=True)
