"""How an emitted kernel is called from a graph: as an op that torch, and TorchInductor, can see into.

On a GPU the op is a `torch.library.triton_op`. Where AOTAutograd meets it, it dissolves into the allocation
of its results and torch's own node for a Triton kernel, which Inductor compiles, plans memory for and
launches itself, also within CUDA graphs. In graphs that are past AOTAutograd `dissolve_ops` does the same.

Called outside of a graph the op launches its kernels past what Triton does at each launch, see
`fxopt.runtime.direct_launch`.

In interpreter mode (`TRITON_INTERPRET=1`) the op is opaque and runs the kernel on the tensors that it is
given, on a CPU as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.runtime.direct_launch import ASSERTING, DirectLaunch
from fxopt.runtime.kernel_cache import KernelCache, default_cache

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile, Launch

NAMESPACE = "fxopt_kernels"

_lock = threading.Lock()
# By the digest of the kernel's file. An op cannot be taken back from torch, so neither are these.
_ops: dict[str, OpOverload] = {}
_kernels: dict[OpOverload, tuple[KernelFile, KernelCache]] = {}


def as_op(
    kernel: KernelFile, fake: Callable[..., Any] | None = None, *, cache: KernelCache | None = None
) -> OpOverload:
    """The op that launches the kernel. The same file gives the same op.

    Args:
        fake: shapes and dtypes of the results. None: the file's own `outputs`, which allocates them.
        cache: where the file is kept. None is the cache of the default options.
    """
    digest = kernel.digest
    with _lock:
        if digest not in _ops:
            cache = cache or default_cache()
            op = _ops[digest] = _register(kernel, f"{kernel.name}_{digest[:12]}", fake, cache)
            _kernels[op] = kernel, cache
        return _ops[digest]


def dissolve_ops(graph: fx.Graph) -> int:
    """Replace the calls of kernels' ops in a functional graph by what the ops are made of; how many.

    For graphs that AOTAutograd has made, before Inductor decides what is written in place: in its
    `post_grad_custom_pre_pass`. Ops that write to their inputs are called by ``auto_functionalized_v2``
    there. In interpreter mode all stay.
    """
    count = 0
    for node in list(graph.nodes):
        functional = node.target is torch.ops.higher_order.auto_functionalized_v2
        op = node.args[0] if functional else node.target
        if node.op != "call_function" or op not in _kernels:
            continue
        kernel, cache = _kernels[op]
        if bool(kernel.mutates) is functional and not is_interpreted(kernel, cache.load(kernel)):
            _dissolve(node, _functional_arguments(node, kernel) if functional else node.args, kernel, cache)
            count += 1
    return count


def _functional_arguments(node: fx.Node, kernel: KernelFile) -> tuple[Any, ...]:
    """What ``auto_functionalized_v2`` gives the op of a kernel, whose written operands are in order."""
    given: dict[str, Any] = dict(node.kwargs)
    bases = dict(zip(kernel.mutates, given["_all_bases"], strict=True))
    return tuple(bases[one.name] if one.name in bases else given[one.name] for one in kernel.parameters)


def _dissolve(node: fx.Node, args: tuple[Any, ...], kernel: KernelFile, cache: KernelCache) -> None:
    inputs = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    body = kernel_graph(kernel, *inputs, cache=cache).graph
    given = dict(zip(body.find_nodes(op="placeholder"), args, strict=True))
    with node.graph.inserting_before(node):
        made: Any = node.graph.graph_copy(body, given)
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    for user in list(node.users):
        user.replace_all_uses_with(made[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def kernel_graph(kernel: KernelFile, *inputs: Any, cache: KernelCache | None = None) -> fx.GraphModule:
    """The kernel on fake inputs as a graph of plain ATen and torch's functional node for Triton kernels.

    To be put in the place of a piece of graph that AOTAutograd has made. What the kernel writes to is not
    written: the graph returns what it would be, behind the results. Not for interpreter mode.
    """
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    launch = _traceable(kernel, (cache or default_cache()).load(kernel))
    written = [place for place, one in enumerate(kernel.parameters) if one.name in kernel.mutates]

    def run(*inputs: Any) -> Any:
        results = launch(*inputs)
        return (results, *(inputs[place] for place in written)) if written else results

    with detect_fake_mode(inputs) or contextlib.nullcontext():
        traced = make_fx(torch.func.functionalize(run))(*inputs)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        traced.graph.erase_node(node)  # into the inputs, at the end
    return traced


def _register(
    kernel: KernelFile, name: str, fake: Callable[..., Any] | None, cache: KernelCache
) -> OpOverload:
    module = cache.load(kernel)
    qualified = f"{NAMESPACE}::{name}"
    op: Any
    if is_interpreted(kernel, module):
        schema = torch.library.infer_schema(module.launch, mutates_args=kernel.mutates)
        run = _interpreting(module.launch)
        op = torch.library.custom_op(qualified, mutates_args=kernel.mutates, schema=schema)(run)
    else:
        run = _without_source(_traceable(kernel, module))
        op = torch.library.triton_op(qualified, mutates_args=kernel.mutates)(run)
    op.register_fake(fake or module.outputs)
    overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def is_interpreted(kernel: KernelFile, module: types.ModuleType) -> bool:
    """Whether Triton was in interpreter mode when the kernel's file was loaded."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(getattr(module, kernel.launches[0].entry), InterpretedFunction)


