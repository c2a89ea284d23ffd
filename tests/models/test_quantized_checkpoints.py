"""Checkpoints that libraries have quantized, end to end: one graph, every layer routed, their numbers.

Needs the libraries of the extra ``quant-tests``; each test is for one of them. What they store is tested
without them in tests/ir/test_weight_sources.py, their modules in tests/ir/test_quantized_modules.py, and
their graphs in tests/frontend/test_adopt.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from support.tiny_checkpoint import IDS, Outcome, exact_logits, load, prepared, relative, save

LAYERS = 14
# Relative error of the logits against float64, weight-only in float32.
EXACT = 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save(tmp_path / "llama")


def check(outcome: Outcome, exact: torch.Tensor, library: torch.Tensor | None, in_graph: bool = True) -> None:
    """One graph with all layers in it; exact, or at most twice as far off as the library is."""
    assert (outcome.graphs, outcome.breaks) == (1, 0)
    assert outcome.left == []
    assert outcome.adopted == (LAYERS if in_graph else 0)
    limit = EXACT if library is None else 2 * relative(library, exact)
    assert relative(outcome.logits, exact) <= limit, (relative(outcome.logits, exact), limit)


def both_ways(folder: str, model: Any, dense_of: Any, library: torch.Tensor | None = None) -> None:
    """As the library has loaded it, and prepared."""
    exact = exact_logits(folder, model, dense_of)
    check(Outcome(model), exact, library)
    torch._dynamo.reset()
    fxopt.prepare(model)
    assert sum(note.is_quantized for note in model.fxopt_linears) == LAYERS
    check(Outcome(model), exact, library, in_graph=False)


# bitsandbytes


def _bnb(folder: str, **given: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return load(folder, config=BitsAndBytesConfig(**given))


def _bnb_dense(module: Any) -> torch.Tensor | None:
    from bitsandbytes import functional

    kind = type(module).__name__
    if kind == "Linear4bit":
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if kind != "Linear8bitLt":
        return None
    codes = module.weight.CB if module.weight.CB is not None else module.state.CB
    absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return codes.double() * absmax.double()[:, None] / 127


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit(folder: str, kind: str, nested: bool) -> None:
    model = _bnb(
        folder, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    for module in model.modules():  # as on a processor that its own layout is not for
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    both_ways(folder, model, _bnb_dense)


def test_bitsandbytes_4bit_for_cpus(folder: str) -> None:
    model = _bnb(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    exact = exact_logits(folder, model, _bnb_dense)
    ready = prepared(model)
    with torch.no_grad():
        library = model(IDS, use_cache=False).logits  # packs the weights, and rounds scales to bfloat16
    outcome = Outcome(model)
    # Where bitsandbytes' own op is measured to be faster it stays.
    assert outcome.adopted + sum("the time of fxopt's product" in why for why in outcome.left) == LAYERS
    assert (outcome.graphs, outcome.breaks) == (1, 0)
    assert relative(outcome.logits, exact) <= 2 * relative(library, exact)
    torch._dynamo.reset()
    taken = [note.is_quantized for note in ready.fxopt_linears if note.name != "lm_head"]
    assert len(taken) == LAYERS and len(set(taken)) == 1
    if taken[0]:
        check(Outcome(ready), exact, None, in_graph=False)
        return
    outcome = Outcome(ready)
    assert (outcome.graphs, outcome.breaks) == (1, 0)
    assert relative(outcome.logits, exact) <= 2 * relative(library, exact)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bitsandbytes_int8(folder: str, threshold: float) -> None:
    model = _bnb(folder, load_in_8bit=True, llm_int8_threshold=threshold)
    exact = exact_logits(folder, model, _bnb_dense)
    ready = prepared(model)
    with torch.no_grad():
        library = model(IDS, use_cache=False).logits
    check(Outcome(ready), exact, library, in_graph=False)
    torch._dynamo.reset()
    found = Outcome(model)
    if not threshold:
        check(found, exact, library)
        return
    # Whole, with the products of the library: its layers keep which features are apart in a call.
    assert (found.graphs, found.breaks, found.adopted, len(found.left)) == (1, 0, 0, LAYERS)
    assert torch.equal(found.logits, library)


# torchao


@pytest.mark.parametrize("name", ["Int8WeightOnly", "Float8WeightOnly", "Int8DynamicActivationInt8Weight"])
def test_torchao(folder: str, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = load(folder, config=TorchAoConfig(getattr(quantization, f"{name}Config")()))

    def dense_of(module: Any) -> torch.Tensor | None:
        weight = getattr(module, "weight", None)
        return weight.dequantize() if type(weight).__name__ in ("Int8Tensor", "Float8Tensor") else None

    library = None
    if "Dynamic" in name:
        with torch.no_grad():
            library = model(IDS, use_cache=False).logits
    both_ways(folder, model, dense_of, library)


# optimum-quanto


@pytest.mark.parametrize("name", ["int8", "float8", "int4"])
def test_quanto(folder: str, name: str) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    model = load(folder, config=QuantoConfig(weights=name))

    def dense_of(module: Any) -> torch.Tensor | None:
        return module.weight.dequantize() if type(module).__name__ == "QLinear" else None

    both_ways(folder, model, dense_of)


# HQQ, which transformers 5.23 cannot load


def test_hqq(folder: str) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    model = load(folder)
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            new = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)

    def dense_of(module: Any) -> torch.Tensor | None:
        return module.dequantize() if type(module).__name__ == "HQQLinear" else None

    both_ways(folder, model, dense_of)


# compressed-tensors


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8"])
def test_compressed_tensors(folder: str, scheme: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = load(folder)
    config = QuantizationConfig(
        config_groups={"all": preset_name_to_scheme(scheme, ["Linear"])}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    _calibrate(model)
    dense = {name: _rounded(module) for name, module in model.named_modules() if _has_scheme(module)}
    exact = exact_logits(folder, model, lambda module: dense.get(_name_of(model, module)))
    with torch.no_grad():
        library = model(IDS, use_cache=False).logits if scheme == "W8A8" else None
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    fxopt.prepare(model)
    assert sum(note.is_quantized for note in model.fxopt_linears) == LAYERS, str(model.fxopt_linears)
    check(Outcome(model), exact, library, in_graph=False)


def _has_scheme(module: Any) -> bool:
    return getattr(module, "quantization_scheme", None) is not None


def _name_of(model: Any, module: Any) -> str:
    return next(name for name, each in model.named_modules() if each is module)


@torch.no_grad()
def _calibrate(model: Any) -> None:
    """Scales of the largest magnitude of each group."""
    for module in filter(_has_scheme, model.modules()):
        how = module.quantization_scheme.weights
        groups = module.weight.unflatten(1, (module.weight_scale.shape[1], -1))
        module.weight_scale.copy_(groups.abs().amax(-1) / (2 ** (how.num_bits - 1) - 1))


@torch.no_grad()
def _rounded(module: Any) -> torch.Tensor:
    from compressed_tensors.quantization import fake_quantize

    how = module.quantization_scheme.weights
    zero = getattr(module, "weight_zero_point", None)
    return fake_quantize(module.weight, module.weight_scale, zero, how)


# GPTQModel


@pytest.mark.parametrize("kind", ["TorchLinear", "AwqTorchLinear"])
def test_gptqmodel(folder: str, kind: str) -> None:
    where = "torch" if kind == "TorchLinear" else "torch_awq"
    module = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{where}")
    model = load(folder)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            new = getattr(module, kind)(
                bits=4, group_size=32, sym=False, desc_act=False, in_features=linear.in_features,
                out_features=linear.out_features, bias=False, register_buffers=True,
            )  # fmt: skip
            generator = torch.Generator().manual_seed(len(name))
            new.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
            new.qzeros.random_(0, 2**31 - 1, generator=generator).bitwise_and_(0x77777777)
            new.scales.uniform_(0.001, 0.01, generator=generator)
            if kind == "TorchLinear":
                new.qzero_format(format=2)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new.eval())

    def dense_of(layer: Any) -> torch.Tensor | None:
        if type(layer).__name__ != kind:
            return None
        found = layer.dequantize_weight() if kind == "TorchLinear" else _awq_dense(layer)
        return found.t()

    exact = exact_logits(folder, model, dense_of)
    fxopt.prepare(model)
    assert sum(note.is_quantized for note in model.fxopt_linears) == LAYERS, str(model.fxopt_linears)
    # The library widens weights to float16, whose rounding is not repeated.
    outcome = Outcome(model)
    assert (outcome.graphs, outcome.breaks) == (1, 0)
    assert relative(outcome.logits, exact) <= 2e-3


def _awq_dense(layer: Any) -> torch.Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32)
