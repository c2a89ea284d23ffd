"""Run as a program with `TRITON_INTERPRET=1`: graphs and a model through kernels; findings as JSON."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.choose_products import candidates, choose
from fxopt.codegen.configurations import configuration, proposals
from fxopt.codegen.kernel_check import differences
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import partition
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.uniform import BITS
from fxopt.ir.target import Target
from fxopt.options import Options
from fxopt.report.record import collect
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from support import emitted_large_products, emitted_norms, emitted_products
from support.emission_fuzz import check
from support.numerics import assert_closer

aten = torch.ops.aten
Value = torch.Tensor
NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, 3e38, 1e-7]


def special(dtype: torch.dtype = torch.float32) -> Value:
    return torch.tensor(SPECIAL * 3).to(dtype).view(3, 10)


def signs_of_zeros(a: Value) -> tuple[Value, ...]:
    """Which zero it is: the reciprocal of -0.0 is -inf."""
    parts = torch.cat([a[:, :5], -a[:, 5:]], -1)
    values = (-a, a * -2, a + -0.0, 0 - a, a.abs(), torch.where(a > 0, 1, a), a / -3, a.half(), parts)
    return tuple(1 / value for value in values)


def rope(x: Value, cos: Value, sin: Value) -> Value:
    x = x.view(2, 5, 4, 8).transpose(1, 2)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return (x * cos + half * sin).transpose(1, 2).reshape(2, 5, 32)


def interleaved_rope(x: Value, cos: Value, sin: Value) -> Value:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rope_in_sections(x: Value, cos: Value, sin: Value) -> Value:
    """Qwen2-VL's: parts of a head turn by the places in time, height and width."""
    parts = [2, 1, 3, 2, 1, 3]
    cos, sin = (
        torch.cat([part[place % 3] for place, part in enumerate(one.split(parts, -1))], -1).unsqueeze(1)
        for one in (cos, sin)
    )
    x = x.view(2, 5, 4, 12).transpose(1, 2)
    half = torch.cat([-x[..., 6:], x[..., :6]], -1)
    return (x * cos + half * sin).transpose(1, 2).reshape(2, 5, 48)


def dropped(x: Value, seed: Value) -> Value:
    drawn = torch.ops.fxopt.uniform(x.t().shape, seed, BITS[x.dtype]).to(x.dtype).t()
    return (drawn > 0.3) * x / 0.7


def places(size: int, *shape: int) -> Value:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(size))


def crossing(x: Value, w: Value) -> tuple[Value, ...]:
    """Two kernels of siblings: the first ends behind the beginning of the second, which needs it."""
    sine = x.sin() + 1
    total = (sine @ w) + w
    return total * 2, w * 3 + 1, x.cos() + 1


