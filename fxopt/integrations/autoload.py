"""What fxopt does at the end of `import torch`, called by torch through its entry points `torch.backends`.

Five small things, none of which imports torch's compiler, accelerate or any other part of fxopt:
- `TORCH_LOGS="fxopt"` becomes a name that torch knows;
- `torch.compile(backend="fxopt", options=...)` checks its options at once, as it does for Inductor;
- accelerate will accept the name `fxopt`, if and when it is imported;
- `generate` of a module that was compiled with fxopt will run compiled, see `fxopt.integrations.generate`;
- `from_pretrained` will load what `fxopt.prepare` has quantized, see `fxopt.integrations.hf_quantizer`.

torch turns an exception raised here into a failure of `import torch`. So each step is contained, and what
became of it is kept for `fxopt doctor`. With `TORCH_DEVICE_BACKEND_AUTOLOAD=0` torch calls nothing of this.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.integrations.import_hooks import PostImportFinder

_LOGGING = 'TORCH_LOGS="fxopt"'
_OPTIONS = "options checked by torch.compile"
_IMPORT_HOOKS = "import hooks"
_ACCELERATE = "accelerate"
_LAUNCH = "accelerate launch"
_GENERATE = "generate of compiled models"
_QUANTIZER = "quantized checkpoints"
_CACHES = "saved caches"
_LIBRARIES = "layers of other libraries"

_outcomes: dict[str, str] = {}
_failures: dict[str, str] = {}
_finder: PostImportFinder | None = None


def autoload() -> None:
    """Run every step. Never raises; calling it again changes nothing."""
    _attempt(_LOGGING, _register_log)
    _attempt(_OPTIONS, _check_options_in_torch_compile)
    _attempt(_IMPORT_HOOKS, _wait_for_imports)


def outcomes() -> dict[str, str]:
    """What became of each step so far, in plain words; empty if torch did not call `autoload`."""
    return dict(_outcomes)


def failures() -> dict[str, str]:
    """The steps that failed, each with its exception as text."""
    return dict(_failures)


def _attempt(step: str, action: Callable[[], str]) -> None:
    try:
        _outcomes[step] = action()
        _failures.pop(step, None)
    except Exception as error:  # `import torch` and `import accelerate` go on whatever happens here
        _failures[step] = f"{type(error).__name__}: {error}"
        _outcomes[step] = f"failed: {_failures[step]}"


def _register_log() -> str:
    from torch._logging._internal import log_registry, register_log

    if not log_registry.is_log("fxopt"):
        register_log("fxopt", "fxopt")
    return "known to torch"


def _check_options_in_torch_compile() -> str:
    wrapper = getattr(sys.modules["torch"], "_TorchCompileWrapper", None)
    if wrapper is None:
        return "not done: this torch has no _TorchCompileWrapper; options are checked at the first call"
    original = wrapper.__init__
    if getattr(original, "_fxopt_checks_options", False):
        return "done"

    # torch finds a backend by its name only once; a second thread on its way there would fail.
    lookup = threading.RLock()

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with lookup:
            original(self, *args, **kwargs)
        validate: Any = getattr(getattr(self, "compiler_fn", None), "validate", None)
        if _is_from_fxopt(validate):
            validate(**getattr(self, "kwargs", {}))
            _fix_libraries(self)

    init._fxopt_checks_options = True  # type: ignore[attr-defined]
    wrapper.__init__ = init
    return "done"


def _fix_libraries(compiler: Any) -> None:
    """What libraries of quantized layers need to be traced; nothing where none is loaded."""
    if not sys.modules.keys() & {"bitsandbytes", "gptqmodel"}:
        return

    def action() -> str:
        from fxopt.integrations.library_fixes import fix_libraries

        fix_libraries(compiler)
        return "done"

    _attempt(_LIBRARIES, action)


def _is_from_fxopt(function: object) -> bool:
    """Another backend may have a `validate` of its own, which is none of our business."""
    return callable(function) and str(getattr(function, "__module__", "")).partition(".")[0] == "fxopt"


def _wait_for_imports() -> str:
    global _finder
    from fxopt.integrations.import_hooks import PostImportFinder

    if _finder is None:
        _finder = PostImportFinder()
    for step in (_ACCELERATE, _LAUNCH, _GENERATE, _QUANTIZER, _CACHES):
        _outcomes.setdefault(step, "waits until it is imported")
    _finder.when_imported("accelerate.utils.dataclasses", _on_accelerate)
    _finder.when_imported("accelerate.commands.config.config_utils", _on_accelerate_launch)
    _finder.when_imported("torch._dynamo.eval_frame", _on_compiled_modules)
    _finder.when_imported("transformers.quantizers.auto", _on_quantizers)
    _finder.when_imported("transformers.cache_utils", _on_caches)
    return "installed"


def _on_accelerate(module: ModuleType) -> None:
    def action() -> str:
        from fxopt.integrations.accelerate import extend_dynamo_backends

        return extend_dynamo_backends(module)

    _attempt(_ACCELERATE, action)


def _on_compiled_modules(module: ModuleType) -> None:
    def action() -> str:
        from fxopt.integrations.generate import extend_optimized_module

        return extend_optimized_module(module)

    _attempt(_GENERATE, action)


def _on_quantizers(_: ModuleType) -> None:
    def action() -> str:
        from fxopt.integrations.hf_quantizer import register_with_transformers

        register_with_transformers()
        return "known to transformers"

    _attempt(_QUANTIZER, action)


def _on_caches(module: ModuleType) -> None:
    def action() -> str:
        from fxopt.integrations.saved_caches import extend_cache_layers

        return extend_cache_layers(module)

    _attempt(_CACHES, action)


def _on_accelerate_launch(module: ModuleType) -> None:
    def action() -> str:
        from fxopt.integrations.accelerate import extend_launch_choices

        return extend_launch_choices(module)

    _attempt(_LAUNCH, action)
