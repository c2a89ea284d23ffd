"""Activation checkpointing: the same gradients, really recomputed, with the same random numbers as before."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from support.architecture import liven
from support.compile_stats import Counting, compile_stats
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.reference import double_model, reference_mode, to_double
from support.rounding import perturbed
from support.runs import Result, train, train64
from support.zoo import ZOO

B, H, S, D = 2, 3, 7, 8
LAYERS = 2
MATMULS = ("aten.mm.", "aten.addmm.")

Checkpoint = Callable[..., torch.Tensor]


class Operators(TorchDispatchMode):
    """Counts the ATen operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def starting(self, *names: str) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith(names))


def save_projections(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    matmul = str(operator).startswith(MATMULS)
    return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, Checkpoint] = {
    "non_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_projections),
    ),
}


def call_directly(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    return function(*args)


class Block(torch.nn.Module):
    """Attention spelled out, with dropout on its weights and on its result."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(H * D, H * D) for _ in range(4))
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (H, D)).transpose(1, 2) for linear in self.project[:3])
        weights = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1)
        mixed = dropout(weights, self.rate, self.training) @ v
        return x + dropout(self.project[3](mixed.transpose(1, 2).flatten(-2)), self.rate, self.training)


class Stack(torch.nn.Module):
    """Blocks, each of them checkpointed."""

    def __init__(self, wrap: Checkpoint, rate: float = 0.0) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(rate) for _ in range(LAYERS))
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.wrap(block, x)
        return x


def make_stack(wrap: Checkpoint, rate: float = 0.0) -> Stack:
    torch.manual_seed(0)
    stack = Stack(wrap, rate).train()
    liven(stack)
    return stack


def hidden() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(B, S, H * D, requires_grad=True)


def step(call: Callable[..., Any], model: torch.nn.Module, x: torch.Tensor) -> Result:
    """`train` of one input, always with the same random numbers."""
    torch.manual_seed(2)
    return train(call, model, {"x": x})


def recomputed(call: Callable[..., Any], x: torch.Tensor) -> Operators:
    """The operators that run in the backward pass."""
    loss = call(x).square().mean()
    with Operators() as operators:
        loss.backward()
    return operators


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_of_transformers(attention: str, use_reentrant: bool) -> None:
    llama = ZOO["llama"]
    model = llama.make_model(attention).train()
    inputs = llama.make_inputs(training=True, mask="right") | {"use_cache": False}
    reference = train64(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    eager = train(model, model, inputs)
    with all_handled() as records:
        candidate = train(compile_fxopt(model), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    assert_closer(reference, candidate, eager, roundings=others)
    assert sum(len(record.applied("rewrite-attention")) for record in records) == LAYERS


def test_no_graph_break_more_than_a_backend_that_changes_nothing() -> None:
    llama = ZOO["llama"]

    def run(backend: Callable[..., Any]) -> None:
        model = llama.make_model("sdpa").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        compiled = torch.compile(model, backend=backend)
        for seq in (13, 17):
            train(compiled, model, llama.make_inputs(seq=seq, training=True) | {"use_cache": False})

    plain = compile_stats(Counting("eager"), run)
    with all_handled():
        ours = compile_stats(Counting("fxopt", options={"host": "eager", "strict": True}), run)
    assert ours == plain


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_blocks(kind: str, rate: float) -> None:
    """With dropout, the recomputed blocks must draw the numbers of the first time: eager's, op by op."""
    model, x = make_stack(CHECKPOINTS[kind], rate), hidden()
    unwrapped = double_model(make_stack(call_directly, rate))
    with reference_mode():
        reference = step(unwrapped, unwrapped, to_double(x))
    eager = step(model, model, x)
    with all_handled() as records:
        candidate = step(compile_fxopt(model), model, x)
    assert_closer(reference, candidate, eager)
    (record,) = records
    assert len(record.applied("rewrite-attention")) == LAYERS


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_blocks_are_recomputed(kind: str) -> None:
    """As often as eager recomputes them; selective checkpointing keeps what the policy says."""
    model, x = make_stack(CHECKPOINTS[kind]), hidden()
    operators = recomputed(compile_fxopt(model), x)
    assert operators.starting("aten._softmax.") == LAYERS
    alone = recomputed(compile_fxopt(make_stack(call_directly)), x)
    assert alone.starting("aten._softmax.") == 0
    more = operators.starting(*MATMULS) - alone.starting(*MATMULS)
    # Three or four projections in each block, as the last one's result may not be needed.
    assert more == 0 if kind == "selective" else 3 * LAYERS <= more <= 4 * LAYERS


def test_preserve_rng_state_is_the_users_choice() -> None:
    """Without it the numbers drawn the second time are others, in eager as in compiled code."""
    wrap = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    model, x = make_stack(wrap, 0.25), hidden()
    kept = make_stack(CHECKPOINTS["non_reentrant"], 0.25)
    candidate, eager = (step(call, model, x)["inputs"]["x"].grad for call in (compile_fxopt(model), model))
    other = step(kept, kept, x)["inputs"]["x"].grad
    torch.testing.assert_close(candidate, eager)
    assert not torch.allclose(candidate, other)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gradients_on_inductor_belong_to_the_dropout_of_the_forward(kind: str) -> None:
    """Inductor draws numbers of its own. Attention with fixed weights is linear in V, so by Euler's identity
    V times the gradient by V is the result, but only if both passes dropped the same entries."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1)
        return dropout(weights, 0.5) @ v

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return CHECKPOINTS[kind](attend, q, k, v)

    q, k, v = (torch.randn(B, H, S, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with all_handled() as records:
        result = compile_fxopt(model, host="inductor")(q, k, v).sum()
    result.backward()
    assert len(records[0].applied("rewrite-attention")) == 1
    assert v.grad is not None
    torch.testing.assert_close((v * v.grad).sum(), result)
    assert not torch.allclose(result, scaled_dot_product_attention(q, k, v).sum())
