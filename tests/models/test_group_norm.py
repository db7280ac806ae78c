"""The fused norm against float64, in PyTorch's kernels and in Triton's: interpreted, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import Norm, choose_norm
from tests.models.norm_cases import CASES, Case, check, distances, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folded_norm_is_the_norm_of_float64(case: Case) -> None:
    check(case, "folded")


def test_folded_norm_is_exact_in_float64() -> None:
    case = Case((2, 12, 5, 7), groups=4, dtype=torch.float64)
    assert max(distances(case, "folded").values()) < 1e-12


def test_a_network_with_folded_norms_has_the_gradients_of_the_plain_one_and_keeps_less() -> None:
    found: list[dict[str, Tensor]] = []
    kept: list[int] = []
    for name in ("native", "folded"):
        torch.manual_seed(0)
        model = build_model(UNetConfig(width=8, multipliers=(1, 2), heads=2, head_dim=4), out_channels=1).double()
        use_norm(model, Norm(name, "test"))
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, to=sizes: to.setdefault(value.untyped_storage().data_ptr(), value.numel()) and value,
            lambda value: value,
        ):
            out = model(torch.rand(2, 1, 32, 32, dtype=torch.float64), torch.tensor([3, 420]))
        kept.append(sum(sizes.values()))
        out.square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() <= 1e-10 * (1e-6 + value.norm()), name
    assert kept[1] < 0.75 * kept[0]


def test_the_norm_of_a_run_is_chosen_by_what_is_there() -> None:
    cpu = torch.device("cpu")
    assert choose_norm("auto", cpu, is_compiled=False).name == "native"
    assert choose_norm("fused", cpu, is_compiled=False).name == "folded"
    assert choose_norm("auto", cpu, is_compiled=True).name == "native"
    assert choose_norm("native", cpu, is_compiled=False).name == "native"
    assert choose_norm("fused", cpu, is_compiled=True).name == "folded"


def in_a_process(code: str, **environment: str) -> str:
    """Standard output of Python code with the repository on its path."""
    more = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | more | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.extra("triton-dev")
def test_triton_kernels_under_the_interpreter_are_the_norm_of_float64() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    code = (
        "from tests.models.norm_cases import CASES, check\nfor case in CASES: check(case, 'triton')\nprint(len(CASES))"
    )
    assert in_a_process(code, TRITON_INTERPRET="1").strip() == str(len(CASES))


@pytest.mark.extra("triton-dev")
def test_triton_kernels_compile_for_an_h100_without_one() -> None:
    said = in_a_process("from tests.models.norm_compiled import main; main()")
    forward, backward = ["chunk_statistics", "combine_statistics", "apply"], ["chunk_gradients", "combine_gradients"]
    assert said.split() == [*forward, *backward, "apply_gradients"]


def test_results_do_not_depend_on_the_batch() -> None:
    """What class exact needs: an image has the same bits alone and beside others."""
    case = Case((3, 8, 6, 5), groups=4)
    whole = run(case, "folded", dtype=torch.float32)[0]
    alone = run(case, "folded", dtype=torch.float32, images=1)[0]
    assert torch.equal(whole[:1], alone)
