"""Where the keys and values of attention can be loaded through tensor descriptors, and the kernel that does.

A descriptor says where a head begins, how many rows it has and how they follow each other; the copy engine
(TMA) of a GPU from sm_90 on then loads tiles of it, without addresses in registers. It takes tensors whose
heads and rows begin at multiples of 16 bytes. Source: CUDA Driver API, `cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch

from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.kernel_file import About, KernelFile
from fxopt.ir.sizes import size_of
from fxopt.ir.target import Target

LEAST_ARCH = 90
ALIGNMENT = 16  # bytes
DTYPES = (torch.float16, torch.bfloat16)  # of products on the matrix units, which read shared memory


def takes_descriptors(target: Target | None, operands: Sequence[torch.Tensor]) -> bool:
    """Whether the target has descriptors, and all of these (fake) tensors, (B, H, S, D), fit them.

    Their memory begins at a multiple of 16 bytes, as torch allocates it; TorchInductor copies inputs that
    do not.
    """
    if target is None or target.backend != "cuda" or target.arch < LEAST_ARCH:
        return False
    return all(_is_aligned(each) for each in operands)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """For all values of sizes that are not known. A tensor of this shape without gaps is aligned as well: on
    such ones a kernel's file checks itself.
    """
    if tensor.dtype not in DTYPES or tensor.stride(-1) != 1:
        return False
    places = [tensor.storage_offset(), *tensor.stride()[:-1], tensor.shape[-1]]
    return all(sympy.Mod(size_of(place) * tensor.element_size(), ALIGNMENT) == 0 for place in places)


def with_descriptors(
    kernel: KernelFile, spec: Spec, target: Target | None, about: About, operands: Sequence[torch.Tensor]
) -> KernelFile:
    """The forward `kernel`, with one that uses descriptors as an alternative where the operands allow it."""
    if not takes_descriptors(target, operands[1:3]):
        return kernel
    other = forward_kernel(spec, target, kernel.example_inputs, about, described=True)
    return replace(kernel, alternatives=(other,))