def scattered(a: Value, b: Value) -> Value:
    """As the gradient of RoPE."""
    halves = aten.slice_backward(a[:, :4], [5, 8], 1, 4, 8, 1) + aten.slice_backward(
        a[:, 4:], [5, 8], 1, 0, 4, 1
    )
    return halves * b + aten.slice_scatter(a, b[1:4] * 2, 0, -4, -1)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Value, ...]]] = {
    "pointwise of special values": (lambda a: torch.relu(a) + a.abs() * 2, (special(),)),
    "comparisons of special values": (lambda a: torch.where(a > 0, a, -a).clamp(-2, 2), (special(),)),
    "signs of zeros": (signs_of_zeros, (special(),)),
    "maximum of NaN": (lambda a: a.amax(-1) + a.amin(-1), (special(),)),
    "softmax of infinities": (lambda a: a.softmax(-1) * 2, (special(),)),
    "half overflows as in eager": (lambda a: (a * a) * 0.5, (special(torch.float16) * 100,)),
    "bfloat16 rounds after every operator": (
        lambda a, b: (a + b) * a - b,
        (torch.randn(33, 7).bfloat16(), torch.randn(33, 7).bfloat16()),
    ),
    "mixed dtypes": (lambda a, b: (a + b) * 0.1 + a, (torch.randn(5, 6).half(), torch.randn(5, 6))),
    "integers": (lambda a: ((a * 3 + 1) & 6).sum(-1) - 2, (torch.randint(-9, 9, (4, 11)),)),
    "a sum of booleans": (lambda a: (a > 0).sum(-1) + 1, (torch.randn(4, 11),)),
    "any and all of special values": (
        lambda a: (torch.any(a, 0), torch.any(a * 0, -1), torch.all(a, 1, keepdim=True)),
        (special(),),
    ),
    "all of conditions": (lambda a: torch.where((a > -2).all(-1, keepdim=True), a, 0), (torch.randn(7, 9),)),
    "any of bytes": (lambda a: (a & 1).any(), (torch.randint(0, 2, (5, 9), dtype=torch.uint8) * 2,)),
    "any in pieces": (lambda a: (a > 0.9999).any(0), (torch.rand(40001, 3),)),
    "embedding": (lambda table, at: table[at] * 2 + at[..., None], (torch.randn(11, 6), places(11, 4, 5))),
    "embedding and its norm": (
        lambda table, at: F.layer_norm(F.embedding(at, table), (6,)),
        (torch.randn(11, 6).bfloat16(), places(11, 4, 5).int()),
    ),
    "negative places": (lambda a, at: a[:, at - 7] + 1, (torch.randn(3, 7, 2), places(7, 4))),
    "places in two dimensions": (
        lambda a, i, j: a[:, i, j].exp(),
        (torch.randn(3, 7, 5), places(7, 4, 1), places(5, 3)),
    ),
    "places along rows": (lambda a, at: a.gather(1, at).softmax(-1), (torch.randn(3, 7), places(7, 3, 9))),
    "one column": (lambda a, at: a.index_select(-1, at).sum(0) * 2, (torch.randn(5, 7).t(), places(5, 1))),
    "a table of one row": (
        lambda table, at: F.embedding(at, table) * 2 + table[at - 1],
        (torch.randn(1, 6), places(1, 4, 5)),
    ),
    "places that are computed": (
        lambda table, a: table[(a.abs() * 3).to(torch.int64).clamp(0, 8)] - 1,
        (torch.randn(9, 4), torch.randn(5, 6)),
    ),
    "places in a part": (lambda a, at: torch.cat([a, a[at]], 0) * 2, (torch.randn(6, 3), places(6, 4))),
    "rows longer than registers": (lambda a: a.softmax(-1) * 2, (torch.randn(2, 9001),)),
    "columns": (lambda a: (a * 2).sum(0), (torch.randn(301, 5),)),
    "all elements": (lambda a: (a * 2).mean(), (torch.randn(37, 5),)),
    "columns in pieces": (lambda a: (a * 2).sum(0) + 1, (torch.randn(40001, 5),)),
    "all elements in pieces": (lambda a: (a * 2).mean(), (torch.randn(201, 301),)),
    "largest in pieces": (lambda a: (-a.abs()).amax(0), (torch.rand(40001, 2) + 1,)),
    "pieces of integers": (lambda a: (a - 7).amin(), (torch.randint(9, 99, (201, 301)),)),
    "pieces of two dimensions": (lambda a: (a + a).sum([0, 1]), (torch.randn(33, 1201, 3),)),
    "pieces of whole slices": (lambda a: (a[:, 1:] * 2).sum([0, 1]), (torch.randn(6, 401, 3),)),
    "middle dimension": (lambda a: a - a.mean(1, keepdim=True), (torch.randn(3, 7, 5),)),
    "rotate-half RoPE": (rope, (torch.randn(2, 5, 32), torch.randn(5, 8), torch.randn(5, 8))),
    "interleaved RoPE": (interleaved_rope, (torch.randn(2, 5, 8), torch.randn(5, 4), torch.randn(5, 4))),
    "RoPE in sections": (
        rope_in_sections,
        (torch.randn(2, 5, 48), *(torch.randn(3, 2, 5, 12) for _ in range(2))),
    ),
    "parts that are scattered": (scattered, (torch.randn(5, 8), torch.randn(5, 8))),
    "gated activation": (lambda a, b: F.silu(a) * b, (torch.randn(5, 9), torch.randn(5, 9))),
    "permuted input": (lambda a: a.exp() + 1, (torch.randn(3, 4, 5).permute(2, 0, 1),)),
    "strided input": (lambda a: a.exp() + 1, (torch.randn(6, 8)[::2, 1::3],)),
    "expanded input": (lambda a: a.exp() + 1, (torch.randn(1, 4).expand(3, 4),)),
    "dropout": (dropped, (torch.randn(5, 70), torch.tensor(2**40 + 3))),
    "dropout in bfloat16": (dropped, (torch.randn(5, 70).bfloat16(), torch.tensor(-9))),
    "kernels that cross": (crossing, (torch.randn(40, 40), torch.randn(40, 40))),
    **emitted_norms.PROGRAMS,
    "a tensor of one element": (lambda a, b: (a + 1) * b, (torch.randn(()), torch.randn(3))),
}


