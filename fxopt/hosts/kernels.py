"""Emitted kernels between ATen ops.

AOTAutograd makes the forward and backward graphs, kernels take their regions, and what is left runs op by op.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxopt.hosts.host import Note
from fxopt.options import Options

EMIT_KERNELS = "emit-kernels"


def emits_kernels(options: Options) -> bool:
    """Whether the eager host is to emit kernels: they have to run, in Triton's interpreter."""
    if not options.interpret or {EMIT_KERNELS, "all"} & set(options.disable):
        return False
    from fxopt.codegen.emit import interpreted

    return interpreted()


def compile_with_kernels(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, note: Note
) -> Callable[..., Any]:
    """Forward and backward of `gm` with kernels for their regions."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor.decomposition import select_decomp_table

    from fxopt.codegen.emit import emit_kernels

    def compile_part(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for entry in emit_kernels(gm, options):
            note(entry)
        return _boxed(gm.forward)

    compiled: Callable[..., Any] = aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=compile_part,
        bw_compiler=compile_part,
        decompositions=select_decomp_table(),
    )
    return compiled


def _boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd hands over a list, which is emptied so that inputs can be freed early."""

    def run(arguments: list[Any]) -> Any:
        given = tuple(arguments)
        arguments.clear()
        return function(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
