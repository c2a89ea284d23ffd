"""Run with `TRITON_INTERPRET=1`: `generate` of a tiny model through kernels; prints findings as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fxopt.report.record import collect
from support.architecture import liven, padding_mask

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 1,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
# How `generate` is called, and the options of the compilation.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "static": ({"cache_implementation": "static"}, {}),
    "growing": ({}, {}),
    "unpadded": ({}, {}),
    "replayed": ({}, {"replay": "always"}),
    "int8": ({}, {"kv_cache_dtype": "int8"}),
    "fp8": ({}, {"kv_cache_dtype": "fp8"}),
    "static int8": ({"cache_implementation": "static"}, {"kv_cache_dtype": "int8"}),
    "static fp8": ({"cache_implementation": "static"}, {"kv_cache_dtype": "fp8"}),
    "capped": ({"cache_implementation": "static"}, {}),
}


def found(name: str, directory: str) -> dict[str, Any]:
    """Whether the tokens are eager's, and through which kernels they came."""
    arguments, options = RUNS[name]
    torch.manual_seed(0)
    if name == "capped":
        config: Any = Gemma2Config(**SIZES, sliding_window=8, pad_token_id=0)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    else:
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").eval()
    liven(model)
    ids = torch.randint(1, 50, (2, 5))
    arguments = {
        **arguments, "attention_mask": padding_mask(2, 5, "left"), "max_new_tokens": 7, "min_new_tokens": 7,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    if name == "unpadded":
        del arguments["attention_mask"]
    options = {"host": "eager", "strict": True, "cache_dir": directory, **options}
    with torch.no_grad(), collect() as records:
        tokens = torch.compile(model, backend="fxopt", options=options).generate(ids, **arguments)
    return {
        "tokens": torch.equal(tokens, model.generate(ids, **arguments)),
        "kernels": sum(one.name.endswith("_attention") for record in records for one in record.kernels),
        "appending": sum(one.name == "append_attention" for record in records for one in record.kernels),
        "reasons": [
            each.reason
            for record in records
            for each in record.evidence
            if each.rewrite == "fuse-append-attention" and each.status == "applied"
        ],
        "providers": [each[1] for record in records for each in record.providers],
        "failures": sum(len(record.failures) for record in records),
    }


if __name__ == "__main__":
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    print("\n" + json.dumps(found(*sys.argv[1:])))
