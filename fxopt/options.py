"""All options, in one frozen dataclass. The only reader of environment variables.

Options are validated before anything is traced. What is not a field of `Options` must be a configuration
key of TorchInductor and is handed to it unchanged, so `options={...}` means for the host what it means for
Inductor.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_origin

from fxopt.errors import (
    OptionTypeError,
    OptionValueError,
    UnknownOption,
    UnsupportedMode,
    UnsupportedTarget,
)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
HOSTS = ("auto", "inductor", "eager")
VERIFY = ("nothing", "masks")
KERNELS = ("auto", "always", "never")
GEMM = ("auto", "always", "never")
SPLIT_K = ("deterministic", "atomic", "never")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "a100", "l40s", "h100", "h200", "b200")
# What `disable` calls the kernels that take regions.
EMIT_KERNELS = "emit-kernels"
# Those of the fields that can change the compiled result.
DECISIVE = (
    "mode", "host", "disable", "fuel", "target", "interpret", "kernels", "gemm", "split_k", "tune_seconds",
    "replay", "quantize", "group_size", "skip",
)  # fmt: skip
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
REPLAY = ("auto", "never", "always")
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # in which Inductor, too, makes them
QUANTIZE = ("int8", "int8-dynamic", "int4", "nf4", "fp4", "fp8", "fp8-dynamic", "none")


@dataclass(frozen=True)
class Options:
    """Options of one compilation.

    Attributes:
        mode: torch.compile's mode, with the meaning it has for Inductor.
        host: who compiles what fxopt leaves: ``"inductor"``, ``"eager"`` (no compiler), or ``"auto"``:
            Inductor; eager with one warning on a CPU-only machine without a C++ compiler, and for graphs with
            lazily conjugated or negated inputs, which Inductor misreads.
        disable: names of passes not to run, see ``fxopt.pipeline``; ``("all",)`` runs none.
        strict: raise `InternalError` when a stage of fxopt fails, instead of handing the graph to the host.
        verify: ``"masks"`` computes every mask that became a formula both ways, and compares all entries; a
            formula that differs is not used (`InternalError` with `strict`). Slow: for tests and bug reports.
        fuel: number of rewrites that may be applied in this process, for bisecting. None is no limit.
        generate: `generate` of the module that torch.compile returns runs compiled; otherwise torch hands it
            on to the original model, as it does with any other backend.
        fast_decode: steps of such a `generate` go past Dynamo's guards where it is known that they hold.
        replay: steps over a key-value cache are launched as a whole, as CUDA graphs, where they come back
            with the same memory: ``"auto"`` on CUDA in modes that ask for CUDA graphs (``"reduce-overhead"``,
            ``"max-autotune"``). ``"always"`` is in all modes, and makes graphs of that form on other devices,
            too, where nothing is replayed.
        kv_cache_dtype: what the caches hold that `generate` of the compiled module makes: ``"int8"`` or
            ``"fp8"`` rows with a scale for each head and token, half of the memory of bfloat16; ``"auto"`` is
            what the model computes in. A cache that is passed to `generate` stays what it is; see
            ``fxopt.QuantizedCache``.
        quantize: what the weights of linear layers are stored as: ``"int8"``, ``"int4"``, ``"nf4"``,
            ``"fp4"``, ``"fp8"``; ``"int8-dynamic"`` and ``"fp8-dynamic"`` round activations, too, with a
            scale for each token. Or a mapping from patterns of layers' names to these or ``"none"``, of which
            the first that fits decides. Heads, tied, small and float32 layers are left alone unless a pattern
            other than ``"*"`` names them. None quantizes nothing.
        group_size: columns that share a scale; 0 is all. None is 32 for int4 and 64 for nf4 and fp4.
        skip: patterns of the names of layers that are not quantized.
        dump: directory into which every stage is written as a runnable Python file. None writes nothing.
        target: the GPU that kernels are compiled for, ``"sm_90"`` or ``"h200"``, see `fxopt.ir.target`. None
            is the GPU at hand.
        kernels: whether fxopt's own kernels take their regions where TorchInductor hosts a graph on a GPU:
            ``"always"``, ``"never"``, or ``"auto"``: those that were measured there and were faster.
        gemm: whether matrix products with more than 16 rows, and of stacks of matrices, may be parts of
            fxopt's kernels: ``"always"``, ``"never"``, or ``"auto"``: those whose kernel was measured to be
            faster than the vendor's library with what is around it; where nothing is measured, those that a
            model of the target takes for faster.
        split_k: how the pieces of a product are added up that is cut along what it sums over:
            ``"deterministic"``, by a second launch in one order; ``"atomic"``, in any order, into one result
            in float32; ``"never"``: it is not cut.
        tune_seconds: for how long kernels of attention, and then those of regions, may be measured on a GPU
            for one graph. None is no limit with ``mode="max-autotune"`` (or its kin), 0 with other modes.
        interpret: run emitted kernels in Triton's interpreter, on tensors of any device, with the eager host.
            Follows the variable ``TRITON_INTERPRET``, which Triton itself reads.
        cache_dir: directory of the kernels' files. None is ``fxopt/kernels`` in the user's cache directory.
        cache_mib: size in MiB from which on the least recently used kernels' files are removed.
        host_config: Inductor configuration, the keys that are not fields of this class.
    """

    mode: str = "default"
    host: str = "auto"
    disable: tuple[str, ...] = ()
    strict: bool = False
    verify: str = "nothing"
    fuel: int | None = None
    generate: bool = True
    fast_decode: bool = True
    replay: str = "auto"
    kv_cache_dtype: str = "auto"
    quantize: tuple[tuple[str, str], ...] = ()
    group_size: int | None = None
    skip: tuple[str, ...] = ()
    dump: str | None = None
    target: str | None = None
    kernels: str = "auto"
    gemm: str = "auto"
    split_k: str = "deterministic"
    tune_seconds: float | None = None
    interpret: bool = False
    cache_dir: str | None = None
    cache_mib: int = 1024
    host_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def parse(
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        pass_names: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Options:
        """Validate what the user gave to `torch.compile`.

        Raises:
            UnsupportedMode: `mode` is not one of torch.compile's.
            UnsupportedTarget: `target` is none that kernels can be compiled for here.
            UnknownOption: a key is known neither to fxopt nor to Inductor.
            OptionTypeError: a value has the wrong type.
            OptionValueError: a value is not one of the valid ones.
        """
        given = _from_environment(os.environ if environ is None else environ)
        if options is not None and not isinstance(options, Mapping):
            raise OptionTypeError(name="options", wanted="a dict", value=options, kind=type(options).__name__)
        said = {name: f"environment variable FXOPT_{name.upper()}" for name in given}
        for key, value in (options or {}).items():
            given[_normal(key)] = value
            said.pop(_normal(key), None)
        if mode is not None:
            given["mode"] = mode
        own = {f.name for f in fields(Options)} - {"host_config"}
        chosen = {k: _checked(k, v, said.get(k, f"option {k!r}")) for k, v in given.items() if k in own}
        rest = {name: value for name, value in given.items() if name not in own}
        _check_disable(chosen.get("disable", ()), tuple(pass_names), said.get("disable", "option 'disable'"))
        return Options(**chosen, host_config=MappingProxyType(_host_config(rest, own)))

    @property
    def measuring_seconds(self) -> float:
        """For how long kernels may be measured in the compilation of one graph."""
        if self.tune_seconds is not None:
            return self.tune_seconds
        return math.inf if self.mode.startswith("max-autotune") else 0.0

    def replays_on(self, kinds: Iterable[str]) -> bool:
        """Whether steps are to be replayed whose inputs are on devices of these kinds."""
        if self.replay != "auto":
            return self.replay == "always"
        return self.mode in _WITH_CUDA_GRAPHS and "cuda" in kinds

    @property
    def fingerprint(self) -> tuple[tuple[str, str], ...]:
        """Everything that can change the compiled result, as plain text, for cache keys."""
        return tuple((name, repr(getattr(self, name))) for name in DECISIVE)


def environment_without(variable: str) -> dict[str, str]:
    """The environment of this process for another one, less a variable."""
    return {name: value for name, value in os.environ.items() if name != variable}


def _normal(key: object) -> str:
    if not isinstance(key, str):
        raise OptionTypeError(
            name=f"option {key!r}", wanted="a string as its name", value=key, kind=type(key).__name__
        )
    return key.replace("-", "_")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What variables say. Of one whose name is nearly that of an option the user is told that it is none."""
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not text or variable != _PREFIX + name.upper():
            continue
        if name in _READ:
            found[name] = _READ[name](f"environment variable {variable}", text)
        elif meant := nearest("variables", variable, (_PREFIX + one.upper() for one in _READ), cutoff=0.85):
            warnings.warn(f"fxopt reads no environment variable {variable}.{meant}", stacklevel=2)
    if environ.get("TRITON_INTERPRET", "0") not in ("0", "false", "off"):
        found["interpret"] = True
    return found


