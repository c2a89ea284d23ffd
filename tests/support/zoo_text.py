"""The architectures of the zoo that read and write text."""

from __future__ import annotations

from typing import Any

from support import zoo_inputs as make
from support.architecture import VOCAB, Architecture

ONE = ("eager",)

# 48 wide; 6 heads of 8; 2 K/V heads, so groups of 3.
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = DENSE | {"num_key_value_heads": 2}
# Token ids below 10 are never drawn as text.
SPECIAL: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
GPT: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
}
# The three ways in which experts are computed: "eager" loops over them and breaks the graph at every layer.
GROUPED_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}
BATCHED_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
LOOPED_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}


def _decoder(name: str, model_class: str, config: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, model_class, SPECIAL | config, make.text, **more)


def _encoder(name: str, model_class: str, config: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, model_class, SPECIAL | config, make.text, **more)


ENCODERS = [
    _encoder("bert", "BertForMaskedLM", DENSE),
    _encoder("roberta", "RobertaForMaskedLM", DENSE),
    _encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCAB,
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 2,
            "n_heads": 6,
            "max_position_embeddings": 64,
        },
    ),
    _encoder("albert", "AlbertForMaskedLM", DENSE | {"embedding_size": 24}),
    _encoder("electra", "ElectraForMaskedLM", DENSE | {"embedding_size": 24}),
    _encoder("mpnet", "MPNetForMaskedLM", DENSE, attentions=ONE),
    _encoder(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        DENSE
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        attentions=ONE,
    ),
    _encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        DENSE
        | {
            "cls_token_id": 2,
            "sep_token_id": 3,
            "local_attention": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    Architecture(
        "xlnet",
        "XLNetLMHeadModel",
        SPECIAL | {"vocab_size": VOCAB, "d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 80},
        make.text,
        attentions=ONE,
    ),
]

DECODERS = [
    _decoder("gpt2", "GPT2LMHeadModel", GPT),
    _decoder("gptj", "GPTJForCausalLM", GPT | {"rotary_dim": 4}, attentions=ONE),
    _decoder(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 6,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
        },
        attentions=ONE,
    ),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", DENSE),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM", GPT | {"n_inner": 80}),
    _decoder(
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
        },
    ),
    _decoder("llama", "LlamaForCausalLM", GROUPED),
    _decoder("mistral", "MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    _decoder("mixtral", "MixtralForCausalLM", GROUPED | GROUPED_EXPERTS | {"num_local_experts": 4}),
    _decoder("qwen2", "Qwen2ForCausalLM", GROUPED),
    _decoder("qwen3", "Qwen3ForCausalLM", GROUPED | {"head_dim": 10}),
    _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        GROUPED | BATCHED_EXPERTS | {"head_dim": 10, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    _decoder("gemma", "GemmaForCausalLM", GROUPED | {"head_dim": 10}),
    _decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        GROUPED | {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 12},
        attentions=ONE,
    ),
    _decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GROUPED
        | {
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    _decoder("phi", "PhiForCausalLM", GROUPED | {"partial_rotary_factor": 0.5}),
    _decoder("phi3", "Phi3ForCausalLM", GROUPED | {"sliding_window": 5}),
    _decoder(
        "falcon",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 80,
        },
    ),
    _decoder(
        "falcon_alibi",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "alibi": True,
            "multi_query": True,
            "ffn_hidden_size": 80,
        },
    ),
    _decoder(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 6},
        attentions=ONE,
    ),
    _decoder(
        "mpt",
        "MptForCausalLM",
        {
            "vocab_size": VOCAB,
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
        attentions=ONE,
    ),
    _decoder("stablelm", "StableLmForCausalLM", GROUPED | {"qk_layernorm": True}),
    _decoder("starcoder2", "Starcoder2ForCausalLM", GROUPED),
    _decoder("olmo2", "Olmo2ForCausalLM", GROUPED),
    _decoder("glm4", "Glm4ForCausalLM", GROUPED | {"head_dim": 8}),
    _decoder("nemotron", "NemotronForCausalLM", GROUPED | {"head_dim": 8}),
    _decoder(
        "cohere2",
        "Cohere2ForCausalLM",
        GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    _decoder(
        "granite",
        "GraniteForCausalLM",
        GROUPED
        | {
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    _decoder(
        "gpt_oss",
        "GptOssForCausalLM",
        GROUPED
        | GROUPED_EXPERTS
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        attentions=ONE,
    ),
    _decoder(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        DENSE
        | LOOPED_EXPERTS
        | {
            "num_key_value_heads": 6,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 20,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
        },
    ),
    Architecture(
        "mamba",
        "MambaForCausalLM",
        SPECIAL | {"vocab_size": VOCAB, "hidden_size": 48, "state_size": 5, "num_hidden_layers": 2},
        make.text,
        attentions=ONE,
    ),
]

ENCODER_DECODERS = [
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 48,
            "d_kv": 10,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 6,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        make.text_pair,
    ),
    Architecture(
        "bart",
        "BartForConditionalGeneration",
        SPECIAL
        | {
            "vocab_size": VOCAB,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": 3,
        },
        make.text_pair,
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        SPECIAL
        | {
            "vocab_size": VOCAB,
            "num_mel_bins": 12,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "max_source_positions": 17,
            "max_target_positions": 40,
            "decoder_start_token_id": 3,
            "begin_suppress_tokens": None,
        },
        make.spectrogram,
        masks=(),
    ),
]
