"""substitute-qlinear: linear layers of all spellings take quantized weights; others say why not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt.runtime.packed_weights import STORE
from support.golden import assert_golden
from support.quantizing import quantizing, rounded, texts, with_rounded

K, N = 384, 512


class Net(nn.Module):
    """One layer, called as a test says."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor], torch.Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.run, self.proj = run, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.proj, x)


def module(layer: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer(x)
    return out


SPELLINGS: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "linear": (module, lambda: nn.Linear(K, N)),
    "no_bias": (module, lambda: nn.Linear(K, N, bias=False)),
    "conv1d": (module, lambda: Conv1D(N, K)),
    "matmul": (lambda layer, x: x @ layer.weight.t() + layer.bias, lambda: nn.Linear(K, N)),
    "transposed": (lambda layer, x: x @ layer.weight.transpose(0, 1), lambda: nn.Linear(K, N)),
    "mm": (lambda layer, x: x.reshape(-1, K).mm(layer.weight.T), lambda: nn.Linear(K, N)),
    "permuted": (lambda layer, x: x @ layer.weight.permute(1, 0), lambda: nn.Linear(K, N)),
    "twice": (lambda layer, x: layer(x) * layer(x.sin()), lambda: nn.Linear(K, N)),
}


def net(spelling: str) -> Net:
    run, make = SPELLINGS[spelling]
    return Net(run, make()).eval()


