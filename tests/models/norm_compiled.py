"""Compiles the kernels of the fused norm for compute capability 9.0 (H100, H200) on a machine without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from ddpm_lmk.models.kernels import group_norm_triton as kernels

H100 = GPUTarget("cuda", 90, 32)
FP32, SIZE = "*fp32", "i32"
MAPS = {"x", "y", "dy", "dx"}  # bf16, as under autocast
SIZES = {"N", "C", "width", "per_chunk", "chunks"}
CONSTANTS: dict[str, Any] = {"R": 16, "K": 256, "SILU": True, "HAS_FILM": True}


def main() -> None:
    """Compile each kernel and name it; raises where one does not compile, or spills registers into memory."""
    for kernel in (
        *(kernels.chunk_statistics, kernels.combine_statistics, kernels.apply),
        *(kernels.chunk_gradients, kernels.combine_gradients, kernels.apply_gradients),
    ):
        names = kernel.arg_names
        signature = {name: type_of(name) for name in names}
        constants = {(index,): CONSTANTS[name] for index, name in enumerate(names) if name in CONSTANTS}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=H100, options={"num_warps": 8})
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.asm["cubin"]
        sys.stdout.write(f"{kernel.__name__}\n")


def type_of(name: str) -> str:
    """The type of a kernel's argument, by its name."""
    if name in CONSTANTS:
        return "constexpr"
    if name in SIZES:
        return SIZE
    return "*bf16" if name in MAPS else "fp32" if name == "eps" else FP32
