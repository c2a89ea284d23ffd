"""fxopt.prepare takes over linear modules of other libraries: here one with bitsandbytes' attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.integrations import adopt_modules
from fxopt.integrations.quantized_module import QuantizedLinear
from support.compiled import all_handled, compile_fxopt
from support.packed_layouts import codes_of, in_bytes, scales_of

N, K = 96, 64


class Linear8bitLt(nn.Linear):
    """bitsandbytes' layer at its default threshold: it reads how many features are large."""

    def __init__(self, seed: int, has_fp16_weights: bool = False, outputs: int = N, inputs: int = K) -> None:
        super().__init__(inputs, outputs)
        codes = (codes_of(outputs, inputs, 8, seed).int() - 128).to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.CB, self.weight.SCB = codes, scales_of(outputs, seed=seed)  # type: ignore[attr-defined]
        self.state = SimpleNamespace(CB=None, SCB=None, threshold=6.0, has_fp16_weights=has_fp16_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if int((x.abs() >= self.state.threshold).sum()) > 10**9:
            raise AssertionError
        dense = weight.CB.to(x.dtype) * weight.SCB[:, None].to(x.dtype) / 127
        return nn.functional.linear(x, dense, self.bias)


class Model(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = Linear8bitLt(1), second, nn.Linear(K, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def model(**given: Any) -> Model:
    return Model(Linear8bitLt(2, outputs=K, inputs=N, **given)).eval()


def test_one_graph_after_preparing() -> None:
    own = model()
    x = torch.randn(2, 5, K)
    with torch.no_grad():
        wanted = own(x)
        fxopt.prepare(own)
        torch._dynamo.utils.counters.clear()
        with all_handled() as records:
            found = compile_fxopt(own)(x)
    assert len(records) == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert isinstance(own.first, QuantizedLinear) and own.first.threshold == 6.0
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 2e-2, "activations are rounded to 8 bits, as bitsandbytes does"


def test_every_layer_is_noted() -> None:
    own = model(has_fp16_weights=True)
    fxopt.prepare(own)
    notes = {note.name: note for note in own.fxopt_linears}  # type: ignore[union-attr]
    assert notes["first"].is_quantized and notes["first"].source == "bitsandbytes Linear8bitLt"
    assert notes["second"].route == "its library" and "anew in each call" in notes["second"].reason
    assert notes["head"].route == "dense"
    assert type(own.second) is Linear8bitLt
    assert "first: int8, activations int8 below 6" in str(own.fxopt_linears)


def test_memory_is_the_librarys() -> None:
    own = model()
    where = own.first.weight.CB.data_ptr()  # type: ignore[union-attr]
    fxopt.prepare(own)
    assert own.first.codes.data_ptr() == where  # type: ignore[union-attr]


def test_a_shared_layer_stays_shared() -> None:
    own = model()
    own.again = own.first  # type: ignore[assignment]
    fxopt.prepare(own)
    assert own.again is own.first and isinstance(own.first, QuantizedLinear)


def test_a_state_is_complete() -> None:
    own = model()
    fxopt.prepare(own)
    state = own.state_dict()
    made = QuantizedLinear.described(state, "first.")
    x = torch.randn(3, K)
    assert made.threshold == 6.0
    torch.testing.assert_close(made(x), own.first(x), rtol=0, atol=0)


def test_layers_of_libraries_are_not_quantized_again() -> None:
    own = model()
    fxopt.prepare(own, quantize={"head": "int8", "*": "int4"})
    assert own.first.format == "int8" and own.second.format == "int8"  # type: ignore[union-attr]


class Linear4bit(nn.Linear):
    """bitsandbytes' layer on a processor with AVX512-BF16: packed for its op in the first call."""

    support_avx512bf16_for_cpu = True

    def __init__(self) -> None:
        super().__init__(K, N, bias=False)
        self.compute_dtype, self.compute_type_is_set, self.calls = torch.bfloat16, True, list[torch.dtype]()
        packed = in_bytes(codes_of(N, K), high_first=True)[:, None]
        own = {"shape": (N, K), "quant_type": "nf4", "blocksize": 64, "nested": False}
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(absmax=scales_of(N * K // 64), **own)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x.dtype)
        return x.new_zeros((*x.shape[:-1], N))


def prepared_4bit(monkeypatch: pytest.MonkeyPatch, reason: str | None, train: bool = False) -> nn.Module:
    asked: list[tuple[str, torch.dtype]] = []

    def measured(name: str, rival: Any, found: Any, dtype: torch.dtype) -> str | None:
        asked.append((name, dtype))
        return reason

    monkeypatch.setattr(adopt_modules, "faster_rival", measured)
    own = fxopt.prepare(nn.Sequential(Linear4bit()).train(train))
    assert asked == ([] if train else [("Linear4bit", torch.bfloat16)])
    return own


def test_a_layer_with_a_faster_op_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = prepared_4bit(monkeypatch, "Linear4bit took 0.50x the time of fxopt's product")
    layer: Any = own[0]  # type: ignore[index]
    assert type(layer) is Linear4bit
    assert layer.calls == [torch.bfloat16], "it has packed its weight, which no graph can hold"
    (note,) = own.fxopt_linears  # type: ignore[union-attr]
    assert (note.route, note.reason) == ("its library", "Linear4bit took 0.50x the time of fxopt's product")


@pytest.mark.parametrize("train", [False, True])
def test_a_layer_with_a_slower_op_is_taken_over(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    """In training it has no op of its own."""
    assert isinstance(prepared_4bit(monkeypatch, None, train)[0], QuantizedLinear)  # type: ignore[index]


def test_hooks_of_the_user_are_carried_over() -> None:
    own, x = model(), torch.randn(2, K)
    own.first.register_forward_hook(lambda module, args, out: out * 2)

    def of_library(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        raise AssertionError

    own.second.register_forward_hook(of_library)
    of_library.__module__ = "compressed_tensors.quantization"
    with torch.no_grad():
        wanted = own.first(x)
        fxopt.prepare(own)
        assert isinstance(own.first, QuantizedLinear)
        assert float((own.first(x) - wanted).norm() / wanted.norm()) < 2e-2  # tokens are rounded
        own(x)