def _interpreting(launch: Callable[..., Any]) -> Callable[..., Any]:
    from fxopt.runtime.interpreter import exact_bfloat16

    def run(*arguments: Any) -> Any:
        with exact_bfloat16(), _asserting():
            return launch(*arguments)

    return run


@contextlib.contextmanager
def _asserting() -> Iterator[None]:
    """Meanwhile the interpreter checks what kernels assert, which it passes over by itself.

    Raises:
        IndexError: what was asserted does not hold: a place outside of a tensor, for which eager raises it.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    kept = builder.options
    builder.options = dataclasses.replace(kept, **ASSERTING)
    try:
        yield
    except interpreter.InterpreterError as error:
        if isinstance(error.__cause__, AssertionError):
            raise IndexError(f"{error.__cause__} in a kernel") from error
        raise
    finally:
        builder.options = kept


def _traceable(kernel: KernelFile, module: types.ModuleType) -> Callable[..., Any]:
    """`launch` of the file with its kernels wrapped so that tracing records them; the file stays plain."""
    wrapped = {one.entry: _Wrapped(getattr(module, one.entry), one) for one in kernel.launches}
    launch = module.launch
    traceable = types.FunctionType(launch.__code__, {**vars(module), **wrapped}, launch.__name__)
    traceable.__annotations__ = launch.__annotations__
    return traceable


def _without_source(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The same function. torch parses the source of a new op for the kernels in it, to have them in the keys
    of its caches. That takes two thirds of the time of making an op; ours has the hash in its name."""
    hidden = types.SimpleNamespace(launch=launch)

    def run(*arguments: Any) -> Any:
        return hidden.launch(*arguments)

    run.__signature__ = inspect.signature(launch)  # type: ignore[attr-defined]
    return run


class _Wrapped:
    """A kernel that asks torch at each launch whether it is being traced; if not it is launched directly."""

    def __init__(self, kernel: Any, launch: Launch) -> None:
        self.kernel = kernel
        self.direct = DirectLaunch(kernel, launch)

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        found = torch.library.wrap_triton(self.kernel)
        return self.direct[grid] if found is self.kernel else _recorded(found[grid])


def _recorded(launcher: Callable[..., None]) -> Callable[..., None]:
    """For a launch that is traced: Inductor compiles assertions in by its own `assert_indirect_indexing`."""
    return lambda **given: launcher(**{name: one for name, one in given.items() if name not in ASSERTING})
