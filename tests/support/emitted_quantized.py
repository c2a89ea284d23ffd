"""Run as a program with `TRITON_INTERPRET=1`: linear layers with quantized weights through kernels.

Findings as JSON: relative error (L2) against the product with the dequantized weight in float64, and what
the kernels' own checks find.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.emit import emit_kernels
from fxopt.codegen.kernel_check import differences
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.split_products import can_split_products
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.packed_linear import per_token, round_tokens
from fxopt.ir.quantization_policy import SCHEMES
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.options import Options
from fxopt.report.record import collect
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from support.quantized_products import Linear, linear, packed, rms_norm

Value = torch.Tensor
# rows, columns, depth, dtype, bias
SHAPES = (
    (1, 37, 64, torch.bfloat16, True),
    (1, 16, 160, torch.float32, False),
    (2, 61, 96, torch.float16, True),
    (16, 19, 64, torch.float32, True),
    (17, 37, 96, torch.bfloat16, True),
    (33, 16, 64, torch.float16, False),
)
# Of weights whose groups are no power of two, or whose last one is short, or that have one for all columns.
GROUPS = (("int4", 16), ("int4", 48), ("nf4", 32), ("fp4", 0), ("int8", 64), ("int8", 24))


def given(scheme: str, shape: Any, group: int | None = None) -> tuple[Value, QuantizedWeight, Value | None]:
    rows, columns, depth, dtype, has_bias = shape
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype) if has_bias else None
    return x, packed(columns, depth, scheme, group), bias


def emitted(
    function: Callable[..., Any], inputs: list[Value], directory: str, **more: Any
) -> tuple[Any, list[KernelFile], list[str]]:
    """The result through kernels, these, and what was said of the quantized layers."""
    given = {"host": "eager", "cache_dir": directory, "target": "sm_90", "gemm": "always", **more}
    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    graph.graph.eliminate_dead_code()
    kernels, evidence = emit_kernels(graph, Options.parse(options=given), call=True)
    told = [one.reason for one in evidence if one.rewrite == "emit-quantized-linears"]
    return graph(*inputs), kernels, told


def one_layer(
    scheme: str, shape: Any, directory: str, group: int | None = None, *, turned: bool = False, **more: Any
) -> dict[str, Any]:
    """One layer: its error, its kernels, and what their checks find. `turned`: its columns are in an order of
    their own, as those of GPTQ's are under act-order."""
    x, weight, bias = given(scheme, shape, group)
    if turned:
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))
        weight = weight.replaced(columns=order)
    names, call = list(weight.tensors), linear(weight, scheme)

    def function(x: Value, *rest: Value) -> Value:
        tensors = dict(zip(names, rest, strict=False))
        return call(x, tensors, rest[len(names)] if bias is not None else None)

    inputs = [x, *weight.tensors.values(), *([bias] if bias is not None else [])]
    found, kernels, told = emitted(function, inputs, directory, **more)
    seen = per_token(x.float(), SCHEMES[scheme][1]).double() if SCHEMES[scheme][1] else x.double()
    exact = seen @ weight.dequantize(torch.float64).t() + (0 if bias is None else bias.double())
    cache = KernelCache(Path(directory), 1 << 30)
    wrong = []
    for kernel in kernels:
        module = cache.load(kernel)
        with exact_bfloat16():
            wrong += differences(module.launch, module.reference, module.example_inputs("cpu"))
    return {
        "dtype": str(found.dtype),
        "error": float((found.double() - exact).norm() / exact.norm()),
        "kernels": [one.name for one in kernels],
        "launches": [len(one.launches) for one in kernels],
        "told": told,
        "wrong": wrong,
    }


def whole_numbers(directory: str) -> dict[str, bool]:
    """Products of bytes are exact: of integers within 127, with scales of one, so is the result."""
    found = {}
    for rows in (1, 5, 20):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randint(-127, 128, (rows, 96), generator=generator).float()
        x[:, 0] = 127
        codes = torch.randint(-127, 128, (24, 96), generator=generator, dtype=torch.int8)
        weight = QuantizedWeight.from_codes("int8", codes, torch.ones(24, 1))
        function = functools.partial(_without_bias, linear(weight, "int8-dynamic"))
        got, kernels, _ = emitted(function, [x, weight.codes, weight.scales], directory)
        assert torch.equal(round_tokens(x, "int8")[0].float(), x)
        found[str(rows)] = any("wide_product" in one.jit for one in kernels) and torch.equal(
            got, (x.long() @ codes.long().t()).float()
        )
    return found


