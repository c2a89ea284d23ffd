"""Kernels between ATen ops, without Inductor.

AOTAutograd makes the forward and backward graphs. In Triton's interpreter kernels take their regions and what
is left runs op by op; for a target that is not at hand kernels are made and kept, and all runs op by op.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.hosts.group_norm import native_group_norm
from fxopt.hosts.host import Notes
from fxopt.options import EMIT_KERNELS, Options


def wants_kernels(options: Options) -> bool:
    """Whether the options leave a place for kernels at all."""
    return options.kernels != "never" and not {EMIT_KERNELS, "all"} & set(options.disable)


def makes_kernels(options: Options, example_inputs: Sequence[Any]) -> bool:
    """Whether the eager host has a use for kernels: it can interpret them, or a target was named."""
    return wants_kernels(options) and (options.interpret or for_target(options, example_inputs))


def for_target(options: Options, example_inputs: Sequence[Any]) -> bool:
    """Whether a GPU was named for a graph that is on the CPU alone."""
    devices = {value.device.type for value in example_inputs if hasattr(value, "device")}
    return options.target is not None and devices <= {"cpu"}


def kernel_devices(host: str, options: Options, example_inputs: Sequence[Any]) -> frozenset[str]:
    """Types of devices for whose semantic ops the host of this name puts kernels, unmeasured, for those who
    ask for that."""
    if not wants_kernels(options):
        return frozenset()
    if host == "eager":
        return frozenset({"cpu", "cuda"} if makes_kernels(options, example_inputs) else ())
    return _with_kernels(example_inputs) if options.kernels == "always" else frozenset()


def contest_devices(host: str, options: Options, example_inputs: Sequence[Any]) -> frozenset[str]:
    """Types of devices on which it is measured whether semantic ops are faster with kernels."""
    measured = wants_kernels(options) and options.kernels == "auto" and options.measuring_seconds > 0
    return _with_kernels(example_inputs) if measured and host == "inductor" else frozenset()


def _with_kernels(example_inputs: Sequence[Any]) -> frozenset[str]:
    devices = {value.device for value in example_inputs if hasattr(value, "device")}
    return frozenset({"cuda"} if any(map(_runs_kernels, devices)) else ())


def _runs_kernels(device: torch.device) -> bool:
    from fxopt.codegen.attention_emit import LEAST_ARCH

    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= LEAST_ARCH


def compile_with_kernels(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, notes: Notes
) -> Callable[..., Any]:
    """Forward and backward of `gm`, with kernels for their regions."""
    import torch._inductor.lowering  # Inductor's form of max_pool2d asks it, and does not import it
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import default_partition
    from torch._inductor.decomposition import select_decomp_table

    from fxopt.codegen.emit import emit_kernels, interpreted

    def partition_fn(joint: fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        own_random_numbers(joint.graph)
        joint.recompile()
        return default_partition(joint, *arguments, **options)

    def compile_part(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        own_random_numbers(gm.graph)
        kernels, evidence = emit_kernels(gm, options, call=interpreted())
        notes.kernels += kernels
        notes.evidence += evidence
        return _boxed(gm.forward)

    compiled: Callable[..., Any] = aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=compile_part,
        bw_compiler=compile_part,
        partition_fn=partition_fn,
        decompositions=select_decomp_table() | {torch.ops.aten.native_group_norm.default: native_group_norm},
    )
    return compiled


def own_random_numbers(graph: fx.Graph) -> int:
    """Before the split into forward and backward: both then draw the same numbers. How many draws there are.

    As Inductor's they are not eager's, unless the user has asked Inductor for those.
    """
    from torch._inductor import config

    from fxopt.codegen.random_numbers import seed_random_numbers

    return 0 if config.fallback_random else seed_random_numbers(graph)


def _boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd hands over a list, which is emptied so that inputs can be freed early."""

    def run(arguments: list[Any]) -> Any:
        given = tuple(arguments)
        arguments.clear()
        return function(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
