"""How a kernel is launched, as plain values, and what measurements of it are kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fxopt.codegen.kernel_file import KernelFile


def versions() -> list[str]:
    """On which what was measured depends."""
    return [version(name) for name in ("torch", "triton")]


def identity(kernel: KernelFile) -> str:
    """A hash of what is computed and how, without how it is launched and the user's lines."""
    launches = [(one.entry, one.arguments, one.grid) for one in kernel.launches]
    parts = (kernel.jit, launches, kernel.outputs, kernel.scratch, kernel.sizes, kernel.reference)
    others = tuple(map(identity, kernel.alternatives))
    return hashlib.sha256(repr((parts, others)).encode()).hexdigest()


def settings(kernel: KernelFile) -> list[Any]:
    """How the kernel is launched, as plain values."""
    return [[dict(one.constants), one.num_warps, one.num_stages] for one in kernel.launches]


def with_settings(kernel: KernelFile, chosen: Sequence[Any]) -> KernelFile:
    """The kernel, launched so."""
    launches = tuple(
        replace(
            launch,
            constants=tuple((name, constants[name]) for name, _ in launch.constants),
            num_warps=warps,
            num_stages=stages,
        )
        for launch, (constants, warps, stages) in zip(kernel.launches, chosen, strict=True)
    )
    return replace(kernel, launches=launches)
