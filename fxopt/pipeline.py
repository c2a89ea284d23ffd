"""The way of a graph through fxopt, stage by stage. Read this page first.

    Dynamo graph -> normalize -> rewrite (the passes below, in order) -> steps -> lower -> host

Order is the source text. Nothing registers itself: a pass runs because it is in `PASSES`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import fx
from torch._dynamo.eval_frame import innermost_fn

from fxopt.frontend.adopt import NAME as ADOPT_QUANTIZED
from fxopt.frontend.adopt import Adopted, adopt, check_dtypes, typed_places
from fxopt.frontend.driver import run_rewrite
from fxopt.frontend.frames import captured_frame
from fxopt.frontend.known_buffers import NAME as KNOWN_BUFFERS
from fxopt.frontend.known_buffers import KnownBuffer, checked, compute_known_buffers, settle, when_changed
from fxopt.frontend.kv_append import NAME as APPEND_KV_CACHE
from fxopt.frontend.kv_append import insert_appends
from fxopt.frontend.linear_notes import linear_notes, note_routes
from fxopt.frontend.lower import lower
from fxopt.frontend.normalize import normalize
from fxopt.frontend.outputs import keep_output_layout, output_layout
from fxopt.frontend.packed_weights import PackedInputs, hide_parameters, packed_inputs, show_parameters
from fxopt.frontend.replays import NAME as REPLAY
from fxopt.frontend.replays import Step, find_step, is_wanted
from fxopt.frontend.retrace import CannotNormalize
from fxopt.frontend.side_effects import stored_attributes
from fxopt.frontend.subgraphs import link_subgraphs, unlink_subgraphs
from fxopt.hosts import choose_host
from fxopt.hosts.host import CONTROL_FLOW, RESTARTS, Host
from fxopt.hosts.inductor import without_graphs
from fxopt.hosts.kernels import contest_devices, kernel_devices
from fxopt.ir.contract import Evidence, Rewrite
from fxopt.ir.facts import val
from fxopt.ir.graph_facts import Kernels
from fxopt.ir.ops import register_ops
from fxopt.options import EMIT_KERNELS, Options
from fxopt.report.dump import Dump
from fxopt.report.record import GraphRecord, recorded
from fxopt.runtime.frames import Frame
from fxopt.runtime.kv_calls import Plan, with_growing_caches
from fxopt.runtime.packed_weights import with_packed_weights
from fxopt.runtime.quantized_linear import register_processor
from fxopt.runtime.quantized_rows import register_rows

# name, class, and why it stands where it stands
PASSES: tuple[tuple[str, str], ...] = (
    # first: a write is a barrier to everyone below
    ("functionalize-writes", "fxopt.passes.functionalize_writes:FunctionalizeWrites"),
    # likewise, for what is written in parts
    ("concatenate-parts", "fxopt.passes.concatenate_parts:ConcatenateParts"),
    # early: what does nothing hides structure
    ("eliminate-noops", "fxopt.passes.eliminate_noops:EliminateNoops"),
    # what reads nothing but a shape looks like a reader
    ("simplify-views", "fxopt.passes.simplify_views:SimplifyViews"),
    # no pass below has to think of empty operands
    ("simplify-cat", "fxopt.passes.simplify_cat:SimplifyCat"),
    # what attention reads is then the window itself, not a copy of it
    ("shift-windows", "fxopt.passes.shift_windows:ShiftWindows"),
    # a layer norm without its mean is an RMS norm: the larger one goes first
    ("fuse-layer-norm", "fxopt.passes.fuse_layer_norm:FuseLayerNorm"),
    # norms before the residual sums in front of them
    ("fuse-rms-norm", "fxopt.passes.fuse_rms_norm:FuseRmsNorm"),
    ("fuse-add-rms-norm", "fxopt.passes.fuse_rms_norm:FuseAddRmsNorm"),
    # reads the hidden states in the place of the logits: after the norm that makes them
    ("fuse-linear-cross-entropy", "fxopt.passes.fuse_linear_cross_entropy:FuseLinearCrossEntropy"),
    # spelled-out attention and scaled_dot_product_attention take one form, that the passes below anchor on
    ("rewrite-attention", "fxopt.passes.rewrite_attention:RewriteAttention"),
    # needs the attention op on whose mask it acts
    ("fold-causal-mask", "fxopt.passes.fold_causal_mask:FoldCausalMask"),
    # needs the attention op on whose K and V it acts
    ("remove-repeat-kv", "fxopt.passes.remove_repeat_kv:RemoveRepeatKv"),
    # a copy of K or V may hide their repetition
    ("skip-kv-copies", "fxopt.passes.skip_kv_copies:SkipKvCopies"),
    # what is still masked by a tensor gets formulas of its mask
    ("recover-mask", "fxopt.passes.recover_mask:RecoverMask"),
    # late: it takes the operands and attributes of attention as they are by now
    ("absorb-latent-attention", "fxopt.passes.absorb_latent_attention:AbsorbLatentAttention"),
    # last: no pass above has to know the op that it makes of an attention
    ("fold-kv-scales", "fxopt.passes.fold_kv_scales:FoldKvScales"),
    # likewise for linear layers, which the loss and latent attention have taken theirs of
    ("substitute-qlinear", "fxopt.passes.substitute_qlinear:SubstituteQlinear"),
    # the same of what is no linear layer: products with a stack of matrices
    ("substitute-expert-products", "fxopt.passes.substitute_expert_products:SubstituteExpertProducts"),
    # behind all others and behind `find_step`, which look at writes into caches and at attention one by one
    ("fuse-append-attention", "fxopt.passes.fuse_append_attention:FuseAppendAttention"),
)
# Those that run once steps have got their form, and only where the host makes kernels of semantic ops.
LATE_PASSES = frozenset({"fuse-append-attention"})


@functools.cache
def pass_names() -> tuple[str, ...]:
    """The names of all passes, in order."""
    return tuple(name for name, _ in PASSES)


def optional_names() -> tuple[str, ...]:
    """What the option `disable` can name."""
    return (ADOPT_QUANTIZED, KNOWN_BUFFERS, APPEND_KV_CACHE, *pass_names(), EMIT_KERNELS)


@functools.cache
def load_passes() -> tuple[Rewrite, ...]:
    """One instance of each pass, in order. The only place that loads `fxopt.passes`."""
    loaded: list[Rewrite] = []
    for name, where in PASSES:
        module, _, attribute = where.partition(":")
        rewrite = getattr(import_module(module), attribute)()
        if rewrite.name != name:
            raise ImportError(f"{where} calls itself {rewrite.name!r}, the pipeline calls it {name!r}")
        loaded.append(rewrite)
    return tuple(loaded)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """One Dynamo graph to one callable.

    A stage that fails never fails the user: the untouched graph goes to the host and the record says why,
    unless `options.strict`.
    """
    register_ops()
    register_processor()
    register_rows()
    with recorded(gm) as record:
        dump = Dump.open(options.dump, record)
        dump.write("dynamo", gm)
        host = choose_host(options, example_inputs)
        record.host = host.name
        optimized = _optimize(gm, example_inputs, options, record, dump, host.name)
        if optimized is None:
            return _host(host, gm, example_inputs, options, record)
        try:
            inputs = _inputs(optimized, example_inputs)
            alone = options if optimized.step is None else without_graphs(options)
            compiled = _host(host, optimized.gm, inputs, alone, record)
            if optimized.adopted is not None:
                compiled = optimized.adopted.around(compiled)
            return _around(compiled, optimized, gm.forward, record)
        except CONTROL_FLOW:
            raise
        except Exception as error:
            if options.strict:
                raise
            record.fail("host", error)
        return _host(host, gm, example_inputs, options, record)


@dataclass
class _Optimized:
    """A graph for the host, and what its calls rely on."""

    gm: fx.GraphModule
    known: list[KnownBuffer]
    adopted: Adopted | None
    growing: Plan
    frame: Frame | None
    step: Step | None
    packed: PackedInputs | None


def _inputs(optimized: _Optimized, inputs: Sequence[Any]) -> list[Any]:
    """Examples of what the host's callable takes: caches come with room for new rows, lengths in a tensor."""
    placeholders = optimized.gm.graph.find_nodes(op="placeholder")
    plain = inputs if optimized.adopted is None else optimized.adopted.plain(inputs)
    given = [*plain, *(val(node) for node in placeholders[len(inputs) :])]
    for append in optimized.growing.appends:
        given[append.source] = val(placeholders[append.source])
    return given


