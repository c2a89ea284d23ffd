"""Inputs stay what Dynamo made of them: parameters and marked tensors are static inputs, copied by nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.report.record import collect
from support.compile_stats import CompileStats, Counting, compile_stats
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture
from support.numerics import assert_closer


class Model(nn.Module):
    """Parameters (one of them used twice), a buffer that is written, a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.up.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("offset", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tied(self.up(x).relu())) + self.offset


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_dynamo_wrote_on_the_inputs_is_carried_over(dynamic: bool) -> None:
    found = capture(Model(), torch.randn(3, 6), dynamic=dynamic)
    before, after = placeholders(found.dynamo[0]), placeholders(found.graph)
    assert [node.name for node in after] == [node.name for node in before]
    assert [node.target for node in after] == [node.target for node in before]
    assert any("tensor_dict" in node.meta for node in before)
    for old, new in zip(before, after, strict=True):
        assert new._dynamo_source == old._dynamo_source
        for key, value in old.meta.items():
            assert new.meta[key] is value, key


def test_what_dynamo_wrote_on_the_module_is_carried_over() -> None:
    found = capture(Model(), torch.randn(3, 6))
    before, after = found.dynamo[0], found.graph
    assert "dynamo_compile_id" in before.meta
    for key, value in before.meta.items():
        assert after.meta[key] is value, key
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        assert getattr(after, name) is getattr(before, name)


def test_dynamos_graph_is_left_as_it_was() -> None:
    texts: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        from fxopt.frontend.normalize import normalize

        fakes = [node.meta["example_value"] for node in placeholders(gm)]
        versions = [fake._version for fake in fakes]
        texts.append(gm.print_readable(print_output=False))
        normalize(gm, inputs)
        texts.append(gm.print_readable(print_output=False))
        assert [fake._version for fake in fakes] == versions
        return gm.forward

    torch.compile(Model(), backend=backend)(torch.randn(3, 6))
    assert texts[0] == texts[1]


def static_inputs(monkeypatch: pytest.MonkeyPatch, backend: str, run: Callable[[str], None]) -> list[Any]:
    """What AOTAutograd tells Inductor of each graph: the indices of static inputs, and how many inputs."""
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx, config

    seen: list[Any] = []

    def watched(gm: fx.GraphModule, inputs: Any, **given: Any) -> Any:
        seen.append((sorted(given.get("static_input_idxs", ())), len(inputs)))
        return make_boxed_func(gm.forward)  # no need to compile the graph

    with monkeypatch.context() as patch, config.patch(force_disable_caches=True):
        patch.setattr(compile_fx, "_compile_fx_inner", watched)
        torch._dynamo.reset()
        run(backend)
    return seen


def infer(backend: str) -> None:
    with torch.no_grad():
        torch.compile(Model().eval(), backend=backend)(torch.randn(3, 6))


def train(backend: str) -> None:
    torch.compile(Model(), backend=backend)(torch.randn(3, 6)).sum().backward()


def with_a_marked_input(backend: str) -> None:
    cache = torch.zeros(3, 6)
    torch._dynamo.mark_static_address(cache)

    def write(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.copy_(x * 2.0)
        return cache.sum(-1)

    torch.compile(write, backend=backend)(cache, torch.ones(3, 6))


@pytest.mark.parametrize("run", [infer, train, with_a_marked_input])
def test_the_same_inputs_are_static_as_for_inductor(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[str], None]
) -> None:
    wanted = static_inputs(monkeypatch, "inductor", run)
    assert any(indices for indices, _ in wanted)
    with collect() as records:
        assert static_inputs(monkeypatch, "fxopt", run) == wanted
    assert all(record.normalized for record in records)


def test_parameters_are_read_where_they_are() -> None:
    """Changed in place by an optimizer, a new value is seen with no recompile."""
    model = Model()
    x = torch.randn(3, 6)
    compiled = compile_fxopt(model)
    with all_handled() as records:
        compiled(x)
        with torch.no_grad():
            model.up.weight.mul_(-2.0)
            model.offset.add_(1.0)
        got = compiled(x)
    assert len(records) == 1
    with torch.no_grad():
        model.norm.reset_running_stats()
    wide = Model().double()
    wide.load_state_dict(model.state_dict())
    assert_closer(wide(x.double()), got, model(x))


def test_buffers_are_written_where_they_are() -> None:
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    where = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    compiled = compile_fxopt(model)
    for _ in range(2):
        x = torch.randn(3, 6)
        compiled(x)
        plain(x)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == where
    assert model.norm.num_batches_tracked == 2
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_training_steps_recompile_as_often_as_without_fxopt() -> None:
    def steps(backend: Counting) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled = torch.compile(model, backend=backend)
        for _ in range(3):
            compiled(torch.randn(3, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    wanted = compile_stats(Counting("eager"), steps)
    assert wanted == CompileStats(graphs=1, breaks={}, recompiles=0)
    assert compile_stats(Counting("fxopt", options={"host": "eager"}), steps) == wanted


def test_one_tensor_given_twice_is_seen_as_one() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return x * y

    x = torch.ones(3)
    with all_handled():
        assert compile_fxopt(f)(x, x).tolist() == [4.0] * 3
    assert x.tolist() == [2.0] * 3


def test_views_of_one_tensor_are_seen_as_sharing_memory() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = y * 1.0
        x.mul_(3.0)
        return before + y

    base = torch.arange(4.0)
    with all_handled():
        assert compile_fxopt(f)(base[:3], base[1:]).tolist() == [4.0, 8.0, 6.0]
