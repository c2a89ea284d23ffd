"""Dynamo graph -> pre-dispatch ATen: one spelling per op, source lines and symbolic shapes kept.

The graph is re-traced with ``make_fx(..., pre_dispatch=True)`` in Dynamo's own fake mode. Composite ops
stay whole (``linear``, ``softmax``, ``layer_norm``, ``scaled_dot_product_attention``, ``dropout``,
``cross_entropy_loss``), calls of higher-order ops stay calls and their sub-graphs are normalized
recursively, in-place ops stay in place, and autocast and grad-mode regions stay as the enter/exit nodes
that Dynamo wrote.

The trace runs on fresh fake tensors, never on Dynamo's: a write in the graph would otherwise change the
metadata that AOTAutograd reads later. They do not require grad: ops are recorded above autograd, so nothing
would change.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.frontend.subgraphs import PLAIN_CALLS
from fxopt.frontend.vmap import fold_vmap

ALIAS_KEY = "fxopt_alias"
NEEDS_GRAD_KEY = "fxopt_needs_grad"
PARAMETER_KEY = "fxopt_parameter"


class CannotNormalize(Exception):  # noqa: N818 - a typed refusal, not an error: it becomes evidence
    """The graph has something that cannot be re-traced. The message says what."""


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Return an equivalent graph module in pre-dispatch ATen. `gm` is left as it was.

    Args:
        gm: what Dynamo gave to the backend, or one piece that DDPOptimizer cut from it.
        example_inputs: one value for each placeholder, real or fake.

    Raises:
        CannotNormalize: with what stands in the way. Whatever else the re-trace raises is passed on.
    """
    mode = _fake_mode(gm, example_inputs)
    with preserve_grad_mode():
        return _normalize(gm, _fake_inputs(gm, example_inputs, mode), mode)


def preserve_grad_mode() -> torch.set_grad_enabled:
    """A graph may switch the grad mode and leave it switched; tracing must not leak that."""
    return torch.set_grad_enabled(torch.is_grad_enabled())


def _normalize(gm: fx.GraphModule, inputs: list[Any], mode: FakeTensorMode) -> fx.GraphModule:
    subgraphs = _normalize_subgraphs(gm, mode)
    retrace = _Retrace(fold_vmap(gm), subgraphs, mode)
    try:
        with preserve_node_meta(), mode:
            new = make_fx(_named(retrace.run, len(inputs)), pre_dispatch=True)(*inputs)
    finally:
        retrace.leave_all()
    _check_constants(new)
    new.graph.eliminate_dead_code(_must_stay)
    _carry_over(gm, new)
    return new