def programs(options: Options, given: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The difference of each program, or nothing."""
    found = {}
    for name, (function, inputs) in given:
        step = (name, lambda values, function=function: function(*values))
        counts: Counter[str] = Counter()
        try:
            check(list(inputs), [step], options, counts)
            found[name] = "" if counts["kernels"] else "no kernel"
        except AssertionError as error:
            found[name] = str(error)
    return found


def large_products(options: dict[str, Any], whole: bool) -> dict[str, dict[str, str]]:
    """The same of products with many rows, in every way of adding up pieces of them."""
    return {
        split_k: programs(
            Options.parse(options=options | {"target": "sm_90", "gemm": "always", "split_k": split_k}), given
        )
        for split_k, given in (
            ("deterministic", emitted_large_products.programs(whole)),
            ("atomic", emitted_large_products.PLAIN.items()),
            ("never", emitted_large_products.PLAIN.items()),
        )
    }


def faults(cache: KernelCache) -> dict[str, list[str]]:
    """What the check of a kernel's file says of kernels that are wrong."""
    inputs = torch.randn(7, 33).bfloat16(), torch.randn(7, 33).bfloat16()
    gm = make_fx(lambda a, b: ((a + b) * b).softmax(-1), decomposition_table=select_decomp_table())(*inputs)
    (region,) = partition(gm.graph, frozenset({"cpu"})).regions
    right = kernel_of(region, None)
    assert _said(cache, right) == []
    wrong = {
        "rows": right.jit.replace("x * 33", "x * 32"),
        "columns": right.jit.replace("tl.where(inside_r, exp, 0)", "exp"),
        "rounding": right.jit.replace("(in_0 + in_1)", "(in_0 + in_1 * 1.2)"),
        "mask": right.jit.replace("inside_r = r < 33", "inside_r = r < 31"),
    }
    assert right.jit not in wrong.values(), right.jit
    return {name: _said(cache, replace(right, jit=text)) for name, text in wrong.items()}


def configurations(cache: KernelCache, whole: bool) -> dict[str, list[str]]:
    """What the check says of kernels in every configuration that would be measured, or in each third."""
    target, found, step = Target.named("sm_90"), {}, 1 if whole else 3
    given = [PROGRAMS[name] for name in ("rows longer than registers", "columns", "gated activation")]
    given += [PROGRAMS[name] for name in ("group norm", "places in two dimensions", "a table of one row")]
    given += _multiplied()
    for function, inputs in given:
        gm = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        choose(gm.graph, candidates(gm.graph, frozenset({"cpu"})))
        for region in partition(gm.graph, frozenset({"cpu"})).regions:
            kernel = kernel_of(region, target)
            for one in proposals(kernel, target)[len(found) % step :: step]:
                found[f"{kernel.digest[:6]} {configuration(one)}"] = _said(cache, one)
    return found


def _multiplied() -> list[emitted_products.Program]:
    """Products whose tiles may change: of one row, few, many, and with a depth in pieces."""
    random = emitted_products.random
    ragged = emitted_large_products.layers(70, 40, 50, torch.bfloat16)
    return [
        (emitted_products.gated, (random(1, 64), random(64), random(48, 64), random(48, 64))),
        (emitted_products.residual, (random(5, 100), random(70, 100), random(5, 70))),
        ragged["gated"],
        ragged["gradients"],
        emitted_large_products.PLAIN["a gradient of many rows"],
        emitted_large_products.rotations(19, 32, torch.float32)["8 of 16 turned"],
    ]


def _said(cache: KernelCache, kernel: Any) -> list[str]:
    module = cache.load(kernel)
    with exact_bfloat16():
        return differences(module.launch, module.reference, module.example_inputs("cpu"))


def model(options: dict[str, Any]) -> dict[str, Any]:
    """A training step of a small Llama: its values by the rule, and how many kernels it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ours = LlamaForCausalLM(config)
    eager, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    ids = torch.randint(0, 50, (2, 5))
    with collect() as records:
        got = _step(ours, torch.compile(ours, backend="fxopt", options=options), ids)
    want, reference = _step(eager, eager, ids), _step(exact, exact, ids)
    found: dict[str, Any] = {"kernels": sum(len(record.kernels) for record in records)}
    for part in got:
        try:
            assert_closer(reference[part], got[part], want[part], strides=False)
            found[part] = ""
        except AssertionError as error:
            found[part] = str(error)
    return found


def _step(module: Any, call: Callable[..., Any], ids: Value) -> dict[str, Any]:
    result = call(ids, labels=ids)
    loss = result.loss
    if result.logits.dtype is torch.float64:  # of which the model makes a loss in float32
        loss = F.cross_entropy(result.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    return {"loss": loss.detach(), "logits": result.logits.detach(), "gradients": gradients}


def dynamic(options: dict[str, Any]) -> dict[str, Any]:
    """One kernel for all lengths, after the first, also for more rows than a tile of a product has."""
    torch.manual_seed(0)
    weight = torch.randn(9, 3)

    def function(a: Value) -> tuple[Value, Value, Value]:
        rows = a[:, :3] * (a[:, :3].pow(2).mean(-1, keepdim=True) + 1).rsqrt()
        newest = torch.arange(a.shape[0])[:, None] >= max(0, a.shape[0] - 5)
        products = F.silu(F.linear(rows, weight.to(a.dtype))) * 2
        return (a * 2).softmax(-1) + a.mean(0), products, torch.where(newest, a * 2, a - 1).sum(0)

    wrong = []
    torch._dynamo.reset()
    with collect() as records:
        compiled = torch.compile(function, backend="fxopt", options=options)
        for length in (4, 7, 19, 33):
            a = torch.randn(length, length + 1)
            try:
                for three in zip(function(a.double()), compiled(a), function(a), strict=True):
                    assert_closer(*three)
            except AssertionError as error:
                wrong.append(f"{length}: {error}")
    products = sum("mm" in kernel.name for record in records for kernel in record.kernels)
    return {"graphs": len(records), "differences": wrong, "products": products}


def dropout(options: dict[str, Any]) -> dict[str, Any]:
    """What is dropped forward and backward, of a step through kernels."""
    x = torch.randn(64, 50, requires_grad=True)

    def function(x: Value) -> Value:
        return F.layer_norm(x, (50,)) * 0 + F.dropout(x * 2, 0.25)

    torch._dynamo.reset()
    with collect() as records:
        compiled = torch.compile(function, backend="fxopt", options=options)
        torch.manual_seed(1)
        first, second = compiled(x), compiled(x)
        torch.manual_seed(1)
        again = compiled(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    return {
        "in kernels": any("uniform(" in kernel.jit for record in records for kernel in record.kernels),
        "forward is backward": torch.equal(first == 0, gradient == 0),
        "share": float((first == 0).float().mean()),
        "scale": _is_scaled(first.detach(), x.detach()),
        "other numbers each time": not torch.equal(first == 0, second == 0),
        "the seed decides": torch.equal(first, again),
    }


def _is_scaled(dropped: Value, x: Value) -> bool:
    kept = dropped != 0
    try:
        assert_closer((x.double() * 2 / 0.75)[kept], dropped[kept], (x * 2 / 0.75)[kept])
    except AssertionError:
        return False
    return True


def main() -> None:
    register_ops()
    directory, whole = sys.argv[1], "whole" in sys.argv[2:]
    torch.set_num_threads(1)
    options = {"host": "eager", "cache_dir": directory, "strict": True}
    cache = KernelCache(Path(directory), 1 << 30)
    found = {
        "programs": programs(Options.parse(options=options), PROGRAMS.items()),
        "products": programs(
            Options.parse(options=options | {"target": "sm_90"}), emitted_products.programs(whole)
        ),
        "large products": large_products(options, whole),
        "configurations": configurations(cache, whole),
        "faults": faults(cache),
        "model": model(options),
        "dynamic": dynamic(options),
        "dropout": dropout(options),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
