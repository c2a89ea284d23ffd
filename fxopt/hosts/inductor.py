"""TorchInductor as host: `mode` and unknown-to-fxopt options mean what they mean for ``backend="inductor"``.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxopt.errors import NoHost
from fxopt.hosts.host import Host, Notes
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


def config_patches(options: Options) -> dict[str, Any]:
    """The Inductor configuration of one compilation."""
    from torch._inductor import list_mode_options

    patches: dict[str, Any] = {}
    if options.mode != "default":
        patches |= list_mode_options(options.mode)
    patches |= options.host_config
    patches["post_grad_custom_post_pass"] = _fingerprinted(patches, options)
    return patches


def _fingerprinted(patches: dict[str, Any], options: Options) -> Any:
    """A post-grad pass that changes nothing but carries fxopt's version into the keys of the caches."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    inner = patches.get("post_grad_custom_post_pass", config.post_grad_custom_post_pass)

    class Fingerprint(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            if inner is not None:
                inner(graph)

        def uuid(self) -> Any:
            theirs = inner.uuid() if isinstance(inner, CustomGraphPass) else repr(inner)
            return (source_fingerprint(), options.fingerprint, theirs)

    return Fingerprint()


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, notes: Notes
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    devices = {getattr(value, "device", None) for value in example_inputs}
    if any(device is not None and device.type == "cpu" for device in devices):
        reason = missing_compiler()
        if reason is not None:
            raise NoHost(host="inductor", reason=reason, remedy="Install g++ (Debian: apt-get install g++).")
    compiled: Callable[..., Any] = compile_fx(  # type: ignore[assignment]
        gm, example_inputs, config_patches=config_patches(options)
    )
    return compiled


INDUCTOR = Host("inductor", _compile)
