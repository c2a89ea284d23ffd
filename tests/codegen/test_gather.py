"""Tensors read at places that are data: what becomes part of a kernel, and what must not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.compile import compile_launches
from fxopt.codegen.gather import is_gather
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import Partition, partition
from fxopt.ir.target import Target

CPU = frozenset({"cpu"})
Value = torch.Tensor
table, at = torch.randn(50, 16), torch.randint(0, 50, (4, 6))


def graph_of(function: Callable[..., Any], *inputs: Value) -> fx.Graph:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs).graph


def regions_of(function: Callable[..., Any], *inputs: Value) -> Partition:
    return partition(graph_of(function, *inputs), CPU)


def test_an_embedding_is_read_by_the_norm_behind_it() -> None:
    def function(a: Value, i: Value) -> Value:
        return torch.nn.functional.layer_norm(torch.nn.functional.embedding(i, a), (16,))

    (region,) = regions_of(function, table, at).regions
    assert "embedding" in region.members[0].name
    touched, written = 24 * 16 * 4, 24 * 16 * 4
    assert region.fused.bytes == at.nbytes + touched + written, "only the rows that are looked up"
    text = kernel_of(region, None).jit
    assert "tl.device_assert(" in text
    assert "in_1 < 0" not in text, "an embedding has no negative places"


def test_negative_places_count_from_the_end() -> None:
    (region,) = regions_of(lambda a, i: a[i] * 2, table, at).regions
    assert "+ 50" in kernel_of(region, None).jit


def test_a_small_table_is_not_priced_by_its_readers() -> None:
    small = torch.randn(2, 16)
    (region,) = regions_of(lambda a, i: a[i % 2] * 2, small, at).regions
    assert region.fused.bytes == small.nbytes + at.nbytes + 24 * 16 * 4


def test_the_reference_takes_what_the_kernel_takes() -> None:
    """Places are read first, whatever the graph has first."""
    (region,) = regions_of(lambda a, i: a[i] * 2, table, at).regions
    kernel = kernel_of(region, None)
    names = [one.name for one in kernel.parameters]
    assert names == [val.arg for val in ast.parse(kernel.reference).body[0].args.args]  # type: ignore[attr-defined]
    assert names != sorted(names), "a case in which the orders differ"


@pytest.mark.parametrize(
    ("function", "rows", "entries"),
    [
        (lambda a, i: a[i] * 2, 50, 50),
        (lambda a, i: a[i.view(-1)] * 2, 3, 3),
        (lambda a, i: torch.nn.functional.embedding(i, a) * 2, 1, 1),
        (lambda a, i: a[i + 1] * 2, 50, 2),  # what is computed of 0 and 1 is most likely a place
        (lambda a, i: a[torch.where(i == -100, 0, i)] * 2, 1, 1),
        (lambda a, i: (a[0, 0] * i).exp(), 50, 2),
    ],
)
def test_examples_are_places_that_exist(function: Callable[..., Any], rows: int, entries: int) -> None:
    regions = regions_of(function, torch.randn(rows, 16), at).regions
    texts = [kernel_of(region, None).example_inputs for region in regions]
    (text,) = [one for one in texts if "int64" in one]
    assert f"random_(0, {entries}, generator" in text


@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda a, i: a[i, :, i] * 2, (torch.randn(5, 4, 5), torch.arange(5))),  # the places come first
        (lambda a, i: a[i] * 2, (torch.randn(5).to(torch.complex64), at % 5)),
    ],
)
def test_what_is_left_to_the_host(function: Callable[..., Any], inputs: tuple[Value, ...]) -> None:
    for region in regions_of(function, *inputs).regions:
        assert not any(is_gather(node) for node in region.members)


def test_what_is_computed_is_written_before_it_is_looked_up() -> None:
    found = regions_of(lambda a, i: (a * 2 + 1)[i] * 2, table, at)
    groups = [[node.name for node in one.members] for one in found.regions]
    assert groups == [["mul", "add"], ["index", "mul_1"]]
    assert any("which has to be in memory" in reason for _, reason in found.refused)


def test_a_gather_alone_is_left_to_the_host() -> None:
    assert regions_of(lambda a, i: a[i], table, at).regions == []


def test_a_product_with_few_rows_does_not_look_up() -> None:
    weight = torch.randn(16, 32)
    found = regions_of(lambda a, i, w: (a[i] * 2) @ w + 1, table, at[0], weight)
    assert not any({"index", "mm"} <= {node.name for node in one.members} for one in found.regions)


def test_a_place_is_asserted_once() -> None:
    """Not again in the second pass over the row, around whose call ptxas would spill registers."""

    def function(a: Value, i: Value) -> tuple[Value, Value]:
        rows = a.flatten(1)[i] * 2
        return rows, rows.sum(0)

    regions = regions_of(
        function, torch.randn(16, 4, 6, dtype=torch.bfloat16), torch.zeros(9001, dtype=torch.int64)
    )
    (kernel,) = [kernel_of(one, Target.named("sm_100")) for one in regions.regions]
    assert kernel.jit.count("for start in range(") == 2
    assert kernel.jit.count("tl.device_assert(") == 1
    assert kernel.jit.count("(index >= 0) & (index < 16), other=0") == 2, "no place outside is ever read"


def looked_up_and_asked(a: Value, i: Value) -> tuple[Value, ...]:
    rows = torch.nn.functional.layer_norm(torch.nn.functional.embedding(i, a), a.shape[-1:])
    return rows, torch.where((rows > 0).any(-1, keepdim=True), rows, 0), a[i - 7] * 2


def norm_gradient(gradient: Value, x: Value) -> tuple[Value, ...]:
    wide, normal = gradient.float(), x.float() - x.float().mean(-1, keepdim=True)
    weighted = wide - normal * (wide * normal).mean(-1, keepdim=True)
    return weighted.to(x.dtype), (wide * normal).sum(0), wide.sum(0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_they_compile_and_fit(arch: str) -> None:
    """Gathers, any, and what is computed again, at the width of a model."""
    target, meta = Target.named(arch), frozenset({"meta"})
    wide = torch.empty(2048, 768, dtype=torch.bfloat16, device="meta")
    many = torch.empty(4, 512, dtype=torch.int64, device="meta")
    graphs = [graph_of(looked_up_and_asked, wide, many), graph_of(norm_gradient, wide, wide.clone())]
    regions = [one for graph in graphs for one in partition(graph, meta).regions]
    assert any(one.again for one in regions)
    kernels = [kernel_of(one, target) for one in regions]
    launches = [(kernel, place) for kernel in kernels for place in range(len(kernel.launches))]
    assert [(one.entry, one.problems()) for one in compile_launches(launches, target) if one.problems()] == []


OUTSIDE = """
import sys, torch
from torch.fx.experimental.proxy_tensor import make_fx
from fxopt.codegen.emit import emit_kernels
from fxopt.options import Options
a, i = torch.randn(5, 4), torch.tensor([1, 2, int(sys.argv[2])])
function = eval(sys.argv[3])
gm = make_fx(function)(a, i * 0 + 2)
kernels, _ = emit_kernels(gm, Options.parse(options={"cache_dir": sys.argv[1]}), call=True)
assert len(kernels) == 1
try:
    print(torch.equal(gm(a, i), function(a, i)))
