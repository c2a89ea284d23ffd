"""The changes to a graph that is to read its lengths from a tensor: see `fxopt.frontend.device_lengths`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.frontend.dead_code import erase_unused
from fxopt.frontend.kv_edit import rows_outermost
from fxopt.frontend.length_flow import is_symbolic
from fxopt.ir import facts
from fxopt.ir.facts import argument, val
from fxopt.ir.formula import AXES, K, capture, real_capture
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.propagate import evaluate, fake_mode_of, propagate_from
from fxopt.ir.writes import COUNTED_ROWS

aten = torch.ops.aten


class Cache(Protocol):
    """What is known of a cache."""

    node: fx.Node
    write: fx.Node
    slice: fx.Node
    dim: int
    new: int
    count: int
    total: int


def takes_tensors(node: fx.Node) -> bool:
    """A pointwise operator whose numbers can be tensors without dimensions, with the same result."""
    tensors = [arg for arg in node.all_input_nodes if facts.is_tensor(arg)]
    wide = any(facts.rank(arg) > 0 for arg in tensors)
    return wide and _with_tensors(node) is not None


def _with_tensors(node: fx.Node) -> OpOverload | None:
    """The overload that takes a tensor for each of the symbolic numbers of `node`."""
    target: Any = node.target
    if target._overloadname == "Scalar" and "Tensor" in target.overloadpacket.overloads():
        target = target.overloadpacket.Tensor
    formals = target._schema.arguments
    given = [*zip(formals, node.args, strict=False)]
    given += [(formal, node.kwargs[formal.name]) for formal in formals if formal.name in node.kwargs]
    fits = all(str(formal.type) == "Tensor" for formal, arg in given if is_symbolic(arg))
    return target if fits and len(node.args) <= len(formals) else None


class Edit:
    """Changes, one by one."""

    def __init__(self, gm: fx.GraphModule, numbers: int, windows: Sequence[fx.Node]) -> None:
        """Args: numbers: how many are read, behind which is where each of `windows` begins."""
        self.gm, self.graph = gm, gm.graph
        mode, placeholders = fake_mode_of(gm.graph), gm.graph.find_nodes(op="placeholder")
        assert mode is not None
        self.mode = mode
        self._start = {window: numbers + place for place, window in enumerate(windows)}
        device = next(val(node).device for node in placeholders if facts.is_tensor(node))
        with self.graph.inserting_after(placeholders[-1]):
            self.numbers = self.graph.placeholder("numbers")
        self.numbers._dynamo_source = None  # AOTAutograd asks each input for one
        with mode:
            made = torch.empty(numbers + len(windows), dtype=torch.int64, device=device)
        self.numbers.meta["val"] = self.numbers.meta["example_value"] = made
        self._read: dict[int, fx.Node] = {}
        self._live: dict[Any, fx.Node] = {}
        self._wide: dict[fx.Node, fx.Node] = {}

    def finish(self) -> None:
        """Leave the graph in order."""
        erase_unused([node for node in self.graph.nodes if node.op == "call_function"])
        self.graph.lint()
        self.gm.recompile()

    def _call(self, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(node, self.mode)
        return node

    def _number(self, place: int) -> fx.Node:
        """One of the numbers, as a tensor without dimensions."""
        if place not in self._read:
            with self.graph.inserting_after(self.numbers):
                self._read[place] = self._call(aten.select.int, self.numbers, 0, place)
        return self._read[place]

    def _range(self, count: int, first: int) -> fx.Node:
        """`count` integers, from a number on."""
        many = self._call(aten.arange.default, count, device=val(self.numbers).device)
        return self._call(aten.add.Tensor, many, self._number(first))

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        erase_unused([node])

    def read_numbers(self, node: fx.Node, places: Mapping[fx.Node, int]) -> None:
        """Have a pointwise operator read its integers from tensors."""
        target = _with_tensors(node)
        assert target is not None
        node.target = target
        for number, place in places.items():
            node.replace_input_with(number, self._number(place))

    def shift(self, node: fx.Node, count: int, first: int) -> None:
        """A range of fixed length that begins with a number."""
        with self.graph.inserting_before(node):
            self._replace(node, self._range(count, first))

    def _put(self, cache: Cache, index: fx.Node) -> None:
        """New rows, at these places. AOTAutograd's form of ``index_copy_`` would copy the memory as well, to
        have it contiguous.
        """
        places = [*[None] * cache.dim, index]
        put = self._call(aten.index_put_.default, cache.node, places, cache.write.args[1])
        put.meta[COUNTED_ROWS] = True

    def write(self, cache: Cache, rows: int) -> None:
        """Write new rows behind as many as a number says."""
        with self.graph.inserting_before(cache.write):
            index = self._range(cache.new, rows)
            self._put(cache, index)
        self.graph.erase_node(cache.write)
        self.graph.erase_node(cache.slice)

    def write_window(self, cache: Cache) -> None:
        """Take all of the memory of a window, write behind its rows, and have them read from a copy."""
        node, dim, before = cache.node, cache.dim, val(cache.node)
        readers = [user for user in node.users if user is not cache.slice]
        with self.mode:
            sizes = [cache.total if each == dim else size for each, size in enumerate(before.shape)]
            like = torch.empty(sizes, dtype=before.dtype, device=before.device)
        node.meta["val"] = node.meta["example_value"] = rows_outermost(like, dim, self.mode)
        with self.graph.inserting_before(cache.write):
            rows = self._range(cache.count + cache.new, self._start[node])
            index = self._call(aten.slice.Tensor, rows, 0, cache.count, cache.count + cache.new)
            self._put(cache, index)
            window = self._call(aten.index_select.default, node, dim, rows)
        for reader in readers:
            reader.replace_input_with(node, window)
        self.graph.erase_node(cache.write)
        self.graph.erase_node(cache.slice)
        propagate_from(window, before, self.mode, lambda node, value: None)

    def wrap(self, node: fx.Node, sizes: Mapping[int, int]) -> None:
        """Have indices that may lie outside look up something inside: those of live entries stay."""
        given: Any = node.args[1]
        indices = [given] if isinstance(given, fx.Node) else list(given)
        with self.graph.inserting_before(node):
            for dim, size in sizes.items():
                indices[dim] = self._call(aten.remainder.Tensor, indices[dim], self._number(size))
        changed = indices[0] if isinstance(given, fx.Node) else indices
        node.args = (node.args[0], changed, *node.args[2:])

    def exclude(self, node: fx.Node, place: int) -> None:
        """Have an attention leave out the keys behind as many as a number says."""
        names = ("attn_mask", "mask", "bias", "bias_replaced", "captures", "sizes")
        mask = argument(node, "attn_mask")
        positional = ("dropout_p", "is_causal")
        others = {name: argument(node, name) for name in positional}
        others |= {name: arg for name, arg in node.kwargs.items() if name not in names}
        with self.graph.inserting_before(node):
            made = {"attn_mask": self._masked(mask, node.args[1], place), **self._formulas(mask, place)}
        node.kwargs = {**others, **made}
        node.args = node.args[:3]

    def _formulas(self, mask: fx.Node | None, place: int) -> dict[str, Any]:
        """What `_masked` makes of `mask`, as attributes of an attention: whoever reads keys by them reads as
        many as the number says, of all that there is room for.
        """
        captures, live = [self._captured(self._number(place), 1)], sympy.Lt(K, capture("c0")(0))
        found: dict[str, Any] = {"captures": captures}
        if mask is not None:
            whole = self._captured(mask, 4)
            captures.append(whole)
            sizes = facts.shape(whole)
            at = [0 if facts.same_size(size, 1) else axis for axis, size in zip(AXES, sizes, strict=True)]
            if facts.is_floating(mask):
                found["bias"] = str(ScoreProgram(real_capture("c1")(*at)))
            else:
                live = sympy.And(live, sympy.Ne(capture("c1")(*at), 0))
        return {**found, "mask": str(MaskProgram(live))}

    def _captured(self, node: fx.Node, rank: int) -> fx.Node:
        """`node` with leading dimensions of size 1, up to so many. Made once for all layers."""
        if node not in self._wide:
            made = node
            for _ in range(rank - facts.rank(node)):
                made = self._call(aten.unsqueeze.default, made, 0)
            self._wide[node] = made
        return self._wide[node]

    def _masked(self, mask: fx.Node | None, key: Any, place: int) -> fx.Node:
        """`mask`, without the keys that are not live. Made once for all layers."""
        if (mask, place) not in self._live:
            if mask is None:
                count = self._call(aten.sym_size.int, key, 2)
                keys = self._call(aten.arange.default, count, device=val(key).device)
                live = self._call(aten.lt.Tensor, keys, self._number(place))
                made = self._call(aten.view.default, live, [1, 1, 1, -1])
            elif facts.is_floating(mask):
                live = self._masked(None, key, place)
                made = self._call(aten.where.ScalarOther, live, mask, -math.inf)
            else:
                made = self._call(aten.logical_and.default, mask, self._masked(None, key, place))
            self._live[mask, place] = made
        return self._live[mask, place]

    def drop_numbers(self) -> None:
        """Integers are no results any more."""
        output = self.graph.output_node()
        results: Any = output.args[0]
        kept = [result for result in results if not is_symbolic(result)]
        output.args = (tuple(kept),)
        erase_unused([result for result in results if is_symbolic(result)])
