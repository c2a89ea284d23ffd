"""Linear layers with quantized weights as products that kernels compute."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fxopt.codegen.compile import CompiledKernel, compile_launches
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.matmul import MatmulBody
from fxopt.ir.quantization_policy import SCHEMES
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.target import Target
from support.programs import findings
from support.quantized_products import (
    expanded,
    gated,
    linear,
    packed,
    product_kernels,
    regions,
    residual,
)

LIMITS = {"torch.float32": 1e-5, "torch.bfloat16": 5e-3, "torch.float16": 2e-3}
TARGETS = ("sm_80", "sm_90", "sm_100")


def layer(scheme: str, rows: int, columns: int = 256, depth: int = 512, **more: Any) -> Any:
    weight = packed(columns, depth, scheme, more.pop("group", None))
    x = torch.empty(1, rows, depth, dtype=more.pop("dtype", torch.bfloat16))
    return (*expanded(linear(weight, scheme), x, weight.tensors), weight)


# What becomes one kernel


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_read_once(scheme: str) -> None:
    """At one row nothing but the weight counts: as it is stored, with its scales."""
    gm, evidence, weight = layer(scheme, rows=1, columns=1024, depth=1024)
    (region,) = regions(gm)
    assert isinstance(region.body, MatmulBody)
    assert int(region.fused.bytes) <= 1.02 * weight.nbytes + 2 * 2 * 1024
    assert [one.status.value for one in evidence] == ["applied"]
    assert "in registers of the product's kernel" in evidence[0].reason


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_two_codes_of_a_byte_are_multiplied_in_one_step(rows: int) -> None:
    (region,) = regions(layer("int4", rows)[0])
    body = region.body
    assert isinstance(body, MatmulBody)
    assert int(body.summed.size) == 256
    assert int(body.depth.size) == 512
    assert body.columns_of_step == 2
    loads = [one for one in body.loads if one.tensor.meta["val"].dtype is torch.uint8]
    assert len(loads) == 1, "each byte is loaded once"


@pytest.mark.parametrize("scheme, steps", [("int4", 16), ("nf4", 32)])
def test_scales_are_loaded_once_for_a_group(scheme: str, steps: int) -> None:
    (region,) = regions(layer(scheme, rows=1)[0])
    assert isinstance(region.body, MatmulBody)
    ((group, size),) = region.body.groups
    assert (int(group.size), size) == (512 // (2 * steps), steps)
    (kernel,) = product_kernels(layer(scheme, rows=1)[0], "sm_90")
    assert f"{group.symbol} = start // {steps} + tl.arange(0, (DEPTH + {steps - 1}) // {steps})" in kernel.jit


def test_the_scale_of_a_row_comes_behind_the_sum() -> None:
    (kernel,) = product_kernels(layer("int8", rows=1)[0], "sm_90")
    loop = kernel.jit[kernel.jit.index("for start in") : kernel.jit.index("tl.sum(")]
    assert "in_2" not in loop, "scales are no part of the loop"


def test_bytes_are_multiplied_as_bytes() -> None:
    (kernel,) = product_kernels(layer("int8-dynamic", rows=4)[0], "sm_90")
    assert "tl.zeros([ROWS, COLUMNS], tl.int32)" in kernel.jit
    assert "rint(" in kernel.jit, "tokens are rounded in front of the product"
    assert kernel.launches[0].products is not None
    assert kernel.launches[0].products.dtype == "int8"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norm_gate_up_and_activation_are_one_kernel(scheme: str) -> None:
    weight = packed(256, 512, scheme)
    x, scale = torch.empty(1, 2, 512, dtype=torch.bfloat16), torch.empty(512, dtype=torch.bfloat16)
    other = {name: each.clone() for name, each in weight.tensors.items()}
    gm, _ = expanded(gated(linear(weight, scheme)), x, scale, weight.tensors, other)
    (region,) = regions(gm)
    assert isinstance(region.body, MatmulBody)
    assert len(region.body.products) == 2
    assert len(region.outputs) == 1


def test_layers_that_share_their_tokens_round_them_once() -> None:
    weight = packed(256, 512, "int8-dynamic")
    one = linear(weight, "int8-dynamic")
    others = [{name: each.clone() for name, each in weight.tensors.items()} for _ in range(2)]

    def three(x: Any, *given: Any) -> list[Any]:
        return [one(x, each) for each in given]

    gm, _ = expanded(three, torch.empty(1, 1, 512), weight.tensors, *others)
    assert sum("amax" in str(node.target) for node in gm.graph.nodes) == 1
    (region,) = regions(gm)
    assert isinstance(region.body, MatmulBody)
    assert len(region.body.parts) == 3


def test_with_many_rows_the_dense_weight_is_a_kernel_of_its_own() -> None:
    """Where the library multiplies: one kernel writes what it reads, nothing in between is stored."""
    gm = layer("int4", rows=512)[0]
    (region,) = regions(gm, every=False)
    assert [str(node.target) for node in region.members] == ["fxopt.dequantized.default"]
    (fused,) = regions(gm)
    assert isinstance(fused.body, MatmulBody)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_order_of_columns_moves_tokens_and_not_the_weight(scheme: str) -> None:
    """Codes are read once, as they are stored; what is put in order is a row of x."""
    weight = packed(1024, 1024, scheme).replaced(columns=torch.randperm(1024))
    gm, evidence = expanded(linear(weight, scheme), torch.empty(1, 1, 1024), weight.tensors)
    assert [one.status.value for one in evidence] == ["applied"]
    (region,) = [one for one in regions(gm) if isinstance(one.body, MatmulBody)]
    assert int(region.fused.bytes) <= 1.02 * weight.nbytes + 4 * 3 * 1024


# What must not


def test_columns_that_do_not_fill_blocks_of_bytes_are_refused() -> None:
    _, evidence, _ = layer("int4", rows=1, depth=488)
    assert evidence[0].status.value == "miss"
    assert "wanted a multiple of 32 columns" in evidence[0].reason


def test_groups_that_split_a_byte_are_refused() -> None:
    _, evidence, _ = layer("int4", rows=1, group=24)
    assert "wanted groups of a multiple of 16 columns, saw 24" in evidence[0].reason


def test_rounded_tokens_want_one_scale_for_a_row() -> None:
    weight = packed(256, 512, "int8", 64)
    gm, evidence = expanded(linear(weight, "int8-dynamic"), torch.empty(2, 512), weight.tensors)
    assert "in groups or with offsets" in evidence[0].reason
    assert any("packed_product" in str(node.target) for node in gm.graph.nodes)


def test_no_tokens_are_left_alone() -> None:
    _, evidence, _ = layer("int8", rows=0)
    assert evidence[0].status.value == "miss"


def test_doubles_are_left_alone() -> None:
    _, evidence, _ = layer("int8", rows=2, dtype=torch.float64)
    assert "not torch.float64" in evidence[0].reason


# For GPUs that are not here


def large(scheme: str, rows: int, program: str = "residual") -> Any:
    """A layer of Llama 3.1 8B."""
    columns, depth, dtype = 14336, 4096, torch.bfloat16
    small = packed(16, depth, scheme)
    tensors = {
        name: torch.empty((columns, *each.shape[1:]), dtype=each.dtype)
        for name, each in small.tensors.items()
    }
    x, call = torch.empty(1, rows, depth, dtype=dtype), linear(small, scheme)
    if program == "gated":
        other = {name: each.clone() for name, each in tensors.items()}
        return expanded(gated(call), x, torch.empty(depth, dtype=dtype), tensors, other)[0]
    bias, across = torch.empty(columns, dtype=dtype), torch.empty(1, rows, columns, dtype=dtype)
    return expanded(residual(call), x, tensors, bias, across)[0]


def compiled(kernels: list[KernelFile], target: str) -> list[CompiledKernel]:
    launches = [(one, place) for one in kernels for place in range(len(one.launches))]
    return compile_launches(launches, Target.named(target))


def check(found: list[CompiledKernel], rows: int) -> None:
    assert found
    for one in found:
        one.check()
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\.shared\.global .*, 0x10", one.ptx)
        assert bool(re.search(r"mma\.sync|wgmma|tcgen05\.mma", one.ptx)) == (rows > 1)


def test_int4_fits() -> None:
    for rows in (1, 8):
        check(compiled(product_kernels(large("int4", rows), "sm_90"), "sm_90"), rows)


def test_widened_codes_stay_where_they_were_loaded() -> None:
    """Of one row: they are not exchanged between threads before they are multiplied."""
    (kernel,) = product_kernels(large("int4", 1), "sm_90")
    (found,) = compiled([kernel], "sm_90")
    columns, depth = (dict(kernel.launches[0].constants)[name] for name in ("COLUMNS", "DEPTH"))
    moved = re.findall(r"ttg\.convert_layout .* : tensor<(\S+?)x(?:f|bf|i)\d+,", found.ttgir)
    assert moved
    assert f"{columns}x{depth}" not in moved


def test_e4m3_is_widened_by_its_bits_where_the_gpu_does_not_have_it() -> None:
    (found,) = compiled(product_kernels(large("fp8", 1), "sm_80"), "sm_80")
    found.check()
    assert "mul.f32" in found.ptx
    assert "ftz" not in found.ptx, "small codes are numbers that float32 holds without a leading one"


@pytest.mark.parametrize(("target", "scheme", "rows"), [("sm_90", "nf4", 64), ("sm_80", "fp8", 512)])
def test_tables_and_wide_weights_fit(target: str, scheme: str, rows: int) -> None:
    """Entries of a table go through shared memory; e4m3 takes registers where a GPU does not have it."""
    check(compiled(product_kernels(large(scheme, rows, "gated"), target), target), rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 512])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", TARGETS)
def test_all_fit(target: str, scheme: str, rows: int) -> None:
    for program in ("residual", "gated"):
        check(compiled(product_kernels(large(scheme, rows, program), target), target), rows)


# In Triton's interpreter


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("kernels"))


def within_limits(found: dict[str, Any]) -> None:
    for name, one in found.items():
        assert one["kernels"], (name, one["told"])
        assert one["error"] <= LIMITS[one["dtype"]], name
        assert not one["wrong"], name


def test_layers_are_right(directory: str) -> None:
    within_limits(findings("support.emitted_quantized", directory, "layers")["layers"])


def test_groups_of_any_length_are_right(directory: str) -> None:
    within_limits(findings("support.emitted_quantized", directory, "groups")["groups"])


def test_columns_in_an_order_of_their_own_are_right(directory: str) -> None:
    found = findings("support.emitted_quantized", directory, "orders")["orders"]
    within_limits(found)
    assert all("registers" in told or "chosen" in told for one in found.values() for told in one["told"])


def test_pieces_of_the_depth_are_right(directory: str) -> None:
    found = findings("support.emitted_quantized", directory, "pieces")["pieces"]
    within_limits(found)
    assert all(max(one["launches"]) == 2 for one in found.values())


def test_products_of_bytes_are_exact(directory: str) -> None:
    found = findings("support.emitted_quantized", directory, "whole_numbers")["whole_numbers"]
    assert found == dict.fromkeys(("1", "5", "20"), True)


def test_blocks_are_right(directory: str) -> None:
    for name, one in findings("support.emitted_quantized", directory, "blocks")["blocks"].items():
        assert len(one["kernels"]) == 2, name
        assert one["error"] < 2e-2, name


@pytest.mark.slow
def test_a_model_decodes_through_them(directory: str) -> None:
    for name, one in findings("support.emitted_quantized", directory, "models")["models"].items():
        assert one["same tokens"], name
        assert one["left"] == [], name
        assert one["layers"] >= 2 * 7, name
        assert one["error"] < 1e-4, name


def test_all_bits_of_e4m3_are_widened_exactly() -> None:
    """The formula of the kernels, in torch."""
    codes = torch.arange(256, dtype=torch.uint8)
    live = (codes & 127) != 127
    bits = ((codes & 128).int() << 24) | ((codes & 127).int() << 20)
    wide = bits.view(torch.float32) * 2.0**120
    assert torch.equal(wide[live], codes.view(torch.float8_e4m3fn).float()[live])
    weight = QuantizedWeight.from_codes(
        "fp8_e4m3", codes[live].view(torch.float8_e4m3fn)[None], torch.ones(1, 1)
    )
    assert torch.equal(weight.dequantize()[0], wide[live])
