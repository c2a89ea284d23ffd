"""Every kernel of models' forward and backward graphs compiles for GPUs that are not here, and fits."""

from __future__ import annotations

import pytest
import torch

from fxopt.codegen.fit import fitted
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.target import Target
from fxopt.report.record import collect
from support.zoo import ZOO

CASES = [
    ("sm_80", torch.bfloat16),
    ("sm_90", torch.bfloat16),
    ("sm_100", torch.bfloat16),
    ("sm_120", torch.bfloat16),
    ("sm_90", torch.float32),
]


def kernels_of(name: str, dtype: torch.dtype, arch: str) -> list[KernelFile]:
    """Those of a training step, as they are made for that architecture, each once."""
    torch._dynamo.reset()
    model = ZOO[name].make_model(dtype=dtype).train()
    inputs = ZOO[name].make_inputs(training=True, dtype=dtype)
    with collect() as records:
        model.compile(backend="fxopt", options={"host": "eager", "target": arch, "strict": True})
        made = model(**inputs)
        sum(value.float().sum() for value in made.values() if has_gradient(value)).backward()
    return list({kernel.digest: kernel for record in records for kernel in record.kernels}.values())


def has_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def check(model: str, dtype: torch.dtype, arch: str) -> None:
    kernels = kernels_of(model, dtype, arch)
    assert kernels
    compiled = [one for _, launches in fitted(kernels, Target.named(arch)) for one in launches]
    assert [(one.entry, one.problems()) for one in compiled if one.problems()] == []


def test_a_decoder_in_bfloat16() -> None:
    check("llama", torch.bfloat16, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), CASES)
@pytest.mark.parametrize("model", sorted(ZOO))
def test_models(model: str, arch: str, dtype: torch.dtype) -> None:
    check(model, dtype, arch)