def _must_stay(node: fx.Node) -> bool:
    """A dead reader hides from the passes that a value has one reader only. Whatever has an effect stays."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return True
    return node.is_impure() or node.target._schema.is_mutable or "unbacked_bindings" in node.meta


def _check_constants(new: fx.GraphModule) -> None:
    """A value that tracing lost track of is baked into the graph as a constant: refuse."""
    for node in new.graph.find_nodes(op="get_attr"):
        value = getattr(new, str(node.target), None)
        if isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or _is_batched(value)):
            raise CannotNormalize(f"{node.name} stands for a value that could not be traced, as under vmap")


def _is_batched(value: torch.Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _named(run: Callable[..., Any], count: int) -> Callable[..., Any]:
    def graph(*args: Any) -> Any:
        if len(args) != count:
            raise CannotNormalize(f"{count} inputs were traced, {len(args)} given")
        return run(*args)

    return graph


class _Retrace(fx.Interpreter):
    """Runs the Dynamo graph under tracing; higher-order ops are recorded, not run."""

    def __init__(
        self, gm: fx.GraphModule, subgraphs: dict[str, fx.GraphModule], mode: FakeTensorMode
    ) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.subgraphs = subgraphs
        self.fake_mode = mode
        self.regions: list[torch.amp.autocast_mode.autocast] = []
        self._attributes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        result = super().run_node(n)
        rebind_unbacked(self.fake_mode.shape_env, n, result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator):
            return _record_call(target, args, kwargs, self._node, self.fake_mode)
        if target is torch.amp.autocast_mode._enter_autocast:
            return self._enter_autocast(args)
        if target is torch.amp.autocast_mode._exit_autocast:
            return self._exit_autocast()
        _refuse_functorch(target)
        return super().call_function(target, args, kwargs)

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
        self.regions.append(region)

    def _exit_autocast(self) -> None:
        self.regions.pop().__exit__(None, None, None)

    def leave_all(self) -> None:
        """Leave what a trace that failed half-way has entered."""
        while self.regions:
            self._exit_autocast()

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.subgraphs:
            return self.subgraphs[target]
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        if target not in self._attributes:
            self._attributes[target] = _record_attribute(target, value, self.fake_mode)
        return self._attributes[target]


def _refuse_functorch(target: Any) -> None:
    """Grad transforms trace autograd inside the graph: they need inputs that require grad; ours do not."""
    name = getattr(target, "__name__", "")
    if name in ("_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad", "_wrap_for_grad"):
        raise CannotNormalize(f"a functorch grad transform ({name}) is traced inside the graph")


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
    proxy_mode = get_proxy_mode()
    if proxy_mode is None:
        raise CannotNormalize(f"higher-order op {op} met outside of tracing")
    tracer: Any = proxy_mode.tracer

    def to_proxy(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return _module_proxy(tracer, value)
        return tracer.unwrap_proxy(value)

    is_leaf = _is_module
    proxy_args, proxy_kwargs = pytree.tree_map(to_proxy, (args, kwargs), is_leaf=is_leaf)
    with disable_proxy_modes_tracing():
        outputs = pytree.tree_map(lambda v: _fresh(v, mode), node.meta["example_value"])
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
    proxy_mode = get_proxy_mode()
    if proxy_mode is None:
        raise CannotNormalize(f"attribute {target} met outside of tracing")
    tracer: Any = proxy_mode.tracer
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


def _normalize_subgraphs(gm: fx.GraphModule, mode: FakeTensorMode) -> dict[str, fx.GraphModule]:
    """Normalized versions of the sub-graph modules that may be; the others stay as they are."""
    wanted = {
        arg.target
        for node in gm.graph.nodes
        if isinstance(node.target, HigherOrderOperator) and node.target.name() in PLAIN_CALLS
        for arg in node.all_input_nodes
        if arg.op == "get_attr" and isinstance(getattr(gm, str(arg.target), None), fx.GraphModule)
    }
    found: dict[str, fx.GraphModule] = {}
    for name, module in gm.named_children():
        if not isinstance(module, fx.GraphModule):
            continue
        found[name] = _normalize_one(module, mode) if name in wanted else module
        found[name]._fxopt_name = name  # type: ignore[assignment]
    return found


def _normalize_one(module: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    placeholders = module.graph.find_nodes(op="placeholder")
    if any("example_value" not in node.meta for node in placeholders):
        return module
    inputs = [_fresh(node.meta["example_value"], mode) for node in placeholders]
    with preserve_grad_mode():
        return _normalize(module, inputs, mode)


def _fake_mode(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    recorded = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode([*example_inputs, *recorded])
    if mode is None:
        raise CannotNormalize("no fake mode: the graph was not captured by Dynamo")
    return mode


def _fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise CannotNormalize(f"{len(placeholders)} placeholders, {len(example_inputs)} inputs")
    return [
        _fresh(_recorded(node, value, mode), mode)
        for node, value in zip(placeholders, example_inputs, strict=True)
    ]


def _recorded(node: fx.Node, value: Any, mode: FakeTensorMode) -> Any:
    """The fake that Dynamo made for this input; for pieces cut by DDPOptimizer, the input itself."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    return value


def _fresh(value: Any, mode: FakeTensorMode) -> Any:
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
        fresh = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    symbol = getattr(value, "item_memo", None)
    if symbol is not None:
        setattr(fresh, "item_memo", symbol)  # noqa: B010 - a Python number that Dynamo made an input
    return fresh


def is_subclass(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value)


def _carry_over(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Keep what AOTAutograd and Inductor read from a Dynamo graph: placeholder metadata and module
    attributes.

    Without the placeholders' ``tensor_dict`` parameters stop being static inputs and CUDA graphs copy the
    weights at every step; without ``_dynamo_source`` AOTAutograd cannot tell which input is which.
    """
    storages: dict[int, int] = {}
    for before, after in zip(
        old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True
    ):
        after.meta.update(before.meta)
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        after.target = before.target
        after._rename(before.name)
        after.type = before.type
        _note_input(before.meta.get("example_value"), after, storages)
    new.meta.update(old.meta)
    for name, value in old.__dict__.items():
        if name not in new.__dict__ and not name.startswith("__"):
            new.__dict__[name] = value
    new.recompile()


def _note_input(value: Any, node: fx.Node, storages: dict[int, int]) -> None:
    """Inputs that share storage share a number: a write through one is seen as a write to the other."""
    if not isinstance(value, torch.Tensor):
        return
    key = value.untyped_storage()._cdata
    node.meta[ALIAS_KEY] = storages.setdefault(key, len(storages))
    node.meta[NEEDS_GRAD_KEY] = value.requires_grad
    node.meta[PARAMETER_KEY] = isinstance(value, torch.nn.Parameter)
