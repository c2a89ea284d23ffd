"""Quantized linears under a budget for measuring: kernels where they are faster, else one op each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.emit import emit_kernels
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.tune import Budget, Samples, Tuner
from fxopt.ir.contract import Evidence
from fxopt.ir.ops import register_ops
from fxopt.ir.target import Target
from fxopt.options import Options
from fxopt.runtime.kernel_cache import KernelCache
from support.quantized_products import linear, packed

SLOW, HOST, FAST = (Samples((seconds,) * 5) for seconds in (30e-6, 20e-6, 10e-6))
NAME = "emit-quantized-linears"


@dataclass
class MadeUp:
    """Kernels that `is_faster` says so of are faster than the host."""

    is_faster: Callable[[KernelFile], bool]
    asked: list[KernelFile] = field(default_factory=list)
    device: str = "a card"

    def samples(self, kernels: Sequence[KernelFile]) -> list[Samples]:
        self.asked.append(kernels[0])
        return [*(FAST if self.is_faster(one) else SLOW for one in kernels), HOST]

    def problems(self, _: KernelFile) -> list[str]:
        return []


def widens_nibbles(kernel: KernelFile) -> bool:
    return ">> 4" in kernel.jit


def two_layers(rows: int) -> fx.GraphModule:
    """One of int8 and one of int4, for tokens on a GPU."""
    register_ops()
    weights = [packed(256, 512, scheme) for scheme in ("int8", "int4")]
    calls = [linear(one, scheme) for one, scheme in zip(weights, ("int8", "int4"), strict=True)]

    def both(x: Any, other: Any, *tensors: Any) -> Any:
        one = dict(zip(("codes", "scales"), tensors[:2], strict=True))
        two = dict(zip(("codes", "scales", "offsets"), tensors[2:], strict=True))
        return torch.relu(calls[0](x, one)), torch.sigmoid(calls[1](other, two))

    with FakeTensorMode():
        given = [torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for weight in weights:
            given += [
                torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in weight.tensors.values()
            ]
        return make_fx(both, decomposition_table=select_decomp_table())(*given)


@pytest.fixture
def emitted(tmp_path: Path) -> Callable[..., tuple[fx.GraphModule, list[Evidence], MadeUp]]:
    def run(is_faster: Callable[[KernelFile], bool], rows: int = 1, **more: Any) -> Any:
        gm, timer = two_layers(rows), MadeUp(is_faster)
        options = Options.parse(options={"target": "sm_90", "cache_dir": str(tmp_path), **more})
        tuner = Tuner(KernelCache(tmp_path), timer, Target.named("sm_90"), Budget(60.0), shown=False)
        _, evidence = emit_kernels(gm, options, call=True, decide=tuner.decide)
        return gm, [one for one in evidence if one.rewrite == NAME], timer

    return run


def calls(gm: fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    return [one for one in names if one.startswith("fxopt")]


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_kernels_that_are_faster_are_used(emitted: Any, rows: int) -> None:
    gm, evidence, timer = emitted(lambda _: True, rows)
    assert [one.status.value for one in evidence] == ["applied", "applied"]
    assert not any("packed_product" in one for one in calls(gm))
    assert len(timer.asked) >= 2


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_ops_stay_where_the_host_is_faster(emitted: Any, rows: int) -> None:
    gm, evidence, _ = emitted(lambda _: False, rows)
    assert [one.status.value for one in evidence] == ["unprofitable", "unprofitable"]
    assert all("measured on a card: 30.0 us in the kernel, 20.0 us in" in one.reason for one in evidence)
    assert calls(gm) == ["fxopt.packed_product.default"] * 2


def test_each_layer_is_decided_about(emitted: Any) -> None:
    gm, evidence, _ = emitted(widens_nibbles)
    assert [one.status.value for one in evidence] == ["unprofitable", "applied"]
    assert sum("packed_product" in one for one in calls(gm)) == 1


def test_without_a_budget_ops_stay(emitted: Any, tmp_path: Path) -> None:
    gm, timer = two_layers(1), MadeUp(lambda _: True)
    options = Options.parse(options={"target": "sm_90", "cache_dir": str(tmp_path)})
    tuner = Tuner(KernelCache(tmp_path), timer, Target.named("sm_90"), Budget(0.0), shown=False)
    _, evidence = emit_kernels(gm, options, call=True, decide=tuner.decide)
    told = [one.reason for one in evidence if one.rewrite == NAME]
    assert told == ["not measured: the 0 s for measuring were spent"] * 2
    assert len(calls(gm)) == 2 and not timer.asked


def test_on_request_all_are_taken_apart(emitted: Any) -> None:
    _, evidence, _ = emitted(lambda _: False, kernels="always")
    assert [one.status.value for one in evidence] == ["applied", "applied"]


def test_nothing_is_measured_for_graphs_without_quantized_layers(tmp_path: Path) -> None:
    with FakeTensorMode():
        gm = make_fx(lambda x: x @ x)(torch.empty(512, 512, device="cuda"))
    timer = MadeUp(lambda _: True)
    tuner = Tuner(KernelCache(tmp_path), timer, Target.named("sm_90"), Budget(60.0), shown=False)
    options = Options.parse(options={"target": "sm_90", "cache_dir": str(tmp_path)})
    _, evidence = emit_kernels(gm, options, call=True, decide=tuner.decide)
    assert not [one for one in evidence if one.rewrite == NAME]
