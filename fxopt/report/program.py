"""A graph module as the text of a Python file that runs it on seeded inputs."""

from __future__ import annotations

import hashlib
import importlib
import io
import platform
import re
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx

from fxopt.ir.cost import hint
from fxopt.report.inputs import InputSpec
from fxopt.report.program_text import CALL_BODY, HELPERS, MAIN

# A constant of more elements stands in a file beside the program, a still larger one becomes random.
_INLINE = 32
_STORED = 16_000_000

# Their meaning in a forward pass is the call of the sub-graph.
_CALLS_BODY = re.compile(
    r"torch\.ops\.higher_order\.(?:tag_activation_checkpoint|wrap_activation_checkpoint|wrap)\("
)


class Program:
    """The text of a runnable file, and what it needs beside it.

    Attributes:
        data: file name -> content of constants that are too long for the text.
    """

    def __init__(self, gm: fx.GraphModule, inputs: list[InputSpec], heading: Iterable[str]) -> None:
        self.data: dict[str, bytes] = {}
        self._inputs = inputs
        self._heading = list(heading)
        self._symbols = _symbol_values(inputs)
        self._imports: dict[str, str] = {}
        self._problems: list[str] = []
        self._names: dict[int, str] = {}
        self._classes: list[str] = []
        self._sources: dict[str, None] = {}
        self._emit(gm, "Graph")

    def text(self) -> str:
        """The file."""
        body = "\n\n\n".join(self._classes)
        calls_body = _CALLS_BODY.search(body) is not None
        if calls_body:
            body = _CALLS_BODY.sub("call_body(", body)
        sections = [
            self._docstring(),
            "\n".join([*_ALWAYS, *self._used_imports(body)]),
            _REGISTER if "torch.ops.fxopt." in body else "",
            self._symbol_lines(),
            HELPERS + (CALL_BODY if calls_body else ""),
            body,
            self._input_function(),
            MAIN,
        ]
        return "\n\n\n".join(section.strip("\n") for section in sections if section) + "\n"

    def _used_imports(self, body: str) -> list[str]:
        used = [line for name, line in self._imports.items() if line and re.search(rf"\b{name}\b", body)]
        return sorted(set(used), key=lambda line: (not line.startswith("import"), line))

    def _docstring(self) -> str:
        import fxopt

        versions = f"fxopt {fxopt.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        lines = [*self._heading, f"Written by {versions}.", ""]
        lines += ["Run it: `python` and this file's name. It prints shape and checksum of each output; the"]
        lines += ["inputs are random from a seed, and the same in every stage of this graph."]
        if self._problems:
            lines += ["", "Not runnable as it is:", *(f"- {problem}" for problem in self._problems)]
        if self._sources:
            lines += ["", "Made from:", *(f"  {source}" for source in self._sources)]
        text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
        return f'"""{text}\n"""\n\n# ruff: noqa'

    def _symbol_lines(self) -> str:
        if not self._symbols:
            return ""
        lines = [f"{name} = {value}" for name, value in self._symbols.items()]
        return "\n".join(["# Symbolic sizes, at the values they had when the graph was captured", *lines])

    def _input_function(self) -> str:
        lines = ["def inputs():", '    """One value for each input, in order."""', "    return ["]
        for number, spec in enumerate(self._inputs):
            lines.append(f"        {self._input(number, spec)},  # {spec.name}")
        return "\n".join([*lines, "    ]"])

    def _input(self, number: int, spec: InputSpec) -> str:
        if spec.kind == "symbol":
            return self._dim(spec.value)
        if spec.kind == "constant":
            return _literal(spec.value)
        size, stride = self._dims(spec.size), self._dims(spec.stride)
        extra = f", bound={self._dim(spec.bound)}" if spec.bound is not None else ""
        extra += ", parameter=True" if spec.parameter else ""
        return f"tensor({number}, {size}, {stride}, {spec.dtype}, {spec.device!r}{extra})"

    def _dims(self, dims: Iterable[Any]) -> str:
        texts = [self._dim(dim) for dim in dims]
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"

    def _dim(self, dim: Any) -> str:
        """A size by its symbols where that is plain arithmetic, else by its value."""
        value = _value(dim)
        text = _expression(dim)
        if text is not None and _evaluates(text, self._symbols, value):
            return text
        return repr(value)

    def _emit(self, gm: fx.GraphModule, name: str) -> None:
        """Append the class of `gm`, after those of its sub-graphs."""
        self._names[id(gm)] = name
        attributes = list(self._attributes(gm, name))
        code = gm.graph.python_code("self", verbose=True)
        for known_as, value in code.globals.items():
            self._import(known_as, value)
        for node in gm.graph.nodes:
            self._sources |= dict.fromkeys(_source_lines(node))
        lines = [f"class {name}(torch.nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in attributes]
        lines += ["", *(f"    {line}".rstrip() for line in code.src.strip("\n").splitlines())]
        self._classes.append("\n".join(lines))

    def _attributes(self, gm: fx.GraphModule, name: str) -> Iterator[str]:
        """Assignments of what the graph reads from its module."""
        targets = [str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")]
        for target in dict.fromkeys(targets):
            holders = target.split(".")[:-1]
            for depth in range(len(holders)):
                holder = "self." + ".".join(holders[: depth + 1])
                parent, _, last = holder.rpartition(".")
                yield f"{holder} = getattr({parent}, {last!r}, torch.nn.Module())"
            yield f"self.{target} = {self._attribute(_fetch(gm, target), f'{name}_{target}')}"

    def _attribute(self, value: Any, name: str) -> str:
        if isinstance(value, fx.GraphModule):
            if id(value) not in self._names:
                self._emit(value, re.sub(r"\W", "_", name))
            return f"{self._names[id(value)]}()"
        if isinstance(value, torch.Tensor):
            return self._constant(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return _literal(value)
        self._problems.append(f"{name} is a {type(value).__name__}, which has no text")
        return f"None  # a {type(value).__name__}"

    def _constant(self, value: torch.Tensor) -> str:
        plain = value.detach()
        if plain.numel() <= _INLINE and not plain.is_quantized and _is_real(plain):
            return f"torch.tensor({plain.tolist()!r}, dtype={plain.dtype}, device={str(plain.device)!r})"
        if plain.numel() <= _STORED and _is_real(plain):
            stored = io.BytesIO()
            torch.save(plain.clone(), stored)
            name = f"constant_{hashlib.sha256(stored.getvalue()).hexdigest()[:12]}.pt"
            self.data[name] = stored.getvalue()
            return f"torch.load(Path(__file__).with_name({name!r}))"
        number = 1000 + len(self._problems)
        size, stride = (tuple(map(_value, dims)) for dims in (plain.shape, plain.stride()))
        self._problems.append(f"a constant of shape {size} is replaced by random numbers")
        return f"tensor({number}, {size}, {stride}, {plain.dtype}, {str(plain.device)!r})"

    def _import(self, known_as: str, value: Any) -> None:
        if known_as in self._imports:
            return
        try:
            self._imports[known_as] = import_line(known_as, value)
        except ValueError as problem:
            self._problems.append(str(problem))
            self._imports[known_as] = f"{known_as} = None  # {problem}"


_ALWAYS = [
    "from math import inf, nan",
    "from pathlib import Path",
    "",
    "import torch",
    "from torch import device",
]
_BOUND = ("inf", "nan", "Path", "torch", "device")
_REGISTER = "from fxopt.ir.ops import register_ops\n\nregister_ops()"


def import_line(known_as: str, value: Any) -> str:
    """The statement that binds `known_as` to `value`.

    Raises:
        ValueError: no module has it under its own name.
    """
    if known_as in _BOUND:
        return ""
    if value is type(None):
        return f"{known_as} = type(None)"
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {known_as}"
    home, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not home or not path or _resolve(home, path) is not value:
        raise ValueError(f"{known_as} is a {type(value).__name__} that cannot be imported")
    return f"import {home}; {known_as} = {home}.{path}"


def _resolve(home: str, path: str) -> Any:
    try:
        found: Any = importlib.import_module(home)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _fetch(gm: fx.GraphModule, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _is_real(value: torch.Tensor) -> bool:
    """It holds numbers: no fake, no meta tensor, no subclass."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and not value.is_meta
        and value.layout is torch.strided
    )


def _literal(value: Any) -> str:
    text = repr(value)
    try:
        compile(text, "literal", "eval")
    except SyntaxError:
        return f"None  # {type(value).__name__}"
    return text


def _value(dim: Any) -> Any:
    """The number behind a symbol, as it was while tracing. Adds no guard."""
    if isinstance(dim, (torch.SymFloat, torch.SymBool)):
        return dim.node.hint
    return hint(dim)


def _expression(dim: Any) -> str | None:
    if not isinstance(dim, torch.SymInt):
        return None
    expression = dim.node.expr
    symbols = expression.free_symbols
    return str(expression) if symbols and expression.is_polynomial(*symbols) else None


def _evaluates(text: str, symbols: dict[str, int], wanted: Any) -> bool:
    try:
        return bool(eval(text, {"__builtins__": {}}, dict(symbols)) == wanted)
    except Exception:
        return False


def _symbol_values(inputs: Iterable[InputSpec]) -> dict[str, int]:
    """The symbols that are sizes of inputs by themselves, with their values."""
    dims = [dim for spec in inputs for dim in (*spec.size, *spec.stride, spec.value)]
    found: dict[str, int] = {}
    for dim in dims:
        text = _expression(dim)
        if text is not None and text.isidentifier():
            found[text] = _value(dim)
    return found


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')


def _source_lines(node: fx.Node) -> list[str]:
    """The user's line for a node: ``file.py:12: code``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [frame for frame in frames if "/torch/" not in frame[0]]
    return [f"{path}:{line}: {code.strip()}" for path, line, code in users[-1:]]
