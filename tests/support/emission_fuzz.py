"""Random programs through emitted kernels, in Triton's interpreter, against eager; JSON on stdout.

How far it has come is on stderr:

    TRITON_INTERPRET=1 python -m tests.support.emission_fuzz --programs 2000

All programs are run; those that differ are counted, and the first of them is made as small as it gets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.emit import emit_kernels
from fxopt.codegen.kernel_check import InFloat64
from fxopt.ir.contract import Status
from fxopt.options import Options

Value = torch.Tensor
Step = Callable[[list[Value]], Value | tuple[Value, ...]]

UNARY: dict[str, Callable[[Value], Value]] = {
    "exp": lambda x: (x * 0.1).exp(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": torch.relu,
    "abs": torch.abs,
    "neg": torch.neg,
    "square": lambda x: x * x,
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 1).rsqrt(),
    "clamp": lambda x: x.clamp(-1, 1.5),
    "sin": torch.sin,
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: (x.tanh() * 8).half(),
    "float32": lambda x: x.float(),
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "masked": lambda x: torch.where(x > 0, x, 0.5),
    "cube": lambda x: x.tanh() ** 3,
}
BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": torch.add,
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "mul": lambda x, y: x * y.tanh(),
    "div": lambda x, y: x / (y.abs() + 1),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x <= y, x, y * 0.5),
    "and": lambda x, y: ((x > 0) & (y > 0)).to(x.dtype) * x,
}
ROWS: dict[str, Callable[[Value, int], Value]] = {
    "sum": lambda x, dim: x.sum(dim),
    "sum_keep": lambda x, dim: x.sum(dim, keepdim=True),
    "mean": lambda x, dim: x.mean(dim, keepdim=True),
    "amax": lambda x, dim: x.amax(dim, keepdim=True),
    "amin": lambda x, dim: x.amin(dim),
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x, dim: x.log_softmax(dim),
    "rms": lambda x, dim: x * (x.float().pow(2).mean(dim, keepdim=True) + 1e-5).rsqrt().to(x.dtype),
    "var": lambda x, dim: x - torch.var_mean(x, dim, keepdim=True, correction=0)[1],
    "layer_norm": lambda x, dim: F.layer_norm(x, x.shape[-1:]),
    "all": lambda x, dim: x.sum(),
    "any": lambda x, dim: torch.where((x > 1).any(dim, keepdim=True), x, 0),
    "every": lambda x, dim: (x > -1).all(dim),
    "twice": lambda x, dim: (x.float() * 2 - x.float().sum(-1, keepdim=True)) + (x.float() * 2).sum(0),
}
VIEWS: dict[str, Callable[[Value, int], Value]] = {
    "transpose": lambda x, dim: x.transpose(dim, -1),
    "flatten": lambda x, dim: x.reshape(-1),
    "split": lambda x, dim: x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2) if x.shape[-1] % 2 == 0 else x,
    "merge": lambda x, dim: x.flatten(0, 1) if x.dim() > 1 else x,
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
    "slice": lambda x, dim: x.narrow(dim, x.shape[dim] // 2, x.shape[dim] - x.shape[dim] // 2),
    "step": lambda x, dim: x[..., ::2],
    "select": lambda x, dim: x.select(dim, x.shape[dim] - 1) if x.dim() > 1 else x,
    "rotate": lambda x, dim: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
    "double": lambda x, dim: torch.cat([x, x * 2], dim),
    "expand": lambda x, dim: x.unsqueeze(0).expand(3, *x.shape),
}
PRODUCTS: dict[str, Callable[[Value, Value, int], Value]] = {
    "linear": lambda x, weight, n: F.linear(x, weight[:n, : x.shape[-1]]),
    "linear_bias": lambda x, weight, n: F.linear(x, weight[-n:, : x.shape[-1]], weight[0, :n]),
    "conv1d": lambda x, weight, n: torch.addmm(weight[1, :n], x.flatten(0, -2), weight[: x.shape[-1], :n]),
    "gated": lambda x, weight, n: (
        F.silu(x @ weight[: x.shape[-1], :n]) * F.linear(x, weight[:n, : x.shape[-1]])
    ),
    "long": lambda x, weight, n: F.relu(_long(x) @ weight[: x.shape[-1], :n]) + 1,
    "gradient": lambda x, weight, n: (_long(x).t() @ _long(x)[:, :n]) * 0.1,
    "stacks": lambda x, weight, n: torch.baddbmm(
        weight[0, :n], _stacks(x), weight[: x.shape[-1], :n].expand(3, -1, -1)
    ).sigmoid(),
    "widened": lambda x, weight, n: torch.bmm(_stacks(x).float() * 0.5, _stacks(x).float().mT) * 0.25,
    "scores": lambda x, weight, n: torch.bmm(_stacks(x), _stacks(x).mT / 4).softmax(-1),
    "padded": lambda x, weight, n: F.pad(_long(x), (0, 3))[:, :-3] @ weight[: x.shape[-1], :n] - 1,
    "interleaved": lambda x, weight, n: _rotated(F.linear(x, weight[:32, : x.shape[-1]]), weight[1, :8]),
}
GATHERS: dict[str, Callable[[Value, Value], Value]] = {
    "rows": lambda x, places: x[places],
    "negative": lambda x, places: x[places - x.shape[0]],
    "embedding": lambda x, places: F.embedding(places.int(), x) if x.dim() == 2 else x,
    "columns": lambda x, places: x.transpose(0, -1).index_select(-1, places),
    "gather": lambda x, places: x.gather(0, places.view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:])),
}


def _long(x: Value) -> Value:
    """As a matrix with more rows than a tile of a product with few, a multiple of three."""
    rows = x.flatten(0, -2)
    return rows.repeat(-(-18 // rows.shape[0]) * 3, 1)[: max(18, rows.shape[0] // 3 * 3)]


def _stacks(x: Value) -> Value:
    return _long(x).unflatten(0, (3, -1))


def _rotated(x: Value, angles: Value) -> Value:
    """Neighbours turned by angles, in the first half of every head of 16 columns."""
    heads = x.unflatten(-1, (2, 16))
    own, rest = heads[..., :8], heads[..., 8:]
    turned = torch.stack([-own[..., 1::2], own[..., ::2]], -1).flatten(-2)
    return torch.cat([own * angles.cos() + turned * angles.sin(), rest], -1).flatten(-2)


SIZES = (1, 2, 3, 4, 6, 7, 16)
WIDTH = 40  # of the matrix that products take their weights from


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Value], list[tuple[str, Step]]]:
    """Inputs, and steps that each append a tensor to what there is."""
    count = draw(st.integers(1, 3))
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3))
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)) / 4
    places = torch.randint(0, WIDTH, (WIDTH,), generator=torch.Generator().manual_seed(5))
    inputs = [places, weight, *(_input(draw, shape) for _ in range(count))]
    steps: list[tuple[str, Step]] = []
    for position in range(draw(st.integers(2, 9))):
        steps.append(_step(draw, 2 + count + position))
    return inputs, steps


def _input(draw: st.DrawFn, shape: list[int]) -> Value:
    own = [1 if draw(st.integers(0, 4)) == 0 else size for size in shape]
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    order = draw(st.permutations(range(len(own))))
    value = torch.randn([own[dim] for dim in order], generator=generator).to(dtype)
    return value.permute([order.index(dim) for dim in range(len(own))])


def _step(draw: st.DrawFn, have: int) -> tuple[str, Step]:
    first, second = (draw(st.integers(max(1, have - 4), have - 1)) for _ in range(2))
    kind = draw(st.sampled_from(("unary", "binary", "binary", "rows", "view", "product", "gather")))
    if kind == "unary":
        name = draw(st.sampled_from(sorted(UNARY)))
        return f"{name} {first}", lambda values: UNARY[name](values[first])
    if kind == "binary":
        name = draw(st.sampled_from(sorted(BINARY)))
        return f"{name} {first} {second}", lambda values: _binary(name, values[first], values[second])
    if kind == "product":
        name, columns = draw(st.sampled_from(sorted(PRODUCTS))), draw(st.sampled_from((1, 5, 16, 33)))
        return f"{name} {first} {columns}", lambda values: _product(name, values[first], values[1], columns)
    if kind == "gather":
        name, count = draw(st.sampled_from(sorted(GATHERS))), draw(st.sampled_from((1, 3, 8)))
        return f"{name} {first} {count}", lambda values: _gather(name, values[first], values[0][:count])
    table = ROWS if kind == "rows" else VIEWS
    name, dim = draw(st.sampled_from(sorted(table))), draw(st.integers(0, 2))
    return f"{name} {first} {dim}", lambda values: _along(table[name], values[first], dim)


def _binary(name: str, x: Value, y: Value) -> Value:
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        y = y.float().mean().to(y.dtype)
    return BINARY[name](x, y)


def _product(name: str, x: Value, weight: Value, columns: int) -> Value:
    """A matrix product; one that stands for nothing where there is no matrix."""
    if x.dim() < 2 or not x.is_floating_point():
        return x
    return PRODUCTS[name](x[..., :WIDTH], weight.to(x.dtype), columns)


def _gather(name: str, x: Value, places: Value) -> Value:
    x = x.reshape(1) if x.dim() == 0 else x
    return GATHERS[name](x, places.clamp(0, x.shape[0] - 1))


def _along(function: Callable[[Value, int], Value], x: Value, dim: int) -> Value:
    x = x.reshape(1) if x.dim() == 0 else x
    return function(x, dim % x.dim())


def _run(steps: list[tuple[str, Step]]) -> Callable[..., tuple[Value, ...]]:
    def run(*inputs: Value) -> tuple[Value, ...]:
        values = list(inputs)
        for _, step in steps:
            made = step(values)
            for one in made if isinstance(made, tuple) else (made,):
                values.append(one if one.numel() <= 4096 else one.flatten()[:64])
        return tuple(values[len(inputs) :][-3:])

    return run


def difference(want: Value, got: Value, exact: Value, draws: list[Value]) -> str | None:
    """By the rule that everything is judged by: error against float64 at most twice eager's and one ulp.

    `draws` are eager's results for inputs that differ by a rounding: eager may be exact by luck.
    """
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return f"{got.dtype} {tuple(got.shape)}, eager {want.dtype} {tuple(want.shape)}"
    if not want.dtype.is_floating_point:
        return None if torch.equal(got, want) else "integers differ"
    special = ~want.isfinite()
    if not torch.equal(~got.isfinite(), special) or not torch.allclose(
        got[special], want[special], 0, 0, equal_nan=True
    ):
        return "other NaN or infinities"
    finite = want.isfinite() & exact.isfinite()
    if not finite.any():
        return None
    unit = float(exact[finite].abs().max()) * torch.finfo(want.dtype).eps
    exact, want, got = exact[finite], want[finite].double(), got[finite].double()
    errors = [float((one - exact).abs().max()) for one in (want, *(draw[finite].double() for draw in draws))]
    mine, theirs = float((got - exact).abs().max()), max(error for error in errors if error == error)
    return None if mine <= 2 * theirs + unit else f"error {mine:.3g}, eager {theirs:.3g}"


def _rounded_otherwise(value: Value, seed: int) -> Value:
    """Each number, or one of its two neighbours."""
    if not value.is_floating_point():
        return value
    steps = torch.randint(-1, 2, value.shape, generator=torch.Generator().manual_seed(seed))
    return value * (1 + steps * torch.finfo(value.dtype).eps).to(value.dtype)


def check(inputs: list[Value], steps: list[tuple[str, Step]], options: Options, counts: Counter[str]) -> None:
    """Compile one program and compare it.

    Raises:
        AssertionError: it differs; the message holds the program.
        hypothesis.errors.UnsatisfiedAssumption: eager refuses the program.
    """
    run = _run(steps)
    text = "; ".join(name for name, _ in steps)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = run(*inputs)
        except (RuntimeError, TypeError, IndexError) as error:
            counts["refused by eager"] += 1
            counts[f"refused: {str(error).splitlines()[0][:60]}"] += 1
            reject()
        graph = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
        graph.graph.eliminate_dead_code()
        code = graph.code
        try:
            _, evidence = emit_kernels(graph, options, call=True)
            got = graph(*inputs)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{text}\n{inputs}\n{code}") from error
        with InFloat64():
            exact = run(*(one.double() if one.is_floating_point() else one for one in inputs))
        draws = [run(*(_rounded_otherwise(one, seed) for one in inputs)) for seed in range(3)]
    counts["programs"] += 1
    counts["kernels"] += sum(entry.status is Status.APPLIED for entry in evidence)
    counts["computed again"] += sum("of others computed again" in entry.reason for entry in evidence)
    counts["gathers"] += sum("index" in entry.reason or "embedding" in entry.reason for entry in evidence)
    for place, three in enumerate(zip(want, got, exact, strict=True)):
        found = difference(*three, [draw[place] for draw in draws])
        shapes = [(tuple(one.shape), one.dtype, one.stride()) for one in inputs]
        assert found is None, f"result {place}: {found}\n{text}\n{shapes}\n{code}"


def fuzz(programs_count: int, directory: str) -> dict[str, Any]:
    """Run that many programs.

    Returns: `mismatches`: how many differ; `failure`: the first of them, made smaller; `failures`: the first
    few as they were found; and how many `programs`, `kernels`, ... there were.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    options = Options.parse(options={"cache_dir": directory, "gemm": "always"})

    def recorded(program: tuple[list[Value], list[tuple[str, Step]]]) -> None:
        try:
            check(*program, options, counts)
        except AssertionError as error:
            failures.append(str(error))
            bar.console.print(f"program {counts['programs']} differs: {error}", markup=False, highlight=False)
        bar.update(task, completed=counts["programs"], mismatches=len(failures))
        if bar.disable and counts["programs"] % 100 == 0:
            print(f"{counts['programs']} programs, {len(failures)} differ", file=sys.stderr, flush=True)

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), "{task.fields[mismatches]} differ")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("programs", total=programs_count, mismatches=0)
        _each(programs_count, recorded, Phase.generate)
    found = {**counts, "mismatches": len(failures), "failures": failures[:10]}
    return {**found, "failure": _smallest(programs_count, options) if failures else ""}


def _each(programs_count: int, run: Callable[[Any], None], *phases: Phase) -> None:
    """Call `run` with programs, always with the same ones."""
    chosen = settings(
        max_examples=programs_count,
        database=None,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )

    @chosen
    @given(programs())
    def one(program: tuple[list[Value], list[tuple[str, Step]]]) -> None:
        run(program)

    one()


def _smallest(programs_count: int, options: Options) -> str:
    """The first program that differs, made smaller for as long as it does."""
    try:
        _each(
            programs_count,
            lambda program: check(*program, options, Counter()),
            Phase.generate,
            Phase.shrink,
        )
    except AssertionError as error:
        return str(error)
    return "none that differs again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    given_arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(fuzz(given_arguments.programs, directory)))


if __name__ == "__main__":
    main()