def _around(
    compiled: Callable[..., Any], optimized: _Optimized, captured: Callable[..., Any], record: GraphRecord
) -> Callable[..., Any]:
    """What Dynamo calls. Growing caches come first: they count who holds the inputs of the call.

    Dynamo keeps itself out of what it calls, so that the same around the host's callable is taken off.
    """
    compiled = innermost_fn(compiled)
    instead, step = when_changed(optimized.known, captured), optimized.step
    if optimized.adopted is not None:
        instead = optimized.adopted.unless_changed(instead, captured)
    if optimized.packed is not None:
        compiled = with_packed_weights(compiled, optimized.packed.packed, optimized.packed.first)
    if step is not None:
        compiled = step.around(compiled, lambda reason: record.note_refusal(REPLAY, reason))
        instead = step.unless_fit(instead, captured)
    if optimized.growing:
        return with_growing_caches(compiled, optimized.growing, instead, optimized.frame)
    return checked(compiled, instead) if optimized.known or optimized.adopted is not None else compiled


def _host(
    host: Host, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Callable[..., Any]:
    with record.timed("host"):
        return host.compile(gm, example_inputs, options, record)


def _optimize(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
    dump: Dump,
    host: str,
) -> _Optimized | None:
    """normalize -> rewrite -> lower; None when the untouched graph is to be used.

    The buffers that were read while compiling have to be the same in every call.
    """
    try:
        with record.timed("normalize"):
            normal, adopted = _normalize(gm, example_inputs, options, record)
            off = {KNOWN_BUFFERS, "all"} & set(options.disable)
            known = [] if off else compute_known_buffers(normal, example_inputs)
            frame = captured_frame(normal)  # its caches as they are, without room for new rows
            growing = _growing(gm, normal, example_inputs, options, record)
            growing.together = is_wanted(normal, options)
        record.normalized = True
        dump.write("normalized", normal)
        with record.timed("passes"):
            kernels = _kernels(host, options, example_inputs)
            packed = _rewrite(normal, example_inputs, options, record, dump, kernels)
            # A step is replayed with the inputs that Dynamo gives.
            step, notes = find_step(normal, growing, options) if packed is None else (None, [])
            record.evidence += notes
            if kernels is not None:
                rewrite(normal, options, record, dump, kernels, late=True)
        contested = contest_devices(host, options, example_inputs)
        with record.timed("lower"), _measured_kernels(contested, options) as faster:
            lowered = lower(normal, record, kernels or faster)
            note_routes(record)
            known, notes = settle(lowered, known)
            record.evidence += notes
        dump.write("lowered", lowered)
    except RESTARTS:
        raise
    except CannotNormalize as refusal:
        record.refuse("normalize", refusal.reason)
        return None
    except Exception as error:
        record.fail("normalize" if not record.normalized else "passes", error)
        if options.strict:
            raise
        return None
    return _Optimized(lowered, known, adopted, growing, frame, step, packed)


def _normalize(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, record: GraphRecord
) -> tuple[fx.GraphModule, Adopted | None]:
    """The normalized graph, in which weights that a library has quantized are fxopt's."""
    typed = typed_places(inputs)
    check_dtypes(gm, typed)
    normal = normalize(gm, inputs, typed)
    adopted, evidence = adopt(normal, inputs, typed, bool({ADOPT_QUANTIZED, "all"} & set(options.disable)))
    record.evidence += evidence
    return normal, adopted


def _rewrite(
    normal: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
    dump: Dump,
    kernels: Kernels | None,
) -> PackedInputs | None:
    """All passes; what they may know of parameters, and what they made of these, where any is quantized."""
    if not options.quantize:
        rewrite(normal, options, record, dump, kernels)
        record.linears = linear_notes(normal, ())
        return None
    show_parameters(normal, inputs)
    try:
        rewrite(normal, options, record, dump, kernels)
        record.linears = linear_notes(normal, record.evidence)
    finally:
        hide_parameters(normal)
    return packed_inputs(normal)


def _kernels(host: str, options: Options, example_inputs: Sequence[Any]) -> Kernels | None:
    """What says of a semantic op whether the host puts a kernel in its place."""
    devices = kernel_devices(host, options, example_inputs)
    if not devices:
        return None
    from fxopt.codegen.attention_emit import kernel_serves
    from fxopt.codegen.emit import writes_float8

    serves = functools.partial(kernel_serves, devices=devices)
    return Kernels(devices, serves, float8=writes_float8(options))


def _measured_kernels(
    devices: frozenset[str], options: Options
) -> contextlib.AbstractContextManager[Kernels | None]:
    """What says so of those that are measured to be faster; they may be none."""
    if not devices:
        return contextlib.nullcontext()
    from fxopt.hosts.gpu_contest import measured_kernels

    return measured_kernels(devices, options)


def _growing(
    gm: fx.GraphModule, normal: fx.GraphModule, inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Plan:
    if {APPEND_KV_CACHE, "all"} & set(options.disable):
        return Plan()
    plan, evidence = insert_appends(normal, inputs, stored_attributes(gm))
    record.evidence += evidence
    return plan


def rewrite(
    gm: fx.GraphModule,
    options: Options,
    record: GraphRecord,
    dump: Dump | None = None,
    kernels: Kernels | None = None,
    *,
    late: bool = False,
) -> None:
    """Run all passes over `gm` and over the graphs of its higher-order ops, in place.

    Args:
        kernels: what the host puts kernels in the place of. late: run those of `LATE_PASSES`, not the others.
    """
    graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    layouts = [output_layout(module.graph) for module in graphs]
    for one in load_passes():
        if (one.name in LATE_PASSES) != late:
            continue
        with record.timed_pass(one.name):
            found = run_pass(one, gm, options, kernels)
        record.evidence += found
        if dump is not None and any(entry.status == "applied" for entry in found):
            dump.write(one.name, gm)
    for module, layout in zip(graphs, layouts, strict=True):
        keep_output_layout(module, layout)


def run_pass(
    one: Rewrite, gm: fx.GraphModule, options: Options, kernels: Kernels | None = None
) -> list[Evidence]:
    """Run one pass over `gm` and over the graphs of its higher-order ops, in place."""
    found: list[Evidence] = []
    link_subgraphs(gm)
    for module in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        new = run_rewrite(one, module, options, kernels)
        if any(entry.status == "applied" for entry in new):
            link_subgraphs(gm)
        found += new
    unlink_subgraphs(gm)
    return found
