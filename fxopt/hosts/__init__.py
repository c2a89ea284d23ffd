"""Choosing the host: Inductor, unless the user asks otherwise or this machine cannot run it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.hosts.eager import EAGER
from fxopt.hosts.host import Host
from fxopt.hosts.inductor import INDUCTOR, missing_compiler
from fxopt.hosts.kernels import for_target
from fxopt.options import Options


def choose_host(options: Options, example_inputs: Sequence[Any]) -> Host:
    """The host for one graph. ``"auto"`` is Inductor; eager for the CPU where there is no C++ compiler, for
    inputs that Inductor misreads, and where kernels for a GPU are to be made without one.
    """
    if options.host == "eager":
        return EAGER
    if options.host == "inductor":
        return INDUCTOR
    if for_target(options, example_inputs) or any(_is_lazy(value) for value in example_inputs):
        return EAGER
    if not _on_cpu(example_inputs):
        return INDUCTOR
    reason = missing_compiler()
    if reason is None:
        return INDUCTOR
    _warn_once(reason)
    return EAGER


def _on_cpu(example_inputs: Sequence[Any]) -> bool:
    devices = {value.device.type for value in example_inputs if hasattr(value, "device")}
    return not devices or "cpu" in devices


def _is_lazy(value: Any) -> bool:
    """A view that is conjugated or negated when it is read: Inductor computes with the memory as it is."""
    return isinstance(value, torch.Tensor) and (value.is_conj() or value.is_neg())


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"fxopt: no C++ compiler ({reason}), so graphs on the CPU run op by op after fxopt's rewrites. "
        "Install g++ (Debian/Ubuntu: apt-get install g++) for compiled speed, "
        "or pass options={'host': 'eager'} to silence this.",
        stacklevel=2,
    )
