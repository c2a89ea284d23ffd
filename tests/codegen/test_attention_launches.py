"""Launches of attention's kernels as Triton compiles them on a GPU: by the values of sizes and strides.

Triton makes a constant of an integer argument that is 1, gives others the type that they fit into, and knows
only of multiples of 16 that they are multiples of something. None of that is seen in its interpreter, and
where a kernel is compiled ahead of time the types are given. Here Triton launches as on a GPU, through a stub
of its driver that runs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.stub_driver import StubDriver, stubbed
from fxopt.codegen.append_attention import AppendProblem, append_kernel
from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_emit import spec_of as of_operands
from fxopt.codegen.attention_example import example_text
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support.attention_kernels import CASES, Case, others_of, spec_of
from support.programs import findings

TARGET = Target.named("sm_90")
HALF = torch.bfloat16


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path)


def operands(
    case: Case, batch: int, groups: int, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as projections give them: (B, S, H, D) in memory."""
    heads = groups * case.group
    shapes = ((rows, heads, case.width), (columns, groups, case.width), (columns, groups, case.width_v))
    query, key, value = (torch.zeros(batch, *shape, dtype=HALF).transpose(1, 2) for shape in shapes)
    return query, key, value


def launched(kernel: KernelFile, cache: KernelCache, inputs: list[Any]) -> tuple[Any, StubDriver]:
    """The file's module, behind its launches, and what they gave the driver."""
    module = cache.load(kernel)
    with stubbed(TARGET) as stub:
        module.launch(*inputs)
    return module, stub


def compiled(module: Any, entry: str) -> list[Any]:
    """What Triton has compiled of a function, with its text at each stage."""
    kernels, *_ = getattr(module, entry).device_caches[0]
    return list(kernels.values())


def train(case: Case, cache: KernelCache, *sizes: int) -> list[Any]:
    """The launches of the forward and of the backward of a case, with sizes of 1 as its numbers."""
    spec = spec_of(case, HALF)
    given = [*operands(case, *sizes), *others_of(case, HALF).values()]
    given = [1 if isinstance(one, int) else one for one in given]
    forward = forward_kernel(spec, TARGET, example_text(spec, ()))
    backward = backward_kernel(spec, case.learned, TARGET, example_text(spec, ()))
    module, stub = launched(forward, cache, given)
    out, sums = module.outputs(*given)
    _, other = launched(backward, cache, [torch.zeros_like(out), out, sums, *given])
    assert len(stub.launched) == 1
    assert len(other.launched) == len(backward.launches)
    return [*stub.launched, *other.launched]


SAMPLE = ("alibi", "shifted causal", "lowest numbers of integers")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in SAMPLE else pytest.mark.slow) for one in CASES]
)
def test_sizes_of_one_compile(name: str, cache: KernelCache) -> None:
    """One sequence, one head, one query, one key: each is a constant to Triton, which has no dtype."""
    train(replace(CASES[name], group=1, width=16, width_v=16), cache, 1, 1, 1, 1)


def test_descriptors_compile(cache: KernelCache) -> None:
    """Strides are numbers of 32 bits, and the number of rows may be a constant."""
    spec = replace(spec_of(Case(group=1, width=64, width_v=64), HALF), alignment=16)
    kernel = forward_kernel(spec, TARGET, example_text(spec, ()), described=True)
    for columns in (1, 100):
        given = operands(Case(group=1, width=64, width_v=64), 1, 2, 1, columns)
        module, _ = launched(kernel, cache, list(given))
    found = compiled(module, "_attention_forward_kernel")
    assert len(found) == 2
    assert all("cp.async.bulk.tensor" in one.asm["ptx"] for one in found)


