"""Runs one rewrite over one graph: match, legal, profit, replace; evidence for every anchor; undo on failure.

The driver, not the pass, rewires users, brings metadata up to date, verifies, counts fuel and turns an
exception into evidence with the graph left as it was.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxopt.errors import InternalError
from fxopt.frontend.dead_code import dead_cone
from fxopt.frontend.subgraphs import pass_in
from fxopt.ir.cone import from_sizes
from fxopt.ir.contract import Context, Evidence, Match, Miss, Rewrite, Status, Verdict
from fxopt.ir.cost import cost_of
from fxopt.ir.facts import is_floating, location
from fxopt.ir.graph_facts import Facts, Kernels
from fxopt.ir.propagate import evaluate, fake_mode_of, propagate_from
from fxopt.ir.verify import Violation, check_graph, check_replacement
from fxopt.options import Options

COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")


class Fuel:
    """How many more rewrites may be applied, over all compilations of a process: to bisect a wrong answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent = 0

    def take(self, limit: int | None) -> bool:
        """Spend one unit; False when `limit` units are spent already. No limit spends nothing."""
        if limit is None:
            return True
        with self._lock:
            if self._spent >= limit:
                return False
            self._spent += 1
            return True

    def reset(self) -> None:
        with self._lock:
            self._spent = 0


FUEL = Fuel()


@dataclass
class _Edit:
    """The undo log of one replacement."""

    inserted: list[fx.Node] = field(default_factory=list)
    replacements: list[fx.Node] = field(default_factory=list)
    rewired: list[tuple[fx.Node, list[fx.Node]]] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def undo(self) -> None:
        for node, value in self.values.items():
            node.meta["val"] = value
        for (old, users), new in zip(self.rewired, self.replacements, strict=True):
            for user in users:
                user.replace_input_with(new, old)
        for node in self.inserted:  # what was inserted in a wrong order can be erased in none
            node.args, node.kwargs = (), {}
        for node in self.inserted:
            node.graph.erase_node(node)


def run_rewrite(
    rewrite: Rewrite, gm: fx.GraphModule, options: Options, kernels: Kernels | None = None
) -> list[Evidence]:
    """Run `rewrite` over one graph (not over its sub-graphs). Returns the evidence, one entry for each site.

    Args:
        kernels: what the host puts kernels in the place of; None: that is not asked, or nothing.

    Raises:
        InternalError: a pass failed and `options.strict` is set.
    """
    run = _Run(rewrite, gm, options, kernels)
    disabled = rewrite.name in options.disable or "all" in options.disable
    for node in list(gm.graph.nodes):
        if node.target in rewrite.anchors and node.op == "call_function" and not _is_erased(node):
            run.visit(node, disabled)
    if run.applied:
        run.finish()
    return run.evidence