def _as_it_is(name: str, text: str) -> str:
    return text


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionTypeError(name=name, wanted="an integer", value=text, kind="str") from None


def _boolean(name: str, text: str) -> bool:
    word = text.strip().lower()
    if word in _YES or word in _NO:
        return word in _YES
    wanted = f"one of {', '.join((*_YES, *_NO))}"
    raise OptionTypeError(name=name, wanted=wanted, value=text, kind="str")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionTypeError(name=name, wanted="a number", value=text, kind="str") from None


_PREFIX = "FXOPT_"
# Options that a variable may set -> how its text is read.
_READ: dict[str, Callable[[str, str], Any]] = {
    "disable": lambda _, text: tuple(part.strip() for part in text.split(",") if part.strip()),
    **dict.fromkeys(("fuel", "cache_mib"), _integer),
    **dict.fromkeys(("strict", "generate", "fast_decode"), _boolean),
    "tune_seconds": _number,
    **dict.fromkeys(("host", "dump", "target", "cache_dir", "verify", "kv_cache_dtype"), _as_it_is),
    **dict.fromkeys(("kernels", "gemm", "split_k", "replay"), _as_it_is),
}
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_VALUES = {
    "host": HOSTS,
    "verify": VERIFY,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "replay": REPLAY,
    "kernels": KERNELS,
    "gemm": GEMM,
    "split_k": SPLIT_K,
}
_WANTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mode": ((str,), "a string"),
    "host": ((str,), "a string"),
    "disable": ((str, list, tuple, set, frozenset), "a pass name or a list of pass names"),
    "strict": ((bool,), "a bool"),
    "verify": ((str,), "a string"),
    "generate": ((bool,), "a bool"),
    "interpret": ((bool,), "a bool"),
    "fast_decode": ((bool,), "a bool"),
    "kv_cache_dtype": ((str,), "a string"),
    "kernels": ((str,), "a string"),
    "gemm": ((str,), "a string"),
    "split_k": ((str,), "a string"),
    "replay": ((str,), "a string"),
    "tune_seconds": ((int, float, type(None)), "a number or None"),
    "fuel": ((int, type(None)), "an integer or None"),
    "quantize": (
        (str, Mapping, tuple, list, type(None)),
        "a format, a mapping of patterns to formats, or None",
    ),
    "group_size": ((int, type(None)), "an integer or None"),
    "skip": ((str, list, tuple, set, frozenset), "a pattern or a list of patterns"),
    "dump": ((str, os.PathLike, type(None)), "a directory name or None"),
    "target": ((str, type(None)), "the name of a GPU or None"),
    "cache_dir": ((str, os.PathLike, type(None)), "a directory name or None"),
    "cache_mib": ((int,), "an integer"),
}


