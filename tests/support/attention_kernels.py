"""Run as a program with `TRITON_INTERPRET=1`: kernels of attention against a plain one; findings as JSON.

The plain one evaluates programs as `fxopt.ir` does, on all scores at once; it shares no text with kernels.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_example import example_text
from fxopt.codegen.attention_functions import RANDOM_BITS
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_program import Capture
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.formula import numbered
from fxopt.ir.ops.philox import philox_uniform
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.ir.tile_values import TileValues
from fxopt.report.record import collect
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from support.numerics import assert_closer, reference_mode
from support.reference import double_model
from support.rounding import perturbed

ROWS, COLUMNS, BATCH, GROUPS = 37, 41, 2, 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PADDED = torch.ones(BATCH, COLUMNS, dtype=torch.bool)
LEFT, RIGHT = PADDED.clone(), PADDED.clone()
LEFT[0, :9], RIGHT[1, 30:] = False, False
DOCUMENTS = (torch.arange(COLUMNS) // 13).expand(BATCH, COLUMNS).contiguous()
HEADS, LOWEST = 6, -int(torch.finfo(torch.float32).min)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(len(shape) + shape[-1]))


@dataclass(frozen=True)
class Case:
    """One attention. `learned` are the places of captures whose gradient is wanted."""

    mask: str = "k <= q"
    score: str = ""
    captures: tuple[torch.Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    learned: tuple[int, ...] = ()
    dead: str = "zero"
    stops: bool = False
    sinks: bool = False
    dropout: float = 0.0
    group: int = 3
    width: int = 24
    width_v: int = 16
    rows: int = ROWS


CASES: dict[str, Case] = {
    "all keys": Case("True"),
    "causal": Case(group=1, width=40, width_v=40),
    "shifted causal": Case("k <= q + n0", sizes=(4,)),
    "window": Case("k <= q and k > q - 7"),
    "two-sided window": Case("k <= q + 5 and k >= q - 5", width=72, width_v=72, group=1),
    "soft cap and window": Case("k <= q and k > q - 16", "5*tanh(s/5)", group=2),
    "alibi": Case(score="s + c0[h]*k - c0[h]*q", captures=(random(HEADS).abs(),), learned=(0,)),
    "sinks": Case(sinks=True),
    "sinks and window": Case("k <= q and k > q - 7", sinks=True, group=6),
    "documents": Case("k <= q and c0[b, k] == c0[b, q]", captures=(DOCUMENTS,)),
    "prefix": Case("k <= q or k < n0", sizes=(9,)),
    "prefix of each sequence": Case("k <= q or k < c0[b]", captures=(torch.tensor([5, 20]),)),
    "length of each sequence": Case("k < c0[b]", captures=(torch.tensor([41, 17]),), group=1),
    "left padding": Case("k <= q and c0[b, k]", captures=(LEFT,), dead="mean"),
    "left padding that replaces": Case("k <= q and c0[b, k]", captures=(LEFT,), dead="mean", stops=True),
    "left padding of minus infinity": Case("k <= q and c0[b, k]", captures=(LEFT,), dead="nan"),
    "right padding": Case("c0[b, k]", captures=(RIGHT,)),
    "table": Case(score="s + c0[h, k - q + 36]", captures=(random(HEADS, 77),)),
    # Read on both sides of the 256th entry: programs have so many.
    "learned table": Case(score="s + c0[h, k - q + 266]", captures=(random(HEADS, 320),), learned=(0,)),
    "short learned table": Case(
        score="s + c0[h, k - q + 250]", captures=(random(GROUPS, 300),), learned=(0,), rows=9, group=1
    ),
    "learned table, padding": Case(
        "k <= q and c1[b, k]", "s + c0[h, k - q + 36]", (random(HEADS, 77), LEFT), learned=(0,), dead="mean"
    ),
    "learned table of buckets": Case(
        score="s + c0[c1[q, k], h]",
        captures=(random(8, HEADS), torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 8),
        learned=(0,),
    ),
    "learned table of indices": Case(
        "True",
        "s + c1[c0[41*q + k], h]",
        (torch.arange(ROWS * COLUMNS) * 7 % 20, random(20, HEADS)),
        learned=(1,),
    ),
    "learned vectors": Case(
        score="5*tanh(s/5) + c0[h]*k - c0[h]*q + c1[h]*c2[b, k]",
        captures=(random(HEADS).abs(), random(HEADS), random(BATCH, COLUMNS)),
        learned=(0, 1, 2),
    ),
    "opaque mask": Case("c0[b, 0, q, k]", captures=(random(BATCH, 1, ROWS, COLUMNS) > 0,), dead="mean"),
    "opaque bias": Case("True", "s + c0[0, h, q, k]", (random(1, HEADS, ROWS, COLUMNS),)),
    "learned bias": Case("True", "s + c0[0, h, q, k]", (random(1, HEADS, ROWS, COLUMNS),), learned=(0,)),
    "learned bias of sequences": Case(
        "k <= q", "5*tanh(s/5 + c0[b, 0, q, k])", (random(BATCH, 1, ROWS, COLUMNS),), learned=(0,)
    ),
    "lowest numbers": Case(
        "True", "s + c0[b, 0, 0, k]", (torch.where(LEFT, 0.0, torch.finfo(torch.float32).min)[:, None, None],)
    ),
    "lowest numbers of integers": Case("True", f"s + {LOWEST}*c0[b, k] - {LOWEST}", (LEFT.long(),)),
    "chunks": Case("k <= q and (k)//8 == (q)//8", width=80, width_v=80, group=1),
    "dropout": Case(dropout=0.25),
    "few queries": Case("k <= q + 38", rows=3),
    "wide keys, narrow values": Case("k > q - 9 and k <= q", width=96, width_v=64, group=2),
}


def spec_of(case: Case, dtype: torch.dtype) -> Spec:
    return Spec(
        dtype, case.group, case.width, case.width_v, MaskProgram.parse(case.mask),
        ScoreProgram.parse(case.score), 1 / math.sqrt(case.width),
        tuple(Capture.of(name, one) for name, one in others_of(case, dtype).items() if name.startswith("c")),
        tuple(numbered("n", case.sizes)), dtype if case.sinks else None,
        case.dead, case.stops, (), case.dropout,
    )  # fmt: skip


def operands_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value in three layouts: heads last, packed, heads first."""
    heads = GROUPS * case.group
    query = random(BATCH, case.rows, heads, case.width).transpose(1, 2)
    packed = random(BATCH, COLUMNS, GROUPS, case.width + case.width_v).transpose(1, 2)
    key, value = packed.split([case.width, case.width_v], -1)
    return [one.to(dtype) for one in (query, key, value.contiguous())]


