"""Steps past Dynamo's guards: each thing that a step relies on is broken once; the answer stays eager's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.runtime import step_loops
from fxopt.runtime.decode_path import DecodePath
from fxopt.runtime.step_loops import PythonLoops
from support.stepping import compiled_once, kept_compiler

FACTOR = 1.0


def scaled(value: torch.Tensor) -> torch.Tensor:
    return value * 0.5


def negated(value: torch.Tensor) -> torch.Tensor:
    return value * -0.5


class Rows:
    def __init__(self) -> None:
        self.keys = torch.linspace(0, 1, 15).view(1, 5, 3)
        self.rate = 1.0


class Cache:
    def __init__(self) -> None:
        self.layers = [Rows(), Rows()]


class Decoder(torch.nn.Module):
    shift = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
        self.register_buffer("offset", torch.linspace(0, 1, 3))
        self.scale = 0.5

    def forward(
        self, x: torch.Tensor, cache: Cache, mask: torch.Tensor | None = None, rate: float = 1.0
    ) -> dict[str, Any]:
        for linear, rows in zip(self.linears, cache.layers, strict=True):
            rows.keys = torch.cat([rows.keys, linear(x) + self.offset], 1)
            live = rows.keys if mask is None else rows.keys * mask[..., None]
            x = x + scaled(live.sum(1, keepdim=True)) * self.scale * rows.rate * rate * FACTOR + self.shift
        if self.training:
            x = x + 1
        return {"x": x.tanh(), "cache": cache}


class World:
    """The decoder compiled, and an eager twin, each with a cache; both take the same steps."""

    def __init__(self, compiled: Any, twin: Decoder) -> None:
        self.compiled, self.twin = compiled, twin
        self.model: Decoder = compiled._orig_mod
        self.path = DecodePath(compiled)
        self.caches = [Cache(), Cache()]

    def both(self, change: Callable[[Any, Cache], object]) -> None:
        for model, cache in zip((self.model, self.twin), self.caches, strict=True):
            change(model, cache)

    def step(self, *, masked: bool = False, rows: int = 1, **how: Any) -> bool:
        """One step of both, with equal results; whether it went past the guards."""
        x = torch.linspace(-1, 1, 3 * rows).view(1, rows, 3)
        before = DecodePath.taken
        results = []
        for call, cache in zip((self.path, self.twin), self.caches, strict=True):
            if masked:
                how["mask"] = torch.ones(1, cache.layers[0].keys.shape[1] + rows)
            results.append(call(x=x.clone(), cache=cache, **how))
        assert torch.equal(results[0]["x"], results[1]["x"])
        assert results[0]["cache"] is self.caches[0]
        for mine, other in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
            assert torch.equal(mine.keys, other.keys)
        return DecodePath.taken > before

    def learned(self, **how: Any) -> World:
        taken = [self.step(**how) for _ in range(10)]
        assert taken[-2:] == [True, True], taken
        return self


compiled = compiled_once(Decoder)
fresh_compiler = kept_compiler()


@pytest.fixture
def world(compiled: Any) -> World:
    return World(compiled, copy.deepcopy(compiled._orig_mod))


def test_steps_go_past_the_guards(world: World) -> None:
    assert not isinstance(step_loops.CURRENT.loops, PythonLoops)
    world.learned()
    assert all(world.step() for _ in range(20))


def test_without_a_compiler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loops.CURRENT, "loops", PythonLoops())
    for change in (_layout, _edited, _attributes_replaced):
        world.learned()
        assert all(world.step() for _ in range(5))
        world.both(change)
        assert not world.step()
    weight = world.model.linears[0].weight
    weight.data = weight.data.contiguous()


def test_buffers_that_are_full_grow(world: World) -> None:
    world.learned()
    taken = [world.step() for _ in range(400)]
    assert 380 < sum(taken) < 400


def test_a_mask_that_grows(world: World) -> None:
    world.learned(masked=True)
    assert all(world.step(masked=True) for _ in range(5))


def test_two_caches_by_turns(compiled: Any, world: World) -> None:
    """Each call of generate has a path of its own."""
    other = World(compiled, copy.deepcopy(world.model)).learned()
    world.learned()
    assert all(each.step() for _ in range(5) for each in (world, other))


def _parameter(model: Any, cache: Cache) -> None:
    model.linears[0].weight = torch.nn.Parameter(torch.eye(3))


def _layout(model: Any, cache: Cache) -> None:
    model.linears[0].weight.data = model.linears[0].weight.data.t().contiguous().t()


def _module(model: Any, cache: Cache) -> None:
    model.linears[1] = torch.nn.Linear(3, 3, bias=False)
    model.linears[1].weight.fill_(0.5)


def _buffer(model: Any, cache: Cache) -> None:
    model.offset = torch.full((3,), 2.0)


def _attribute(model: Any, cache: Cache) -> None:
    model.scale = 0.125


class Doubled(torch.nn.Linear):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(value)


def _class(model: Any, cache: Cache) -> None:
    model.linears[0].__class__ = Doubled


def _edited(model: Any, cache: Cache) -> None:
    cache.layers[0].keys = cache.layers[0].keys * 2


def _cropped(model: Any, cache: Cache) -> None:
    cache.layers[0].keys = cache.layers[0].keys[:, :-2]


def _turned(model: Any, cache: Cache) -> None:
    cache.layers[1].keys.copy_(cache.layers[1].keys.flip(1))
    cache.layers.reverse()


def _rate(model: Any, cache: Cache) -> None:
    cache.layers[1].rate = -1.0


def _attributes_replaced(model: Any, cache: Cache) -> None:
    cache.layers[1].__dict__ = dict(vars(cache.layers[1]))


_CLASS = pytest.param(
    _class, marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo itself does not see it")
)


@pytest.mark.parametrize(
    "change",
    [_parameter, _layout, _module, _buffer, _attribute, _CLASS, _edited, _cropped, _turned, _rate,
     _attributes_replaced, lambda model, cache: model.train()],
)  # fmt: skip
def test_a_change_of_the_model_or_the_cache_is_seen(compiled: Any, world: World, change: Any) -> None:
    kept = copy.deepcopy(world.model)
    world.learned()
    world.both(change)
    assert not world.step()
    for name in ("scale", "offset", "training"):
        setattr(world.model, name, getattr(kept, name))
    world.model.linears = kept.linears
    world.model.eval()


def test_what_was_kept_of_the_cache_stays_as_it_is(world: World) -> None:
    for keep in (lambda keys: keys, lambda keys: keys[:, :3], lambda keys: keys.numpy()):
        world.learned()
        kept = keep(world.caches[0].layers[0].keys)
        then = copy.deepcopy(kept)
        assert not world.step()
        kept += 1
        assert (kept == then + 1).all()
        world.step()


def test_values_written_into_the_cache_count(world: World) -> None:
    world.learned()
    world.both(lambda model, cache: cache.layers[0].keys.mul_(0.5))
    assert world.step()


def test_another_cache(world: World) -> None:
    world.learned()
    world.caches = [Cache(), Cache()]
    assert not world.step()


def test_other_arguments(world: World) -> None:
    for how in ({"rate": 2.0}, {"masked": True}, {"rows": 2}, {"mask": None}):
        world.learned()
        assert not world.step(**how)


class Holder:
    """A state that each step replaces, held in an attribute, a dict or a list."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = torch.zeros(1, 1, 3)
        self.named: dict[str, Any] = {"state": torch.zeros(1, 1, 3)}
        self.listed: list[Any] = [None, torch.zeros(1, 1, 3)]


