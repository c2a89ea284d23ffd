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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.traceback import preserve_node_meta

from fxopt.frontend.retrace import DATA_KEY, CannotNormalize, Retrace, fresh, is_subclass, traced
from fxopt.frontend.subgraphs import PLAIN_CALLS
from fxopt.frontend.vmap import fold_vmap
from fxopt.ir.facts import is_write, location
from fxopt.ir.views import views_of

ALIAS_KEY = "fxopt_alias"
NEEDS_GRAD_KEY = "fxopt_needs_grad"
PARAMETER_KEY = "fxopt_parameter"


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any], typed: Sequence[int] = ()) -> fx.GraphModule:
    """Return an equivalent graph module in pre-dispatch ATen. `gm` is left as it was.

    Args:
        gm: what Dynamo gave to the backend, or one piece that DDPOptimizer cut from it.
        example_inputs: one value for each placeholder, real or fake.
        typed: places of tensor subclasses for which plain tensors of their shape are to stand in the
        result. It
            is equivalent once nobody reads these.

    Raises:
        CannotNormalize: with what stands in the way. Whatever else the re-trace raises is passed on.
    """
    mode = _fake_mode(gm, example_inputs)
    with preserve_state():
        return _normalize(gm, _fake_inputs(gm, example_inputs, mode, typed), mode)


@contextmanager
def preserve_state() -> Iterator[None]:
    """A graph may switch modes of torch and leave them switched; tracing must not leak that."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    kernels = [(enable, enabled()) for enabled, enable in _SDP_SWITCHES]
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)
        for enable, enabled in kernels:
            enable(enabled)


_SDP_SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _normalize(gm: fx.GraphModule, inputs: list[Any], mode: FakeTensorMode) -> fx.GraphModule:
    subgraphs = _normalize_subgraphs(gm, mode)
    retrace = Retrace(fold_vmap(gm), subgraphs, mode)
    with preserve_node_meta(), mode:
        new = traced(_named(retrace.run, len(inputs)), *inputs)
    _check_constants(new)
    _check_data(new)
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


def _check_data(new: fx.GraphModule) -> None:
    """A write through ``x.data`` is not one that autograd sees, as this graph would say: refuse."""
    for node in new.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        users = [user for view in views_of(node) for user in view.users] if DATA_KEY in node.meta else []
        write = next((user for user in users if is_write(user)), None)
        if write is not None:
            raise CannotNormalize(f"{write.name} ({location(write)}) writes to the .data of a tensor")


def _is_batched(value: torch.Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _named(run: Callable[..., Any], count: int) -> Callable[..., Any]:
    def graph(*args: Any) -> Any:
        if len(args) != count:
            raise CannotNormalize(f"{count} inputs were traced, {len(args)} given")
        return run(*args)

    return graph


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
    inputs = [fresh(node.meta["example_value"], mode) for node in placeholders]
    with preserve_state():
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


def _fake_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: FakeTensorMode, typed: Sequence[int]
) -> list[Any]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise CannotNormalize(f"{len(placeholders)} placeholders, {len(example_inputs)} inputs")
    values = [_recorded(node, value, mode) for node, value in zip(placeholders, example_inputs, strict=True)]
    for place in typed:
        values[place] = _stand_in(values[place], mode)
    return [fresh(value, mode) for value in values]


def _stand_in(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A plain tensor with the shape, dtype and device of a tensor subclass."""
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _recorded(node: fx.Node, value: Any, mode: FakeTensorMode) -> Any:
    """The fake that Dynamo made for this input; for pieces cut by DDPOptimizer, the input itself."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    return value


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
    if not isinstance(value, torch.Tensor) or is_subclass(value):
        return
    key = value.untyped_storage()._cdata
    node.meta[ALIAS_KEY] = storages.setdefault(key, len(storages))
    node.meta[NEEDS_GRAD_KEY] = value.requires_grad
    node.meta[PARAMETER_KEY] = isinstance(value, torch.nn.Parameter)