def _without_bias(call: Linear, x: Value, codes: Value, scales: Value) -> Value:
    return call(x, {"codes": codes, "scales": scales})


def block(scheme: str, rows: int, directory: str) -> dict[str, Any]:
    """Norm, gate, up, activation and residual: how many kernels with products, and whether they are right."""
    width, inner = 64, 96
    layers = [packed(n, k, scheme) for n, k in ((inner, width), (inner, width), (width, inner))]
    names, calls = list(layers[0].tensors), [linear(one, scheme) for one in layers]

    def function(x: Value, scale: Value, *rest: Value) -> Value:
        parts = [dict(zip(names, rest[i::3], strict=True)) for i in range(3)]
        normal = rms_norm(x, scale)
        return x + calls[2](F.silu(calls[0](normal, parts[0])) * calls[1](normal, parts[1]), parts[2])

    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors = [one.tensors[name] for name in names for one in layers]
    inputs = [x, torch.ones(width).bfloat16(), *tensors]
    want = function(*inputs)
    got, kernels, _ = emitted(function, inputs, directory)
    return {
        "error": float((got.double() - want.double()).norm() / want.double().norm()),
        "kernels": [one.name for one in kernels],
    }


def decodes(scheme: str, directory: str) -> dict[str, Any]:
    """A tiny Llama whose linear layers are quantized, through kernels: a prompt, then tokens, one by one."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"host": "eager", "strict": True, "quantize": {"model.*": scheme}, "cache_dir": directory}

    def generated(more: dict[str, Any]) -> tuple[list[int], Value, list[Any]]:
        torch._dynamo.reset()
        with collect() as records, torch.no_grad():
            compiled = torch.compile(model, backend="fxopt", options=options | more)
            cache, step, out = DynamicCache(config=config), tokens, []
            for _ in range(3):
                logits = compiled(step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = logits.argmax(-1, keepdim=True)
                out.append(int(step))
        return out, logits, records

    want, plain, _ = generated({"kernels": "never"})
    got, logits, records = generated({"kernels": "always", "target": "sm_90"})
    evidence = [one for record in records for one in record.evidence]
    told = [one for one in evidence if one.rewrite == "emit-quantized-linears"]
    bodies = [kernel.jit for record in records for kernel in record.kernels]
    return {
        "same tokens": want == got,
        "error": float((logits.double() - plain.double()).norm() / plain.double().norm()),
        "layers": len(told),
        "left": [one.reason for one in told if one.status.value != "applied"],
        "kernels": sum("weight" in text or "wide_product" in text for text in bodies),
    }


def layers(directory: str) -> dict[str, Any]:
    return {f"{scheme} {one}": one_layer(scheme, one, directory) for scheme in SCHEMES for one in SHAPES}


def groups(directory: str) -> dict[str, Any]:
    return {
        f"{scheme} {group} {rows}": one_layer(scheme, (rows, 13, 96, torch.float32, True), directory, group)
        for scheme, group in GROUPS
        for rows in (1, 3, 18)
    }


def orders(directory: str) -> dict[str, Any]:
    return {
        f"{scheme} {rows}": one_layer(scheme, (rows, 21, 96, torch.float32, True), directory, turned=True)
        for scheme in SCHEMES
        for rows in (1, 3, 18)
    }


def pieces(directory: str) -> dict[str, Any]:
    """Of a depth that is cut, as where there are too few columns for all SMs."""

    def always(body: Any, tile: Any, target: Any) -> list[int]:
        return [tile.depth] if can_split_products(body) else []

    with mock.patch("fxopt.codegen.kernels.pieces_worth_while", always):
        return {
            f"{scheme} {rows} {how}": one_layer(
                scheme, (rows, 5, 4128, torch.float32, True), directory, split_k=how
            )
            for scheme, rows in (("int4", 1), ("int8", 1), ("nf4", 2))
            for how in ("deterministic", "atomic")
        }


def blocks(directory: str) -> dict[str, Any]:
    return {f"{scheme} {rows}": block(scheme, rows, directory) for scheme in SCHEMES for rows in (1, 3)}


def models(directory: str) -> dict[str, Any]:
    return {scheme: decodes(scheme, directory) for scheme in ("int4",)}


PARTS = (layers, groups, orders, pieces, whole_numbers, blocks, models)


def main() -> None:
    """Arguments: a directory for kernels; names of some of `PARTS`, else all."""
    register_ops()
    torch.set_num_threads(1)
    directory, *names = sys.argv[1:]
    print(json.dumps({one.__name__: one(directory) for one in PARTS if one.__name__ in names or not names}))


if __name__ == "__main__":
    main()