def others_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    # What is learned has the dtype of the other parameters.
    found: dict[str, Any] = {
        name: one.to(dtype) if is_learned(case, name) else one
        for name, one in numbered("c", case.captures).items()
    }
    found |= {"sinks": random(GROUPS * case.group).to(dtype)} if case.sinks else {}
    found |= {"seed": torch.tensor(77)} if case.dropout else {}
    return found | dict(numbered("n", case.sizes))


def plain(case: Case, query: Any, key: Any, value: Any, others: dict[str, Any]) -> torch.Tensor:
    """Attention with all scores in one tensor."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = (one.repeat_interleave(case.group, 1) for one in (key, value))
    scores = ((query @ key.mT) * (1 / math.sqrt(case.width))).to(dtype)
    extents = [(0, size) for size in scores.shape]
    captures = {name: one for name, one in others.items() if name.startswith("c")}
    sizes = dict(numbered("n", case.sizes))
    tile = TileValues(extents, captures, sizes, query.device, scores, dtype)
    live = MaskProgram.parse(case.mask).compute(*extents_of(extents), captures, sizes, query.device)
    scored = tile.number(ScoreProgram.parse(case.score).result).masked_fill(~live, -math.inf)
    dead = ~live.expand(scores.shape).any(-1, keepdim=True)
    if case.sinks:
        sink = others["sinks"].to(dtype).view(1, -1, 1, 1).expand(*scored.shape[:3], 1)
        weights = torch.softmax(torch.cat([scored, sink], -1), -1)[..., :-1]
    else:
        alike = tile.number(ScoreProgram.parse(case.score).result)
        alike = torch.zeros_like(alike) if case.stops else alike - alike.detach()
        weights = torch.softmax(torch.where(dead, alike, scored), -1)
        if case.dead == "zero":
            weights = weights.masked_fill(dead, 0.0)
        elif case.dead == "nan":
            weights = weights * torch.where(dead, math.nan, 1.0)
    if case.dropout:
        kept = philox_uniform(scores.shape, others["seed"], RANDOM_BITS) >= case.dropout
        weights = weights * kept / (1 - case.dropout)
    return weights.to(value.dtype) @ value


def extents_of(extents: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
    (_, batch), (_, heads), rows, columns = extents
    return (batch, heads), rows, columns


def plain_gradients(
    case: Case, operands: Sequence[Any], others: dict[str, Any], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Of query, key, value, sinks and what is learned, by autograd."""
    wanted = [one.detach().requires_grad_() for one in operands]
    shared = {name: one for name, one in others.items() if name == "sinks" or is_learned(case, name)}
    shared = {name: one.detach().requires_grad_() for name, one in shared.items()}
    result = plain(case, *wanted, others | shared)
    order = sorted(shared, key=lambda name: name != "sinks")
    return list(torch.autograd.grad(result, [*wanted, *(shared[name] for name in order)], grad))


