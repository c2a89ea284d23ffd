"""What a kernel computes once more, in place of reading what another kernel has written.

Which values are the cheapest to read, so that all that a kernel needs can be computed from them, is a
minimum cut: the capacity of a value is what reading it moves, and writing it, where nobody else reads it.
(AOTAutograd asks the same of a forward and a backward graph, in `min_cut_rematerialization_partition`.) What
is proposed so is taken if the bytes of all kernels that it concerns become fewer. A value is the same bits in
both places: it is the same operators, each rounded where eager rounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import networkx as nx
from torch import fx

from fxopt.codegen.elementwise import formula_of, operations_of
from fxopt.codegen.price import hinted
from fxopt.codegen.product_operands import in_kernel
from fxopt.codegen.region import Region, are_numbers, make_region, outputs_of, stands_alone
from fxopt.codegen.trace import CannotEmit, is_created
from fxopt.codegen.view_index import readers_of, view_base
from fxopt.ir.cost import bytes_of, numel, tensors_of
from fxopt.ir.target import least_balance

MOST_AGAIN = 32  # operators in front of one kernel that are looked at

Group = int  # the place of its first operator
Again = Mapping[Group, tuple[fx.Node, ...]]


class Recomputation:
    """Groups of operators, each a kernel, and what each of them computes again of others.

    Attributes:
        again: what was decided, by group. reasons: for it.
    """

    def __init__(
        self,
        groups: Mapping[Group, Sequence[fx.Node]],
        order: Mapping[fx.Node, int],
        epoch: Mapping[fx.Node, int],
    ) -> None:
        """`order`: of the graph. `epoch`: how many barriers are in front of a node; none may be crossed."""
        self.groups, self.order, self.epoch = groups, order, epoch
        self.again: dict[Group, tuple[fx.Node, ...]] = {}
        self.reasons: dict[Group, str] = {}
        self.owner = {node: key for key, members in groups.items() for node in members}
        self._made: dict[tuple[object, ...], Region | CannotEmit] = {}

    def improve(self) -> None:
        """Decide for each group, in order, and for those together that read one value."""
        for key in sorted(self.groups):
            self._try([key])
        for node in sorted(self.owner, key=self.order.__getitem__):
            readers = self._reading(node, self.again)
            if len(readers) > 1 and None not in readers:
                self._try(sorted(key for key in readers if key is not None), node)

    def region(self, key: Group) -> Region | None:
        """The kernel of a group; None when it is not worth one, or nothing reads it any more.

        Raises:
            CannotEmit: it is no kernel.
        """
        members = self.groups[key]
        if len(members) == 1 and not stands_alone(members[0]):
            return None
        if are_numbers(members):
            raise CannotEmit("a single number, which the host computes where it is used")
        if not self._outputs(key, self.again) and outputs_of(members):
            return None
        region = self._region(key, self.again)
        return replace(region, why_again=self.reasons[key]) if region.again else region

    def _try(self, keys: Iterable[Group], unread: fx.Node | None = None) -> None:
        """Change what `keys` compute again, if that moves less. `unread`: a value that none of them reads."""
        trial = dict(self.again)
        for key in keys:
            if self._is_kernel(key):
                trial[key] = self._cheapest(key, unread)
        changed = [key for key in keys if trial.get(key, ()) != self.again.get(key, ())]
        concerned = {key: None for key in changed}
        for one in (trial, self.again):
            for node in (node for key in changed for node in one.get(key, ())):
                near = (node, *map(view_base, node.all_input_nodes))
                concerned |= {self.owner[other]: None for other in near if other in self.owner}
        if not changed:
            return
        before, after = (self._bytes(concerned, one) for one in (self.again, trial))
        if before is None or after is None or after >= before:
            return
        operations = sum(map(_operations, (node for key in changed for node in trial[key])))
        if operations <= (before - after) * least_balance():
            self.again = trial
            self.reasons |= dict.fromkeys(changed, f"bytes of the kernels concerned {before} -> {after}")

    def _is_kernel(self, key: Group) -> bool:
        members = self.groups[key]
        if len(members) == 1 and not stands_alone(members[0]):
            return False
        return not are_numbers(members) and not any(map(in_kernel, members))

    def _cheapest(self, key: Group, unread: fx.Node | None) -> tuple[fx.Node, ...]:
        """What a group computes again if it reads the values that are the cheapest to read."""
        wanted = dict.fromkeys(
            base for node in self.groups[key] for base in _read(node) if self._apart(base, key)
        )
        flow, todo, seen = nx.DiGraph(), list(wanted), set(wanted)
        flow.add_nodes_from(("source", "sink"))
        flow.add_edges_from(((node, "out"), "sink") for node in wanted)
        count = 0
        while todo:
            node = todo.pop(0)
            inside = self._can_repeat(node, key) and count < MOST_AGAIN
            free = node in wanted and not inside  # it is read in any case
            flow.add_edge((node, "in"), (node, "out"), capacity=0 if free else self._moved(node, key, unread))
            count += inside
            operands = [base for base in _read(node) if self._apart(base, key)] if inside else []
            for base in operands:
                flow.add_edge((base, "out"), (node, "in"))
                todo += () if base in seen else (base,)
                seen.add(base)
            if not inside:
                flow.add_edge("source", (node, "in"))
        _, (_, behind) = nx.minimum_cut(flow, "source", "sink")
        return tuple(sorted((node for node in seen if (node, "in") in behind), key=self.order.__getitem__))

    def _can_repeat(self, node: fx.Node, key: Group) -> bool:
        """Whether a group can compute `node` itself: pointwise, and on the same side of all barriers."""
        first = self.groups[key][0]
        if node not in self.owner or formula_of(node) is None or self.epoch[node] != self.epoch[first]:
            return False
        return tensors_of(node)[0].device == tensors_of(first)[0].device

    def _apart(self, node: fx.Node, key: Group) -> bool:
        return self.owner.get(node) != key

    def _moved(self, node: fx.Node, key: Group, unread: fx.Node | None) -> int:
        """Bytes that a group costs by reading `node`: also those of writing it for this group alone."""
        size = sum(map(bytes_of, tensors_of(node)))
        others = self._reading(node, self.again) - {key, self.owner.get(node)}
        written = node in self.owner and (not others or node is unread)
        return 2 * size if written else size

    def _reading(self, node: fx.Node, again: Again) -> set[Group | None]:
        """The groups that read `node` from memory; None among them for what is left to the host."""
        found: set[Group | None] = set()
        for reader in readers_of(node):
            own = self.owner.get(reader)
            found |= {own} if own is None or node not in again.get(own, ()) else set()
            found |= {key for key, copies in again.items() if reader in copies and node not in copies}
        return found - {self.owner.get(node, -1)}

    def _outputs(self, key: Group, again: Again) -> tuple[fx.Node, ...]:
        """Those of a group whose value something else reads."""
        return tuple(node for node in self.groups[key] if self._reading(node, again))

    def _bytes(self, keys: Iterable[Group], again: Again) -> int | None:
        """What the kernels of some groups move; None when one of them cannot be emitted."""
        total = 0
        for key in keys:
            members, outputs = self.groups[key], self._outputs(key, again)
            if not outputs:
                continue
            if not self._is_kernel(key) and not any(map(in_kernel, members)):
                nodes = {one: None for node in members for one in (node, *_read(node))}
                total += sum(bytes_of(value) for node in nodes for value in tensors_of(node))
                continue
            try:
                region = self._region(key, again)
            except CannotEmit:
                return None
            total += hinted(region.fused.bytes, (*outputs, *(one.tensor for one in region.body.loads)))
        return total

    def _region(self, key: Group, again: Again) -> Region:
        """The kernel of a group, made once for each that is asked for."""
        outputs, copies = self._outputs(key, again), again.get(key, ())
        wanted = (key, outputs, copies)
        if wanted not in self._made:
            try:
                self._made[wanted] = make_region(self.groups[key], outputs, copies)
            except CannotEmit as refusal:
                self._made[wanted] = refusal
        made = self._made[wanted]
        if isinstance(made, CannotEmit):
            raise made
        return made


def _read(node: fx.Node) -> list[fx.Node]:
    """The tensors in memory that an operator alone reads."""
    bases = dict.fromkeys(map(view_base, node.all_input_nodes))
    return [base for base in bases if tensors_of(base) and not is_created(base)]


def _operations(node: fx.Node) -> int:
    return operations_of(node) * numel(tensors_of(node)[0])
