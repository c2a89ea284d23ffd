"""Products of the sizes of large models, compiled for GPUs that are not here: spills and wide loads."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.choose_products import candidates, choose
from fxopt.codegen.compile import CompiledKernel, compile_launches
from fxopt.codegen.configurations import proposals
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.regions import partition
from fxopt.ir.target import Target
from support.emitted_large_products import interleaved_projections, stacks
from support.emitted_products import Program, layers, residual, rotated_projections

CPU = frozenset({"cpu"})


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


def large(rows: int, width: int, inner: int, dtype: torch.dtype) -> dict[str, Program]:
    """The products of a layer of that width, forward and backward, with what is around them."""
    x, across = torch.empty(1, rows, width, dtype=dtype), torch.empty(rows, inner, dtype=dtype)
    up, down = torch.empty(inner, width, dtype=dtype), torch.empty(width, inner, dtype=dtype)
    q, k = torch.empty(width, width, dtype=dtype), torch.empty(512, width, dtype=dtype)
    scale, bias = torch.empty(width, dtype=dtype), torch.empty(inner, dtype=dtype)
    cos, pairs = torch.empty(1, 1, rows, 64, dtype=dtype), torch.empty(rows, 1, 32, dtype=dtype)
    return {
        "gate and up": (
            lambda a, g, u: F.silu(F.linear(a, g)) * F.linear(a, u),
            (x, up, torch.empty_like(up)),
        ),
        "one weight twice": (lambda a, w: F.silu(F.linear(a, w)) * F.linear(a, w), (x, up)),
        "residual": (residual, (across[None], down, x)),
        "bias and activation": (lambda a, w, b: F.gelu(F.linear(a, w, b)), (x, up, bias)),
        "gradient of a weight": (lambda g, a: (g.t() @ a) * 0.5, (across, x[0])),
        "rotary": (rotated_projections(64), (x, scale, q, k, cos, cos)),
        "interleaved rotary": (interleaved_projections(64, 32), (x, q, k, pairs, pairs)),
        "stacks": (
            stacks,
            (
                across[:, :64].expand(32, -1, -1),
                torch.empty(32, 64, rows, dtype=dtype),
                torch.empty(rows, dtype=dtype),
            ),
        ),
    }


LLAMA_1B, LLAMA_8B, BERT_LARGE = (2048, 2048, 8192), (2048, 4096, 14336), (512, 1024, 4096)


def compiled_large(
    target: str, sizes: tuple[int, int, int], dtype: torch.dtype, *names: str, every: bool = False
) -> list[CompiledKernel]:
    """The kernels with products of the programs called `names`, or of all; `every`: all that is proposed."""
    card = Target.named(target)
    found = []
    with FakeTensorMode():
        for name, (function, inputs) in large(*sizes, dtype).items():
            if names and name not in names:
                continue
            gm = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
            gm.graph.eliminate_dead_code()
            choose(gm.graph, candidates(gm.graph, CPU))
            regions = partition(gm.graph, CPU).regions
            own = [kernel_of(one, card) for one in regions if isinstance(one.body, MatmulBody)]
            assert own, name
            found += [one for kernel in own for one in (proposals(kernel, card) if every else [kernel])]
    return compile_launches([(one, place) for one in found for place in range(len(one.launches))], card)


def test_large_products_fit() -> None:
    found = compiled_large("sm_90", BERT_LARGE, torch.bfloat16, "gate and up", "interleaved rotary")
    for one in found:
        one.check()
        assert "wgmma" in one.ptx
        assert "cp.async" in one.ptx, "what is multiplied next is on its way"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [LLAMA_1B, LLAMA_8B, BERT_LARGE])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all_large_products_fit(target: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    for one in compiled_large(target, sizes, dtype):
        one.check()
        multiplies = "tt.dot" in one.ttgir and dtype is not torch.float32
        assert not multiplies or re.search(r"mma\.sync|wgmma|tcgen05\.mma", one.ptx)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all_that_is_proposed_fits(target: str) -> None:
    """Of Llama 3.2 1B. What spills would be measured in vain; what is too large could not be launched."""
    found = compiled_large(target, LLAMA_1B, torch.bfloat16, every=True)
    assert len(found) >= 40
    for one in found:
        one.check()
