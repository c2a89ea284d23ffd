"""One emitted kernel as a value, and its text: a self-contained Python file that can be read and run.

The file imports torch and triton, nothing else. In this order it holds: where it came from and why it looks
as it does, the `@triton.jit` functions, `outputs` (allocates the results), `launch`, `reference` (the same
in plain torch), `example_inputs`, `cost`, and a `main` that checks the kernel against its reference. The text
is a function of the value alone: equal values give equal files, byte for byte.

Expressions (sizes, grids, shapes, scalar arguments) are Python text over the parameters of `launch` and the
names of `KernelFile.sizes`.
"""

from __future__ import annotations

import functools
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fxopt.ir.ops.code_products import WIDENING
from fxopt.runtime.direct_launch import ASSERTING

KINDS = {"Tensor": "torch.Tensor", "int": "int", "float": "float", "bool": "bool"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of `launch` and of `reference`. `kind` is one of `KINDS`."""

    name: str
    kind: str = "Tensor"


@dataclass(frozen=True)
class Output:
    """A result that `launch` allocates. Shape, strides and dtype are expressions; no strides is contiguous.

    `fill` is the value that it starts from, for kernels that add to it; None leaves it uninitialised.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    strides: tuple[str, ...] | None = None
    fill: str | None = None


@dataclass(frozen=True)
class Argument:
    """A run-time argument of a jit function.

    Attributes:
        type: as Triton writes it: ``"*bf16"``, ``"i32"``, ``"fp32"``.
        value: an expression; empty for the parameter, output or size of the name without ``_ptr``.
        aligned: divisible by 16, for compilation ahead of time. None: pointers are, numbers are not.
    """

    name: str
    type: str
    value: str = ""
    aligned: bool | None = None

    @property
    def expression(self) -> str:
        return self.value or self.name.removesuffix("_ptr")

    @property
    def is_aligned(self) -> bool:
        return self.type.startswith("*") if self.aligned is None else self.aligned


@dataclass(frozen=True)
class Products:
    """The matrix products of a launch, with sizes as seen while compiling.

    Attributes:
        batch: matrices in a stack. columns: of each part that has columns of its own. depth: what is summed
            over. pieces: into which it is cut. together: products that share a tile of columns.
        dtype: of the operands: ``"bfloat16"``. on_matrix_units: whether these multiply. pairs: whether what
            follows mixes columns.
        summands: that a step of the depth adds to an element: two, where codes share a byte. stored: bytes of
            a weight's step, where they are codes; else 0. looked_up: whether a table has what they stand for.
    """

    batch: int
    rows: int
    columns: tuple[int, ...]
    depth: int
    pieces: int
    together: int
    dtype: str
    on_matrix_units: bool
    pairs: bool = False
    summands: int = 1
    stored: int = 0
    looked_up: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a jit function of the file. `grid` holds expressions, in which constants may be used.

    Attributes:
        adjustable: constants that may be any power of two, which changes speed alone, and the extent that
            each divides, as seen while compiling. Those that are not in `grid` are steps of a loop.
        bounds: the least and the most that some of these may be, by name.
        products: what is multiplied, if the launch multiplies matrices.
    """

    entry: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, ...]
    constants: tuple[tuple[str, int | float | bool], ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    adjustable: tuple[tuple[str, int], ...] = ()
    bounds: tuple[tuple[str, int, int], ...] = ()
    products: Products | None = None


@dataclass(frozen=True)
class About:
    """What the head of the file says.

    Attributes:
        summary: one line. lines: the user's source lines, "file.py:12: text". replaces: names of ATen ops.
        shapes: one text per tensor, "x: bf16[B, 4096]". configuration: what was chosen, and why.
        moved: bytes, flops: operations; expressions, with which `main` computes what was achieved.
        seen: both, at the sizes seen while tracing; without scores that a mask leaves out.
        multiplied: how many of the operations seen matrix units do, and the dtype that they multiply.
    """

    summary: str = ""
    lines: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    configuration: tuple[str, ...] = ()
    moved: str = "0"
    flops: str = "0"
    seen: tuple[int, int] = (0, 0)
    multiplied: tuple[int, str] = (0, "")


@dataclass(frozen=True)
class KernelFile:
    """A kernel with all that is needed to launch, check and explain it.

    Attributes:
        name: an identifier, unique within its region's graph.
        jit: the text of the `@triton.jit` functions.
        launches: run in this order.
        reference: text of `def reference(<parameters>)`, which returns what `launch` returns.
        example_inputs: text of `def example_inputs(device)`, which returns a tuple of arguments of `launch`.
        sizes: names and the expressions that they stand for; later ones may use earlier ones.
        mutates: names of those tensor parameters that the kernel writes to.
        scratch: tensors that launches hand to each other, allocated by `launch` and not returned.
        alternatives: kernels that compute the same by other launches, to be tried beside this one.
        modelled: `fxopt.codegen.configurations` knows what limits it, and proposes other launches by that.
    """

    name: str
    parameters: tuple[Parameter, ...]
    jit: str
    launches: tuple[Launch, ...]
    outputs: tuple[Output, ...]
    reference: str
    example_inputs: str
    sizes: tuple[tuple[str, str], ...] = ()
    mutates: tuple[str, ...] = ()
    scratch: tuple[Output, ...] = ()
    about: About = field(default_factory=About)
    alternatives: tuple[KernelFile, ...] = ()
    modelled: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.render().encode()).hexdigest()

    @property
    def asserts(self) -> bool:
        """Whether something is checked while the kernel runs, which Triton leaves out unless it is told."""
        return "tl.device_assert(" in self.jit

    @property
    def describes(self) -> bool:
        """Whether it makes tensor descriptors on the device, for which Triton asks for memory at a launch."""
        return any(dict(launch.constants).get("DESCRIBED") for launch in self.launches)

    @property
    def uses_bfloat16(self) -> bool:
        types = [argument.type for launch in self.launches for argument in launch.arguments]
        return "bfloat16" in self.jit or any("bf16" in one for one in types)

    def render(self) -> str:
        """The file's text."""
        return _render(self)


@functools.lru_cache(maxsize=64)
def _render(kernel: KernelFile) -> str:
    parts = [
        _head(kernel),
        _IMPORTS,
        _code(kernel.jit),
        _outputs(kernel),
        _launch(kernel),
        *([_PHILOX + _inlined("ir/ops/philox.py")] if "philox_uniform(" in kernel.reference else []),
        *([_CODES + _inlined("ir/ops/widen_codes.py")] if _widens(kernel.reference) else []),
        _code(kernel.reference),
        _code(kernel.example_inputs),
        _cost(kernel),
        *_checks(kernel),
        'if __name__ == "__main__":\n    raise SystemExit(main())',
    ]
    return "\n\n\n".join(parts) + "\n"


def _widens(reference: str) -> bool:
    return any(f" = {name}(" in reference for name in WIDENING)


_IMPORTS = """import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a function is decorated
import triton
import triton.language as tl"""


def _head(kernel: KernelFile) -> str:
    about = kernel.about
    sections = (
        ("Computes", about.lines),
        ("Replaces", (", ".join(about.replaces),) if about.replaces else ()),
        ("Shapes", about.shapes),
        ("Costs", (f"bytes: {about.moved}", f"operations: {about.flops}")),
        ("Configuration", about.configuration),
    )
    lines = [f"{kernel.name}: {about.summary}".rstrip(": ") + "."]
    for title, entries in sections:
        if entries:
            lines += ["", title, *(f"    {_quoted(entry)}" for entry in entries)]
    return '"""' + "\n".join(lines) + '\n"""'


def _quoted(text: str) -> str:
    """`text` on one line, harmless within a docstring."""
    return " ".join(text.split()).replace("\\", "\\\\").replace('"""', "'''")


def _code(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def _signature(kernel: KernelFile) -> str:
    return ", ".join(f"{one.name}: {KINDS[one.kind]}" for one in kernel.parameters)


def _returns(kernel: KernelFile) -> str:
    if len(kernel.outputs) == 1:
        return "torch.Tensor"
    return f"tuple[{', '.join('torch.Tensor' for _ in kernel.outputs)}]" if kernel.outputs else "None"


def _results(kernel: KernelFile) -> str:
    return ", ".join(output.name for output in kernel.outputs)


def _body(lines: Iterator[str] | list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _sizes(kernel: KernelFile) -> list[str]:
    return [f"{name} = {expression}" for name, expression in kernel.sizes]


def _outputs(kernel: KernelFile) -> str:
    """`outputs`: all that a fake implementation needs."""
    lines = [*_sizes(kernel), *(f"{one.name} = {_allocated(one, kernel)}" for one in kernel.outputs)]
    end = f"return {_results(kernel)}" if kernel.outputs else "return None"
    return f"def outputs({_signature(kernel)}) -> {_returns(kernel)}:\n{_body([*lines, end])}"


def _allocated(output: Output, kernel: KernelFile) -> str:
    shape = _tuple(output.shape)
    options = f"dtype={output.dtype}, device={_device(kernel)}"
    if not output.shape:
        # Inductor fills a tensor without dimensions, by a launch; one of one element it only allocates.
        call = f"torch.empty((1,), {options}).view(())"
    elif output.strides is None:
        call = f"torch.empty({shape}, {options})"
    else:
        call = f"torch.empty_strided({shape}, {_tuple(output.strides)}, {options})"
    return call if output.fill is None else f"{call}.fill_({output.fill})"


def _device(kernel: KernelFile) -> str:
    name = next((one.name for one in kernel.parameters if one.kind == "Tensor"), None)
    return f"{name}.device" if name else '"cuda"'


def _tuple(entries: tuple[str, ...]) -> str:
    return f"({', '.join(entries)}{',' if len(entries) == 1 else ''})"


def _launch(kernel: KernelFile) -> str:
    names = ", ".join(one.name for one in kernel.parameters)
    lines = [f"{_results(kernel)} = outputs({names})"] if kernel.outputs else []
    lines += _sizes(kernel)
    lines += [f"{one.name} = {_allocated(one, kernel)}" for one in kernel.scratch]
    lines += _allocator(kernel) if kernel.describes else []
    for launch in kernel.launches:
        lines += _one_launch(launch, kernel.asserts)
    if kernel.outputs:
        lines.append(f"return {_results(kernel)}")
    return f"def launch({_signature(kernel)}) -> {_returns(kernel)}:\n{_body(lines)}"


def _allocator(kernel: KernelFile) -> Iterator[str]:
    """Set for the thread that launches, at each launch. Triton keeps it, so it holds no tensor."""
    yield f"device = {_device(kernel)}"
    yield "triton.set_allocator("
    yield "    lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)"
    yield ")"


def _one_launch(launch: Launch, asserts: bool) -> Iterator[str]:
    """Arguments by name, which is what Triton and torch both accept for constants and for options."""
    for name, value in launch.constants:
        yield f"{name} = {value!r}"
    yield f"{launch.entry}[{_tuple(launch.grid)}]("
    for argument in launch.arguments:
        yield f"    {argument.name}={argument.expression},"
    for name, _ in launch.constants:
        yield f"    {name}={name},"
    yield f"    num_warps={launch.num_warps},"
    yield f"    num_stages={launch.num_stages},"
    for name, value in ASSERTING.items() if asserts else ():
        yield f"    {name}={value},"
    yield ")"


def _cost(kernel: KernelFile) -> str:
    doc = '"""Bytes that must be moved, and operations that must be done."""'
    lines = [doc, *_sizes(kernel), f"return {kernel.about.moved}, {kernel.about.flops}"]
    return f"def cost({_signature(kernel)}) -> tuple[int, int]:\n{_body(lines)}"


@functools.cache
def _inlined(module: str) -> str:
    """The part of a module of fxopt that is to be copied into kernels' files."""
    return (_PACKAGE / module).read_text().split(_MARK, 1)[1].strip("\n").replace("  # noqa: E402", "")


_PACKAGE = Path(__file__).parent.parent
_MARK = "# --- All below is copied into kernels' files as it stands."


def _checks(kernel: KernelFile) -> Iterator[str]:
    """The tools of the check, and `main`."""
    if kernel.uses_bfloat16:
        yield _BFLOAT16 + _inlined("runtime/interpreter.py")
    else:
        yield "exact_bfloat16 = contextlib.nullcontext  # there is no bfloat16 here"
    yield _CHECK + _inlined("codegen/kernel_check.py")
    written = [place for place, one in enumerate(kernel.parameters) if one.name in kernel.mutates]
    call = f"check_kernel(launch, reference, example_inputs, cost, mutated={written})"
    yield f"def main() -> int:\n    return {call}"


_BFLOAT16 = "# Triton's interpreter computes on the bits of a bfloat16; this makes it use the value.\n"
_PHILOX = "# The kernel's random numbers in plain torch.\n"
_CODES = "# What the codes of quantized weights stand for, in plain torch.\n"
_CHECK = "# The check of this file: the kernel, and eager, against the reference in float64.\n"
