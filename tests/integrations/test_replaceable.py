"""What stands against a quantized layer in the place of a linear one, and what is carried over to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import BloomConfig, BloomModel, MambaConfig, MambaModel, T5Config, T5EncoderModel

import fxopt
from fxopt.integrations.quantized_module import QuantizedLinear
from support.quantizable import distance, ids

K = 384


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def one(**kind: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, K, **kind))


def pruned() -> nn.Module:
    model = one()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def forwarded() -> nn.Module:
    model: Any = one()
    before = model[0].forward
    model[0].forward = lambda x: before(x) * 3
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(K, K)))


def stored_as(dtype: torch.dtype) -> nn.Module:
    model = one()
    model[0].weight = nn.Parameter(torch.ones(K, K, dtype=dtype), requires_grad=False)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "itself": (lambda: nn.Linear(K, K), "it is the model itself, which is changed in place"),
    "pruned": (pruned, "its weight is computed before each call"),
    "parametrized": (parametrized, "a subclass of Linear"),
    "forward": (forwarded, "its forward was replaced"),
    "complex": (lambda: stored_as(torch.complex64), "saw torch.complex64"),
    "float8": (lambda: stored_as(torch.float8_e4m3fn), "saw torch.float8_e4m3fn"),
    "integers": (lambda: stored_as(torch.int32), "saw torch.int32"),
    "meta": (lambda: one(device="meta"), "no numbers yet"),
}


@pytest.mark.filterwarnings("ignore:fxopt.prepare. none of")
@pytest.mark.parametrize("case", REFUSED)
def test_stays(case: str) -> None:
    make, reason = REFUSED[case]
    model: Any = make()
    before = list(model.modules())
    fxopt.prepare(model, "int8")
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    (note,) = model.fxopt_linears
    assert reason in note.reason


class Reads(nn.Module):
    """Looks at weights inside."""

    def __init__(self, fast: bool) -> None:
        super().__init__()
        self.fast, self.inner = fast, one()
        self.kept, self.other, self.called = (nn.Linear(K, K) for _ in range(3))

    def reset_parameters(self) -> None:
        self.called.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fast:
            x = nn.functional.linear(x, self.kept.weight)
            x = x.relu()
        else:
            x = x @ self.other.weight
        x = x.to(self.inner.proj.weight.dtype) if hasattr(self.inner, "proj") else self.inner(x)
        return self.kept(x) + self.other(x) + self.called(x)


@pytest.mark.parametrize("fast", [True, False])
def test_weights_that_are_read(fast: bool) -> None:
    """Only where a call comes to that, which two of three conditions tell."""
    model, x = Reads(fast), torch.randn(3, K)
    wanted = model(x)
    fxopt.prepare(model, "int8")
    assert distance(model(x), wanted) < 2e-2
    dense = [name for name, each in model.named_modules() if type(each) is nn.Linear]
    assert dense == ["kept" if fast else "other"]


def mamba() -> nn.Module:
    return MambaModel(MambaConfig(vocab_size=640, hidden_size=512, num_hidden_layers=1, time_step_rank=160))


def bloom(ranks: int) -> nn.Module:
    sizes = {"vocab_size": 640, "hidden_size": 384, "n_layer": 1, "n_head": 6}
    return BloomModel(BloomConfig(**sizes, pretraining_tp=ranks, slow_but_exact=True))


def t5() -> nn.Module:
    sizes = {"d_model": 384, "d_ff": 768, "d_kv": 64, "num_heads": 6, "num_layers": 1, "vocab_size": 640}
    return T5EncoderModel(T5Config(**sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "mamba": (mamba, "int8", "layers.0.mixer.dt_proj"),
    "bloom": (lambda: bloom(2), "int8", "h.0.self_attention.dense"),
    "bloom_plain": (lambda: bloom(1), "int8", ""),
    "t5": (t5, {"*.wo": "int4", "*": "int8"}, "encoder.block.0.layer.1.DenseReluDense.wo"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_read_weights(case: str) -> None:
    make, scheme, name = MODELS[case]
    model: Any = make().eval()
    wanted = model(ids())[0]
    fxopt.prepare(model, scheme)
    assert distance(model(ids())[0], wanted) < 5e-2
    read = [note.name for note in model.fxopt_linears if note.reason.endswith("besides calling it")]
    assert (name in read) if name else not read


@pytest.mark.filterwarnings("ignore:fxopt.prepare. none of")
def test_the_encoder_of_torch() -> None:
    model, x = nn.TransformerEncoderLayer(K, 6, 512, batch_first=True).eval(), torch.randn(2, 5, K)
    wanted = model(x)
    assert torch.equal(fxopt.prepare(model, "int8")(x), wanted)


def test_hooks_are_carried_over() -> None:
    model: Any = one()
    handle = model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    x = torch.randn(3, K)
    wanted = copy.deepcopy(model)(x)
    fxopt.prepare(model, "int8")
    assert isinstance(model[0], QuantizedLinear)
    assert distance(model(x), wanted) < 2e-2
    handle.remove()
    assert distance(model(x), wanted / 2) < 2e-2


def test_a_layer_of_two_names() -> None:
    layer = nn.Linear(K, K)
    model: Any = nn.Sequential(layer, nn.ReLU(), layer)
    fxopt.prepare(model, {"0": "int8"})
    assert isinstance(model[0], QuantizedLinear)
    assert model[2] is model[0]


def test_what_was_compiled_before() -> None:
    model, x = one(), torch.randn(3, K)
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(x)
    calibration = fxopt.calibrate(compiled, [x])
    assert list(calibration.tokens) == ["0"]
    assert fxopt.prepare(compiled, {"0": "int8"}, calibration=calibration) is compiled
    assert isinstance(model[0], QuantizedLinear)
    assert 0 < distance(compiled(x), wanted) < 2e-2


def test_prepared_twice() -> None:
    model: Any = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    fxopt.prepare(model, {"0": "int8"})
    fxopt.prepare(model, "int4")
    formats = {note.name: note.format for note in model.fxopt_linears}
    assert formats == {"0": "int8", "1": "int4 of groups of 32"}
