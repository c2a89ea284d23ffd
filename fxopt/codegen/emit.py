"""Regions of a graph after autograd -> calls of kernels, in place."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxopt.codegen.append_emit import emit_appends
from fxopt.codegen.attention_emit import emit_attention
from fxopt.codegen.choose_products import candidates, choose, compared, large_products
from fxopt.codegen.copies import erase_unread, with_copies
from fxopt.codegen.decode_attention import CONVERTS_FLOAT8
from fxopt.codegen.decode_emit import emit_cached
from fxopt.codegen.fit import fitting
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.kernels import kernel_of, symbol_inputs
from fxopt.codegen.price import hinted, least_seconds
from fxopt.codegen.quantized_products import OF_CALLS, expand_quantized
from fxopt.codegen.region import Region, can_emit, leads_outside, make_region
from fxopt.codegen.regions import Partition, partition
from fxopt.errors import UnsupportedTarget
from fxopt.ir.contract import Cost, Evidence, Status
from fxopt.ir.copy_graph import copy_of
from fxopt.ir.facts import location
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.uniform import is_uniform
from fxopt.ir.sizes import can_compute, size_node
from fxopt.ir.target import Target
from fxopt.options import EMIT_KERNELS, Options
from fxopt.runtime.kernel_cache import KernelCache, cache_of
from fxopt.runtime.launch import as_op


@dataclass(frozen=True)
class Emitted:
    """A region and its kernel."""

    region: Region
    kernel: KernelFile


@dataclass(frozen=True)
class Decision:
    """What becomes of a region: `kernel` computes it, or with None the host does. `reason` says why.

    `faster`: whether the kernel was measured to be faster than the host. `best`: the kernel in the fastest
    configuration that was measured, for those that have no host to be left to.
    """

    kernel: KernelFile | None
    reason: str = ""
    faster: bool = False
    best: KernelFile | None = None


Decide = Callable[[Sequence[KernelFile]], Sequence[Decision]]


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of any device (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def target_of(options: Options) -> Target | None:
    """What kernels are made for: the GPU that is named, else the one at hand.

    Raises:
        UnsupportedTarget: the GPU at hand is none that Triton can compile for here.
    """
    return Target.named(options.target) if options.target else Target.detect()


def writes_float8(options: Options) -> bool:
    """Whether kernels can write float8 in place: in the interpreter, and where instructions convert it."""
    try:
        target = target_of(options)
    except UnsupportedTarget:
        return False
    return interpreted() or target is not None and target.arch >= CONVERTS_FLOAT8


def kernels_for(
    graph: fx.Graph, devices: frozenset[str], target: Target | None, split_k: str = "deterministic"
) -> tuple[list[Emitted], Partition]:
    """The kernels of a graph, in its order; nothing is changed."""
    found = partition(graph, devices)
    return [Emitted(region, kernel_of(region, target, split_k)) for region in found.regions], found


def emit_kernels(
    gm: fx.GraphModule, options: Options, *, call: bool, decide: Decide | None = None
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of the regions of `gm`, and what was done and why not more.

    Args:
        call: put calls of the kernels in the place of the regions. Without, `gm` stays as it is.
        decide: which of them are used. None: all.
    """
    if not call:
        gm = fx.GraphModule(gm, copy_of(gm.graph))
    devices = frozenset({"cpu", "cuda"}) if interpreted() or not call else frozenset({"cuda"})
    try:
        target = target_of(options)
    except UnsupportedTarget as error:
        return [], [Evidence(EMIT_KERNELS, "graph", "-", Status.DISABLED, str(error))]
    made, done = emit_semantic_ops(gm, options, call=call, decide=decide)
    measured = decide is not None and options.kernels != "always"
    slower = slower_quantized(gm, devices, target, options, decide) if measured else {}
    done += expand_quantized(gm, devices, slower)
    left = choose_products(gm.graph, devices, target, options, decide)
    emitted, found = kernels_for(gm.graph, devices, target, options.split_k)
    usable, evidence = _usable(emitted, gm.graph)
    evidence += left
    chosen: list[Emitted] = []
    for one, decision in zip(usable, _decisions(usable, decide), strict=True):
        if decision.kernel is None:
            evidence.append(_evidence(one.region.members[0], Status.UNPROFITABLE, decision.reason))
            continue
        chosen.append(Emitted(one.region, decision.kernel))
        evidence.append(_applied(chosen[-1], target, decision.reason))
    if call:
        _call_all(gm.graph, chosen, found.regions, options)
        drawn = _usable(_draws(gm.graph, devices, target), gm.graph)[0]
        _call_all(gm.graph, drawn, (), options)
        chosen += drawn
    evidence += [_evidence(node, Status.MISS, reason) for node, reason in found.refused]
    gm.graph.lint()
    gm.recompile()
    return made + [one.kernel for one in chosen], done + evidence


