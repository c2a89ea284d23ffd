"""Makes any transformers configuration small, by one rule on the names of its attributes.

Two configurations written by different people call the same quantity by the same few names (`hidden_size`,
`d_model`, `n_embd`). A name says what its number is: a width, a count of layers, of heads, of experts. Every
number of one kind is replaced by the `Scale`'s; a number that is already smaller is kept, except where widths
must stay equal to each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """The size of a model and of its inputs.

    Attributes:
        layers, hidden, heads, ffn, vocab, experts: of every transformer in the model. `hidden` is a multiple
            of `2 * heads`.
        image, patch: pixels along one side.
        batch, seq: of the inputs; positions are at least `2 * seq`.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    ffn: int = 128
    vocab: int = 512
    experts: int = 4
    image: int = 32
    patch: int = 8
    batch: int = 2
    seq: int = 16

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def positions(self) -> int:
        return max(64, 2 * self.seq)


SCALES: dict[str, Scale] = {
    "tiny": Scale(),
    "small": Scale(hidden=384, heads=6, ffn=1024, vocab=4000, image=112, patch=8, batch=2, seq=128),
}

Rule = Callable[[Scale, int], int]


def _same(pick: Callable[[Scale], int]) -> Rule:
    return lambda scale, _: pick(scale)


def _at_most(pick: Callable[[Scale], int]) -> Rule:
    return lambda scale, value: min(value, pick(scale))


# The first pattern that matches the whole name decides.
_RULES: tuple[tuple[str, Rule], ...] = (
    (
        r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|num_(encoder|decoder)_layers"
        r"|(encoder|decoder)_num_hidden_layers|depth|num_(block|encoder_block)s_?|conv_layers|num_hidden_groups",
        _at_most(lambda s: s.layers),
    ),
    (
        r"num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|attention_heads"
        r"|num_(encoder|decoder)_attention_heads|(encoder|decoder)_num_attention_heads"
        r"|num_cross_attention_heads|num_self_attention_heads",
        _same(lambda s: s.heads),
    ),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|d_embed|model_dim|width|text_embed_dim|word_embed_proj_dim"
        r"|(encoder|decoder)_hidden_size|(encoder|decoder)_hidden_dim|embedding_size|out_hidden_size"
        r"|d_latents|hidden_dim|output_channels|text_hidden_size|projection_dim|cross_attention_hidden_size"
        r"|output_hidden_size",
        _same(lambda s: s.hidden),
    ),
    (
        r"intermediate_size|ffn_dim|d_ff|(encoder|decoder)_ffn_dim|ffn_hidden_size|mlp_dim|d_inner"
        r"|(encoder|decoder)_intermediate_size|n_inner|feed_forward_hidden_size",
        _at_most(lambda s: s.ffn),
    ),
    (r"(shared_expert_|moe_|expert_)?intermediate_size.*|moe_ffn_hidden_size", _at_most(lambda s: s.ffn)),
    (
        r"head_dim|attention_head_dim|d_kv|d_head|kv_channels|v_head_dim|qk_head_dim",
        _same(lambda s: s.head_dim),
    ),
    (r"num_pos_feats", _same(lambda s: s.hidden // 2)),  # of each direction
    (r"global_head_dim|qk_nope_head_dim|linear_(key|value)_head_dim", _same(lambda s: s.head_dim)),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", _at_most(lambda s: s.head_dim // 2)),
    (r"[qkvo]_lora_rank|index_n_heads|linear_num_(key|value)_heads", _at_most(lambda s: s.heads)),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", _at_most(lambda s: s.experts)),
    (r"num_experts_per_tok|moe_top_?k|moe_k|num_selected_experts|topk", _at_most(lambda s: 2)),
    (r"n_group|topk_group|first_k_dense_replace|n_shared_experts", _at_most(lambda s: 1)),
    (r"vocab_size|text_vocab_size|vocab_size_per_layer_input", _at_most(lambda s: s.vocab)),
    (
        r"max_position_embeddings|n_positions|max_sequence_length|max_seq_len|n_ctx|max_source_positions"
        r"|max_target_positions|original_max_position_embeddings|num_latents",
        _at_most(lambda s: s.positions),
    ),
    (r"image_size|img_size|input_size", _at_most(lambda s: s.image)),
    (r"patch_size", _at_most(lambda s: s.patch)),
    (
        r"sliding_window|attention_window|local_attention|window_size|attention_chunk_size",
        _at_most(lambda s: s.seq),
    ),
)
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in _RULES)
_KV_HEADS = re.compile(r"num_key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads|kv_n_heads")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_IMAGE = ("image_size", "img_size", "input_size")
# Without these numbers the model cannot be built, and some classes leave them unset.
_NEEDED = re.compile(r"vocab_size|num_key_value_heads|num_experts_per_tok|head_dim")
_UNSET = 1 << 30
_SPECIAL_TOKEN = re.compile(r".*_token_(id|index)")


