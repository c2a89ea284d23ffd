"""The check that every kernel's file carries: error against float64 at most twice eager's, and time.

All below the marker is copied into each file, so it uses torch and triton alone.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

exact_bfloat16: Callable[[], Any] = contextlib.nullcontext  # in a kernel's file the interpreter's, if needed

# --- All below is copied into kernels' files as it stands.
import math  # noqa: E402

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402


class InFloat64(TorchDispatchMode):
    """Every floating dtype that an op is asked for becomes float64: a reference computes exactly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.view.dtype:
            args, kwargs = tree_map(_float64, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _float64(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def differences(
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    mutated: Sequence[int] = (),
) -> list[str]:
    """Where the kernel errs against float64 by more than twice what eager does, plus one unit in the last
    place.

    The largest and the root mean square error of every result count, and those of inputs that are written to.
    Memory that the kernel leaves unwritten is NaN, so that it is seen.
    """

    def results(function: Callable[..., Any], wide: bool = False) -> list[torch.Tensor]:
        given = [_copied(one, wide, place in mutated) for place, one in enumerate(inputs)]
        made = function(*given)
        made = [made] if isinstance(made, torch.Tensor) else list(made or ())
        return [*made, *(given[place] for place in mutated)]

    with InFloat64():
        exact = results(reference, wide=True)
    eager = results(reference)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with exact_bfloat16():
            found = results(launch)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    pooled = _rms(torch.tensor([_relative(*pair) for pair in zip(exact, eager, strict=True)]))
    return [
        f"result {place}: {problem}"
        for place, trio in enumerate(zip(exact, eager, found, strict=True))
        for problem in _problems(*trio, pooled)
    ]


def _copied(value: Any, wide: bool, written: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if wide and value.is_floating_point():
        return value.detach().to(torch.float64, copy=True)
    return value.detach().clone() if written else value


def _relative(exact: torch.Tensor, eager: torch.Tensor) -> float:
    """Eager's root mean square error, relative to its result."""
    if not eager.is_floating_point():
        return 0.0
    eager = _without_float8(eager)
    live = eager.isfinite()
    size = _rms(exact[live].double())
    return _rms(eager[live].double() - exact[live]) / size if size else 0.0


def _problems(exact: torch.Tensor, eager: torch.Tensor, found: torch.Tensor, pooled: float) -> list[str]:
    """What is wrong with one result. `pooled` is the relative error of eager over all results: the error of a
    handful of numbers is itself a random number, and these may err as much as the others."""
    form = [
        f"{name} {getattr(found, name)}, eager's {getattr(eager, name)}"
        for name in ("shape", "dtype", "device")
        if getattr(found, name) != getattr(eager, name)
    ]
    if form or not eager.is_floating_point():
        wrong = 0 if form else int((found != eager).sum())
        return form or ([f"{wrong} of {eager.numel()} entries differ"] if wrong else [])
    dtype, eager, found = eager.dtype, _without_float8(eager), _without_float8(found)
    special = ~eager.isfinite()
    if not torch.allclose(found[special], eager[special], 0, 0, equal_nan=True):
        return ["NaN or infinity differ from eager's"]
    if (~found.isfinite() & ~special).any():
        return [f"{int((~found.isfinite() & ~special).sum())} entries are not finite, eager's are"]
    exact, eager64, found64 = (one.double().masked_fill(special, 0.0) for one in (exact, eager, found))
    # More than roundings can do, also those of a narrow dtype in between.
    if _relative(exact, eager64) > math.sqrt(torch.finfo(torch.bfloat16).eps):
        return ["the reference computes something else in float64: the comparison could not fail"]
    few = pooled if exact.numel() < 32 else 0.0
    figures = []
    for name, size in (("largest", _largest), ("rms", _rms)):
        theirs = max(size(eager64 - exact), few * size(exact))
        error, limit = size(found64 - exact), 2 * theirs + _unit(size(exact), dtype)
        if error > limit:
            figures.append(f"{name} error {error:.3g}, allowed {limit:.3g} ({dtype})")
    return figures


def _without_float8(tensor: torch.Tensor) -> torch.Tensor:
    """Float8 has few operations of its own."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def _unit(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    return info.eps * max(info.tiny, 2.0 ** math.floor(math.log2(magnitude)) if magnitude else 0.0)


def timing(launch: Callable[..., Any], inputs: Sequence[Any], cost: tuple[int, int]) -> str:
    """What one launch takes on this GPU, beside the bandwidth of a copy of 2 x 512 MiB."""
    taken = triton.testing.do_bench(lambda: launch(*inputs), return_mode="median") / 1e3
    source = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ceiling = 2 * source.numel() / triton.testing.do_bench(lambda: target.copy_(source)) * 1e3
    moved, flops = cost
    return (
        f"{taken * 1e6:.1f} us, {moved / taken / 1e9:.0f} GB/s ({moved / taken / ceiling:.0%} of a copy's "
        f"{ceiling / 1e9:.0f}), {flops / taken / 1e12:.2f} TFLOP/s on {torch.cuda.get_device_name()}"
    )


def check_kernel(
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    example_inputs: Callable[[str], Sequence[Any]],
    cost: Callable[..., tuple[int, int]],
    mutated: Sequence[int] = (),
) -> int:
    """Check and, on a GPU, time the kernel on its example. The exit code: 1 if it is wrong."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = example_inputs(device)
    found = differences(launch, reference, inputs, mutated)
    for line in found:
        print(line)
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    print(f"{'WRONG' if found else 'right'} {where}, by error against float64")
    if device == "cuda" and not found:
        print(timing(launch, inputs, cost(*inputs)))
    return int(bool(found))
