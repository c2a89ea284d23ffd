"""What is to be measured, by any suite, and what a suite is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from fxopt.backend import validate
from fxopt.commands.targets import Request, UnknownChoice, check
from fxopt.errors import UserError
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row

SIZES = ("tiny", "small", "full")


class UnknownSuite(UserError, ValueError):
    """There is no such suite."""

    message = "there is no suite {suite!r}. Suites: {valid}."


@dataclass(frozen=True)
class Plan:
    """What to measure. A suite reads the fields that concern it.

    Attributes:
        suite: a key of `SUITES`.
        models: model types, or other targets of `fxopt explain`; empty is what the suite has for the size.
        size: `tiny` and `small` make model types small; `full` are published sizes, for a GPU.
        infer, train: which phases.
        attention: `attn_implementation`; None is transformers' default.
        mode: torch.compile's mode, of fxopt and of Inductor.
        seconds: time budget of the timing of one row, compilation not counted; None is by the size.
        batches, lengths: of the inputs; empty is the suite's own.
        layers: depths, for the suite `compile`.
        caches: `dynamic`, `static`; `kv`: `auto`, `int8`, `fp8`; for the suite `generate`.
        quantize: what weights of linear layers are stored as: schemes, of the suite `quant`; for `generate`,
            where `dense` is one of them. Empty is the suite's own.
        tokens: how many a row of `generate` writes.
        tuned: Inductor with max-autotune beside the others.
        generate: time the first `generate`; repeats: processes for each figure; for the suite `compile`.
        cold: start every row from empty caches. Without it the suite `hf` does so for inference only, and the
            training steps of a run share caches of their own: compiling them takes most of the time.
        check: compare with float64.
        options: for fxopt, as in `torch.compile(options=...)`.
        out: results are written there, row by row.
        resume: keep the rows that `out` has of the same plan.
    """

    suite: str = "hf"
    models: tuple[str, ...] = ()
    size: str = "small"
    infer: bool = True
    train: bool = True
    attention: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    mode: str | None = None
    seconds: float | None = None
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    caches: tuple[str, ...] = ("dynamic", "static")
    kv: tuple[str, ...] = ("auto",)
    quantize: tuple[str, ...] = ()
    tokens: int = 32
    tuned: bool = False
    cold: bool = False
    generate: bool = False
    repeats: int | None = None
    check: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    resume: bool = False

    def plain(self) -> Row:
        """What decides about figures, and not where they go."""
        return {name: value for name, value in vars(self).items() if name not in ("out", "resume")}

    @property
    def budget(self) -> float:
        """Seconds for the timing of one row."""
        return self.seconds or (1.0 if self.size == "tiny" else 4.0)

    @property
    def block(self) -> float:
        """Seconds of a block: many short ones for what takes less than a millisecond."""
        return 0.005 if self.size == "tiny" else 0.02

    def request(self, *, training: bool = False, **changed: Any) -> Request:
        """How a target is to be built; `changed`: fields of the request that are not the plan's."""
        own = {"batch": self.batch, "seq": self.length, "training": training}
        own |= {name: getattr(self, name) for name in ("size", "dtype", "attention", "device")}
        return Request(**{**own, **changed})

    def validate(self) -> None:
        """Check what concerns every suite: how models are built, the mode and fxopt's options.

        Raises:
            UnknownChoice, DeviceUnavailable, UnsupportedMode, OptionValueError.
        """
        chosen("--size", (self.size,), SIZES)
        self.request().validate()
        validate(self.mode, self.options)

    def targets(self, otherwise: Sequence[str], *, names: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """The models of the plan, or `otherwise`; before anything is measured it is known whether they are.

        Args:
            names: what is built, of models that have names of their own.

        Raises:
            UnknownTarget, ModelUnavailable, UnknownChoice.
        """
        for model in self.models:
            check((names or {}).get(model, model), self.request(), SUITES)
        return tuple(self.models or otherwise)

    @property
    def batch(self) -> int | None:
        return self.batches[0] if self.batches else None

    @property
    def length(self) -> int | None:
        return self.lengths[0] if self.lengths else None


class Suite(Protocol):
    """What a module of this package has.

    Attributes:
        TITLE: what the ratio is.
        COLUMNS: of the table, besides the name of a row, its ratio and its noise.
    """

    TITLE: str
    COLUMNS: Mapping[str, Callable[[Row], str]]

    def jobs(self, plan: Plan) -> Sequence[Job]:
        """The rows to measure."""


SUITES: dict[str, str] = {
    "hf": "architectures of transformers, inference and training",
    "generate": "prompts and tokens a second, by cache, batch and length",
    "train": "whole training steps, by hand and by the Trainer",
    "attention": "attention alone, by mask, spelling and length",
    "quant": "linear layers with quantized weights, alone and in a model",
    "fusion": "regions of a model beside what the memory allows",
    "compile": "the time of compilation, cold and warm, by depth",
}
# What a suite computes in unless it is told otherwise; float32 where it says nothing.
DTYPES = {"quant": "bfloat16"}


def load(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UnknownSuite: there is none.
    """
    if name not in SUITES:
        raise UnknownSuite(suite=name, valid=", ".join(SUITES))
    return cast(Suite, importlib.import_module(f"fxopt.suites.{name}"))


def chosen(flag: str, given: Sequence[str], valid: Sequence[str]) -> Sequence[str]:
    """What was given of a flag, when all of it is valid.

    Raises:
        UnknownChoice: some of it is not.
    """
    for name in given:
        if name not in valid:
            raise UnknownChoice(flag=flag, value=name, valid=", ".join(valid) or "none")
    return given


def milliseconds(name: str) -> Callable[[Row], str]:
    """A column: the median time of a candidate."""

    def cell(row: Row) -> str:
        seconds = row.get("seconds", {}).get(name)
        return "-" if seconds is None else f"{1e3 * seconds:.3g}"

    return cell


def over(name: str) -> Callable[[Row], str]:
    """A column: how many times faster than another candidate."""

    def cell(row: Row) -> str:
        ratio = row.get("over", {}).get(name)
        return "-" if ratio is None else f"{ratio['median']:.2f}"

    return cell


def megabytes(row: Row) -> str:
    """A column: the peak of memory, Inductor's and fxopt's."""
    peaks = row.get("peak_bytes")
    return " → ".join(f"{peaks[name] / 2**20:.3g}" for name in ("inductor", "fxopt")) if peaks else "-"
