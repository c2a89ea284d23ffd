"""TorchInductor as host: `mode` and unknown-to-fxopt options mean what they mean for ``backend="inductor"``.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxopt.errors import NoHost
from fxopt.hosts.host import Host, Notes
from fxopt.hosts.inductor_kernels import emitter, mark_parts_of_ops
from fxopt.hosts.kernels import own_random_numbers
from fxopt.options import Options
from fxopt.runtime.fingerprint import source_fingerprint


def missing_compiler() -> str | None:
    """Why Inductor cannot compile for the CPU here, or None when it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).splitlines()[0]
    return None


def config_patches(options: Options, emit: Callable[[fx.Graph], None] | None = None) -> dict[str, Any]:
    """The Inductor configuration of one compilation.

    Its passes go into the keys of Inductor's caches, with fxopt's version and options. With `emit`, random
    numbers become functions of seeds before forward and backward are apart, for kernels to draw, and `emit`
    runs before Inductor fuses anything. The last pass changes nothing.
    """
    from torch._inductor import list_mode_options

    patches: dict[str, Any] = {}
    if options.mode != "default":
        patches |= list_mode_options(options.mode)
    patches |= options.host_config
    own: dict[str, Callable[[fx.Graph], object]] = {"post_grad_custom_post_pass": _nothing}
    if emit is not None:
        own |= {"joint_custom_pre_pass": own_random_numbers, "post_grad_custom_pre_pass": emit}
    return patches | {name: _graph_pass(name, patches, one, options) for name, one in own.items()}


def without_graphs(options: Options) -> Options:
    """`options` for a graph that somebody else records: one recording cannot be made within another."""
    return replace(options, host_config=MappingProxyType({**options.host_config, "triton.cudagraphs": False}))


def _nothing(graph: fx.Graph) -> None:
    pass


def _graph_pass(
    name: str, patches: Mapping[str, Any], own: Callable[[fx.Graph], object], options: Options
) -> Any:
    """The pass of the configuration's `name`: what is configured already, and then `own`."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    given = patches.get(name, getattr(config, name))
    theirs = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for one in (*theirs, own):
                one(graph)

        def uuid(self) -> Any:
            names = [one.uuid() if isinstance(one, CustomGraphPass) else repr(one) for one in theirs]
            return (source_fingerprint(), options.fingerprint, *names)

    return GraphPass()


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, notes: Notes
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_part(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        mark_parts_of_ops(gm)
        return compile_fx_inner(gm, inputs, **more)

    devices = {value.device.type for value in example_inputs if hasattr(value, "device")}
    if "cpu" in devices:
        reason = missing_compiler()
        if reason is not None:
            raise NoHost(host="inductor", reason=reason, remedy="Install g++ (Debian: apt-get install g++).")
    emit = emitter(options, notes) if "cuda" in devices else None
    compiled: Callable[..., Any] = compile_fx(  # type: ignore[assignment]
        gm,
        [*map(_known_symbol, example_inputs)],
        inner_compile=compile_fx_inner if emit is None else compile_part,
        config_patches=config_patches(options, emit),
    )
    return compiled


def _known_symbol(value: Any) -> Any:
    """A size under the symbol that guards have replaced its own by.

    Inductor knows it by its own alone, and then finds no input for sizes of tensors, such as ``s1 + 1``.
    """
    if not isinstance(value, torch.SymInt):
        return value
    node = value.node
    if node._expr == node.expr or not node.expr.is_Symbol:
        return value
    return node.shape_env.create_symintnode(node.expr, hint=node.hint)


INDUCTOR = Host("inductor", _compile)
