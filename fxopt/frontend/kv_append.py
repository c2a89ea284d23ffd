"""Growing caches: ``cat([past, new])`` that replaces what it has read becomes an append.

What is looked for is a concatenation of an input with something behind it, whose result Dynamo stores into
the attribute that the input comes from. Then the input becomes one with room behind the rows of `past`
(`fxopt.runtime.kv_state`), the new rows are written into it, and it is the result. The compiled graph has no
output for it: the caller gets the tensor that was written to.

A cache that begins, a concatenation of nothing with the first rows, is copied into such a tensor behind the
run, where it is known that it will grow. What no token of the call has a part in, such as the keys of an
encoder's output, has all its rows already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.frontend.dead_code import erase_unused
from fxopt.frontend.kv_edit import append_instead
from fxopt.frontend.outputs import keep_output_layout, output_layout
from fxopt.frontend.side_effects import source_of
from fxopt.ir import facts
from fxopt.ir.cone import cone
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.facts import argument, is_call, location, val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.linear import Unsupported
from fxopt.ir.sizes import input_of, newest_of
from fxopt.runtime.kv_calls import Plan
from fxopt.runtime.kv_growth import Append, Begin, Length

aten = torch.ops.aten
NAME = "append-kv-cache"
_END = 2**63 - 1
_COPIED = "wanted a cache that keeps its rows where they are, saw it keep a copy of them, perhaps offloaded"
_RETURNED = "wanted a result that takes the place of {}, saw it returned, alone or in a tuple or list"
_COPIES = (
    aten._to_copy.default,
    aten.clone.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
)
_COMPLETE = "wanted rows of tokens, saw what is made of floating-point inputs alone"


class _Refusal(Exception):  # noqa: N818 - becomes evidence
    """Why a concatenation stays one."""


def insert_appends(
    gm: fx.GraphModule, inputs: Sequence[Any], stored: Mapping[int, str | None]
) -> tuple[Plan, list[Evidence]]:
    """Turn the growing caches of `gm`, which is normalized, into appends, in place.

    Args:
        inputs: one example for each placeholder.
        stored: see `fxopt.frontend.side_effects.stored_attributes`.
    """
    search, plan = _Search(gm, inputs, stored), Plan()
    notes: dict[fx.Node, Evidence] = {}
    for place, result in enumerate(search.outputs):
        cat = _joined(result)
        if place not in stored:
            if cat is not None and (past := _operands(cat)[0]).op == "placeholder":
                notes.setdefault(cat, _note(cat, _RETURNED.format(past.name), Status.ILLEGAL))
            continue
        if cat is None:
            moved = _joined(_before_copies(result))
            if moved is not None:
                notes[moved] = _note(moved, _COPIED, Status.ILLEGAL)
            continue
        try:
            if _begins(cat) and not _made_of_tokens(_operands(cat)[1]):
                plan.complete.append((place, _dim(cat)))
                notes[cat] = _note(cat, _COMPLETE, Status.ILLEGAL)
            elif _begins(cat):
                plan.begins.append(search.begin(place, result, cat))
                notes[cat] = _note(cat, "its first rows get a buffer inside of generate")
            else:
                plan.appends.append(search.append(place, result, cat))
                notes[cat] = _note(cat, "new rows are written behind those that are there")
        except _Refusal as refusal:
            notes[cat] = _note(cat, str(refusal), Status.ILLEGAL)
    for cat, reason in search.rewrite(plan).items():
        notes[cat] = _note(cat, reason, Status.ILLEGAL)
    return plan, list(notes.values())


def _note(cat: fx.Node, reason: str, status: Status = Status.APPLIED) -> Evidence:
    return Evidence(NAME, cat.name, location(cat), status, reason)


def _joined(result: Any) -> fx.Node | None:
    """The concatenation of two tensors that `result` is, or is a slice of."""
    while is_call(result, aten.slice.Tensor, aten.alias.default):  # an alias is a slice of everything
        result = result.args[0]
    return result if is_call(result, aten.cat.default) and len(_operands(result)) == 2 else None


def _before_copies(result: Any) -> Any:
    """What `result` is a copy of: in other memory, or in another dtype."""
    while is_call(result, *_COPIES):
        result = result.args[0]
    return result


def _operands(cat: fx.Node) -> list[fx.Node]:
    return list(argument(cat, "tensors"))


def _dim(cat: fx.Node) -> int:
    return int(argument(cat, "dim", 0)) % facts.rank(cat)


def _begins(cat: fx.Node) -> bool:
    return tuple(facts.shape(_operands(cat)[0])) == (0,)


def _made_of_tokens(rows: fx.Node) -> bool:
    """Integers among the inputs have a part in it; or too much has, to tell."""
    try:
        inputs = [node for node in cone(rows) if node.op == "placeholder"]
    except Unsupported:
        return True
    return not all(facts.is_floating(node) for node in inputs)


class _Search:
    """Looks at the concatenations of one graph, and rewrites those that were accepted."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], stored: Mapping[int, str | None]) -> None:
        self.gm = gm
        self.inputs = inputs
        self.stored = stored
        self.facts = Facts(gm.graph)
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.outputs: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.sources = [source_of(node) for node in self.placeholders]

    def begin(self, place: int, result: fx.Node, cat: fx.Node) -> Begin:
        """The output at `place`: `result`, the first rows of a cache, is `cat` or a slice of it.

        Raises:
            _Refusal: it is to stay what it is.
        """
        self._check_value(cat)
        dim = _dim(cat)
        return Begin(place, dim, bounded=result is not cat, part=self._part(result, cat, dim))

    def append(self, place: int, result: fx.Node, cat: fx.Node) -> Append:
        """The output at `place`: rows of a cache with new ones behind them. As `begin`."""
        past, new = _operands(cat)
        if past.op != "placeholder":
            raise _Refusal("wanted rows behind an input")
        source, dim = self.placeholders.index(past), _dim(cat)
        if not self.sources[source] or self.stored[place] != self.sources[source]:
            raise _Refusal(f"wanted a result that takes the place of {past.name}, saw it stored elsewhere")
        self._check_value(cat)
        self._check_input(past, source)
        if facts.dtype(past) != facts.dtype(cat) or facts.dtype(new) != facts.dtype(cat):
            raise _Refusal("wanted rows of one dtype")
        others = [arg for each, arg in enumerate(self.outputs) if each != place and facts.is_tensor(arg)]
        for value in (past, cat):
            if any(self.facts.alias_class(value) == self.facts.alias_class(arg) for arg in others):
                raise _Refusal(f"wanted one output, saw others that share memory with {value.name}")
        self.row_count(past, dim)
        return Append(
            output=place, dim=dim, bounded=result is not cat, part=self._part(result, cat, dim),
            source=source, new=self._length(facts.shape(new)[dim]), measured=self._is_measured(source),
        )  # fmt: skip

    def _is_measured(self, place: int) -> bool:
        """A size, stride or offset of the input at `place` is an input, too."""
        parts = ("size()", "stride()", "storage_offset()")
        prefixes = tuple(f"{self.sources[place]}.{part}" for part in parts)
        return any(name.startswith(prefixes) for name in self.sources)

    def _check_value(self, node: fx.Node) -> None:
        if val(node).requires_grad or self.facts.differentiates(node):
            raise _Refusal("wanted a value that needs no gradient")
        if self.facts.written_after(node, node) is not None:
            raise _Refusal(f"wanted a value that is not written to, saw {node.name}")

    def _check_input(self, past: fx.Node, source: int) -> None:
        if type(self.inputs[source]) is not torch.Tensor or self.inputs[source].layout is not torch.strided:
            raise _Refusal(f"wanted a plain tensor, saw {type(self.inputs[source]).__name__}")
        if past.meta.get("fxopt_needs_grad"):
            raise _Refusal("wanted a cache that needs no gradient")
        if self.facts.written_after(past, past) is not None:
            raise _Refusal(f"wanted a cache that is not written to, saw {past.name}")
        appended = [each for each in past.users if is_call(each, aten.cat.default)]
        if len(appended) != 1:
            raise _Refusal("wanted one concatenation of the cache, saw several")

    def _length(self, size: int | torch.SymInt) -> Length:
        """How to find a size when the graph is called."""
        if isinstance(size, int):
            return Length(size)
        found = input_of(size.node.expr, self.gm.graph)
        if found is None:
            raise _Refusal(f"wanted a number of rows that an input has, saw {size}")
        node, dim = found
        return Length(0, self.placeholders.index(node), dim)

    def _part(self, result: fx.Node, cat: fx.Node, dim: int) -> tuple[Length, Length] | None:
        """The slice of the concatenation along `dim` that the cache keeps; None for all of it."""
        part = None
        while result is not cat:
            source: Any = result.args[0]
            if not facts.same_shape(val(source).shape, val(result).shape):
                along = int(argument(result, "dim", 0)) % facts.rank(result)
                rows, step = facts.shape(source)[dim], argument(result, "step")
                start = self._bound(argument(result, "start"), 0, rows)
                end = self._bound(argument(result, "end"), _END, rows)
                if part is not None or along != dim or step != 1 or start is None or end is None:
                    raise _Refusal("wanted one slice of the rows with known bounds")
                part = start, end
            result = source
        return part

    def _bound(self, bound: Any, default: int, rows: int | torch.SymInt) -> Length | None:
        """How to find where a slice of so many rows begins or ends, when the graph is called."""
        number = val(bound) if isinstance(bound, fx.Node) else default if bound is None else bound
        if not isinstance(number, torch.SymInt):
            return Length(number)
        most = newest_of(number, rows)
        return self._affine(number.node.expr if most is None else -most)

    def _affine(self, size: sympy.Expr) -> Length | None:
        """A number, and an input that is added to it, or taken from it."""
        number, rest = size.as_coeff_Add()
        factor, symbol = rest.as_coeff_Mul()
        if not rest.free_symbols:
            return Length(int(size))
        found = input_of(symbol, self.gm.graph)
        if found is None or abs(factor) != 1:
            return None
        return Length(0, self.placeholders.index(found[0]), found[1], int(factor), int(number))

    def row_count(self, past: fx.Node, dim: int) -> fx.Node | int:
        """Where the number of rows of `past` can be read."""
        rows = facts.shape(past)[dim]
        if isinstance(rows, int):
            return rows
        node: fx.Node
        for node in self.placeholders:
            if isinstance(val(node), torch.SymInt) and str(val(node)) == str(rows):
                return node
        raise _Refusal(f"wanted a number of rows that is an input, saw {rows}")

    def rewrite(self, plan: Plan) -> dict[fx.Node, str]:
        """Carry out the plan; what turns out impossible leaves it. Returns why, by concatenation."""
        if not plan:
            return {}
        whole = {begin.output: _joined(self.outputs[begin.output]) for begin in plan.begins if begin.part}
        sliced = [self.outputs[place] for place in whole]
        self.outputs = [whole.get(place, result) for place, result in enumerate(self.outputs)]
        self.gm.graph.output_node().args = (tuple(self.outputs),)
        erase_unused(sliced)
        layout = output_layout(self.gm.graph)
        refused: dict[fx.Node, str] = {}
        for append in list(plan.appends):
            cat, past = _joined(self.outputs[append.output]), self.placeholders[append.source]
            assert cat is not None
            obstacle = append_instead(past, cat, append.dim, self.row_count(past, append.dim))
            if obstacle is not None:
                refused[cat] = obstacle
                plan.appends.remove(append)
        gone = {append.output for append in plan.appends}
        kept = [place for place in range(len(self.outputs)) if place not in gone]
        dropped = [self.outputs[place] for place in gone]
        self.gm.graph.output_node().args = (tuple(self.outputs[place] for place in kept),)
        erase_unused(dropped)
        keep_output_layout(self.gm, [layout[place] for place in kept])
        self.gm.recompile()
        return refused