except IndexError as error:
    print(error)
"""
INDEXED = "lambda a, i: a[i] * 1"
# Where the first part is, the second would be looked up in front of the first row.
IN_A_PART = "lambda a, i: torch.cat([a, a.index_select(0, i - 1)]) * 2"


@pytest.mark.parametrize(
    ("function", "place", "said"),
    [
        (INDEXED, -5, "True"),
        (INDEXED, 5, "index out of bounds in a kernel"),
        (INDEXED, -6, "index out of bounds in a kernel"),
        (INDEXED, 1 << 40, "index out of bounds in a kernel"),
        ("lambda a, i: a.gather(0, i[:, None]).exp() * 2", -1, "index out of bounds in a kernel"),
        ("lambda a, i: torch.nn.functional.embedding(i, a).sum(0)", 5, "index out of bounds in a kernel"),
        (IN_A_PART, 5, "True"),
        (IN_A_PART, 6, "index out of bounds in a kernel"),
    ],
)
def test_places_outside_are_an_error_as_in_eager(tmp_path: Any, function: str, place: int, said: str) -> None:
    command = [sys.executable, "-c", OUTSIDE, str(tmp_path), str(place), function]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{said}\n"


def test_assertions_are_compiled_in_where_there_are_gathers(tmp_path: Any) -> None:
    """By our launches, by themselves; those of Inductor are tested with it."""
    target = Target.named("sm_90")
    (looked,) = regions_of(lambda a, i: a[i] * 2, table, at).regions
    (plain,) = regions_of(lambda a, i: a.exp() * 2, table, at).regions
    kernels = [kernel_of(one, target) for one in (looked, plain)]
    compiled = compile_launches([(one, 0) for one in kernels], target)
    assert ["__assertfail" in one.ptx for one in compiled] == [True, False]
    assert [one.problems() for one in compiled] == [(), ()]
    assert ["debug=True, sanitize_overflow=False" in " ".join(one.render().split()) for one in kernels] == [
        True,
        False,
    ]
    assert compiled[0].ptx.count("call.uni") == 1, "and none of sums that overflow"
