"""Linear layers with quantized weights, alone and in a model, beside dense ones and other libraries'.

A target is the shape of a weight, `8192x2048` for N x K, or a model. A shape stands for as many layers as no
cache holds, each with an input of its own, in one graph: a model's weights come from memory, too. A row's
ratio is the time of the dense layers under Inductor by that of fxopt's quantized ones. Beside them are the
dense weights in oneDNN's own order (Inductor with freezing, on a CPU), and what torchao and bitsandbytes make
of the same layers where they are installed and have the scheme, compiled by Inductor.

The floor is the time in which the memory hands over what a candidate reads, at the speed of a large copy that
is timed beside: its weights as it stores them, inputs and results. With many tokens arithmetic is above it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.commands.targets import resolve
from fxopt.integrations.prepare import replace
from fxopt.integrations.quantized_module import PARTS, QuantizedLinear
from fxopt.ir.ops.packed_linear import packed_linear
from fxopt.ir.quantized_weight import signal_to_noise
from fxopt.measure.accuracy import allowed_error, floating, max_error
from fxopt.measure.compare import exact_result, faults_of, figures
from fxopt.measure.compiled import BASELINE, CANDIDATE, EAGER, TUNED, TWIN, apart, compile_with
from fxopt.measure.full_models import FULL
from fxopt.measure.jobs import Job
from fxopt.measure.memory import copy_bandwidth, peak_bytes, stored_bytes
from fxopt.measure.models import Subject
from fxopt.measure.results import Row
from fxopt.measure.suite import release
from fxopt.measure.timing import interleave
from fxopt.options import QUANTIZE
from fxopt.report.record import collect
from fxopt.suites.plan import Plan, chosen, milliseconds, over
from fxopt.suites.quant_rivals import BITSANDBYTES, SETTINGS, TORCHAO, quantized_by, rivals

FROZEN = "inductor freezing"
TITLE = "dense weights, inductor / quantized weights, fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor ms": milliseconds(BASELINE),
    "fxopt ms": milliseconds(CANDIDATE),
    "over freezing": over(FROZEN),
    "over torchao": over(TORCHAO),
    "over bitsandbytes": over(BITSANDBYTES),
    "of the floor": lambda row: f"{row['floor'][CANDIDATE]:.0%}",
    "weights, MB": lambda row: _pair(row["weight_bytes"]),
    "dB": lambda row: f"{row['decibels'][CANDIDATE]:.0f}",
    "right": lambda row: {None: "-", True: "yes", False: "NO"}[row.get("accepted")],
}
KNOWN = tuple(name for name in QUANTIZE if name != "none")
SCHEMES = ("int8", "int8-dynamic", "int4", "nf4", "fp8")
TOKENS = (1, 128)
SHAPES = {
    "tiny": ("256x128",),
    "small": ("2048x2048", "8192x2048", "2048x8192"),
    "full": ("4096x4096", "14336x4096", "4096x14336"),
}
MODELS = {"tiny": ("llama",), "small": ("llama", "bert"), "full": ("llama-3.2-1b", "llama-3.1-8b")}
# What the smallest weights of a shape are to fill together: twice a CPU's and a GPU's last cache.
_COLD = {"tiny": 0, "small": 1 << 26, "full": 1 << 27}
_SHAPE = re.compile(r"(\d+)x(\d+)")
# Layers of a stack have a number in their names, heads have none. Of tiny models it takes small ones, too.
_IN_A_STACK = "*.[0-9]*.*"


@dataclass(frozen=True)
class Dense:
    """What is to be quantized.

    Attributes:
        subject: with dense weights, in the dtype of the plan.
        rule: which layers, as `fxopt.prepare` takes it.
        products: one time is of so many calls of a layer.
    """

    subject: Subject
    rule: dict[str, str]
    products: int


class Layers(nn.Module):
    """Linear layers side by side, each with an input of its own."""

    def __init__(self, rows: int, columns: int, count: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        made = (nn.Linear(columns, rows, bias=False, device=device, dtype=dtype) for _ in range(count))
        self.layers = nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (count, M, K) -> as many (M, N)."""
        return [layer(one) for layer, one in zip(self.layers, x.unbind(0), strict=True)]


def jobs(plan: Plan) -> list[Job]:
    """One for each shape or model, scheme and number of tokens.

    Raises:
        UnknownChoice: a scheme that there is not.
        UnknownTarget, ModelUnavailable: no such model.
    """
    schemes = chosen("--quantize", plan.quantize, KNOWN) or SCHEMES
    models = [name for name in plan.models if not _SHAPE.fullmatch(name)]
    dataclasses.replace(plan, models=tuple(models)).targets(())
    own = plan.models or (*SHAPES[plan.size], *MODELS[plan.size])
    cases = itertools.product(own, plan.lengths or TOKENS, schemes)
    keys: list[Row] = [{"target": where, "scheme": scheme, "tokens": count} for where, count, scheme in cases]
    return [Job(key, functools.partial(_measure, plan, **key)) for key in keys]


def rule(plan: Plan, model: str, scheme: str) -> dict[str, str]:
    """Which layers of a model are quantized, as `fxopt.prepare` takes it: those that it takes by itself."""
    small = plan.size == "tiny" and model.lower() not in FULL
    return {_IN_A_STACK if small else "*": scheme}


def dense_layers(plan: Plan, target: str, scheme: str, tokens: int) -> Dense:
    """The target with dense weights."""
    torch.manual_seed(0)
    shape = _SHAPE.fullmatch(target)
    if shape is None:
        subject = resolve(target, plan.request(batch=plan.batch or 1, seq=tokens))
        return Dense(subject, rule(plan, target, scheme), 1)
    rows, columns = map(int, shape.groups())
    dtype: torch.dtype = getattr(torch, plan.dtype)
    count = max(1, math.ceil(_COLD[plan.size] / (rows * columns / 2)))
    model = Layers(rows, columns, count, plan.device, dtype).eval()
    x = torch.randn(count, tokens, columns, device=plan.device, dtype=dtype)
    return Dense(Subject(target, model, (x,)), {"layers.*": scheme}, count)


