"""Run as a program with `TRITON_INTERPRET=1`: graphs and a model through kernels; findings as JSON."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.kernel_check import differences
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import partition
from fxopt.options import Options
from fxopt.report.record import collect
from fxopt.runtime.kernel_cache import KernelCache
from support.emission_fuzz import check
from support.numerics import assert_closer

Value = torch.Tensor
NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, 3e38, 1e-7]


def special(dtype: torch.dtype = torch.float32) -> Value:
    return torch.tensor(SPECIAL * 3).to(dtype).view(3, 10)


def rope(x: Value, cos: Value, sin: Value) -> Value:
    x = x.view(2, 5, 4, 8).transpose(1, 2)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return (x * cos + half * sin).transpose(1, 2).reshape(2, 5, 32)


def interleaved_rope(x: Value, cos: Value, sin: Value) -> Value:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


PROGRAMS: dict[str, tuple[Callable[..., Value], tuple[Value, ...]]] = {
    "pointwise of special values": (lambda a: torch.relu(a) + a.abs() * 2, (special(),)),
    "comparisons of special values": (lambda a: torch.where(a > 0, a, -a).clamp(-2, 2), (special(),)),
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
    "rows longer than registers": (lambda a: a.softmax(-1) * 2, (torch.randn(2, 9001),)),
    "columns": (lambda a: (a * 2).sum(0), (torch.randn(301, 5),)),
    "all elements": (lambda a: (a * 2).mean(), (torch.randn(37, 5),)),
    "middle dimension": (lambda a: a - a.mean(1, keepdim=True), (torch.randn(3, 7, 5),)),
    "group norm": (lambda a: F.group_norm(a, 2), (torch.randn(2, 6, 5),)),
    "rotate-half RoPE": (rope, (torch.randn(2, 5, 32), torch.randn(5, 8), torch.randn(5, 8))),
    "interleaved RoPE": (interleaved_rope, (torch.randn(2, 5, 8), torch.randn(5, 4), torch.randn(5, 4))),
    "gated activation": (lambda a, b: F.silu(a) * b, (torch.randn(5, 9), torch.randn(5, 9))),
    "permuted input": (lambda a: a.exp() + 1, (torch.randn(3, 4, 5).permute(2, 0, 1),)),
    "strided input": (lambda a: a.exp() + 1, (torch.randn(6, 8)[::2, 1::3],)),
    "expanded input": (lambda a: a.exp() + 1, (torch.randn(1, 4).expand(3, 4),)),
    "one element": (lambda a: a.exp() + 1, (torch.randn(()),)),
}


def programs(options: Options) -> dict[str, str]:
    """The difference of each program, or nothing."""
    found = {}
    for name, (function, inputs) in PROGRAMS.items():
        step = (name, lambda values, function=function: function(*values))
        counts: Counter[str] = Counter()
        try:
            check(list(inputs), [step], options, counts)
            found[name] = "" if counts["kernels"] else "no kernel"
        except AssertionError as error:
            found[name] = str(error)
    return found


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


def _said(cache: KernelCache, kernel: Any) -> list[str]:
    module = cache.load(kernel)
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
    """One kernel for all lengths, after the first."""

    def function(a: Value) -> Value:
        return (a * 2).softmax(-1) + a.mean(0)

    wrong = []
    torch._dynamo.reset()
    with collect() as records:
        compiled = torch.compile(function, backend="fxopt", options=options)
        for length in (4, 7, 19, 33):
            a = torch.randn(length, length + 1)
            try:
                assert_closer(function(a.double()), compiled(a), function(a))
            except AssertionError as error:
                wrong.append(f"{length}: {error}")
    return {"graphs": len(records), "differences": wrong}


def main() -> None:
    directory = sys.argv[1]
    torch.set_num_threads(1)
    options = {"host": "eager", "cache_dir": directory, "strict": True}
    cache = KernelCache(Path(directory), 1 << 30)
    found = {
        "programs": programs(Options.parse(options=options)),
        "faults": faults(cache),
        "model": model(options),
        "dynamic": dynamic(options),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
