"""Group norm for GPUs that are not here: how many kernels, what they move, that they fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.codegen.compile import compile_launches
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.target import Target
from fxopt.report.record import collect

SHAPE = (4, 64, 16, 16)


class Block(nn.Module):
    """The sum in front is a result, the activation behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, SHAPE[1])

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + more
        return nn.functional.silu(self.norm(total)), total


def kernels_of(arch: str, dtype: torch.dtype, *, train: bool) -> list[KernelFile]:
    torch._dynamo.reset()
    block = Block().to(dtype)
    x, more = (torch.randn(SHAPE, dtype=dtype, requires_grad=train) for _ in range(2))
    compiled = torch.compile(
        block, backend="fxopt", options={"host": "eager", "target": arch, "strict": True}
    )
    with collect() as records, torch.set_grad_enabled(train):
        normal, total = compiled(x, more)
        if train:
            (normal.sum() + total.sum()).backward()
    return [kernel for record in records for kernel in record.kernels]


def test_it_is_one_kernel_that_reads_its_input_once() -> None:
    (kernel,) = kernels_of("sm_90", torch.bfloat16, train=False)
    tensor, weights = 2 * torch.Size(SHAPE).numel(), 2 * 2 * SHAPE[1]
    assert kernel.about.seen[0] == 4 * tensor + weights, "two inputs, two results"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_training_step_compiles_and_fits(arch: str) -> None:
    kernels = kernels_of(arch, torch.bfloat16, train=True)
    backward = kernels[1:]
    assert len(backward) == 4, "sums of channels, of groups, the gradient, those of the weights"
    launches = [(kernel, place) for kernel in kernels for place in range(len(kernel.launches))]
    assert [one.problems() for one in compile_launches(launches, Target.named(arch))] == [()] * len(launches)
