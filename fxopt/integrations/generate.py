"""`torch.compile(model, backend="fxopt").generate(...)` runs compiled.

torch hands an attribute that its compiled module does not have on to the original model. So `generate` is
bound to that one, which then calls itself: nothing is compiled, and nobody says so. With fxopt as backend,
`generate` is bound to a stand-in: an instance of a subclass of the model's class that shares the model's
`__dict__`, and whose `__call__` is the compiled one. The model itself is not touched.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from fxopt.runtime.kv_state import expected_length
from fxopt.runtime.read_lengths import OfAnyLength, reading
from fxopt.runtime.step_loops import CURRENT

if TYPE_CHECKING:
    from transformers import CompileConfig

    from fxopt.options import Options
    from fxopt.runtime.decode_path import DecodePath

_HOOKED = "_fxopt_original"
# Prompt and decoding step, batches of one and of several, padded or not, windows that fill and are full: all
# of these together are more graphs of one model than Dynamo compiles before it leaves the rest to eager.
_MOST_GRAPHS = 64

# Set to True by the first call of a stand-in within the current `generate`.
_called: ContextVar[list[bool] | None] = ContextVar("fxopt_called", default=None)
# How the model is called within the current `generate`, by the compiled module.
_paths: ContextVar[dict[int, DecodePath] | None] = ContextVar("fxopt_paths", default=None)
# The layers of the cache of the current `generate` that keep a window.
_windows: ContextVar[list[Any] | None] = ContextVar("fxopt_windows", default=None)
_classes: weakref.WeakKeyDictionary[Any, type] = weakref.WeakKeyDictionary()
# The backend of a compiled module, and what was asked of fxopt there.
_options: weakref.WeakKeyDictionary[Any, tuple[Any, Options | None]] = weakref.WeakKeyDictionary()


def extend_optimized_module(module: ModuleType) -> str:
    """Have `torch._dynamo.eval_frame.OptimizedModule` give out a compiled `generate`; says what was done."""
    kind = getattr(module, "OptimizedModule", None)
    original = getattr(kind, "__getattr__", None)
    if kind is None or original is None:
        return "not done: this torch has another class for compiled modules; use model.compile(...)"
    if hasattr(original, _HOOKED):
        return "done"

    @functools.wraps(original)
    def getattr_(self: Any, name: str) -> Any:
        found = original(self, name)
        return _compiled(self, found) if name == "generate" else found

    setattr(getattr_, _HOOKED, original)
    # Dynamo reads attributes of compiled modules inside of models that it traces. It is to run this as it is,
    # as it does with torch's own.
    module.skip_code(getattr_.__code__)  # type: ignore[attr-defined]
    kind.__getattr__ = getattr_
    return "done"


def restore_optimized_module(module: ModuleType) -> None:
    """Undo `extend_optimized_module`."""
    original = getattr(module.OptimizedModule.__getattr__, _HOOKED, None)
    if original is not None:
        module.OptimizedModule.__getattr__ = original
    forget()


def forget() -> None:
    """Drop the stand-ins of all compiled modules."""
    from fxopt.runtime.decode_path import DecodePath

    _classes.clear()
    _options.clear()
    DecodePath.forget()


def compile_config(**given: Any) -> CompileConfig:
    """transformers' `CompileConfig` for `generate`, with fxopt as backend, on a CPU too.

    transformers compiles decoding over a static cache by itself, on accelerators only unless it is told::

        model.generate(**inputs, cache_implementation="static", compile_config=fxopt.compile_config())

    Args:
        given: fields of `CompileConfig`. `mode` and `options` mean what they mean for torch.compile, and
            exclude each other; without either, `mode` is "reduce-overhead".
    """
    from transformers import CompileConfig

    if "options" in given:
        given.setdefault("mode", None)
    config = CompileConfig(**{"backend": "fxopt", **given})
    config._compile_all_devices = True
    return config


def _compiled(compiled: Any, found: Any) -> Any:
    """`found`, the `generate` of the original model, bound to a stand-in where fxopt is the backend."""
    model = compiled._orig_mod
    options = _options_given(compiled)
    if options is None or not options.generate or not callable(found):
        return found
    if not isinstance(found, MethodType) or found.__self__ is not model:
        return _with_warning(found, _NOT_A_METHOD.format(name=type(model).__name__))

    @functools.wraps(found.__func__)
    def generate(*args: Any, **kwargs: Any) -> Any:
        from fxopt.runtime.decode_path import DecodePath  # needs more of torch than there is at its import

        if options.fast_decode:
            CURRENT.build()
        called = [False]
        token = _called.set(called)
        paths = _paths.set({id(compiled): DecodePath(compiled)} if options.fast_decode else None)
        try:
            with (
                expected_length(_longest(model, args, kwargs)),
                reading(),
                _room_for_graphs(),
                _windows_held(),
            ):
                result = found.__func__(_stand_in(compiled, model, options), *args, **kwargs)
        finally:
            _called.reset(token)
            _paths.reset(paths)
        if not called[0]:
            warnings.warn(_NOT_CALLED.format(name=type(model).__name__), stacklevel=2)
        return result

    return generate


@contextmanager
def _windows_held() -> Iterator[None]:
    """Layers of caches that are held inside become transformers' own again."""
    held: list[Any] = []
    token = _windows.set(held)
    try:
        yield
    finally:
        _windows.reset(token)
        if held:
            from fxopt.integrations.window_layers import release_windows

            release_windows(held)