def shrink(config: Any, scale: Scale) -> Any:
    """A new configuration of the same class with `scale`'s sizes; all else is the class's default."""
    return type(config)(**overrides(config, scale))


def overrides(config: Any, scale: Scale) -> dict[str, Any]:
    """The keyword arguments that make a small configuration; parts (`text_config`) are nested dicts."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found: dict[str, Any] = {
        name: overrides(part, scale) | {"model_type": part.model_type}
        for name, part in parts.items()
        if part is not None and hasattr(part, "sub_configs")
    }
    for name, value in vars(config).items():
        if name in parts or name.startswith("_") or _is_derived(config, name, value):
            continue
        small = _small(name, value, config, scale)
        if small is not None and small != value:
            found[name] = small
    return found


def _is_derived(config: Any, name: str, value: Any) -> bool:
    """The class computes the number from others when it is not given, and will do so again."""
    if isinstance(value, list | tuple | dict):
        return False
    declared = getattr(type(config), "__dataclass_fields__", {}).get(name)
    if declared is None:
        return True
    return value is not None and declared.default is None and value == getattr(type(config)(), name, None)


def _small(name: str, value: Any, config: Any, scale: Scale) -> Any:
    if isinstance(value, list | tuple):
        return _small_list(name, list(value), config, scale)
    if isinstance(value, dict):
        return _small_sections(value, config, scale)
    if value is None:
        value = _UNSET if _NEEDED.fullmatch(name) else None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if _KV_HEADS.fullmatch(name):
        return _kv_heads(value, config, scale)
    if _SPECIAL_TOKEN.fullmatch(name):
        return None if value < scale.vocab else scale.vocab - 1
    if name in _IMAGE and hasattr(config, "depths"):
        return None  # every stage of a pyramid halves it, down to one window
    if name == "num_heads" and isinstance(getattr(config, "expand", None), int):
        return config.expand * scale.hidden // scale.head_dim  # of a state space, as wide as it is expanded
    if name == "embed_dim" and isinstance(_heads(config), list | tuple):
        return _first_stage_width(value, _heads(config), scale)
    for pattern, rule in _COMPILED:
        if pattern.fullmatch(name):
            return rule(scale, value)
    return None


def _heads(config: Any) -> Any:
    return next((getattr(config, name) for name in _HEADS if getattr(config, name, None)), None)


def _kv_heads(value: int, config: Any, scale: Scale) -> int:
    """As many as heads, one, or half of them: full, multi-query and grouped attention stay what they are."""
    if value == 1:
        return 1
    return scale.heads if value in (_heads(config), _UNSET) else max(1, scale.heads // 2)


def _first_stage_width(width: int, heads: list[int], scale: Scale) -> int:
    """A pyramid (Swin) has a list of heads, one for each stage: heads of `head_dim` in the first stage."""
    return min(width, heads[0] * scale.head_dim)


def _small_list(name: str, value: list[Any], config: Any, scale: Scale) -> list[Any] | None:
    """One entry for each layer; every kind of layer is kept if there is room for it."""
    if name in _IMAGE:
        return [min(side, scale.image) for side in value]
    if name == "depths":
        return [min(depth, scale.layers) for depth in value]
    if hasattr(config, "depths"):
        return None  # its lists have one entry for each stage
    counts = [getattr(config, name) for name in _LAYERS if isinstance(getattr(config, name, None), int)]
    if len(value) not in counts or len(value) <= scale.layers:
        return None
    kinds = list(dict.fromkeys(map(repr, value)))
    first = [next(entry for entry in value if repr(entry) == kind) for kind in kinds]
    return (first + value)[: scale.layers] if len(kinds) > 1 else value[: scale.layers]


def _small_sections(value: dict[str, Any], config: Any, scale: Scale) -> dict[str, Any] | None:
    """Rotary angles divided among time, height and width add up to half a head."""
    sections = value.get("mrope_section")
    if sections is None and "rope_type" in value and "mrope_section" in _keys_of_rope(config):
        sections = [1 << 30] * 3  # the model has its own, for its published size
    if not isinstance(sections, list) or sum(sections) <= scale.head_dim // 2:
        return None
    rest = [max(1, entry * (scale.head_dim // 2) // sum(sections)) for entry in sections[1:]]
    return value | {"mrope_section": [scale.head_dim // 2 - sum(rest), *rest]}


def _keys_of_rope(config: Any) -> set[str]:
    """What the class allows among its rotary parameters, besides what all have."""
    return set(getattr(config, "ignore_keys_at_rope_validation", None) or ())