class Recurrent(Decoder):
    """Attention of some layers and a running sum of others, as hybrid decoders have them."""

    def forward(self, x: torch.Tensor, cache: Cache, held: Holder) -> dict[str, Any]:  # type: ignore[override]
        if held.kind == "attribute":
            held.state = state = held.state * 0.5 + x
        elif held.kind == "dict":
            held.named["state"] = state = held.named["state"] * 0.5 + x
        else:
            held.listed[1] = state = held.listed[1] * 0.5 + x
        return super().forward(x + state, cache)


@pytest.mark.parametrize("kind", ["attribute", "dict", "list"])
def test_a_state_that_each_step_replaces(kind: str) -> None:
    compiled = torch.compile(Recurrent().eval(), backend="fxopt", options={"host": "eager"})
    path, twin = DecodePath(compiled), compiled._orig_mod
    caches, holders = (Cache(), Cache()), (Holder(kind), Holder(kind))
    for step in range(10):
        x = torch.linspace(-1, 1, 3).view(1, 1, 3) / (step + 1)
        for call, cache, held in zip((path, twin), caches, holders, strict=True):
            call(x=x.clone(), cache=cache, held=held)
        assert torch.equal(caches[0].layers[1].keys, caches[1].layers[1].keys), step


def test_positional_arguments(world: World) -> None:
    world.learned()
    before, x = DecodePath.taken, torch.ones(1, 1, 3)
    found = world.path(x, world.caches[0])["x"]
    assert torch.equal(found, world.twin(x, world.caches[1])["x"])
    assert DecodePath.taken == before


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _hook(module: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, result: {**result, "x": result["x"] + 1})
    yield
    handle.remove()


