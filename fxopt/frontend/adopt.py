"""Linear layers whose weights another library has quantized become `fxopt::qlinear`.

Found in the normalized graph, in one of three ways: the weight is a tensor subclass (normalization lets a
plain tensor stand for it), the product is an op of a library, or the weight is computed in the graph of
nothing but tensors that modules hold. In all three the tensors are read while compiling. What is compiled
is used as long as they are the same; a call that finds others runs the graph as it was captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.frontend.dead_code import erase_unused
from fxopt.frontend.dequantized import dequantized_site
from fxopt.frontend.library_products import library_site
from fxopt.frontend.linear_site import Site
from fxopt.frontend.retrace import CannotNormalize
from fxopt.frontend.static_values import StaticValues
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.facts import aten, is_call, location
from fxopt.ir.propagate import evaluate, fake_mode_of
from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.found import Found
from fxopt.ir.sources.typed import convert, is_known
from fxopt.runtime.held_weights import STORE, Seen
from fxopt.runtime.rivals import faster_rival

log = logging.getLogger("fxopt")

NAME = "adopt-quantized"
# Another function for a call with such inputs, or None.
Instead = Callable[[Sequence[Any]], Callable[..., Any] | None]


@dataclass
class Adopted:
    """What a graph with adopted weights relies on.

    Attributes:
        seen: inputs, by their places, as they were read.
        typed: the places of inputs that are tensor subclasses; nobody reads these any more.
    """

    seen: dict[int, Seen]
    typed: tuple[int, ...]
    told: bool = False

    def holds(self, inputs: Sequence[Any]) -> bool:
        return all(one.holds(inputs[place]) for place, one in self.seen.items())

    def plain(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs, where what nobody reads is an empty tensor."""
        given = list(inputs)
        for place in self.typed:
            given[place] = _EMPTY
        return given

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, which takes plain tensors, as a function of the inputs as they are."""
        return (lambda *inputs: compiled(*self.plain(inputs))) if self.typed else compiled

    def unless_changed(self, instead: Instead, captured: Callable[..., Any]) -> Instead:
        """`instead`, and `captured` for calls with other weights."""

        def choose(inputs: Sequence[Any]) -> Callable[..., Any] | None:
            if self.holds(inputs):
                return instead(inputs)
            if not self.told:
                self.told = True
                log.warning(_CHANGED)
            return captured

        return choose


_TO = aten.to.dtype
_EMPTY = torch.empty(0)
_CHANGED = (
    "Quantized weights are not what they were when they were compiled. Calls run uncompiled. "
    "torch.compiler.reset() has them compiled anew."
)


def typed_places(inputs: Sequence[Any]) -> tuple[int, ...]:
    """Which inputs are tensor subclasses that hold a quantized weight."""
    return tuple(place for place, value in enumerate(inputs) if is_known(value))


def check_dtypes(gm: fx.GraphModule, typed: Sequence[int]) -> None:
    """Raises CannotNormalize when a library gave Dynamo a wrong dtype for the result of a product: the code
    behind it was traced for that. optimum-quanto 0.2 says float32 for int4 weights, and gives bfloat16.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {placeholders[place] for place in typed}
    for node in gm.graph.nodes:
        if node.op != "call_function" or len(node.args) < 2 or not weights & set(node.all_input_nodes):
            continue
        made, given = (getattr(each, "meta", {}).get("example_value") for each in (node, node.args[0]))
        if isinstance(made, torch.Tensor) and isinstance(given, torch.Tensor) and made.dtype != given.dtype:
            raise CannotNormalize(
                f"{node.name} was traced as {made.dtype} of {given.dtype} by its library; "
                "fxopt.prepare(model) replaces such layers before they are traced"
            )


def adopt(
    gm: fx.GraphModule, inputs: Sequence[Any], typed: Sequence[int], disabled: bool
) -> tuple[Adopted | None, list[Evidence]]:
    """Replace the products of `gm`, a normalized graph, with weights that are quantized already.

    Args:
        inputs: as they are, one for each placeholder that Dynamo made.
        typed: places of tensor subclasses, for which plain tensors stand in `gm`.
        disabled: what could be replaced is noted, and stays.

    Raises:
        CannotNormalize: a tensor subclass is read by something else, or is of no known kind.
    """
    if not typed and not _has_codes(inputs):
        return None, []
    idle = set() if disabled else _drop_idle_writes(gm, inputs)
    run = _Adoption(gm, inputs, typed)
    run.seen = {place: Seen(inputs[place]) for place in idle}
    for node in list(gm.graph.nodes):
        if not node._erased:
            run.visit(node, disabled)
    run.finish()
    return Adopted(run.seen, tuple(typed)) if run.seen else None, run.evidence


def _drop_idle_writes(gm: fx.GraphModule, inputs: Sequence[Any]) -> set[int]:
    """Without ``a.set_(b)`` of inputs that share their memory already: so bitsandbytes ends its int8 layers.

    Returns:
        the places of these inputs.
    """
    placeholders = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    found: set[int] = set()
    for node in gm.graph.find_nodes(op="call_function", target=aten.set_.source_Tensor):
        places = [placeholders.get(each, len(inputs)) for each in node.all_input_nodes]
        if node.users or len(places) != 2 or max(places) >= len(inputs):
            continue
        one, other = (inputs[place] for place in places)
        if one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride():
            gm.graph.erase_node(node)
            found.update(places)
    return found


def _has_codes(inputs: Sequence[Any]) -> bool:
    """A tensor that could hold codes is among the inputs."""
    kinds = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn)
    return any(isinstance(each, torch.Tensor) and each.dtype in kinds and each.dim() > 1 for each in inputs)


