"""What `cross_compile` writes: every kernel's files, also of kernels that share a name."""

from __future__ import annotations

from pathlib import Path

import torch

from fxopt.integrations.cross_compile import cross_compile


def _two_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.sin().sum(-1), x[:, :3].sin().sum(0)


def test_every_kernel_has_its_files(tmp_path: Path) -> None:
    found = cross_compile(_two_sums, torch.randn(4, 40), target="sm_90")
    written = found.save(tmp_path)
    launches = sum(len(kernel.compiled) for kernel in found.kernels)
    assert len(found.kernels) >= 2
    assert len(written) == len(set(written)) == len(found.kernels) + 2 * launches
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert {path.read_text() for path in tmp_path.glob("*.py")} == {one.source for one in found.kernels}