@contextlib.contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    yield
    setattr(holder, name, before)


@contextlib.contextmanager
def _hooked_everywhere(world: World) -> Iterator[None]:
    handle = all_modules.register_module_forward_pre_hook(lambda module, args: None)
    yield
    handle.remove()


@contextlib.contextmanager
def _hooked_twice(world: World) -> Iterator[None]:
    with _hook(world.model), _hook(world.twin):
        yield


@contextlib.contextmanager
def _hooked_outside(world: World) -> Iterator[None]:
    with _hook(world.compiled), _hook(world.twin):
        yield


@contextlib.contextmanager
def _dispatched(world: World) -> Iterator[None]:
    with _Dispatch():
        yield
    torch._dynamo.reset()  # Dynamo leaves a function alone that it has met in such a mode


SURROUNDINGS: dict[str, Callable[[World], AbstractContextManager[Any]]] = {
    "gradients": lambda world: torch.enable_grad(),
    "inference mode": lambda world: torch.inference_mode(),
    "function mode": lambda world: _Functions(),
    "dispatch mode": _dispatched,
    "default device": lambda world: torch.device("cpu"),
    "forward mode": lambda world: torch.autograd.forward_ad.dual_level(),
    "stance": lambda world: torch.compiler.set_stance("force_eager"),
    "class attribute": lambda world: _set(Decoder, "shift", -0.25),
    "code": lambda world: _set(scaled, "__code__", negated.__code__),
    "defaults": lambda world: _set(Decoder.forward, "__defaults__", (None, 3.0)),
    "forward": lambda world: _set(Decoder, "forward", lambda self, x, cache: {"x": x, "cache": cache}),
    "hook": _hooked_twice,
    "hook outside": _hooked_outside,
    "hook everywhere": _hooked_everywhere,
}


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings(world: World, name: str) -> None:
    world.learned()
    with SURROUNDINGS[name](world):
        assert not world.step()


def test_a_global_variable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.learned()
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert not world.step()


def test_autocast(world: World) -> None:
    world.learned()
    before = DecodePath.taken
    with torch.autocast("cpu", torch.bfloat16):
        world.path(x=torch.ones(1, 1, 3), cache=world.caches[0])
    assert DecodePath.taken == before


def test_an_error_leaves_the_slow_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.learned()
    step = world.path._step
    assert step is not None

    def broken(*inputs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step.call, "compiled", broken)
        world.path(x=torch.ones(1, 1, 3), cache=world.caches[0])
    assert not world.step()


def test_reset(compiled: Any) -> None:
    world = World(compiled, copy.deepcopy(compiled._orig_mod)).learned()
    DecodePath.forget()
    assert not world.step()
    world.learned()
    torch._dynamo.reset()
    assert not world.step()