def emit_semantic_ops(
    gm: fx.GraphModule, options: Options, *, call: bool, decide: Decide | None = None
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of semantic ops that are still whole behind autograd, and what was done.

    Args:
        decide: which form of a kernel is used, of those that have alternatives. None: the first that fits the
            GPU at hand.
    """
    register_ops()
    launched = functools.partial(as_op, cache=cache_of(options)) if call else None
    kernels, evidence = list[KernelFile](), list[Evidence]()
    target = target_of(options)
    fastest = functools.partial(_fastest, decide=decide)
    if decide is None and call and target is not None and not options.target and not interpreted():
        fastest = functools.partial(_fitting, target=target, cache=cache_of(options))
    for emit in (emit_attention, emit_cached, emit_appends):
        made, done = emit(gm.graph, target, launched, fastest)
        kernels += made
        evidence += done
    gm.graph.lint()
    gm.recompile()
    return kernels, evidence


def _fitting(kernel: KernelFile, target: Target, cache: KernelCache) -> KernelFile:
    """The kernel with launches that do not spill, where nothing is measured and it has others."""
    return fitting(kernel, target, cache) if kernel.alternatives else kernel


def _fastest(kernel: KernelFile, decide: Decide | None) -> KernelFile:
    """The kernel, or an alternative that was measured to be faster."""
    if decide is None or not kernel.alternatives:
        return kernel
    (decision,) = decide([kernel])
    found, said = decision.best, kernel.about.configuration
    if found is None:
        return replace(kernel, about=replace(kernel.about, configuration=(*said, decision.reason)))
    loaded = "; tiles are loaded by the copy engine" if found.describes else ""
    about = replace(kernel.about, configuration=(*said, f"taken: {found.about.configuration[0]}{loaded}"))
    return replace(found, about=about, alternatives=())


def slower_quantized(
    gm: fx.GraphModule,
    devices: frozenset[str],
    target: Target | None,
    options: Options,
    decide: Decide | None,
) -> dict[str, str]:
    """The quantized linears of `gm` whose kernels are not measured to be faster than what the host makes of
    the same operations, by their names, and why. Such a call stays one op: taken apart and without a kernel,
    it would be no faster.
    """
    trial = fx.GraphModule(gm, copy_of(gm.graph))
    applied = [one for one in expand_quantized(trial, devices) if one.status is Status.APPLIED]
    if not applied:
        return {}
    choose_products(trial.graph, devices, target, options, decide)
    usable, _ = _usable(kernels_for(trial.graph, devices, target, options.split_k)[0], trial.graph)
    slower = dict.fromkeys((one.anchor for one in applied), "no kernel has its codes")
    faster: set[str] = set()
    for one, decision in zip(usable, _decisions(usable, decide), strict=True):
        calls = {name for node in one.region.members for name in node.meta.get(OF_CALLS, ())}
        if decision.kernel is None:
            slower |= dict.fromkeys(calls, decision.reason)
        else:
            faster |= calls
    return {name: reason for name, reason in slower.items() if name not in faster}


def _call_all(
    graph: fx.Graph, chosen: Sequence[Emitted], regions: Iterable[Region], options: Options
) -> None:
    """Calls of kernels in the place of their regions, which are some of `regions`."""
    copied = with_copies(regions, [one.region for one in chosen])
    instead: dict[fx.Node, fx.Node] = {}
    for one in chosen:
        region = copied.get(one.region.members, one.region)
        _call(graph, Emitted(region, one.kernel), as_op(one.kernel, cache=cache_of(options)), instead)
    erase_unread(graph, {node for region in regions for node in region.again})


def choose_products(
    graph: fx.Graph, devices: frozenset[str], target: Target | None, options: Options, decide: Decide | None
) -> list[Evidence]:
    """Choose the products with many rows that kernels take, and say why others are left to the library."""
    found = candidates(graph, devices) if options.gemm != "never" else []
    choose(graph, found)
    if not found or options.gemm == "always":
        return []
    emitted, _ = kernels_for(graph, devices, target, options.split_k)
    own = [one for one in emitted if large_products(one.region)]
    verdicts = {
        node: verdict
        for one, verdict in zip(own, _verdicts(own, target, decide), strict=True)
        for node in large_products(one.region)
    }
    choose(graph, [node for node, (wins, _) in verdicts.items() if wins])
    alone = False, "nothing in front of it or behind it can be part of its kernel"
    left = {node: verdicts.get(node, alone) for node in found}
    return [
        _evidence(node, Status.UNPROFITABLE, f"left to the library: {reason}")
        for node, (wins, reason) in left.items()
        if not wins
    ]


def _verdicts(
    emitted: Sequence[Emitted], target: Target | None, decide: Decide | None
) -> list[tuple[bool, str]]:
    """Whether each kernel is a win over a library's products, and why: measured, or else by the model."""
    if decide is not None:
        return [(one.faster, one.reason) for one in decide([one.kernel for one in emitted])]
    if target is None:
        return [(False, "no target is known to price it for") for _ in emitted]
    found = [compared(one.region, one.kernel, target) for one in emitted]
    return [(one.wins, f"by the model {one} on {target.name}") for one in found]


def _draws(graph: fx.Graph, devices: frozenset[str], target: Target | None) -> list[Emitted]:
    """Kernels for random numbers whose regions were left to the host, which cannot draw the same ones."""
    drawn = [node for node in graph.nodes if is_uniform(node.target) and can_emit(node, devices)]
    regions = [make_region([node]) for node in drawn]
    return [Emitted(region, kernel_of(region, target)) for region in regions]


def _usable(emitted: Sequence[Emitted], graph: fx.Graph) -> tuple[list[Emitted], list[Evidence]]:
    """Those that can be called in the graph, and why others cannot."""
    usable, evidence = [], []
    for one in emitted:
        missing = [symbol for symbol in symbol_inputs(one.region) if not can_compute(symbol, graph)]
        if missing:
            reason = f"no input of the graph has the size {missing[0]}"
            evidence.append(_evidence(one.region.members[0], Status.ILLEGAL, reason))
        else:
            usable.append(one)
    return usable, evidence


def _decisions(emitted: Sequence[Emitted], decide: Decide | None) -> Sequence[Decision]:
    kernels = [one.kernel for one in emitted]
    return [Decision(kernel) for kernel in kernels] if decide is None else decide(kernels)


def _applied(one: Emitted, target: Target | None, why: str) -> Evidence:
    region, about = one.region, one.kernel.about
    moved, flops = about.seen
    sized = dict.fromkeys(near for node in region.members for near in (node, *node.all_input_nodes))
    least = ""
    if target is not None:
        seconds = least_seconds(about, target, region.outputs[0].meta["val"].dtype)
        least = f", not below {seconds * 1e6:.2f} us on {target.name}"
    if region.again:
        least += f"; {len(region.again)} operators of others computed again, {region.why_again}"
    if region.why_beside:
        least += f"; {region.why_beside}"
    return Evidence(
        rewrite=EMIT_KERNELS,
        anchor=region.members[0].name,
        location=location(region.members[0]),
        status=Status.APPLIED,
        reason=f"{len(region.members)} operators become the kernel {one.kernel.name}: "
        f"bytes {region.apart.bytes} -> {region.fused.bytes}, operations {region.apart.flops} -> "
        f"{region.fused.flops}, launches {region.apart.launches} -> {len(one.kernel.launches)}"
        f"{least}{why and '; '}{why}",
        before=Cost(
            hinted(region.apart.bytes, sized),
            hinted(region.apart.flops, sized),
            region.apart.launches,
        ),
        after=Cost(moved, flops, len(one.kernel.launches)),
    )


def _evidence(node: fx.Node, status: Status, reason: str) -> Evidence:
    return Evidence(EMIT_KERNELS, node.name, location(node), status, reason)


def _call(graph: fx.Graph, one: Emitted, op: Callable[..., object], instead: dict[fx.Node, fx.Node]) -> None:
    """Call `op` behind the last member, and move behind it what reads its results before.

    `instead`: what earlier calls have put in the place of nodes that are gone.
    """
    region = one.region
    own = frozenset(region.members)
    # Earlier calls may have moved members, so that their order is another one now.
    ordered = [node for node in graph.nodes if node in own]
    read = [instead.get(node, node) for node in dict.fromkeys(load.tensor for load in region.body.loads)]
    with graph.inserting_after(ordered[-1]):
        anchor = graph.call_function(torch.ops.aten.alias.default, (read[0],))
    with graph.inserting_before(anchor):
        sizes = [size_node(symbol, graph) for symbol in symbol_inputs(region)]
        call = graph.call_function(op, (*read, *sizes))
        results = [call]
        if len(region.outputs) > 1:
            results = [graph.call_function(operator.getitem, (call, at)) for at in range(len(region.outputs))]
    values = [node.meta["val"] for node in region.outputs]
    call.meta["val"] = values[0] if len(values) == 1 else tuple(values)
    _move_readers(ordered, anchor)
    for node, result in zip(region.outputs, results, strict=True):
        result.meta |= node.meta
        instead[node] = result
        node.replace_all_uses_with(result, delete_user_cb=_read_outside(region.members))
    graph.erase_node(anchor)
    _erase(graph, ordered)


def _read_outside(members: Iterable[fx.Node]) -> Callable[[fx.Node], bool]:
    own = frozenset(members)
    return lambda user: leads_outside(user, own)


def _move_readers(members: Sequence[fx.Node], anchor: fx.Node) -> None:
    """What lies between the members and depends on them goes behind the kernel, in its order."""
    own, moved = frozenset(members), dict[fx.Node, None]()
    node = members[0]
    while node is not anchor:
        after = node.next
        if node not in own and any(arg in own or arg in moved for arg in node.all_input_nodes):
            moved[node] = None
        node = after
    place = anchor
    for node in moved:
        place.append(node)
        place = node


def _erase(graph: fx.Graph, members: Sequence[fx.Node]) -> None:
    """The members, and the views between them."""
    for node in reversed(members):
        for user in list(node.users):
            _erase(graph, [user])
        graph.erase_node(node)
