"""The files of `launch/`: every one validates, and the batch scripts are those that `launch slurm` writes today."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ddpm_lmk.launcher.placement import Placement, read_launch_file
from ddpm_lmk.launcher.slurm import Job, write_script
from tests.faults.harness import ROOT

LAUNCH = ROOT / "launch"
SETTINGS = {
    "cpu": Job("my-run", ("ddpm-lmk", "pretrain", "RUN.yaml", "--out", "runs/my-run", "--cpu", "8")),
    "gpu8": Job(
        "my-run", ("ddpm-lmk", "pretrain", "RUN.yaml", "--out", "runs/my-run", "--gpus", "8"), 1, 8, cpus_per_task=64
    ),
    "gpu2x8": Job(
        "my-run", ("ddpm-lmk", "pretrain", "RUN.yaml", "--out", "runs/my-run", "--gpus", "8"), 2, 8, cpus_per_task=64
    ),
}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_file_is_a_placement_and_its_command_names_it(path: Path) -> None:
    file = read_launch_file(path)
    assert Placement(**file.model_dump())
    assert f"--launch launch/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_script_is_the_one_that_is_written(name: str, tmp_path: Path) -> None:
    """`python -m tests.launcher.test_launch_files` writes them anew."""
    path = LAUNCH / "slurm" / f"{name}.sbatch"
    write_script(SETTINGS[name], tmp_path / path.name)
    assert path.read_text() == (tmp_path / path.name).read_text().replace(str(tmp_path / path.name), path.name)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_readme_has_a_line_for_every_file() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:yaml|sbatch))`", (LAUNCH / "README.md").read_text()))
    there = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.suffix in (".yaml", ".sbatch")}
    assert there <= named


if __name__ == "__main__":
    for name, job in SETTINGS.items():
        target = LAUNCH / "slurm" / f"{name}.sbatch"
        write_script(job, target)
        target.write_text(target.read_text().replace(str(target), target.name))
        target.chmod(0o644)
