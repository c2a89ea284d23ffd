"""Quantized forms of the parameters of a model, made once and shared by all compiled graphs.

A graph with quantized linears still is a function of the dense weights: each of its calls passes the
quantized form of what it is given. A form is made anew when its parameter has other memory, has been written
to, or, on a CPU, holds other numbers at a place that is looked at: writes through ``.data``, which torch does
not count.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.ir.quantize import decibels, quantize_parameter
from fxopt.ir.quantized_weight import QuantizedWeight

# On a placeholder: the tensor that is its input, while passes run for a graph of which anything is quantized.
HELD_KEY = "fxopt_held"
# On a placeholder that was added: the `Packed` that it is part of, and the field.
PACKED_KEY = "fxopt_packed"

# Bytes in the middle of a parameter that are looked at in every call.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Spec:
    """What a parameter becomes. `transposed`: it is (K, N), as in GPT-2's Conv1D, or a stack of such."""

    format: str
    group_size: int
    transposed: bool = False


@dataclass(frozen=True)
class Form:
    """The quantized form of a parameter, and how far it is from it, in decibels."""

    weight: QuantizedWeight
    decibels: float
    stamp: tuple[Any, ...]


@dataclass
class _Forms:
    """Of one parameter."""

    owner: weakref.ref[torch.Tensor]
    made: dict[Spec, Form] = field(default_factory=dict)


class Store:
    """Forms by parameter; those of parameters that are gone are dropped."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._forms: dict[int, _Forms] = {}

    def form(self, dense: torch.Tensor, spec: Spec, *, checked: bool = False) -> Form:
        """The form of what the parameter holds now.

        Raises:
            NotFinite: with `checked`, it holds infinities or NaN. Else the form does.
        """
        forms = self._forms.get(id(dense))
        if forms is not None and forms.owner() is dense:
            found = forms.made.get(spec)
            if found is not None and found.stamp == stamp(dense):
                return found
        return self._make(dense, spec, checked)

    def _make(self, dense: torch.Tensor, spec: Spec, checked: bool) -> Form:
        with self._lock:
            before = stamp(dense)
            turned = spec.transposed
            weight = quantize_parameter(
                dense, spec.format, spec.group_size, transposed=turned, checked=checked
            )
            made = Form(weight, decibels(dense, weight, transposed=turned), before)
            forms = self._forms.get(id(dense))
            if forms is None or forms.owner() is not dense:
                key = id(dense)
                forms = _Forms(weakref.ref(dense, lambda gone: self._drop(key, gone)))
                self._forms[key] = forms
            forms.made[spec] = made
            return made

    def _drop(self, key: int, gone: weakref.ref[torch.Tensor]) -> None:
        with self._lock:
            forms = self._forms.get(key)
            if forms is not None and forms.owner is gone:
                del self._forms[key]

    def forget(self, parameters: Sequence[torch.Tensor] | None = None) -> None:
        """Drop the forms of some parameters, or all; the next call makes them anew."""
        with self._lock:
            if parameters is None:
                self._forms.clear()
            for each in parameters or ():
                self._forms.pop(id(each), None)

    def __len__(self) -> int:
        return len(self._forms)

    @property
    def nbytes(self) -> int:
        """Of all forms."""
        with self._lock:
            return sum(form.weight.nbytes for forms in self._forms.values() for form in forms.made.values())


STORE = Store()


def stamp(dense: torch.Tensor) -> tuple[Any, ...]:
    """What is different, as a rule, once a tensor holds something else."""
    place = dense.data_ptr()
    version = None if dense.is_inference() else dense._version
    if dense.device.type != "cpu" or dense.dim() == 0:
        return place, version
    # From its first to its last number: it may be a view of a buffer that holds all weights.
    size: Any = dense.nbytes if dense.is_contiguous() else _reach(dense)
    middle = size // 2 // 8 * 8
    return place, version, ctypes.string_at(place + middle, min(_LOOKED_AT, size - middle))


def _reach(dense: torch.Tensor) -> int:
    """Bytes from the first number of a tensor to its last."""
    steps = zip(dense.shape, dense.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps) if dense.numel() else 0
    return count * dense.element_size()


@dataclass(frozen=True)
class Packed:
    """Inputs of a graph that are made of another one.

    Attributes:
        source: number of the dense input.
        spec: what it becomes.
        parts: the fields of `QuantizedWeight` that are passed.
    """

    source: int
    spec: Spec
    parts: tuple[str, ...]


def with_packed_weights(
    compiled: Callable[..., Any], packed: Sequence[Packed], first: int
) -> Callable[..., Any]:
    """`compiled`, which takes `packed` as its inputs from number `first` on, as a function of the others."""

    def run(*inputs: Any) -> Any:
        made: list[torch.Tensor] = []
        for each in packed:
            weight = STORE.form(inputs[each.source], each.spec).weight
            made += [getattr(weight, part) for part in each.parts]
        return compiled(*inputs[:first], *made, *inputs[first:])

    return run