def _checked(name: str, value: Any, said: str) -> Any:
    """`value` in the form that `Options` holds. `said` is how the user gave it, for messages."""
    types, wanted = _WANTED[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise OptionTypeError(name=said, wanted=wanted, value=value, kind=type(value).__name__)
    if name == "mode" and value not in MODES:
        raise UnsupportedMode(mode=value, nearest=nearest("", value, MODES), valid=", ".join(MODES))
    for option, values in _VALUES.items():
        if name == option and value not in values:
            near = nearest("valid values", value, values)
            raise OptionValueError(name=said, value=value, nearest=near, valid=", ".join(values))
    if name == "fuel" and value is not None and value < 0:
        raise OptionValueError(name=said, value=value, nearest="", valid="integers from 0 on, or None")
    if name == "tune_seconds" and value is not None and not value >= 0:
        raise OptionValueError(name=said, value=value, nearest="", valid="numbers from 0 on, or None")
    if name == "cache_mib" and value < 1:
        raise OptionValueError(name=said, value=value, nearest="", valid="integers from 1 on")
    if name == "disable":
        return _names(value, said)
    if name == "quantize":
        return _rules(value, said)
    if name == "skip":
        return _strings(value, said, "patterns")
    if name == "group_size" and value is not None and (value < 0 or value % 16):
        raise OptionValueError(name=said, value=value, nearest="", valid="multiples of 16 from 0 on, or None")
    if name == "target" and value is not None:
        return check_target(value)
    return os.fspath(value) if name in ("dump", "cache_dir") and value is not None else value


def check_target(text: str) -> str:
    """The name of a GPU in the spelling of `TARGETS`.

    Raises:
        UnsupportedTarget: kernels cannot be compiled for it here; the message says why.
    """
    name = text.strip().lower().replace("-", "_")
    if name in TARGETS:
        return name
    reason = "is not known"
    if name.startswith(("gfx", "mi2", "mi3", "hip", "rocm")):
        reason = "is an AMD GPU: Triton links kernels for it with ROCm, and fxopt has not been tried there"
    elif name.startswith(("xpu", "intel", "pvc", "bmg")):
        reason = "is an Intel GPU: Triton has no back end for it"
    elif name in ("cpu", "x86_64", "aarch64"):
        reason = "is no GPU; on a CPU the host compiles the kernels' plain-torch bodies"
    raise UnsupportedTarget(target=text, reason=reason, valid=", ".join(TARGETS))


def _rules(value: Any, said: str) -> tuple[tuple[str, str], ...]:
    """(pattern, format) in order."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = {"*": value}
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise OptionTypeError(
            name=said, wanted="pairs of a pattern and a format", value=value, kind=type(value).__name__
        )
    rules = [(pattern, "none" if kind is None else kind) for pattern, kind in pairs]
    for pattern, kind in rules:
        if not isinstance(pattern, str) or not isinstance(kind, str):
            raise OptionTypeError(name=said, wanted="names", value=value, kind=type(value).__name__)
        if kind.replace("_", "-") not in QUANTIZE:
            near = nearest("valid values", kind, QUANTIZE)
            raise OptionValueError(name=said, value=kind, nearest=near, valid=", ".join(QUANTIZE))
    return tuple((pattern, kind.replace("_", "-")) for pattern, kind in rules)


def _names(value: Any, said: str) -> tuple[str, ...]:
    return tuple(name.replace("_", "-") for name in _strings(value, said, "pass names"))


def _strings(value: Any, said: str, wanted: str) -> tuple[str, ...]:
    """`value`, one string or several; `wanted` is what they are, for the message."""
    strings = (value,) if isinstance(value, str) else tuple(value)
    for each in strings:
        if not isinstance(each, str):
            raise OptionTypeError(name=said, wanted=wanted, value=each, kind=type(each).__name__)
    return strings


def _check_disable(names: tuple[str, ...], known: tuple[str, ...], said: str) -> None:
    valid = (*known, "all")
    for name in names:
        if known and name not in valid:
            raise OptionValueError(
                name=said,
                value=name,
                nearest=nearest("valid values", name, valid),
                valid=", ".join(valid),
            )


def _host_config(rest: dict[str, Any], own: set[str]) -> dict[str, Any]:
    if not rest:
        return {}
    from torch._inductor import config

    known = config.get_config_copy()
    for name, value in rest.items():
        if name not in known:
            raise UnknownOption(
                name=name,
                nearest=nearest("valid options", name, [*own, *known]),
                known=", ".join(sorted(own)),
            )
        wanted = config.get_type(name)  # type: ignore[attr-defined]
        # Some say how they are written down, in the place of a type.
        if isinstance(wanted, type) and get_origin(wanted) is None and not isinstance(value, wanted):
            raise OptionTypeError(
                name=f"option {name!r}", wanted=f"a {wanted.__name__}", value=value, kind=type(value).__name__
            )
    return rest


def nearest(kind: str, name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A sentence for a message with the closest three names, best first; empty when nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=cutoff)
    return f" {f'Nearest {kind}'.strip()}: {', '.join(close)}." if close else ""
