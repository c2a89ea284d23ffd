"""`generate` with multi-head latent attention: each step reads the latents, and tokens are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_generate import prompts
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from fxopt.ir.contract import Status
from fxopt.runtime.kv_state import STATE
from support.compiled import all_handled, compile_fxopt

SHAPES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 2,
    "n_routed_experts": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.8,
}  # fmt: skip


def v2() -> torch.nn.Module:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPES, head_dim=4)).eval()


def v3() -> torch.nn.Module:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPES, n_group=1, topk_group=1)).eval()


@pytest.mark.parametrize(("build", "cache"), [(v2, "static"), (v3, "dynamic")])
def test_tokens(build: Any, cache: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build()
    how = {**prompts(), "do_sample": False, "max_new_tokens": 120}
    how |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    wanted = model.generate(**how)
    assert len(wanted[0].unique()) > 10
    in_place = STATE.in_place
    with all_handled() as found:
        assert torch.equal(compile_fxopt(model).generate(**how), wanted)
    absorbed = [
        [each.status for each in record.evidence if each.rewrite == "absorb-latent-attention"]
        for record in found
    ]
    # The prompt's keys and values are expanded where there is room for no others.
    assert absorbed[-1] == [Status.APPLIED]
    assert (Status.UNPROFITABLE in absorbed[0]) == (cache == "dynamic")
    # Both latents, at nearly every step.
    assert STATE.in_place - in_place >= (0.9 * 2 * 119 if cache == "dynamic" else 0)
