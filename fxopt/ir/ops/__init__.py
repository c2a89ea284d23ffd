"""The semantic ops, in one explicit list. `register_ops` makes them known to torch's dispatcher, once."""

from __future__ import annotations

import threading

import torch
from torch import fx

from fxopt.ir.ops import (
    append_attention,
    block_attention,
    cached_attention,
    code_products,
    decode_attention,
    expert_linear,
    linear_cross_entropy,
    outlier_linear,
    packed_linear,
    row_attention,
    shift_window,
    snapshot,
    uniform,
)
from fxopt.ir.ops.append_attention import APPEND_ATTENTION
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.expert_linear import EXPERT_LINEAR
from fxopt.ir.ops.layer_norm import LAYER_NORM
from fxopt.ir.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from fxopt.ir.ops.op import NAMESPACE, Provider, SemanticOp
from fxopt.ir.ops.qlinear import QLINEAR
from fxopt.ir.ops.quantized_attention import QUANTIZED_ATTENTION
from fxopt.ir.ops.rms_norm import ADD_RMS_NORM, RMS_NORM

OPS: tuple[SemanticOp, ...] = (
    ATTENTION,
    QUANTIZED_ATTENTION,
    APPEND_ATTENTION,
    RMS_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    LINEAR_CROSS_ENTROPY,
    QLINEAR,
    EXPERT_LINEAR,
)

_lock = threading.Lock()
_library: torch.library.Library | None = None


def register_ops() -> None:
    """Register all semantic ops with the dispatcher. Idempotent and thread-safe."""
    global _library
    with _lock:
        if _library is not None:
            return
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in OPS:
            op.register(library)
        append_attention.register(library)
        block_attention.register(library)
        cached_attention.register(library)
        decode_attention.register(library)
        row_attention.register(library)
        linear_cross_entropy.register(library)
        packed_linear.register(library)
        expert_linear.register(library)
        code_products.register(library)
        outlier_linear.register(library)
        shift_window.register(library)
        snapshot.register(library)
        uniform.register(library)
        _library = library


def semantic_op(node: fx.Node) -> SemanticOp | None:
    """The semantic op that a node calls, or None."""
    namespace = getattr(node.target, "namespace", None)
    if node.op != "call_function" or namespace != NAMESPACE:
        return None
    return next((op for op in OPS if op.overload is node.target), None)


__all__ = ["OPS", "Provider", "SemanticOp", "register_ops", "semantic_op"]
