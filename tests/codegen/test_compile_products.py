"""Products of the sizes of large models, compiled for GPUs that are not here: spills and wide loads."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.compile import CompiledKernel, compile_launches
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.regions import partition
from fxopt.ir.target import Target
from support.emitted_products import layers


def compiled(target: str, rows: int, dtype: torch.dtype, *names: str) -> list[CompiledKernel]:
    """The kernels with products of the programs called `names`."""
    card = Target.named(target)
    with FakeTensorMode():
        programs = layers((1, rows), 4096, 14336, dtype)
        graphs = [
            make_fx(function, decomposition_table=select_decomp_table())(*inputs).graph
            for function, inputs in (programs[name] for name in names)
        ]
    regions = [region for graph in graphs for region in partition(graph, frozenset({"cpu"})).regions]
    kernels = [kernel_of(region, card) for region in regions if isinstance(region.body, MatmulBody)]
    assert len(kernels) == len(names)
    return compile_launches([(kernel, 0) for kernel in kernels], card)


def check(found: list[CompiledKernel], rows: int, dtype: torch.dtype) -> None:
    for one in found:
        one.check()
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\.shared\.global .*, 0x10", one.ptx)
        on_matrix_units = rows > 1 and dtype is not torch.float32
        assert bool(re.search(r"mma\.sync|wgmma|tcgen05\.mma", one.ptx)) == on_matrix_units


@pytest.mark.parametrize("rows", [1, 5])
def test_gated_products_fit(rows: int) -> None:
    check(compiled("sm_90", rows, torch.bfloat16, "gated"), rows, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all_products_fit(target: str, rows: int, dtype: torch.dtype) -> None:
    names = ("projections", "rotated projections", "gated", "residual", "normal residual")
    check(compiled(target, rows, dtype, *names), rows, dtype)