def is_learned(case: Case, name: str) -> bool:
    return name.startswith("c") and int(name[1:]) in case.learned


def wide(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: wide(one) for name, one in values.items()}
    if isinstance(values, torch.Tensor):
        return values.double() if values.is_floating_point() else values
    return [wide(one) for one in values] if isinstance(values, list) else values


@dataclass
class Run:
    """A case in a dtype, with kernels that `edit` may break.

    `described`: keys and values are loaded through tensor descriptors. `device`: on "cpu" in the interpreter.
    """

    case: Case
    dtype: torch.dtype
    cache: KernelCache
    edit: Callable[[KernelFile], KernelFile] = field(default=lambda kernel: kernel)
    described: bool = False
    device: str = "cpu"
    target: Target | None = None

    def check(self, *, backward: bool) -> str:
        """What is wrong; empty when nothing is."""
        operands, others = pytree.tree_map_only(
            torch.Tensor,
            lambda one: one.to(self.device),
            (operands_of(self.case, self.dtype), others_of(self.case, self.dtype)),
        )
        spec = spec_of(self.case, self.dtype)
        interpreted = exact_bfloat16 if self.device == "cpu" else contextlib.nullcontext
        forward = forward_kernel(spec, self.target, example_text(spec, ()), described=self.described)
        module = self.load(forward, edit=not backward)
        with interpreted():
            out, sums = module.launch(*operands, *others.values())
        if not backward:
            return self.compare(
                [out], lambda *given: [plain(self.case, *given[:3], given[3])], operands, others
            )
        grad = random(*out.shape).to(self.device, self.dtype)
        kernel = backward_kernel(spec, self.case.learned, self.target, example_text(spec, ()))
        module = self.load(kernel, edit=True)
        with interpreted():
            made = module.launch(grad, out, sums, *operands, *others.values())

        def gradients(*given: Any) -> list[torch.Tensor]:
            return plain_gradients(self.case, given[:3], given[3], given[4])

        return self.compare(list(made), gradients, operands, others, grad)

    def load(self, kernel: KernelFile, *, edit: bool) -> Any:
        return self.cache.load(self.edit(kernel) if edit else kernel)

    def compare(
        self, made: list[torch.Tensor], function: Any, operands: list[Any], others: Any, *more: Any
    ) -> str:
        given = (*operands, others, *more)
        exact = function(*(wide(one) for one in given))

        def run() -> list[torch.Tensor]:
            found = function(*given)
            return [one.to(got.dtype) for one, got in zip(found, made, strict=True)]

        try:
            assert_closer(exact, made, run(), roundings=perturbed(run, 6), strides=False)
        except AssertionError as error:
            return str(error)
        return ""


