"""Runs a Dynamo graph under tracing, node by node: what is recorded, and what is recorded as it stands.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def traced(run: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The pre-dispatch ATen ops that `run` calls on these inputs."""
    # Nobody reads which Python function each op came from, and noting it takes a tenth of the trace.
    with _without_tensor_meta():
        return make_fx(run, pre_dispatch=True, _disable_torch_fn_metadata_mode=True)(*inputs)


@contextmanager
def _without_tensor_meta() -> Iterator[None]:
    """In this thread, values that are recorded get no `tensor_meta`.

    It says whether a tensor is contiguous, and where that depends on a size, asking adds a guard: one that
    tells a window of keys which is full from one which fills.
    """
    module: Any = proxy_tensor
    original, own = module._extract_tensor_metadata, threading.get_ident()

    def extract(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == own else original(*args, **kwargs)

    module._extract_tensor_metadata = extract
    try:
        yield
    finally:
        module._extract_tensor_metadata = original


class CannotNormalize(Exception):  # noqa: N818 - a typed refusal, not an error: it becomes evidence
    """The graph has something that cannot be re-traced. `reason` says what."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason  # the interpreter appends to the message where it stood


# What a call may return without having been recorded: tensors that it passes on, and constants of the code.
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (int, float, complex, str, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_VALUES = (torch.Tensor, *_SYMBOLS, *_CONSTANTS, tuple, list, dict)


def _tracer() -> Any:
    proxy_mode = get_proxy_mode()
    if proxy_mode is None:
        raise CannotNormalize("a call met outside of tracing")
    return proxy_mode.tracer


class Retrace(fx.Interpreter):
    """Runs the Dynamo graph under tracing; higher-order ops are recorded, not run."""

    def __init__(
        self, gm: fx.GraphModule, subgraphs: dict[str, fx.GraphModule], mode: FakeTensorMode
    ) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.subgraphs = subgraphs
        self.fake_mode = mode
        self._exits: list[Callable[[], None]] = []  # of the regions that the graph is in, innermost last
        self._attributes: dict[str, Any] = {}
        # Results of calls that are no values, by identity: (result, its proxy).
        self._states: dict[int, tuple[Any, Any]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Regions that a trace entered before it failed are left here, inside of the tracing modes that
        stand around them: to leave them later would bring those back.
        """
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._exits:
                self._exits.pop()()

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        result = super().run_node(n)
        if not isinstance(
            n.target, HigherOrderOperator
        ):  # its outputs are recorded with Dynamo's own symbols
            rebind_unbacked(self.fake_mode.shape_env, n, result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator):
            return _record_call(target, args, kwargs, self._node, self.fake_mode)
        if target is torch.amp.autocast_mode._enter_autocast:
            return self._enter_autocast(args)
        if target is torch.amp.autocast_mode._exit_autocast:
            return self._exits.pop()()
        if target is _DATA:
            return _detached(*args)
        _refuse_call(target)
        result = self._traced(
            lambda: super(Retrace, self).call_function(target, args, kwargs), target, args, kwargs
        )
        if target is torch.autograd.grad_mode._enter_inference_mode:
            self._exits.append(lambda: torch.autograd.grad_mode._exit_inference_mode(result))
        elif target is torch.autograd.grad_mode._exit_inference_mode:
            self._exits.pop()
        return result

    def _traced(
        self, run: Callable[[], Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call. One that acts on the state of torch alone (inference mode, the kernels that attention
        may use, the default dtype) leaves no trace: it is recorded as it stands."""
        graph = _tracer().graph
        before = len(graph.nodes)
        result = run()
        if len(graph.nodes) == before and not isinstance(result, _VALUES):
            proxy = self._record_state(target, args, kwargs)
            if result is not None:
                self._states[id(result)] = (result, proxy)
        return result

    def _record_state(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = _tracer()

        def to_proxy(value: Any) -> Any:
            known = self._states.get(id(value))
            return known[1] if known is not None and known[0] is value else tracer.unwrap_proxy(value)

        args, kwargs = pytree.tree_map(to_proxy, (args, kwargs))
        return tracer.create_proxy("call_function", target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Conversions to the dtype of another tensor read its metadata only: write them so."""
        if target in ("type_as", "to") and len(args) == 2 and isinstance(args[1], torch.Tensor):
            source, like = args
            same = source.device == like.device
            return super().call_method("to", (source, *(() if same else (like.device,)), like.dtype), kwargs)
        return super().call_method(target, args, kwargs)

    def _enter_autocast(self, args: tuple[Any, ...]) -> None:
        """Really enter: the context manager records the call; traced values are what autocast makes them."""
        region = torch.amp.autocast_mode.autocast(*args)
        region.__enter__()
        self._exits.append(lambda: region.__exit__(None, None, None))

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.subgraphs:
            return self.subgraphs[target]
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        if target not in self._attributes:
            self._attributes[target] = _record_attribute(target, value, self.fake_mode)
        return self._attributes[target]


_DATA = getattr(torch._C._autograd, "_get_data_attr", object())  # how Dynamo spells ``x.data``
DATA_KEY = "fxopt_data"


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """``x.data``, which would leave no trace.

    It is ``x.detach()``, but for writes through it, which autograd does not notice.
    """
    result = tensor.detach()
    _tracer().unwrap_proxy(result).node.meta[DATA_KEY] = True
    return result


# They trace autograd inside the graph, and need inputs that require grad; ours do not.
_GRAD_TRANSFORMS = ("_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad", "_wrap_for_grad")


def _refuse_call(target: Any) -> None:
    name = str(getattr(target, "__name__", ""))
    if name in _GRAD_TRANSFORMS:
        raise CannotNormalize(f"a functorch grad transform ({name}) is traced inside the graph")
    if name.startswith("set_autocast"):
        # Passes know autocast by its regions; this switches it with no region around it.
        raise CannotNormalize(f"autocast is switched by {name}, not by a region")


def _record_call(
    op: HigherOrderOperator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    node: fx.Node,
    mode: FakeTensorMode,
) -> Any:
    """Record `op` as one call, with the outputs that Dynamo recorded for it as fresh fakes."""
    if "example_value" not in node.meta:
        raise CannotNormalize(f"higher-order op {op} has no recorded output")
    tracer = _tracer()

    def to_proxy(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return _module_proxy(tracer, value)
        return tracer.unwrap_proxy(value)

    is_leaf = _is_module
    proxy_args, proxy_kwargs = pytree.tree_map(to_proxy, (args, kwargs), is_leaf=is_leaf)
    with disable_proxy_modes_tracing():
        outputs = pytree.tree_map(lambda v: fresh(v, mode), node.meta["example_value"])
    proxy = tracer.create_proxy("call_function", op, proxy_args, proxy_kwargs, name=node.name)
    return track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)


def _is_module(value: Any) -> bool:
    return isinstance(value, torch.nn.Module)


def _module_proxy(tracer: Any, module: torch.nn.Module) -> Any:
    """A get_attr of `module`, registered once on the traced root."""
    root = tracer.root
    for name, known in root._modules.items():
        if known is module:
            return tracer.create_proxy("get_attr", name, (), {})
    base = getattr(module, "_fxopt_name", "subgraph")
    name, count = base, 0
    while hasattr(root, name):
        count += 1
        name = f"{base}_{count}"
    root.register_module(name, module)
    return tracer.create_proxy("get_attr", name, (), {})


def _record_attribute(target: str, value: torch.Tensor, mode: FakeTensorMode) -> Any:
    """A constant tensor held by the Dynamo graph module, as a get_attr of the new one."""
    tracer = _tracer()
    name = "_fxopt_" + target.replace(".", "_")
    if isinstance(value, torch.nn.Parameter):
        tracer.root.register_parameter(name, value)
    else:
        tracer.root.register_buffer(name, value)
    with disable_proxy_modes_tracing():
        fake = mode.from_tensor(value, static_shapes=True)
    return track_tensor_tree(
        fake, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer
    )


def fresh(value: Any, mode: FakeTensorMode) -> Any:
    """A fake with the same metadata and no history. Symbolic sizes are shared with the original."""
    if not isinstance(value, torch.Tensor):
        return value
    if is_subclass(value):
        raise CannotNormalize(f"a tensor subclass {type(value).__name__} is an input")
    if value.layout is not torch.strided or value.is_quantized:
        raise CannotNormalize(f"a tensor with layout {value.layout}, dtype {value.dtype} is an input")
    if value.is_conj() or value.is_neg():
        raise CannotNormalize("an input has its conjugate or negative bit set")
    with mode:
        found = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    symbol = getattr(value, "item_memo", None)
    if symbol is not None:
        setattr(found, "item_memo", symbol)  # noqa: B010 - a Python number that Dynamo made an input
    return found


def is_subclass(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value)
