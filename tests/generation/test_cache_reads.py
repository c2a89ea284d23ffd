"""What a compiled step of `generate` reads of caches that it does not append to, or of which it needs a part.

Judged by the graphs that AOTAutograd makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._ops import OpOverload
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import fxopt.hosts
from fxopt.hosts.host import Host
from fxopt.ir.cost import hint
from fxopt.ir.facts import val
from support.compiled import all_handled, compile_fxopt

aten = torch.ops.aten
# Inputs by Dynamo's names, and the graph that AOTAutograd makes of the same inputs.
Step = tuple[list[str], fx.GraphModule]

WINDOW, PROMPT, TOKENS = 6, 9, 14
SMALL: dict[str, Any] = {
    "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
STARTS: dict[str, Any] = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
LAYERS: dict[str, Any] = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "sliding_window": WINDOW,
}  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Step]]:
    """The graphs of all that is compiled, in order."""
    found: list[Step] = []

    def compile_and_keep(gm: fx.GraphModule, inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]

        def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            found.append((names, graph))
            return make_boxed_func(graph.forward)

        return aot_module_simplified(
            gm, inputs, fw_compiler=keep, inference_compiler=keep, keep_inference_input_mutations=True
        )

    torch.compiler.reset()
    monkeypatch.setattr(fxopt.hosts, "EAGER", Host("eager", compile_and_keep))
    yield found


def generate(model: Any, new: int, **how: Any) -> None:
    wanted = model.generate(**how, max_new_tokens=new, do_sample=False)
    with all_handled():
        got = compile_fxopt(model).generate(**how, max_new_tokens=new, do_sample=False)
    assert torch.equal(got, wanted)


def readers(node: fx.Node) -> list[Any]:
    """The ops that read a value, through views."""
    found: list[Any] = []
    for user in node.users:
        is_view = isinstance(user.target, OpOverload) and user.target.is_view
        found += readers(user) if is_view else [user.target]
    return found


def t5() -> Any:
    shapes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**SMALL, **STARTS, **shapes)).eval()


def bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(**SMALL, **STARTS, **LAYERS, max_position_embeddings=64)
    ).eval()


def whisper() -> Any:
    lengths = {"num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 64}
    suppress = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(**SMALL, **STARTS, **LAYERS, **lengths, **suppress)
    ).eval()


PRODUCTS = {
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# What makes keys and values of the encoder's output, by Dynamo's names.
OF_THE_ENCODER = ("encoder_attn_modules_k", "encoder_attn_modules_v", "enc_dec_attention_modules_k")


@pytest.mark.parametrize(("build", "cache"), [(t5, None), (bart, "static"), (whisper, None)])
def test_cross_attention_reads_keys_that_were_computed_once(
    build: Callable[[], Any], cache: str | None, steps: list[Step]
) -> None:
    if build is whisper:
        how: dict[str, Any] = {"input_features": torch.randn(2, 8, 30)}
    else:
        ids = torch.randint(2, 61, (2, 11))
        ids[0, -3:] = 0
        how = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    how |= {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    generate(build(), 8, **how)
    computed = [any(word in name for name in names for word in OF_THE_ENCODER) for names, _ in steps]
    assert computed == [True] + [False] * (len(steps) - 1) and len(steps) > 1
    for names, graph in steps[1:]:
        inputs = zip(names, graph.graph.find_nodes(op="placeholder"), strict=True)
        cached = [node for name, node in inputs if "cross_attention_cache" in name]
        assert len(cached) == 2
        for node in cached:
            assert len(readers(node)) == 1
            assert set(readers(node)) <= PRODUCTS, readers(node)
            # Its rows are no run of a larger buffer: none will come behind them.
            assert node.meta["val"].is_contiguous()


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SMALL, **DECODER, num_hidden_layers=1)).eval()


def gemma3() -> Any:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **DECODER, **layers)).eval()


@pytest.mark.parametrize(
    ("build", "cache", "lengths"), [(mistral, None, {WINDOW}), (gemma3, "static", {WINDOW, TOKENS - 1})]
)
def test_sliding_layers_read_their_window(
    build: Callable[[], Any], cache: str | None, lengths: set[int], steps: list[Step]
) -> None:
    ids = torch.randint(2, 61, (2, PROMPT))
    how: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how |= {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    generate(build(), TOKENS - PROMPT, **how)
    _, graph = steps[-1]
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    calls = graph.graph.find_nodes(op="call_function", target=flash)
    assert {hint(val(call.args[1]).shape[2]) for call in calls} == lengths
    rows = [hint(size) for node in graph.graph.nodes for size in _shape(node)]
    assert max(size for size in rows if size in range(WINDOW, TOKENS + WINDOW)) == max(lengths)


def _shape(node: fx.Node) -> Sequence[Any]:
    value = val(node)
    return value.shape[2:3] if isinstance(value, torch.Tensor) and value.dim() == 4 else ()