class _Adoption:
    """One run over one graph."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], typed: Sequence[int]) -> None:
        self.gm = gm
        self.inputs = inputs
        self.evidence: list[Evidence] = []
        self.seen: dict[int, Seen] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.typed = {placeholders[place]: place for place in typed}
        self.values = StaticValues(gm, inputs)
        self._mode = fake_mode_of(gm.graph)
        self._attributes: dict[int, str] = {}

    def visit(self, node: fx.Node, disabled: bool) -> None:
        try:
            site = self._site(node)
            if site is None:
                return
            if disabled:
                self._note(node, Status.DISABLED, "disabled by options")
                return
            found = self._found(site)
            slower = self._slower(site, found)
        except CannotConvert as refusal:
            self._note(node, Status.ILLEGAL, refusal.reason)
            return
        if slower is not None:
            self._note(node, Status.UNPROFITABLE, slower)
            return
        self._note(node, Status.APPLIED, str(found))
        self._replace(site, found)

    def _site(self, node: fx.Node) -> Site | None:
        if is_call(node, aten.linear.default) and node.args[1] in self.typed:
            weight: Any = node.args[1]
            return Site(
                node,
                node.args[0],  # type: ignore[arg-type]
                node.args[2] if len(node.args) > 2 else node.kwargs.get("bias"),  # type: ignore[arg-type]
                (weight,),
                lambda values: convert(values[0]),
                "typed",
            )
        return library_site(node) or dequantized_site(node, self.values)

    def _found(self, site: Site) -> Found:
        missing = next((each for each in site.weights if each not in self.values), None)
        if missing is not None:
            raise CannotConvert(f"{missing.name} is trained, or differs from call to call")
        origins = {each: None for weight in site.weights for each in self.values.origins(weight)}
        places = [self.values.place(each) for each in origins]
        tensors = [self.inputs[place] for place in places if place is not None]
        with torch.no_grad():
            found = STORE.get(
                site.key, tensors, lambda: site.convert([self.values.value(each) for each in site.weights])
            )
        for place in places:
            if place is not None and place not in self.seen:
                self.seen[place] = Seen(self.inputs[place])
        return found

    def _slower(self, site: Site, found: Found) -> str | None:
        """Why the library's product stays, where it is an op that was measured to be faster."""
        rival = site.rival
        if rival is None:
            return None
        values = [self.values.value(each) for each in site.weights]
        with torch.no_grad():
            name = str(site.root.target)
            given = site.computed or site.x.meta["val"].dtype
            return faster_rival(name, lambda x: rival(values, x), found, given)

    def _replace(self, site: Site, found: Found) -> None:
        graph, weight = self.gm.graph, found.weight
        kinds: dict[str, Any] = {"format": weight.format.name, "group_size": weight.group_size}
        with graph.inserting_before(site.root):
            parts = [
                self._attribute(each)
                for each in (weight.codes, weight.scales, weight.offsets, weight.columns)
            ]
            first = site.x if site.computed is None else graph.call_function(_TO, (site.x, site.computed))
            product = graph.call_function(
                torch.ops.fxopt.qlinear.default,
                (first, *parts, site.bias),
                kinds | {"activation": found.activation},
            )
            new = product if site.finish is None else site.finish(graph, product)
        self._complete(site.root, first if first is not site.x else product, new)
        read = list(site.root.all_input_nodes)
        site.root.replace_all_uses_with(new)
        graph.erase_node(site.root)
        self._erase(read)

    def _complete(self, root: fx.Node, first: fx.Node, last: fx.Node) -> None:
        """Metadata of the nodes that were inserted, from `first` to `last`."""
        node = first
        while True:
            node.meta.update({key: value for key, value in root.meta.items() if key != "val"})
            if self._mode is not None:
                node.meta["val"] = evaluate(node, self._mode)
            if node is last:
                return
            node = node.next

    def _erase(self, read: list[fx.Node]) -> None:
        """What only the old product read: also temporaries with the writes to them."""
        for node in read:
            if node._erased or node.op == "placeholder":
                continue
            part = self.values.part(node) if node in self.values else []
            own = [each for each in part if each.op == "call_function"]
            if own and all(user in own for each in own for user in each.users):
                for each in reversed(own):
                    self.gm.graph.erase_node(each)
            else:
                erase_unused([node])

    def _attribute(self, tensor: torch.Tensor | None) -> fx.Node | None:
        """A read of a tensor that the graph module holds."""
        if tensor is None:
            return None
        name = self._attributes.get(id(tensor))
        if name is None:
            name = f"_fxopt_weight_{len(self._attributes)}"
            self.gm.register_buffer(name, tensor)
            self._attributes[id(tensor)] = name
        node = self.gm.graph.get_attr(name)
        if self._mode is not None:
            node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def finish(self) -> None:
        """Raises CannotNormalize when a tensor subclass is still read."""
        for node in self.typed:
            user = next(iter(node.users), None)
            if user is not None:
                reasons = [each.reason for each in self.evidence if each.status is not Status.APPLIED]
                why = f": {reasons[0]}" if reasons else ""
                kind = type(self.inputs[self.typed[node]]).__name__
                raise CannotNormalize(f"a tensor subclass {kind} is an input, and {user.name} reads it{why}")
            if self._mode is not None:
                node.meta["val"] = node.meta["example_value"] = self._mode.from_tensor(_EMPTY)
        self.gm.graph.lint()
        self.gm.recompile()

    def _note(self, node: fx.Node, status: Status, reason: str) -> None:
        self.evidence.append(Evidence(NAME, node.name, location(node), status, reason))
