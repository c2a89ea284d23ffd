"""Weights that other libraries have quantized -> `QuantizedWeight`: one module for each library's layouts.

Everything here is arithmetic on tensors; none of it imports a library. Codes are carried over bit for bit.
Scales and zero points are the library's own numbers, computed in its order where that decides their rounding.
What has no place in fxopt's layout is refused with `CannotConvert`.
"""

from __future__ import annotations

from fxopt.ir.sources.refusal import CannotConvert

__all__ = ["CannotConvert"]