def test_sizes_of_one_compile_for_caches(cache: KernelCache) -> None:
    """One sequence, head, query and key, and a size of the mask that is 1."""
    shape = (1, 1, 1, 64)
    programs = MaskProgram.parse("k <= q + n0 and k >= c0[b]"), ScoreProgram.parse("")
    tensors = {name: torch.zeros(shape, dtype=HALF) for name in ("query", "key", "value")}
    starts, length = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    problem = Problem(tensors, (starts,), (1,), 0.125, "mean", *programs)
    _, stub = launched(decode_kernel(problem, TARGET), cache, [*tensors.values(), starts, 1])
    assert len(stub.launched) == 2
    more = {"query": tensors["query"], "k_new": tensors["key"], "v_new": tensors["value"]}
    more |= {"key": torch.zeros(shape, dtype=HALF), "value": torch.zeros(shape, dtype=HALF), "length": length}
    appending = AppendProblem(more, (starts,), (1,), 0.125, "zero", *programs)
    _, stub = launched(append_kernel(appending, TARGET), cache, [*more.values(), starts, 1])
    assert len(stub.launched) == 2


@pytest.mark.parametrize("width", [72, pytest.param(88, marks=pytest.mark.slow)])
def test_rows_of_odd_widths_are_read_16_bytes_at_once(width: int, cache: KernelCache) -> None:
    """Such strides are multiples of 8 and not of 16; for reads of 16 bytes at once that is enough."""
    case = Case("k <= q and k > q - 1024", width=width, width_v=width, group=1)
    attributes = {"mask": case.mask, "score": "", "scale": 0.125, "dead_rows": "zero", "stops": False}
    given = [*operands(case, 2, 3, 300, 300), None, None, [], []]
    spec = of_operands(given, attributes | {"stopped": (), "dropout_p": 0.0})
    forward = forward_kernel(spec, TARGET, example_text(spec, ()))
    backward = backward_kernel(spec, (), TARGET, example_text(spec, ()))
    first, _ = launched(forward, cache, given[:3])
    out, sums = first.outputs(*given[:3])
    second, _ = launched(backward, cache, [torch.zeros_like(out), out, sums, *given[:3]])
    for module, kernel in ((first, forward), (second, backward)):
        for launch in kernel.launches:
            (one,) = compiled(module, launch.entry)
            assert "ld.global.b16" not in one.asm["ptx"], launch.entry
            assert "st.global.b16" not in one.asm["ptx"], launch.entry
            assert launch.entry == "_attention_delta_kernel" or "cp.async.cg" in one.asm["ptx"]


@pytest.mark.parametrize(
    ("strides", "alignment", "far"),
    [
        ((64 * 8 * 100, 64, 64 * 8), 16, False),
        ((72 * 8 * 100, 72, 72 * 8), 8, False),
        ((65 * 8 * 100, 65 * 100, 65), 1, False),
        ((64, 64, 2**24), 16, True),
    ],
    ids=["heads of 64", "heads of 72", "padded rows", "rows far apart"],
)
def test_what_strides_say(strides: tuple[int, ...], alignment: int, far: bool) -> None:
    width = strides[1] if strides[1] < 100 else 64
    width = 64 if width == 65 else width
    given = torch.empty_strided((2, 8, 100, width), (*strides, 1), dtype=HALF, device="meta")
    attributes = {"mask": "k <= q", "score": "s + 1", "scale": 0.125, "dead_rows": "zero", "stops": False}
    spec = of_operands([given] * 3 + [None, None, [], []], attributes | {"stopped": (), "dropout_p": 0.0})
    assert (spec.alignment, spec.far) == (alignment, far)


def test_offsets_may_need_more_than_31_bits(tmp_path: Path) -> None:
    found = findings("support.wide_offsets", tmp_path)
    assert len(found) == 4
    assert [name for name, wrong in found.items() if wrong] == []


def test_heads_beyond_the_limit_of_a_grids_second_dimension(cache: KernelCache) -> None:
    case = Case(group=1, width=16, width_v=16)
    batch, groups = 700, 100
    (forward, *backward) = train(case, cache, batch, groups, 1, 1)
    for grid in (forward[:3], *(one[:3] for one in backward)):
        assert grid == (batch * groups, 1, 1)
