"""Mask and score programs as plain torch, for references of kernels."""

from __future__ import annotations

from typing import Any

from fxopt.codegen.attention_program import TritonText


class TorchText(TritonText):
    """Formulas as torch expressions over index tensors b, h, q and k that broadcast to (B, H, Sq, Skv)."""

    where, absolute, tanh, real = "torch.where", "abs", "torch.tanh", ".float()"

    def _quotient(self, above: str, below: str) -> str:
        return f"({above}) // ({below})"

    def _entry(self, access: Any) -> str:
        return f"{access.func}[{', '.join(map(self.integer, access.args)) or '()'}]"
