"""One step of a decoding loop that goes straight to its compiled graph, past Dynamo's guards.

Each of the guards is known to hold as it did at the step before, by something that is cheaper to look at:

- global state (gradients, autocast, inference mode, torch's modes): compared with what it was;
- arguments: the same objects, or tensors whose sizes, strides, dtype and device are checked;
- the cache: nothing has changed since the last step ended (`Watched`), its tensors are held by nobody else,
  and have room behind them (`Growth.resized`);
- everything else that a guard looks at: the same as when they held (`Relied`);
- guards about sizes: computed anew from the sizes of this step (`size_checks`).

Where any of these cannot be told, the step goes the slow way, which is always right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo import eval_frame
from torch.autograd import forward_ad

from fxopt.runtime.kv_calls import GrowingCall
from fxopt.runtime.relied import Unknown
from fxopt.runtime.step_loops import Loops
from fxopt.runtime.step_numbers import Numbers
from fxopt.runtime.watched import Watched

# What `DecodeStep.take` gives where the step has to go the slow way.
SLOW = object()


@dataclass
class Inputs:
    """How the inputs of a graph are found.

    Attributes:
        template: all that stay the same, at their places.
        fixed: those of them that are tensors. ids: theirs.
        users: place and name of an argument that is a tensor.
        lengths: place, and that in `DecodeStep.numbers`, of integers that change.
        sizes: place, index in `users`, and dimension, of other sizes.
    """

    template: list[Any]
    fixed: list[torch.Tensor]
    users: list[tuple[int, str]]
    lengths: list[tuple[int, int]]
    sizes: list[tuple[int, int, int]]
    ids: frozenset[int]


@dataclass
class DecodeStep:
    """Everything that a step needs and checks.

    Attributes:
        call: the graph. inputs: of it. tail: what is done with its outputs.
        model: of which `tail` is a call.
        numbers: that change. dicts, names: where the caches live.
        same: arguments that are no tensors.
        watched, relied, ambient, sizes, tensors: the checks, see above; `tensors` of arguments.
        loops, forms: what `loops` gives for the tensors that stay, and for the caches.
    """

    call: GrowingCall
    inputs: Inputs
    tail: Callable[..., Any]
    model: Any
    numbers: Numbers
    dicts: list[dict[str, Any]]
    names: list[str]
    same: dict[str, Any]
    watched: Watched
    relied: Callable[[], bool]
    ambient: Callable[[], bool]
    sizes: Callable[..., bool]
    tensors: Any
    loops: Loops
    forms: tuple[Any, Any]

    def take(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of the model for these arguments; `SLOW` where it has to be called for it."""
        inputs = self.inputs
        if args or len(kwargs) != len(self.same) + len(inputs.users) or not self.ambient():
            return SLOW
        if not all(_is_same(kwargs.get(name, SLOW), value) for name, value in self.same.items()):
            return SLOW
        users = [kwargs.get(name) for _, name in inputs.users]
        if not self.watched.untouched() or not self.relied():
            return SLOW
        loops = self.loops
        pasts = loops.held_once(self.dicts, self.names)
        if pasts is None or not loops.forms_are(pasts, self.forms[1]):
            return SLOW
        if not loops.forms_are(inputs.fixed, self.forms[0]) or not self.tensors.check(*users):
            return SLOW
        if not inputs.ids.isdisjoint(map(id, users)):
            return SLOW
        numbers = self.numbers.of(pasts)
        if numbers is None or not self.sizes(numbers, *users):
            return SLOW
        given = self._given(numbers, users)
        if self.call.instead(given) is not None:
            return SLOW
        resized = self.call.growth.resized(pasts, given)
        if resized is None:
            return SLOW
        with resized:
            outputs = self.call.run(given, resized.grown, resized.handed_out)
        result = self.tail(outputs, self.model, **kwargs)
        self.watched.after_a_step()
        return result

    def _given(self, numbers: Sequence[int], users: Sequence[Any]) -> list[Any]:
        given = list(self.inputs.template)
        for place, number in self.inputs.lengths:
            given[place] = numbers[number]
        for (place, _), tensor in zip(self.inputs.users, users, strict=True):
            given[place] = tensor
        for place, user, dim in self.inputs.sizes:
            given[place] = users[user].shape[dim]
        return given


def _is_same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    return type(value) is type(other) and isinstance(value, (int, float, str)) and value == other


def counts_are_exact() -> bool:
    """References can be counted: not without the interpreter's lock."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def ambient() -> Callable[[], bool]:
    """A function that says whether the global state is what it is now, and no mode of torch is active."""
    from torch._C._dynamo.guards import GlobalStateGuard

    unchanged, inference = GlobalStateGuard().check, torch.is_inference_mode_enabled()

    def holds() -> bool:
        return (
            unchanged()
            and torch.is_inference_mode_enabled() is inference
            and _len_torch_function_stack() == 0
            and _len_torch_dispatch_stack() == 0
            and peek_interpreter_stack() is None
            and get_eval_frame_callback() is None
            and torch._C._get_tracing_state() is None
            and forward_ad._current_level < 0
            and eval_frame._stance.stance == "default"
            and not eval_frame._stance.skip_guard_eval_unsafe
        )

    return holds


def size_checks(
    guards: Any,
    replaced: Mapping[str, str],
    parameters: Sequence[str],
    steady: Sequence[str],
    caches: Sequence[str],
) -> Any:
    """The guards about sizes as a function of the numbers, and of the arguments that are tensors.

    Args:
        guards: the `GuardManagerWrapper` of the frame.
        replaced: what to write in place of sources.
        parameters: the names of those of the function.
        steady: what sources of things begin with that are known not to have changed.
        caches: sources of the tensors that grow.

    Raises:
        Unknown: a guard is about something else.
    """
    clauses: set[str] = set()
    longest_first = sorted(replaced, key=len, reverse=True)
    for guard in guards.root.get_epilogue_lambda_guards():
        for part in guard.verbose_code_parts():
            text = part.partition("  # ")[0].strip()
            for source in longest_first:
                text = text.replace(source, replaced[source])
            rest = text
            for prefix in steady:
                rest = rest.replace(prefix, "")
            changes = any(name in rest for name in parameters)
            if "L[" in rest or (rest != text and changes) or any(source in text for source in caches):
                raise Unknown(f"a guard: {text}")
            if changes:
                clauses.add(f"({text})")
    code = f"lambda {', '.join(parameters)}: {' and '.join(sorted(clauses)) or 'True'}"
    return eval(code, dict(guards.closure_vars or {}))