def expected(model: nn.Module, format: str = "int8", group: int | None = None) -> nn.Module:
    """The model with weights as they are stored."""
    model = copy.deepcopy(model)
    weight, turned = model.proj.weight, isinstance(model.proj, Conv1D)
    stored = rounded(weight.t() if turned else weight, format, group).dequantize(weight.dtype)
    with torch.no_grad():
        weight.copy_(stored.t() if turned else stored)
    return model


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-5) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and float((a - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (2, 0, K)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fires(spelling: str, shape: tuple[int, ...]) -> None:
    model = net(spelling)
    found = quantizing(model)
    x = torch.randn(shape)
    result, wanted = found.call(x), expected(model)(x)
    assert result.shape == wanted.shape
    assert not wanted.numel() or close(result, wanted)
    assert len(found.applied) == (2 if spelling == "twice" else 1), found.refused


FORMATS = [
    ("int8", {}, "int8", None), ("int4", {}, "int4", None), ("int4", {"group_size": 128}, "int4", 128),
    ("nf4", {}, "nf4", None), ("fp4", {}, "fp4", None), ("fp8", {}, "fp8_e4m3", None),
    ({"*roj": "int4", "*": "none"}, {"group_size": 0}, "int4", 0),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "more", "format", "group"), FORMATS)
def test_fires_for_every_format(scheme: Any, more: dict[str, Any], format: str, group: int | None) -> None:
    model, x = net("linear"), torch.randn(5, K)
    found = quantizing(model, scheme, **more)
    assert close(found.call(x), expected(model, format, group)(x))
    assert len(found.applied) == 1, found.refused


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic"])
def test_fires_with_rounded_activations(scheme: str) -> None:
    model, x = net("linear"), torch.randn(5, K)
    found = quantizing(model, scheme)
    assert close(found.call(x), model(x), 6e-2)
    assert not close(found.call(x), model(x), 3e-3)
    assert len(found.applied) == 1, found.refused


def test_fires_for_one_graph_at_all_numbers_of_tokens() -> None:
    model = net("linear")
    stored, found = expected(model), quantizing(model, dynamic=True)
    for tokens in (5, 1, 70, 0, 13):
        x = torch.randn(tokens, K)
        assert not tokens or close(found.call(x), stored(x))
    assert len(found.applied) <= 3


def test_fires_under_autocast() -> None:
    model, x = net("linear"), torch.randn(5, K)

    def call(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    found = quantizing(call)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = expected(model)(x)
    assert close(found.call(x), wanted, 1e-2)
    assert len(found.applied) == 1, found.refused


def test_fires_in_inductor() -> None:
    model, x = net("linear"), torch.randn(5, K)
    found = quantizing(lambda x: torch.relu(model(x)), "int8", host="inductor")
    assert close(found.call(x), torch.relu(expected(model)(x)))
    assert len(found.applied) == 1, found.refused


def test_fires_golden() -> None:
    before, after = texts(net("linear"), [torch.randn(2, 3, K)])
    assert_golden(before, "substitute_qlinear", "linear_before")
    assert_golden(after, "substitute_qlinear", "linear_after")


# ---- what must stay as it is ----


class Refusing(nn.Module):
    """Layers of which one is looked at."""

    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def tied() -> nn.Module:
    both = Refusing(
        lambda m, x: m.out(m.words((x[:, 0] > 0).long())), words=nn.Embedding(N, K), out=nn.Linear(K, N)
    )
    both.out.weight = both.words.weight
    return both


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    out = m.proj(x)
    m.proj.weight.mul_(2)
    return out


def kept_wide() -> nn.Module:
    low = {f"low{each}": nn.Linear(K, K).bfloat16() for each in range(3)}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for name in low:
            x = getattr(m, name)(x.bfloat16())
        out: torch.Tensor = m.wide(x.float())
        return out

    return Refusing(run, **low, wide=nn.Linear(K, N))


def infinite() -> nn.Module:
    layer = nn.Linear(K, N)
    with torch.no_grad():
        layer.weight[3, 4] = float("inf")
    return Refusing(lambda m, x: m.proj(x), proj=layer)


def line(**names: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(K, width) for name, width in names.items()}


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "head": (lambda: Refusing(lambda m, x: m.lm_head(x), **line(lm_head=N)), "it makes the logits"),
    "tied": (tied, "its weight is also read by an embedding"),
    "tiny": (lambda: Refusing(lambda m, x: m.proj(x), **line(proj=16)), "worth it from 131072"),
    "written": (lambda: Refusing(written, **line(proj=N)), "its weight is written by mul_"),
    "kept_wide": (kept_wide, "the model keeps it in float32"),
    "infinite": (infinite, "entries that are not finite"),
    "a_part": (lambda: Refusing(lambda m, x: nn.functional.linear(x, m.proj.weight[:N // 2]), **line(proj=N)),
               "wanted a weight that is a parameter of the graph, saw the result of aten.slice.Tensor"),
    "computed": (lambda: Refusing(lambda m, x: nn.functional.linear(x, m.proj.weight * 2), **line(proj=N)),
                 "saw the result of aten.mul.Tensor"),
    "double": (lambda: Refusing(lambda m, x: m.proj(x.double()), proj=nn.Linear(K, N).double()),
               "saw torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str) -> None:
    make, reason = NEAR_MISSES[case]
    model = make()
    other = copy.deepcopy(model)
    found = quantizing(model)
    x = torch.randn(3, K)
    result, wanted = found.call(x), other(x)
    applied = 3 if case == "kept_wide" else 0
    assert len(found.applied) == applied
    assert any(reason in each for each in found.refused), found.refused
    if not applied:
        assert torch.equal(result, wanted) or case == "infinite"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"skip": ["*proj"]}, "the options skip '*proj'"),
        ({"quantize": {"*.other": "int4"}}, "the options name no format for it"),
        ({"quantize": {"proj": None, "*": "int4"}}, "the options leave 'proj' alone"),
    ],
)
def test_stays_where_the_options_say_so(more: dict[str, Any], reason: str) -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model, more.pop("quantize", "int8"), **more)
    assert torch.equal(found.call(x), model(x))
    assert found.refused == [reason]


def test_stays_alone_without_the_option() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model, None)
    assert torch.equal(found.call(x), model(x))
    assert found.evidence == [[]]


