"""fxopt: the transformer-aware ``torch.compile`` backend.

Importing this package does no work: every public name is resolved on first use, so that ``import torch``
with the plugin installed stays as fast as without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.backend import backend
    from fxopt.errors import FxoptError
    from fxopt.integrations.calibrate import calibrate
    from fxopt.integrations.cross_compile import cross_compile
    from fxopt.integrations.generate import compile_config
    from fxopt.integrations.invalidate import invalidate
    from fxopt.integrations.load_quantized import load_quantized
    from fxopt.integrations.loss_only import loss_only
    from fxopt.integrations.prepare import prepare
    from fxopt.integrations.quantization_config import FxoptConfig
    from fxopt.integrations.quantized_cache import QuantizedCache
    from fxopt.integrations.static_quantized_cache import StaticQuantizedCache
    from fxopt.integrations.warmup import warmup
    from fxopt.options import Options
    from fxopt.report.explain import explain
    from fxopt.report.report import Report

__version__ = "0.1.0"

_PUBLIC = {
    "backend": "fxopt.backend",
    "calibrate": "fxopt.integrations.calibrate",
    "compile_config": "fxopt.integrations.generate",
    "cross_compile": "fxopt.integrations.cross_compile",
    "explain": "fxopt.report.explain",
    "invalidate": "fxopt.integrations.invalidate",
    "load_quantized": "fxopt.integrations.load_quantized",
    "loss_only": "fxopt.integrations.loss_only",
    "prepare": "fxopt.integrations.prepare",
    "warmup": "fxopt.integrations.warmup",
    "FxoptConfig": "fxopt.integrations.quantization_config",
    "QuantizedCache": "fxopt.integrations.quantized_cache",
    "StaticQuantizedCache": "fxopt.integrations.static_quantized_cache",
    "Report": "fxopt.report.report",
    "Options": "fxopt.options",
    "FxoptError": "fxopt.errors",
}

__all__ = [
    "FxoptConfig",
    "FxoptError",
    "Options",
    "QuantizedCache",
    "Report",
    "StaticQuantizedCache",
    "__version__",
    "backend",
    "calibrate",
    "compile_config",
    "cross_compile",
    "explain",
    "invalidate",
    "load_quantized",
    "loss_only",
    "prepare",
    "warmup",
]


def __getattr__(name: str) -> Any:
    where = _PUBLIC.get(name)
    if where is None:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    module = import_module(where)
    # The submodule `fxopt.backend` becomes an attribute once it is imported; it is callable itself.
    return module if name == "backend" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
