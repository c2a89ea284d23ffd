"""Kernels for a GPU that is not here: source, PTX, cubin and what they need, from a model on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxopt.codegen.compile import CompiledKernel
    from fxopt.codegen.kernel_file import KernelFile
    from fxopt.ir.target import Target


@dataclass(frozen=True)
class CrossKernel:
    """One kernel, compiled.

    Attributes:
        source: text of its file, which runs by itself. compiled: PTX, cubin, registers, shared memory of each
            launch. seconds: below which it cannot come on the target, by bytes and operations.
        count: in how many places of the graphs it is used.
    """

    name: str
    source: str
    compiled: tuple[CompiledKernel, ...]
    seconds: float
    count: int


@dataclass(frozen=True)
class CrossCompiled:
    """All kernels of a model for one target. `str` is a table of them."""

    target: Target
    kernels: tuple[CrossKernel, ...]

    def save(self, directory: str | Path) -> list[Path]:
        """Write the ``.py``, ``.ptx`` and ``.cubin`` of each kernel, under the name of its file in the cache,
        as several kernels may share theirs. Returns the paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for kernel in self.kernels:
            name = Path(kernel.compiled[0].file).stem
            for place, one in enumerate(kernel.compiled):
                stem = name if place == 0 else f"{name}_{place}"
                for suffix, content in ((".ptx", one.ptx.encode()), (".cubin", one.cubin)):
                    written.append(folder / (stem + suffix))
                    written[-1].write_bytes(content)
            written.append(folder / f"{name}.py")
            written[-1].write_text(kernel.source)
        return written

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"kernels for {self.target.name} ({self.target.card})")
        for heading in ("kernel", "uses", "registers", "spilled", "shared", "warps", "roofline"):
            table.add_column(heading, justify="left" if heading == "kernel" else "right", overflow="fold")
        for kernel in self.kernels:
            one = max(kernel.compiled, key=lambda each: each.registers)
            numbers = (kernel.count, one.registers, one.spilled, one.shared, one.num_warps)
            table.add_row(kernel.name, *map(str, numbers), f"{kernel.seconds * 1e6:.2f} us")
        return table


def cross_compile(model: Callable[..., Any], *args: Any, target: str, **kwargs: Any) -> CrossCompiled:
    """Compile the kernels of ``model(*args, **kwargs)`` for `target`, on a machine without a GPU.

    The model is traced on the CPU, with its gradients where it has any, and runs there once.

    Args:
        model: a module or function; its tensors are on the CPU.
        target: ``"sm_80"``, ``"sm_90"``, ``"h200"`` ...: see `fxopt.ir.target`.

    Raises:
        UnsupportedTarget: kernels cannot be compiled for it here.
        CannotCompile: Triton refuses a kernel; names its file.
    """
    from fxopt.codegen.fit import fitted
    from fxopt.ir.target import Target
    from fxopt.report.record import collect

    card = Target.named(target)
    compiled = torch.compile(model, backend="fxopt", options={"host": "eager", "target": target})
    with collect() as records:
        _run(compiled, args, kwargs)
    kernels = [kernel for record in records for kernel in record.kernels]
    uses = Counter(kernel.digest for kernel in kernels)
    unique = list({kernel.digest: kernel for kernel in kernels}.values())
    pairs = zip(unique, fitted(unique, card), strict=True)
    return CrossCompiled(card, tuple(_cross(*made, card, uses[one.digest]) for one, made in pairs))


def _cross(kernel: KernelFile, compiled: tuple[CompiledKernel, ...], card: Target, count: int) -> CrossKernel:
    from fxopt.codegen.price import least_seconds

    seconds = least_seconds(kernel.about, card)
    return CrossKernel(f"{kernel.name}_{kernel.digest[:8]}", kernel.render(), compiled, seconds, count)


def _run(compiled: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Forward, and backward from whatever results have gradients: both graphs are made then."""
    from torch.utils._pytree import tree_leaves

    results = _with_gradient(tree_leaves(compiled(*args, **kwargs)))
    if results:
        sources = _with_gradient(tree_leaves((args, kwargs)))
        sources += _with_gradient(getattr(compiled, "parameters", list)())
        torch.autograd.grad([one.sum() for one in results], sources, allow_unused=True)


def _with_gradient(values: Iterable[Any]) -> list[torch.Tensor]:
    return [one for one in values if isinstance(one, torch.Tensor) and one.requires_grad]