def test_refuses_checkpointed_regions() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = net("linear").requires_grad_(False), torch.randn(3, K)
    found = quantizing(lambda x: checkpoint(model, x, use_reentrant=False))
    with torch.enable_grad():
        result = found.call(x.requires_grad_())
    assert torch.equal(result, model(x))
    assert "saw an input of a sub-graph, as of a checkpointed region" in found.refused[0]


def test_a_rule_for_a_layer_is_meant() -> None:
    model = Refusing(lambda m, x: m.lm_head(x), **line(lm_head=16))
    found = quantizing(model, {"lm_head": "int8"})
    assert close(found.call(torch.ones(1, K)), model(torch.ones(1, K)), 2e-2)
    assert len(found.applied) == 1, found.refused


# ---- gradients ----


def test_not_where_the_weight_is_trained() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    with torch.enable_grad():
        found.call(x).sum().backward()
    assert found.refused == ["its weight is trained"]
    assert model.proj.weight.grad is not None


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_gradients_of_adapters_flow_through(host: str) -> None:
    """As under LoRA: the base is frozen, the adapters before and behind it are trained."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(K, N)
            self.base.requires_grad_(False)
            self.down, self.up, self.first = (
                nn.Linear(K, 4, bias=False),
                nn.Linear(4, N, bias=False),
                nn.Linear(K, K),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            return self.base(x) + self.up(self.down(x))

    with torch.enable_grad():
        model = Adapted()
        stored = copy.deepcopy(model)
        with_rounded(stored, ["base"], "int4")
        found = quantizing(model, "int4", host=host)
        x = torch.randn(6, K)
        for each in (found.call, stored):
            each(x).square().sum().backward()
        assert len(found.applied) == 1, found.refused
        for mine, theirs in zip(model.parameters(), stored.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or close(mine.grad, theirs.grad, 1e-4)


# ---- weights that change after compilation ----


def _merge(weight: nn.Parameter) -> None:
    weight.data += torch.randn_like(weight)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in_place": lambda weight: weight.mul_(3),
    "data_in_place": lambda weight: weight.data.mul_(3),
    "data_merge": _merge,
    "data_replaced": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "copied": lambda weight: weight.copy_(torch.randn_like(weight)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_noticed(change: str) -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    found.call(x)
    for _ in range(2):
        CHANGES[change](model.proj.weight)
        assert close(found.call(x), expected(model)(x))
    assert len(found.evidence) == 1


def test_a_loaded_state_and_another_dtype_are_noticed() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    found.call(x)
    model.load_state_dict(net("linear").state_dict())
    assert close(found.call(x), expected(model)(x))
    model.to(torch.bfloat16)
    assert close(found.call(x.bfloat16()), expected(model)(x.bfloat16()), 1e-2)


def test_an_optimizer_step_is_noticed() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    found.call(x)
    with torch.enable_grad():
        model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert close(found.call(x), expected(model)(x))


def test_a_change_that_cannot_be_seen_needs_to_be_told() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    before = found.call(x)
    model.proj.weight.data[0] += 1
    assert torch.equal(found.call(x), before)
    fxopt.invalidate(model)
    assert close(found.call(x), expected(model)(x))
    model.proj.weight.data[0] += 1
    fxopt.invalidate()
    assert close(found.call(x), expected(model)(x))


def test_forms_are_shared_and_freed() -> None:
    STORE.forget()
    model = net("linear")
    for make in (torch.relu, torch.sin, torch.neg):
        quantizing(Net(lambda layer, x, make=make: make(layer(x)), model.proj)).call(torch.randn(3, K))
    assert len(STORE) == 1
    assert STORE.nbytes == K * N + 4 * N
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE) == 0


def test_a_weight_that_becomes_infinite_gives_nan() -> None:
    model, x = net("linear"), torch.randn(3, K)
    found = quantizing(model)
    found.call(x)
    model.proj.weight[5] = float("inf")
    out = found.call(x)
    assert not out[:, 5].isfinite().any()
    assert out[:, :5].isfinite().all()
