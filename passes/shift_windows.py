"""A window that is rolled, gets its last entries and is copied back -> moved where it is.

The cache of a sliding layer holds the last N keys. Once it is full, each token drops the first and appends
one: ``new = keys.roll(-1, 2)``, ``new[:, :, [-1]] = key``, ``keys.copy_(new)``. That is a tensor of the size
of the window and two passes over it, for each layer and token. The same entries are in the window when its
memory moves by one place.

Assumed: nothing. What is in the window afterwards is the same, bit by bit, at the same place in the graph.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.cost import hint, numel
from fxopt.ir.facts import argument, is_call, val

aten = torch.ops.aten

# Measured with one thread, a token of a model of 8 layers: windows of 512 KiB 0.98x, 1 MiB 1.07x, 2 MiB
# 1.28x.
LEAST_BYTES = 2**20
# One thread moves a window. Measured with one: 5.6 times faster than the host's code, which uses all.
MOST_THREADS = 4

_PUT = (aten.index_put_.default, aten.index_put.default)
_LITERAL = (aten.lift_fresh_copy.default, aten.detach_.default)


@dataclass(frozen=True)
class Shift:
    """What is copied back: the window along `dim` without its first `width` entries, and `new` behind them.

    Attributes:
        read: the first operation, which reads the window. write: what writes `new` into the copy, if it is
            written. made: the copy, and views of it.
    """

    dim: int
    width: int
    new: fx.Node
    read: fx.Node
    write: fx.Node | None
    made: tuple[fx.Node, ...]
    index: fx.Node | None = None


@dataclass(frozen=True)
class ShiftWindows:
    """A window moved in place, instead of a copy of it that is copied back."""

    name: ClassVar[str] = "shift-windows"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.copy_.default,)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        window: Any = node.args[0]
        source: Any = node.args[1]
        if not facts.is_tensor(window) or not facts.is_tensor(source):
            return None
        shift = _joined(window, source) or _rolled(window, node, source)
        if shift is None or isinstance(shift, Miss):
            return shift
        others = {user for made in shift.made for user in made.users} - {node, *shift.made}
        reader = next((user for user in others if user is not shift.write), None)
        if reader is not None:
            return Miss("a copy that is only copied back", f"{reader.name}, which reads it")
        roots = (node,) if shift.write is None else (shift.write, node)
        return Match(node, roots, {"window": window, "shift": shift})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, window, shift = match.anchor, match["window"], match["shift"]
        if ctx.facts.differentiates(node):
            return Verdict.no("it has no gradient")
        if window.op != "placeholder":
            return Verdict.no(f"wanted a window that is an input of the graph, saw {window.name}")
        if not _is_contiguous(val(window)):
            return Verdict.no(f"wanted a contiguous window, saw strides {tuple(val(window).stride())}")
        if facts.dtype(shift.new) != facts.dtype(window):
            return Verdict.no(f"wanted new entries of {facts.dtype(window)}, saw {facts.dtype(shift.new)}")
        if ctx.facts.alias_class(shift.new) == ctx.facts.alias_class(window):
            return Verdict.no(
                f"wanted new entries from elsewhere, saw {shift.new.name}, a part of the window"
            )
        end = shift.write or node
        # The move takes the place of the copy back.
        stale = ctx.facts.unsafe_read([window], shift.read, node)
        stale = stale or ctx.facts.unsafe_read([shift.new], shift.write or shift.made[-1], node)
        if shift.index is not None:
            stale = stale or ctx.facts.unsafe_read([shift.index], shift.index, end)
        return Verdict.no(stale) if stale else Verdict.yes(f"moved by {shift.width} along {shift.dim}")

    def profit(self, match: Match, ctx: Context) -> Verdict:
        window = val(match["window"])
        size = hint(numel(window)) * window.element_size()
        if window.device.type != "cpu":
            return Verdict.no(f"on {window.device.type} memory is not moved onto itself")
        if torch.get_num_threads() > MOST_THREADS:
            return Verdict.no(f"one of {torch.get_num_threads()} threads would move it")
        if size < LEAST_BYTES:
            return Verdict.no(f"a window of {size} B, pays from {LEAST_BYTES}")
        return Verdict.yes(f"no copy of {size} B is made")

    def replace(self, match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
        window, shift = match["window"], match["shift"]
        graph.call_function(torch.ops.fxopt.shift_window.default, (window, shift.new, shift.dim, shift.width))
        moved = graph.call_function(aten.alias.default, (window,))
        if shift.write is None:
            return (moved,)
        view = shift.write.args[0]
        if view is shift.read:
            return moved, moved
        return graph.call_function(view.target, (moved, *view.args[1:])), moved


def _joined(window: fx.Node, source: Any) -> Shift | Miss | None:
    """``cat([window[n:], new])``"""
    if not is_call(source, aten.cat.default) or len(source.args[0]) != 2:
        return None
    kept, new = source.args[0]
    if not is_call(kept, aten.slice.Tensor) or kept.args[0] is not window:
        return None
    rank = facts.rank(window)
    dim, first = int(argument(source, "dim")) % rank, argument(kept, "start")
    to_end = int(argument(kept, "dim")) % rank == dim and _ends(kept, facts.shape(window)[dim])
    width = facts.shape(new)[dim] if facts.rank(new) == rank else None
    if not to_end or not isinstance(width, int) or first != width:
        return Miss("as many entries dropped in front as are appended", f"from {first} on, and {width}")
    return Shift(dim, width, new, kept, None, (source,))


def _rolled(window: fx.Node, node: fx.Node, source: Any) -> Shift | Miss | None:
    """``window.roll(-n)`` with `new` written to its last n entries."""
    rolled: Any = source.args[0] if is_call(source, *_PUT) else source
    if not is_call(rolled, aten.roll.default) or rolled.args[0] is not window:
        return None
    shifts, dims = argument(rolled, "shifts"), argument(rolled, "dims")
    if len(dims) != 1 or not isinstance(shifts[0], int) or shifts[0] >= 0:
        return Miss("a window rolled towards its front along one dimension", f"{shifts} along {dims}")
    dim, width = dims[0] % facts.rank(window), -shifts[0]
    size = facts.shape(window)[dim]
    if not statically_known_true(size > width):
        return Miss(f"a window that is known to be longer than {width}", str(size))
    writes = [_put(user, dim, width, size) or _copied(user, dim, width, size) for user in rolled.users]
    found = [each for each in writes if each is not None and _precedes(each, node, source)]
    if len(found) != 1:
        return Miss(f"the last {width} entries written once before", f"{len(found)} such writes")
    return found[0]


def _precedes(shift: Shift, node: fx.Node, source: fx.Node) -> bool:
    """The entries are written when `node` copies `source` back."""
    return shift.made[-1] is source if shift.write is None else shift.write < node


def _put(user: Any, dim: int, width: int, size: facts.Size) -> Shift | None:
    """``rolled[..., [-1]] = new``"""
    if not is_call(user, *_PUT) or argument(user, "accumulate"):
        return None
    given = [place for place, each in enumerate(user.args[1]) if each is not None]
    if given != [dim]:
        return None
    index = user.args[1][dim]
    last = [*range(-width, 0)]
    counted_from_the_front = [size + each for each in last] if isinstance(size, int) else last
    if _entries(index) not in (last, counted_from_the_front):
        return None
    write = user if facts.is_write(user) else None
    return Shift(dim, width, argument(user, "values"), user.args[0], write, (user.args[0], user), index)


def _copied(view: Any, dim: int, width: int, size: facts.Size) -> Shift | None:
    """``rolled[..., -1:] = new``"""
    if not is_call(view, aten.slice.Tensor) or int(argument(view, "dim")) % val(view).dim() != dim:
        return None
    copies = [each for each in view.users if is_call(each, aten.copy_.default) and each.args[0] is view]
    first = val(argument(view, "start"))
    is_last = first is not None and (facts.same_size(first, -width) or facts.same_size(first, size - width))
    if not is_last or not _ends(view, size) or len(copies) != 1:
        return None
    return Shift(dim, width, copies[0].args[1], view.args[0], copies[0], (view.args[0], view, copies[0]))


def _ends(view: fx.Node, size: facts.Size) -> bool:
    """A slice takes everything from its first entry on."""
    end = val(argument(view, "end"))
    to_end = end is None or end == sys.maxsize or statically_known_true(end >= size)
    return bool(argument(view, "step", 1) == 1 and to_end)


def _entries(index: Any) -> list[int] | None:
    """The indices, where the code names them."""
    while is_call(index, *_LITERAL):
        index = index.args[0]
    held = getattr(index.graph.owning_module, str(index.target), None) if index.op == "get_attr" else None
    return held.tolist() if type(held) is torch.Tensor and held.dim() == 1 else None


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Known to be, for all values of the symbols."""
    size: Any = 1
    for own, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if own != 1 and not facts.same_size(stride, size):
            return False
        size = size * own
    return True
