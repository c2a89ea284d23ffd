"""Layers of libraries that Dynamo could not see whole: mended where they are loaded, and only there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fxopt.integrations import library_fixes
from fxopt.integrations.autoload import autoload, failures
from fxopt.report.record import collect


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    autoload()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert not failures()


def loaded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))


def absent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)


def picked(x: torch.Tensor) -> torch.Tensor:
    """As LLM.int8() picks features."""
    places = (x.abs() > 1).any(0).nonzero().flatten()
    return x.index_select(1, places).sum(1).cos() + x.sum(1)


def graphs(backend: Any) -> int:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(picked, backend=backend, options={"host": "eager"})
    with collect() as records:
        torch.testing.assert_close(compiled(x), picked(x))
        torch.testing.assert_close(compiled(3 * x), picked(3 * x))
    return len(records)


@pytest.mark.parametrize("by_name", [True, False])
def test_sizes_that_depend_on_numbers_are_captured(by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxopt

    loaded(monkeypatch, "bitsandbytes")
    assert graphs("fxopt" if by_name else fxopt.backend) == 1


def test_only_where_bitsandbytes_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "bitsandbytes")
    assert graphs("fxopt") > 1


def test_other_compiled_functions_keep_their_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, "bitsandbytes")
    assert graphs("fxopt") == 1
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops
    torch._dynamo.reset()
    count = 0

    def backend(gm: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return gm.forward

    torch.compile(picked, backend=backend)(torch.randn(5, 7))
    assert count > 1


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """The product of GPTQModel, as its extension declares it."""
    made = torch.library.Library(library_fixes._GPTQ, "FRAGMENT")
    name = "gemm_int4_qzero_group_scaled_cpu_forward"
    made.define(
        f"{name}(Tensor input, Tensor weight, Tensor zeros, Tensor absmax, int blocksize, "
        "Tensor? bias=None) -> Tensor"
    )
    made.impl(name, lambda x, weight, *_: x.sum(1, keepdim=True) * weight.sum(1).to(x.dtype), "CPU")
    yield made
    torch._library.simple_registry.singleton._data.pop(f"{library_fixes._GPTQ}::{name}", None)
    made._destroy()


def test_missing_fakes_are_added(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ops = getattr(torch.ops, library_fixes._GPTQ)
        return ops.gemm_int4_qzero_group_scaled_cpu_forward(x.cos(), weight, weight, x, 32).sin()

    x, weight = torch.randn(3, 64), torch.ones(8, 32, dtype=torch.uint8)
    wanted = fn(x, weight)
    absent(monkeypatch, "gptqmodel")
    with collect() as records:
        torch.testing.assert_close(
            torch.compile(fn, backend="fxopt", options={"host": "eager"})(x, weight), wanted
        )
    assert len(records) > 1
    torch._dynamo.reset()
    loaded(monkeypatch, "gptqmodel")
    with collect() as records:
        for _ in range(2):  # adding it again changes nothing
            compiled = torch.compile(fn, backend="fxopt", options={"host": "eager"})
        torch.testing.assert_close(compiled(x, weight), wanted)
    assert len(records) == 1
