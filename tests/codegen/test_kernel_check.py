"""The check that is part of every kernel's file, on functions in the place of kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxopt.codegen.kernel_check import differences

Function = Callable[[torch.Tensor], torch.Tensor]
SPECIAL = "result 0: NaN or infinity differ from eager's"


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    return 1 / x


@pytest.mark.parametrize(
    ("reference", "launch", "numbers"),
    [
        (square, lambda x: (x * x).clamp(max=65504), [300.0, 1.0]),  # float16's largest number
        (reciprocal, lambda x: 1 / x.abs(), [-0.0, 1.0]),
        (reciprocal, lambda x: (1 / x).nan_to_num(posinf=float("nan")), [0.0, 1.0]),
    ],
)
def test_special_values_are_the_same_ones(
    reference: Function, launch: Function, numbers: list[float]
) -> None:
    x = torch.tensor(numbers).half()
    assert differences(reference, reference, (x,)) == []
    assert differences(launch, reference, (x,)) == [SPECIAL]