class _Run:
    """One run of one rewrite over one graph."""

    def __init__(
        self, rewrite: Rewrite, gm: fx.GraphModule, options: Options, kernels: Kernels | None
    ) -> None:
        self.rewrite = rewrite
        self.gm = gm
        self.options = options
        self.kernels = kernels
        self.evidence: list[Evidence] = []
        self.applied = 0
        self._facts: Facts | None = None
        self._mode = fake_mode_of(gm.graph)

    def visit(self, node: fx.Node, disabled: bool) -> None:
        """One anchor: what becomes of it is one entry of evidence; no candidate leaves none."""
        anchor, where = node.name, location(node)
        try:
            found = self._site(node, disabled)
        except Exception as error:
            if self.options.strict:
                raise InternalError(
                    stage=f"pass {self.rewrite.name}", kind=type(error).__name__, detail=error, location=where
                ) from error
            found = Evidence(
                self.rewrite.name, anchor, where, Status.ERROR, f"{type(error).__name__}: {error}"
            )
        if found is not None:
            self.evidence.append(found)

    def _site(self, node: fx.Node, disabled: bool) -> Evidence | None:
        match = self.rewrite.match(node)
        if match is None:
            return None
        if isinstance(match, Miss):
            return self._note(node, Status.MISS, match.reason)
        if disabled:
            return self._note(node, Status.DISABLED, "disabled by options")
        context = Context(self.gm.graph, self.facts, self.options)
        legal = self.rewrite.legal(match, context)
        if not legal:
            return self._note(node, Status.ILLEGAL, legal.reason)
        profit = self.rewrite.profit(match, context)
        if not profit:
            return self._note(node, Status.UNPROFITABLE, profit.reason)
        far = next((each for each in match.outside if pass_in(each, self.gm.graph) is None), None)
        if far is not None:
            reason = f"wanted a value that the sub-graph can be given, saw {far.name} outside of it"
            return self._note(node, Status.ILLEGAL, reason)
        if match.outside:
            self._facts = None  # the sub-graph may have new inputs
        if not FUEL.take(self.options.fuel):
            return self._note(node, Status.OUT_OF_FUEL, f"{self.options.fuel} rewrites were applied already")
        return self._apply(match, legal, profit)

    def _note(self, node: fx.Node, status: Status, reason: str) -> Evidence:
        return Evidence(self.rewrite.name, node.name, location(node), status, reason)

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            self._facts = Facts(self.gm.graph, self.kernels)
        return self._facts

    def _apply(self, match: Match, legal: Verdict, profit: Verdict) -> Evidence:
        anchor, where = match.anchor.name, location(match.anchor)
        edit = _Edit()
        try:
            self._edit(match, edit)
            dead = dead_cone(match.roots, frozenset(edit.inserted))
        except Exception:
            self._undo(edit)
            raise
        crossing = self._mode_change(match, dead)
        if crossing is not None:
            self._undo(edit)
            return self._note(match.anchor, Status.ILLEGAL, crossing)
        before, after = cost_of(dead), cost_of(edit.inserted)
        for node in dead:
            node.graph.erase_node(node)
        self.applied += 1
        self.facts.update(edit.inserted, edit.values, beside=match.roots[-1])
        reason = "; ".join(part for part in (legal.reason, profit.reason) if part) or "proven equal"
        detail = ", ".join(new.format_node() or new.name for new in edit.replacements)
        return Evidence(self.rewrite.name, anchor, where, Status.APPLIED, reason, detail, before, after)

    def _undo(self, edit: _Edit) -> None:
        edit.undo()
        self._facts = None

    def _mode_change(self, match: Match, dead: list[fx.Node]) -> str | None:
        """Why the replaced computation cannot be one op: part of it ran in another grad or autocast mode."""
        wanted = self.facts.mode_at(match.roots[-1])
        for node in dead:
            if is_floating(node) and self.facts.mode_at(node) != wanted and not from_sizes(node):
                return f"{node.name} and {match.roots[-1].name} run in different grad or autocast modes"
        return None

    def _edit(self, match: Match, edit: _Edit) -> None:
        graph = self.gm.graph
        before = set(graph.nodes)
        last = match.roots[-1]
        try:
            with graph.inserting_before(last):
                made = self.rewrite.replace(match, graph)
        finally:
            edit.inserted = [node for node in graph.nodes if node not in before]
        news = made if isinstance(made, tuple) else (made,)
        if len(news) != len(match.roots):
            raise Violation(f"{len(match.roots)} roots, {len(news)} replacements")
        self._check_order(match, edit.inserted)
        self._complete(edit.inserted, match)
        for old, new in zip(match.roots, news, strict=True):
            check_replacement(old, new)
            edit.rewired.append((old, [user for user in match.readers(old) if user not in edit.inserted]))
            edit.replacements.append(new)
            for user in edit.rewired[-1][1]:
                user.replace_input_with(old, new)
        if self._mode is None:
            return
        for old, new in zip(match.roots, edit.replacements, strict=True):
            propagate_from(
                new,
                old.meta.get("val"),
                self._mode,
                lambda n, v: edit.values.setdefault(n, v),
                lambda n: self.facts.mode_at(last if n in edit.inserted else n)[1],
            )

    def _complete(self, inserted: list[fx.Node], match: Match) -> None:
        """Give new nodes the anchor's source line and their own values."""
        anchor, regions = match.anchor, self.facts.mode_at(match.roots[-1])[1]
        for node in inserted:
            for key in COPIED_META:
                if key in anchor.meta:
                    node.meta.setdefault(key, anchor.meta[key])
            if "val" not in node.meta and node.op == "call_function" and self._mode is not None:
                node.meta["val"] = evaluate(node, self._mode, regions)

    def _check_order(self, match: Match, inserted: list[fx.Node]) -> None:
        """The replacement stands at the last root; whoever reads an earlier root must come after it."""
        for root in match.roots[:-1]:
            readers = match.readers(root)
            early = next((u for u in readers if u not in inserted and u < match.roots[-1]), None)
            if early is not None and early not in match.roots and not self._inside(early, match):
                raise Violation(f"{early.name} reads {root.name} before {match.roots[-1].name}")

    def _inside(self, node: fx.Node, match: Match) -> bool:
        """All that `node` leads to, up to the last root, is part of what is replaced."""
        return node in match.roots or (
            bool(node.users) and all(self._inside(user, match) for user in node.users)
        )

    def finish(self) -> None:
        check_graph(self.gm.graph)
        self.gm.recompile()


def _is_erased(node: fx.Node) -> bool:
    return bool(node._erased)