def plainly(model: nn.Module) -> nn.Module:
    """A copy whose quantized products are the plain torch that says what they mean."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace(made, name, _Plain(module))
    return made


class _Plain(nn.Module):
    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.quantized
        how = {"format": weight.format.name, "group_size": weight.group_size}
        parts = (getattr(weight, name) for name in PARTS)
        out: torch.Tensor = packed_linear(x, *parts, self.layer.bias, **how, activation=self.layer.activation)
        return out


def _measure(plan: Plan, target: str, scheme: str, tokens: int) -> Row:
    release()
    dense = dense_layers(plan, target, scheme, tokens)
    subject = dense.subject
    ours = fxopt.prepare(copy.deepcopy(subject.model), dense.rule)
    names = [note.name for note in ours.fxopt_linears if note.is_quantized]
    if not names:
        raise NothingToQuantize(subject.name)
    own = [*([TUNED] if plan.tuned else []), *([FROZEN] if plan.device == "cpu" else [])]
    measured = _Measured(subject)
    with collect() as records:
        for name in (EAGER, BASELINE, CANDIDATE, *own):
            measured.add(name, ours if name == CANDIDATE else subject.model, _compiler(plan, name))
    for library in rivals(scheme):
        made = functools.partial(quantized_by, library, subject.model, names, scheme)
        measured.try_to_add(library, made, _compiler(plan, library))
    steps = measured.steps
    for step in steps.values():
        step()
    peaks = {name: peak_bytes(steps[name]) for name in (BASELINE, CANDIDATE)}
    times = interleave({**steps, TWIN: steps[BASELINE]}, budget_seconds=plan.budget)
    row = figures(times) | {"faults": faults_of(records), "peak_bytes": peaks, "products": dense.products}
    row |= _quality(subject, ours, measured.answers) if plan.check else {}
    row |= _floors(plan, measured, row["seconds"])
    row |= {"refused": measured.refused} if measured.refused else {}
    del measured, steps
    release()
    return row


@dataclass
class _Measured:
    """Who computes the subject, with what.

    Attributes:
        models, steps, answers: by candidate; a step is one call, the answers are of the first.
        refused: why a rival runs without a compiler, or not at all.
    """

    subject: Subject
    models: dict[str, nn.Module] = field(default_factory=dict)
    steps: dict[str, Callable[[], Any]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, model: nn.Module, compiled: Callable[[nn.Module], Any]) -> None:
        step = self.subject.step(compiled(model))
        self.answers[name] = step()
        self.models[name], self.steps[name] = model, step

    def try_to_add(
        self, name: str, make: Callable[[], nn.Module], compiled: Callable[[nn.Module], Any]
    ) -> None:
        """A rival that cannot be compiled runs eagerly; one that cannot run is left out."""
        for way in (compiled, _eagerly):
            try:
                self.add(name, make(), way)
            except Exception as error:
                told = str(error).strip().partition("\n")[0][:200]
                self.refused[name] = f"{type(error).__name__}: {told}"
            else:
                return


def _eagerly(model: nn.Module) -> Any:
    return model


class NothingToQuantize(ValueError):
    """No linear layer of the model is large enough to be quantized."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has no linear layer that would be quantized")


def _compiler(plan: Plan, name: str) -> Callable[[nn.Module], Any]:
    """As the users of each have it."""
    if name == EAGER:
        return _eagerly
    if name == FROZEN or name in SETTINGS:
        given = SETTINGS.get(name, {"freezing": True})
        return functools.partial(torch.compile, backend=BASELINE, options=given, **apart())
    options = plan.options if name == CANDIDATE else None
    return functools.partial(compile_with, name=name, options=options, mode=plan.mode)


def _quality(subject: Subject, ours: nn.Module, answers: dict[str, Any]) -> Row:
    """How near fxopt is to what its own quantized weights mean, and everyone to the dense ones."""
    plain = Subject(subject.name, plainly(ours), subject.args, subject.kwargs)
    meant, exact = exact_result(plain), exact_result(subject)
    eager = plain.step(plain.model)()
    error, allowed = max_error(answers[CANDIDATE], meant), allowed_error(eager, meant)
    return {
        "errors": {CANDIDATE: error, EAGER: max_error(eager, meant)},
        "accepted": error <= allowed,
        "decibels": {name: _decibels(exact, found) for name, found in answers.items()},
    }


def _decibels(exact: Any, found: Any) -> float:
    dense, approximate = (torch.cat([one.flatten().double() for one in floating(each)])
                          for each in (exact, found))  # fmt: skip
    return round(signal_to_noise(dense, approximate), 2)


def _floors(plan: Plan, measured: _Measured, seconds: dict[str, float]) -> Row:
    subject, answer = measured.subject, measured.answers[CANDIDATE]
    held = {name: stored_bytes(model) for name, model in measured.models.items()}
    tensors = pytree.tree_leaves((subject.args, subject.kwargs, answer))
    others = sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))
    rate = copy_bandwidth(plan.device)
    read = {name: held[name] + others for name in seconds}
    floor = {name: read[name] / rate / seconds[name] for name in seconds}
    return {"weight_bytes": held, "bytes": read, "bandwidth": rate, "floor": floor}


def _pair(held: dict[str, int]) -> str:
    return " → ".join(f"{held[name] / 2**20:.3g}" for name in (BASELINE, CANDIDATE))
