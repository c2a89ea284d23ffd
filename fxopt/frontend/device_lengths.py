"""Lengths on the device: a decoding step that launches the same while its caches grow.

The graph of a step takes its caches with room for the new rows, and their length as a number. Such a number
is part of what is launched: nothing could be replayed. Here the graph is called with all the room that there
is, and with its size as the length; where the rows end it reads from a small tensor. What has to change for
that are

- the writes of new rows: to a place that is read from the tensor;
- attention: keys behind the length are excluded, as those of a static cache are;
- lengths that are used as numbers, such as positions;
- windows that move through their memory: they are copied from where they are.

Everything else has to do with the sizes alone (`fxopt.frontend.length_flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.frontend.dead_code import erase_unused
from fxopt.frontend.device_lengths_edit import Edit, takes_tensors
from fxopt.frontend.host_numbers import compute, source_of_symbol
from fxopt.frontend.length_flow import Lengths, Refusal, is_pointwise, is_symbolic, nodes_in, symbols_of
from fxopt.ir import facts
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import MEAN
from fxopt.ir.program import ScoreProgram
from fxopt.ir.sizes import size_of
from fxopt.runtime.device_lengths import DeviceLengths, Formulas, Grown, Window
from fxopt.runtime.kv_growth import Append, Length
from fxopt.runtime.kv_state import capacity_for

aten = torch.ops.aten


def with_device_lengths(gm: fx.GraphModule, appends: Sequence[Append]) -> DeviceLengths:
    """Have `gm`, a normalized graph with semantic ops, read its lengths from its last input, which is new.

    Args:
        appends: its caches that grow, which it takes with the new rows.

    Raises:
        Refusal: with the reason; then the graph is as it was.
    """
    erase_unused([node for node in gm.graph.nodes if node.op == "call_function"])
    search = _Search(gm, appends)
    changes = [change for node in gm.graph.nodes for change in search.changes(node)]
    found = search.lengths()
    edit = Edit(gm, len(search.numbers), [cache.node for cache in search.windows])
    for change in changes:
        change(edit)
    edit.finish()
    return replace(found, unread=_unread(gm.graph))


def _unread(graph: fx.Graph) -> tuple[int, ...]:
    """Places of numbers that are neither read nor the size of a tensor."""
    nodes = list(enumerate(graph.find_nodes(op="placeholder")))
    sizes = set().union(*(symbols_of(val(node)) for _, node in nodes if facts.is_tensor(node)))
    numbers = [(place, node) for place, node in nodes if is_symbolic(node) and not node.users]
    return tuple(place for place, node in numbers if sizes.isdisjoint(symbols_of(val(node))))


class _Cache:
    """One cache: where it is, and how it is written."""

    def __init__(self, placeholders: Sequence[fx.Node], append: Append) -> None:
        self.append, self.node = append, placeholders[append.source]
        if append.new.place is not None:
            raise Refusal("wanted as many new rows at each step")
        self.new, self.dim = append.new.number, append.dim
        self.write, self.slice = self._write()
        rows: Any = argument(self.slice, "start")
        self.rows, self.count = rows, hint(val(rows))
        self.most = None if append.part is None else _most(append.part[0])
        self.is_window = self.most is not None and self.count + self.new > self.most
        if not self.is_window and not isinstance(val(rows), torch.SymInt):
            raise Refusal("wanted a length that is not known while compiling")

    @property
    def total(self) -> int:
        """Rows of the memory of a window."""
        return 1 + capacity_for(self.count + self.new, bounded=True)

    def grown(self, placeholders: Sequence[fx.Node]) -> Grown:
        """It, for the runtime."""
        return Grown(self.append.source, placeholders.index(self.rows), self.dim, self.new, self.most)

    def window(self, placeholders: Sequence[fx.Node]) -> Window:
        """It, for the runtime."""
        place = placeholders.index(self.rows) if isinstance(self.rows, fx.Node) else None
        return Window(self.append.source, self.dim, self.new, (self.count, place), self.total)

    def _write(self) -> tuple[fx.Node, fx.Node]:
        for view in self.node.users:
            behind = is_call(view, aten.slice.Tensor) and argument(view, "start") not in (0, None)
            for user in view.users:
                if behind and is_call(user, aten.copy_.default) and user.args[0] is view and not user.users:
                    return user, view
        raise Refusal(f"wanted a write of new rows into {self.node.name}")


def _most(start: Length) -> int:
    """Rows of which a cache keeps the newest; 0 where it does not keep these."""
    if start.place is not None:
        raise Refusal("wanted a window whose size is known")
    return max(-start.number, 0)


# What is to be done once it is known that all of it can be.
Change = Callable[[Edit], None]


class _Search:
    """What has to change in one graph. Looks only."""

    def __init__(self, gm: fx.GraphModule, appends: Sequence[Append]) -> None:
        self.graph = gm.graph
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.caches = [_Cache(self.placeholders, append) for append in appends]
        self.grown = [cache for cache in self.caches if not cache.is_window]
        self.windows = [cache for cache in self.caches if cache.is_window]
        lengths = [val(cache.rows).node.expr for cache in self.grown]
        if any(not length.is_Symbol for length in lengths):
            raise Refusal(f"wanted lengths that are inputs, saw {lengths}")
        if len({cache.count for cache in self.grown}) > 1:
            raise Refusal("wanted caches of one length")
        # They are equal in every call.
        self.same = dict.fromkeys(lengths, lengths[0]) if lengths else {}
        self.flow = Lengths({*lengths, *self._of_integers()})
        self.numbers: list[sympy.Expr] = []
        self.own = {each for cache in self.caches for each in (cache.write, cache.slice)}
        outputs: Any = gm.graph.output_node().args[0]
        self.outputs = list(outputs)

    def _of_integers(self) -> set[sympy.Symbol]:
        """Symbols that only tensors of integers have in their sizes, such as a padding mask."""
        tensors = [node for node in self.placeholders if facts.is_tensor(node)]
        whole = [symbols_of(val(node)) for node in tensors if not facts.is_floating(node)]
        other = [symbols_of(val(node)) for node in tensors if facts.is_floating(node)]
        return set().union(*whole).difference(*other)

    def number(self, expression: sympy.Expr) -> int:
        """The place of a number among those that the graph reads."""
        expression = expression.subs(self.same)
        if expression not in self.numbers:
            self.numbers.append(expression)
        return self.numbers.index(expression)

    def changes(self, node: fx.Node) -> list[Change]:
        """What is to be done at `node`. Raises Refusal."""
        if node in self.own:
            return [change for cache in self.caches if node is cache.write for change in self._write(cache)]
        if node.op == "output":
            return self._output()
        if node.op != "call_function" or (not self.flow.touches(node) and not self._numbers_in(node)):
            return []
        if is_call(node, ATTENTION.overload):
            return self._attention(node)
        if is_call(node, aten.index.Tensor):
            return self._index(node, node.args[0], node.args[1])
        if is_call(node, aten.embedding.default):
            return self._index(node, node.args[0], [node.args[1]])
        if is_call(node, aten.arange.start, aten.arange.start_step):
            return self._arange(node)
        if self.flow.touches(node):
            self.flow.check(node)
        places = self._numbers_in(node)
        return [lambda edit: edit.read_numbers(node, places)] if places else []

    def _numbers_in(self, node: fx.Node) -> dict[fx.Node, int]:
        """Symbolic integers among the operands of a pointwise operator."""
        if not is_pointwise(node):
            return {}
        found = [arg for arg in node.all_input_nodes if isinstance(val(arg), torch.SymInt)]
        if not found or not takes_tensors(node):
            if any(self.flow.are_in(val(arg)) for arg in found):
                raise Refusal(f"wanted a length as an operand, saw {node.target}")
            return {}
        return {arg: self.number(val(arg).node.expr) for arg in found}

    def _write(self, cache: _Cache) -> list[Change]:
        if cache.is_window:
            if any(user < cache.write for user in cache.node.users if user is not cache.slice):
                raise Refusal("wanted a window that is read with its new rows only")
            return [lambda edit: edit.write_window(cache)]
        place = self.number(val(cache.rows).node.expr)
        return [lambda edit: edit.write(cache, place)]

    def _output(self) -> list[Change]:
        for result in self.outputs:
            if is_symbolic(result) and not isinstance(val(result), torch.SymInt):
                raise Refusal("wanted results that are tensors or integers")
            if self.flow.dims(result):
                raise Refusal(f"wanted results of sizes that stay, saw {val(result).shape}")
        return [lambda edit: edit.drop_numbers()]

    def _attention(self, node: fx.Node) -> list[Change]:
        query, key, value = node.args[:3]
        rest, mask = argument(node, "key_rest"), argument(node, "attn_mask")
        dims = {key: [2], value: [2], **({} if rest is None else {rest: [2]})}
        dims |= {} if mask is None else {mask: [facts.rank(mask) - 1]}
        named = {*dims, *nodes_in(argument(node, "captures"))}
        named |= set(nodes_in(argument(node, "sizes")))
        others = [arg for arg in node.all_input_nodes if arg not in named]
        if any(self.flow.are_in(val(arg)) for arg in others):
            raise Refusal("wanted lengths in the keys of attention only")
        if any(self.flow.dims(arg) not in ([], wanted) for arg, wanted in dims.items()):
            raise Refusal("wanted keys along one dimension")
        score = argument(node, "score")
        formula = ScoreProgram.parse(score)
        if formula.captures or formula.sizes:
            raise Refusal(f"wanted scores that depend on no position, saw {score}")
        if not self.flow.dims(key):
            return []
        if argument(node, "is_causal"):
            raise Refusal("wanted a mask that is a tensor, saw one that depends on the number of queries")
        if mask is not None and not facts.is_floating(mask) and argument(node, "dead_rows") == MEAN:
            raise Refusal("wanted rows whose keys are not all excluded")
        place = self.number(val(key).shape[2].node.expr)
        return [lambda edit: edit.exclude(node, place)]

    def _index(self, node: fx.Node, source: Any, indices: Any) -> list[Change]:
        """Entries behind those that are live are looked up, too: wherever, but inside."""
        behind = self.flow.dims(source)
        wrapped: dict[int, int] = {}
        for dim, index in enumerate(indices):
            if index is None or not (dim in behind or self.flow.dims(index)):
                continue
            if facts.dtype(index) is not torch.int64:
                raise Refusal(f"wanted indices that are integers, saw {facts.dtype(index)}")
            size = val(source).shape[dim]
            wrapped[dim] = self.number(size_of(size))
        return [lambda edit: edit.wrap(node, wrapped)]

    def _arange(self, node: fx.Node) -> list[Change]:
        start, end, step = (argument(node, name, 1) for name in ("start", "end", "step"))
        first, last = (val(each) if isinstance(each, fx.Node) else each for each in (start, end))
        if first == 0 and step == 1:
            return []
        count = _expression(last) - _expression(first)
        if step != 1 or not count.is_Integer or facts.dtype(node) is not torch.int64:
            raise Refusal(f"wanted a range of fixed length, saw {node.format_node()}")
        place = self.number(_expression(first))
        return [lambda edit: edit.shift(node, int(count), place)]

    def lengths(self) -> DeviceLengths:
        """What the runtime has to know."""
        caches = [cache.node for cache in self.caches]
        nodes = list(enumerate(self.placeholders))
        numbers = [(p, val(n).node.expr) for p, n in nodes if is_symbolic(n) and self.flow.touches(n)]
        results = [(p, val(n).node.expr) for p, n in enumerate(self.outputs) if is_symbolic(n)]
        sizes = [
            ((place, dim), val(node).shape[dim].node.expr)
            for place, node in nodes
            for dim in self.flow.dims(node)
            if node not in caches
        ]
        used = [*self.numbers, *(size for _, size in (*numbers, *results, *sizes))]
        symbols = dict.fromkeys([*self.same, *sorted(self.flow.symbols, key=str)])
        symbols |= dict.fromkeys(symbol for size in used for symbol in sorted(size.free_symbols, key=str))
        order = list(symbols)
        sources = tuple(source_of_symbol(symbol, self.graph, {*caches}) for symbol in order)

        def formulas(pairs: Sequence[tuple[Any, sympy.Expr]]) -> Formulas[Any]:
            return Formulas(
                tuple(place for place, _ in pairs), compute(order, [each for _, each in pairs], sources)
            )

        more = {val(cache.rows).node.expr: cache.new for cache in self.grown}
        return DeviceLengths(
            grown=tuple(cache.grown(self.placeholders) for cache in self.grown),
            windows=tuple(cache.window(self.placeholders) for cache in self.windows),
            symbols=sources,
            lengths={n: more.get(symbol) for n, symbol in enumerate(order) if symbol in self.flow.symbols},
            numbers=formulas(list(enumerate(self.numbers))).compute,
            inputs=formulas(numbers),
            outputs=formulas(results),
            sizes=formulas(sizes),
        )


def _expression(number: Any) -> sympy.Expr:
    """A number as sympy has it, which may be no integer."""
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.sympify(number)
