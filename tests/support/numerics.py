"""The one rule by which fxopt's results are judged, and the float64 reference behind it.

The rule: a candidate may err against float64 at most twice as much as eager does, plus one unit in
the last place.

What "error" means. For every floating tensor of the result on its own, three figures of `x - reference`:
- `max`: the largest absolute entry; the unit in the last place is taken at the largest reference entry;
- `rms`: the root mean square; the unit is taken at the rms of the reference;
- `row`: over the slices along every dimension (rows, columns, heads, batch entries) the largest ratio of the
  slice's rms error to the rms of its reference. A wrong head or a stale row of small numbers is invisible
  beside a large one in the first two figures, and is seen in this one. The rounding errors of one row have
  few causes and scatter widely, so a row counts as wrong only when half of the dtype's digits are.

Four refinements, each because the plain rule would otherwise judge noise:
- The rms of a handful of errors is itself a random number: two equally good computations of one scalar differ
  by more than a factor of two nearly every third time. A tensor of fewer than `FEW` elements is therefore
  allowed eager's error *pooled over the result* as well (rms over its tensors of their relative errors).
- Eager's own error is one draw as well, and in a deep model the errors of a whole tensor may have one cause.
  `roundings` takes results of the same computation under other roundings (`support.rounding.perturbed`);
  the allowance is then twice the largest error among eager and these.
- A gradient can be zero by algebra (a key bias under softmax). Then the float64 value is float64 noise, and
  what any implementation returns is its own noise. Such a tensor, recognised by its size in float64 relative
  to the largest of the result, must stay below one unit in the last place at the largest of the result.
- If eager's error is so large that half of the dtype's digits are wrong, twice that error would let anything
  pass. That is not accepted but reported as `VacuousReferenceError`: the test, not the candidate, is at
  fault.

Everything that is not a rounding error must agree with eager exactly: structure, dtype, device, shape,
strides, `requires_grad`, integers, booleans, and the positions of NaN, infinities and the dtype's extreme
values (mask fills).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from support.reference import reference_mode, run_reference64, to_double
from support.trees import Constant, leaves, skeleton

__all__ = ["FEW", "VacuousReferenceError", "assert_closer", "reference_mode", "run_reference64", "to_double"]

FACTOR = 2.0
FEW = 32
# Largest |reference| of a tensor, relative to the largest of the whole result, that counts as float64
# rounding noise.
ZERO_BY_ALGEBRA = 2.0**-40


class VacuousReferenceError(AssertionError):
    """The comparison could not fail: eager and the reference do not compute the same thing."""


@dataclass(frozen=True)
class _Triple:
    """One floating tensor of a result, all in float64 and flattened of NaN, infinities and fills."""

    path: str
    dtype: torch.dtype
    reference: torch.Tensor
    candidate: torch.Tensor
    eager: torch.Tensor
    roundings: tuple[torch.Tensor, ...]


def assert_closer(
    reference64: object,
    candidate: object,
    eager: object,
    *,
    roundings: Callable[[], Sequence[object]] | None = None,
    what: str = "",
    strides: bool = True,
) -> None:
    """Fail unless `candidate` is as close to `reference64` as `eager` is, by the rule of this module.

    The three are tensors or nests of them (tuples, dicts, model outputs, caches) of the same structure, e.g.
    made by `run_reference64(model, inputs)`, `compiled(**inputs)` and `model(**inputs)`. `roundings` makes
    more such nests, from eager under other roundings; it is called only when eager alone says no. `what`
    names the case in the message. `strides=False` is for results whose layout is not promised, such as
    intermediate buffers.

    Raises AssertionError with every tensor that fails, VacuousReferenceError when eager is too far off to
    judge by.
    """
    where = f"{what}: " if what else ""
    if skeleton(candidate) != skeleton(eager):
        raise AssertionError(
            f"{where}structure differs from eager:\n  {skeleton(candidate)}\n  {skeleton(eager)}"
        )
    if skeleton(reference64) != skeleton(eager):
        raise VacuousReferenceError(f"{where}reference and eager differ in structure")
    form, triples = _pair_up(reference64, candidate, eager, (), strides=strides)
    problems = _error_problems(triples, where)
    if problems and roundings is not None:
        _, triples = _pair_up(reference64, candidate, eager, roundings(), strides=strides)
        problems = _error_problems(triples, where)
    if form or problems:
        listed = "\n  ".join(form + problems)
        raise AssertionError(f"{where}{len(form + problems)} differences\n  {listed}")


def _pair_up(
    reference64: object, candidate: object, eager: object, draws: Sequence[object], *, strides: bool
) -> tuple[list[str], list[_Triple]]:
    """What differs in form, and the floating tensors whose form agrees."""
    problems: list[str] = []
    triples: list[_Triple] = []
    for (path, want), (_, got), (_, exact), *others in zip(
        *map(leaves, (eager, candidate, reference64, *draws)), strict=True
    ):
        if not isinstance(want, torch.Tensor):
            problems += _constant_problems(path, got, want)
            continue
        assert isinstance(got, torch.Tensor)
        assert isinstance(exact, torch.Tensor)
        mismatch = _form_problems(path, got, want, strides=strides) or _special_problems(path, got, want)
        problems += mismatch
        if not mismatch and (want.is_floating_point() or want.is_complex()):
            triples.append(_triple(path, exact, got, want, [other for _, other in others]))
    return problems, triples


def _constant_problems(path: str, got: object, want: Constant | torch.Tensor) -> list[str]:
    same = got == want or (
        isinstance(want, float) and isinstance(got, float) and math.isnan(got) and math.isnan(want)
    )
    return [] if same else [f"{path}: {got!r}, eager {want!r}"]


def _form_problems(path: str, got: torch.Tensor, want: torch.Tensor, *, strides: bool) -> list[str]:
    """Differences in dtype, device, layout, shape, requires_grad and, if asked, strides."""
    problems = [
        f"{path}: {name} {getattr(got, name)}, eager {getattr(want, name)}"
        for name in ("dtype", "device", "layout", "shape", "requires_grad")
        if getattr(got, name) != getattr(want, name)
    ]
    if not problems and strides and want.layout is torch.strided and _strides(got) != _strides(want):
        problems.append(f"{path}: strides {got.stride()}, eager {want.stride()} (shape {tuple(want.shape)})")
    return problems


def _strides(tensor: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have any: the stride of a dimension of size 1 addresses nothing."""
    if tensor.numel() == 0:
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _special(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    extreme = torch.finfo(tensor.dtype)
    return {
        "NaN": tensor.isnan(),
        "+inf": tensor == math.inf,
        "-inf": tensor == -math.inf,
        "largest": tensor == extreme.max,
        "lowest": tensor == extreme.min,
    }


def _special_problems(path: str, got: torch.Tensor, want: torch.Tensor) -> list[str]:
    """Differences in integers, and in the positions of NaN, infinities and the extreme values."""
    if want.is_complex():
        return _special_problems(path, torch.view_as_real(got), torch.view_as_real(want))
    if not want.is_floating_point():
        wrong = int((got != want).sum())
        return (
            [f"{path}: {wrong} of {want.numel()} entries differ from eager ({want.dtype})"] if wrong else []
        )
    marks, expected = _special(got.detach()), _special(want.detach())
    return [
        f"{path}: {name} at {int(marks[name].sum())} positions, eager {int(mask.sum())}, "
        f"{int((marks[name] != mask).sum())} differ"
        for name, mask in expected.items()
        if not torch.equal(marks[name], mask)
    ]


def _triple(
    path: str, exact: torch.Tensor, got: torch.Tensor, want: torch.Tensor, draws: Sequence[Any]
) -> _Triple:
    """All tensors in float64; where eager is NaN, infinite or a fill, they are zero."""
    everything = [exact, got, want, *draws]
    if want.is_complex():
        everything = [torch.view_as_real(one.resolve_conj()) for one in everything]
    if exact.shape != want.shape:
        raise VacuousReferenceError(f"{path}: reference has shape {exact.shape}, eager {want.shape}")
    if everything[0].dtype != torch.float64:
        raise VacuousReferenceError(f"{path}: the reference is {exact.dtype}, not float64")
    special = torch.stack(list(_special(everything[2].detach()).values())).any(0)
    exact, got, want, *draws = (one.detach().double().masked_fill(special, 0.0) for one in everything)
    if not exact.isfinite().all():
        raise VacuousReferenceError(f"{path}: the reference is not finite where eager is")
    return _Triple(path, everything[2].dtype, exact, got, want, tuple(draws))


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def _max(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def _slices(error: torch.Tensor, reference: torch.Tensor) -> Iterator[float]:
    """For each dimension, the largest of rms(error) / rms(reference) over the slices along it."""
    for dim in range(error.dim()):
        others = [other for other in range(error.dim()) if other != dim]
        if error.numel() // error.shape[dim] < FEW:
            continue
        scale = reference.square().mean(others).sqrt()
        ratio = error.square().mean(others).sqrt() / scale
        # A slice that is zero in the reference has no scale of its own; `max` and `rms` judge it.
        live = scale > ZERO_BY_ALGEBRA * float(scale.max())
        if live.any():
            yield float(ratio[live].max())


def _row(error: torch.Tensor, reference: torch.Tensor) -> float:
    return max(_slices(error, reference), default=0.0) if error.numel() else 0.0


def _error_problems(triples: list[_Triple], where: str) -> list[str]:
    largest = max((_max(triple.reference) for triple in triples), default=0.0)
    live = [triple for triple in triples if _max(triple.reference) > ZERO_BY_ALGEBRA * largest]
    relative = [_relative_eager(triple, where) for triple in live]
    pooled = math.sqrt(sum(value * value for value in relative) / len(relative)) if relative else 0.0
    problems = [problem for triple in live for problem in _figure_problems(triple, pooled)]
    for triple in triples:
        noise, limit = _max(triple.candidate), _ulp(largest, triple.dtype)
        if _max(triple.reference) <= ZERO_BY_ALGEBRA * largest and noise > limit:
            problems.append(f"{triple.path}: {noise:.3g} where algebra gives 0, allowed {limit:.3g}")
    return problems


def _relative_eager(triple: _Triple, where: str) -> float:
    relative = _rms(triple.eager - triple.reference) / _rms(triple.reference)
    limit = math.sqrt(torch.finfo(triple.dtype).eps)
    if relative > limit:
        raise VacuousReferenceError(
            f"{where}{triple.path}: eager is {relative:.3g} (relative rms) away from float64, more than "
            f"{limit:.3g}: twice that would let anything pass. "
            "Eager and the reference do not compute the same thing here."
        )
    return relative


def _figure_problems(triple: _Triple, pooled: float) -> list[str]:
    """The figures of one tensor that break the rule."""
    info, reference = torch.finfo(triple.dtype), triple.reference
    few = pooled if reference.numel() < FEW else 0.0
    largest, typical = _max(reference), _rms(reference)
    errors = [draw - reference for draw in (triple.eager, *triple.roundings)]
    ours = triple.candidate - reference
    row = max(_row(error, reference) for error in errors)
    figures = (
        ("max", _max(ours), max(few * largest, *map(_max, errors)), _ulp(largest, triple.dtype)),
        ("rms", _rms(ours), max(few * typical, *map(_rms, errors)), _ulp(typical, triple.dtype)),
        ("row", _row(ours, reference), row, max(info.eps, math.sqrt(info.eps) - FACTOR * row)),
    )
    return [
        f"{triple.path}: {name} error {got:.3g}, eager's {want:.3g}, allowed {FACTOR * want + unit:.3g} "
        f"({triple.dtype}, shape {tuple(reference.shape)})"
        for name, got, want, unit in figures
        if got > FACTOR * want + unit
    ]