def _hold_windows(cache: Any) -> None:
    from fxopt.integrations.window_layers import hold_windows

    held = _windows.get()
    if held is not None:
        held += hold_windows(cache)


def _with_warning(found: Callable[..., Any], message: str) -> Callable[..., Any]:
    @functools.wraps(found)
    def generate(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(message, stacklevel=2)
        return found(*args, **kwargs)

    return generate


@contextmanager
def _room_for_graphs() -> Iterator[None]:
    """Dynamo's limit of graphs for a function raised, in this thread, where the user has not set one."""
    config: Any = torch._dynamo.config
    limit = config.recompile_limit
    if limit != config._config["recompile_limit"].default:
        yield
        return
    config.recompile_limit = _MOST_GRAPHS
    try:
        yield
    finally:
        config.recompile_limit = limit


def _longest(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How long the sequences of a call of `generate` can become; 0 where it does not say."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    limits = {
        name: kwargs.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length")
    }
    prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    rows = getattr(prompt, "shape", (0,))[-1]
    if isinstance(limits["max_new_tokens"], int):
        return int(rows) + limits["max_new_tokens"]
    return limits["max_length"] if isinstance(limits["max_length"], int) else 0


_NOT_CALLED = (
    "fxopt: generate of {name} did not call the model itself, so nothing of it ran compiled. "
    'Compile the module that it calls instead: module.compile(backend="fxopt").'
)


_NOT_A_METHOD = (
    "fxopt: generate of {name} was replaced by what is no method of it, and cannot be handed the compiled "
    'model, so nothing of it runs compiled. Use model.compile(backend="fxopt"), or replace it by '
    "types.MethodType(function, model)."
)


def _options_given(compiled: Any) -> Options | None:
    """`options_of` a compiled module, which are read once: `generate` is fetched at every call of it."""
    callback = getattr(compiled.dynamo_ctx, "callback", None)
    known = _options.get(compiled)
    if known is None or known[0] is not callback:
        known = _options[compiled] = callback, options_of(callback)
    return known[1]


def options_of(callback: Any) -> Options | None:
    """The options given to torch.compile; None when its backend is another one."""
    backend = _innermost(callback)
    function = getattr(backend, "compiler_fn", backend)
    validate: Any = getattr(function, "validate", None)
    if str(getattr(validate, "__module__", "")) != "fxopt.backend":
        return None
    options: Options = validate(**getattr(backend, "kwargs", {}))
    return options


def _innermost(callback: Any) -> Any:
    """What the user gave as backend, in torch's wrapper with its options."""
    for name in ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable"):  # today; in older versions
        while hasattr(callback, name):
            callback = getattr(callback, name)
    return callback


def _stand_in(compiled: Any, model: Any, options: Options) -> Any:
    kind = _classes.get(compiled)
    if kind is None or kind.__bases__ != (type(model),):
        kind = _classes[compiled] = _stand_in_class(weakref.ref(compiled), type(model), options)
    made: Any = object.__new__(kind)
    object.__setattr__(made, "__dict__", model.__dict__)
    return made


def _stand_in_class(compiled: Callable[[], Any], kind: Any, options: Options) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called = _called.get()
        if called is not None:
            called[0] = True
        module = compiled()
        with OfAnyLength(kwargs):
            return (_paths.get() or {}).get(id(module), module)(*args, **kwargs)

    def get_compiled_call(self: Any, compile_config: Any = None) -> Any:
        """transformers asks for this to compile decoding itself. It is compiled already."""
        return self.__call__

    def prepare_cache(self: Any, config: Any, model_kwargs: dict[str, Any], *args: Any, **given: Any) -> Any:
        passed = model_kwargs.get("past_key_values")
        result = kind._prepare_cache_for_generation(self, config, model_kwargs, *args, **given)
        cache = model_kwargs.get("past_key_values")
        if options.kv_cache_dtype != "auto":
            _quantize(cache, passed is not None, options.kv_cache_dtype)
        # Where steps are replayed, one over a full window is another one than one over a window that fills.
        if not options.replays_on({self.device.type}):
            _hold_windows(cache)
        return result

    body: dict[str, Any] = {"__call__": call, "get_compiled_call": get_compiled_call}
    if hasattr(kind, "_prepare_cache_for_generation"):
        body["_prepare_cache_for_generation"] = prepare_cache
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def _quantize(cache: Any, passed: bool, dtype: str) -> None:
    """Have the cache of a call of `generate` quantized rows; a warning where it stays what it is."""
    from fxopt.integrations.quantize_made import quantize_made

    obstacle = quantize_made(cache, passed, dtype)
    if obstacle:
        warnings.warn(f"fxopt: kv_cache_dtype={dtype!r} changes nothing: {obstacle}", stacklevel=2)
