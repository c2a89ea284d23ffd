"""What `cross_compile` writes: files of every kernel, also of kernels that share a name, and that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.kernel_check import InFloat64
from fxopt.integrations.cross_compile import CrossCompiled, cross_compile


def _program(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    normal = torch.nn.functional.layer_norm(x + bias, (40,))
    return normal, x[:, 3:20].sin().sum(-1), x[:, :3].sin().sum(0)


@pytest.fixture(scope="module")
def found() -> CrossCompiled:
    return cross_compile(_program, torch.randn(4, 40), torch.randn(1, 40).expand(4, 40), target="sm_90")


def test_every_kernel_has_its_files(found: CrossCompiled, tmp_path: Path) -> None:
    written = found.save(tmp_path)
    launches = sum(len(kernel.compiled) for kernel in found.kernels)
    assert len(found.kernels) == 3
    assert len(written) == len(set(written)) == len(found.kernels) + 2 * launches
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert {path.read_text() for path in tmp_path.glob("*.py")} == {one.source for one in found.kernels}


def test_references_run_on_the_examples(found: CrossCompiled) -> None:
    """Operators with several results, and inputs that are expanded, have to be written so that they run."""
    expanded = several = False
    for kernel in found.kernels:
        module: dict[str, Any] = {"__name__": kernel.name}
        source = kernel.source.replace("@triton.jit\n", "")  # which wants a file
        exec(source, module)
        inputs = module["example_inputs"]("cpu")
        expanded |= any(0 in one.stride() for one in inputs)
        several |= "var_mean" in source
        with InFloat64():
            made = module["reference"](*[one.double() for one in inputs])
        wanted = module["outputs"](*inputs)
        for one, want in zip(_listed(made), _listed(wanted), strict=True):
            assert (one.shape, one.dtype) == (want.shape, torch.float64)
    assert expanded
    assert several


def _listed(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)