FAULTS: dict[str, tuple[str, bool, str, str]] = {
    "mask off by one": ("causal", False, "return k <= q", "return k <= q + 1"),
    "missing rescale": ("all keys", False, "acc * kept[:, None]", "acc"),
    "wrong group": ("alibi", False, "group * GROUP + pair % GROUP", "group * GROUP + (pair + 1) % GROUP"),
    "a bound too far": ("causal", False, "1 + first", "40 + first"),
    "a bound too near": ("window", False, "1 + last", "last - 40"),
    "no dead rows": ("left padding", False, "1.0 / columns", "0.0"),
    "no scale of gradients": ("causal", True, "acc * OF_SCORES", "acc"),
    "another random number": ("dropout", True, "tl.load(seed_ptr)", "(tl.load(seed_ptr) + 1)"),
    "no sum over the group": (
        "window",
        True,
        "full_high * GROUP, high, edge",
        "full_high, high // GROUP, edge",
    ),
    "entries of another block": ("short learned table", True, "block * BLOCK_T + tl.arange", "tl.arange"),
    "a part left out": ("short learned table", True, "tl.range(0, SPLITS)", "tl.range(1, SPLITS)"),
    "another matrix": ("learned bias", True, "line_of(of_ptr, b, h, ", "line_of(of_ptr, b, h * 0, "),
    "no cap in the backward": ("soft cap and window", True, "return grad * (", "return grad + 0 * ("),
}


def fault(name: str, cache: KernelCache) -> str:
    """What the check says of a kernel with this fault; KeyError where the fault changes nothing."""
    case, backward, right, wrong = FAULTS[name]

    def edit(kernel: KernelFile) -> KernelFile:
        if right not in kernel.jit:
            raise KeyError(right)
        return replace(kernel, jit=kernel.jit.replace(right, wrong))

    return Run(CASES[case], torch.float32, cache, edit).check(backward=backward)


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=8, attn_implementation="eager"))
    return LlamaForCausalLM(LlamaConfig(**shape))


def step(model: Any, inputs: dict[str, torch.Tensor], train: bool) -> list[torch.Tensor]:
    """Logits, or the loss and its gradients."""
    model.train(train)
    made = model(**inputs, use_cache=False)
    if not train:
        return [made.logits.detach()]
    model.zero_grad()
    made.loss.backward()
    return [made.loss.detach(), *(one.grad for one in model.parameters())]


def whole_model(name: str, train: bool, dynamic: bool = False) -> dict[str, Any]:
    """A prefill or a training step of padded sequences: what is wrong, and who computed attention."""
    model = model_of(name)
    tokens = torch.randint(0, 97, (2, 19), generator=torch.manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    with reference_mode():
        exact = step(double_model(model), inputs, train)

    def eager() -> list[torch.Tensor]:
        return step(copy.deepcopy(model), inputs, train)

    compiled = copy.deepcopy(model)
    compiled.compile(backend="fxopt", dynamic=dynamic, options={"host": "eager", "strict": True})
    with collect() as records, torch.set_grad_enabled(train):
        made = step(compiled, inputs, train)
    torch._dynamo.reset()
    try:
        assert_closer(exact, made, eager(), roundings=perturbed(eager), strides=False)
        wrong = ""
    except AssertionError as error:
        wrong = str(error)
    chosen = {one for record in records for op, one, _ in record.providers if op == "attention"}
    kernels = {one.name for record in records for one in record.kernels if one.name.startswith("attention")}
    return {"wrong": wrong, "providers": sorted(chosen), "kernels": sorted(kernels)}


# Those of which a sample has the backward: the ones that faults are seen by, and one of each that is learned.
BACKWARD = (
    "causal", "window", "soft cap and window", "alibi", "left padding", "short learned table", "learned bias",
    "dropout",
)  # fmt: skip


def sampled(place: int, name: str, whole: bool) -> list[tuple[str, bool]]:
    """All dtypes and directions of a case. A sample has one of them, or none of what others have as well."""
    if whole:
        return [(dtype, backward) for dtype in DTYPES for backward in (False, True)]
    backward = name in BACKWARD
    return [(list(DTYPES)[place % len(DTYPES)], backward)] if backward or place % 2 == 0 else []


def main(directory: str, whole: bool) -> dict[str, Any]:
    cache = KernelCache(Path(directory))
    found = {
        f"{name}, {dtype}, {'backward' if backward else 'forward'}": Run(case, DTYPES[dtype], cache).check(
            backward=backward
        )
        for place, (name, case) in enumerate(CASES.items())
        for dtype, backward in sampled(place, name, whole)
    }
    models = {"training": whole_model("gemma2", train=True)}
    if whole:
        models["prefill"] = whole_model("llama", train=False)
        models["prefill of any length"] = whole_model("llama", train=False, dynamic=True)
    return {"cases": found, "faults": {name: fault(name, cache) for name in FAULTS}, "models": models}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], "whole" in sys.argv[2:])))
