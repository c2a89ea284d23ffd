"""Run as a program: fxopt's kernels in what Inductor generates for an assumed GPU; findings as JSON."""

from __future__ import annotations

from benchmarks.assumed_gpu import generated, install

TARGET = install("sm_90")

import json  # noqa: E402
import re  # noqa: E402
from collections.abc import Callable  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
from torch._higher_order_ops.associative_scan import associative_scan  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.codecache import compiled_fx_graph_hash  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as attend  # noqa: E402

from fxopt.hosts import inductor_kernels  # noqa: E402
from fxopt.hosts.inductor import config_patches  # noqa: E402
from fxopt.options import Options  # noqa: E402
from fxopt.report.record import GraphRecord, collect  # noqa: E402
from support.made_up_timer import made_up  # noqa: E402

Found = dict[str, Any]


def norm(x: torch.Tensor) -> torch.Tensor:
    return torch.layer_norm(x + 1, x.shape[-1:]) * 2


def dropped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm(torch.dropout(x @ weight, 0.1, True))


def dropped_norm(x: torch.Tensor) -> torch.Tensor:
    return norm(torch.dropout(x, 0.1, True))


def windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    place = torch.arange(query.shape[2], device=query.device)
    mask = (place <= place[:, None]) & (place > place[:, None] - 7)
    return attend(query, key, value, mask, enable_gqa=True)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attend(query, key, value, is_causal=True, enable_gqa=True)


def attention(function: Callable[..., Any], **options: Any) -> Found:
    """A training step of attention."""
    heads = ((2, 4), (2, 2), (2, 2))
    operands = [torch.randn(b, 300, h, 64, device="cuda", dtype=torch.bfloat16) for b, h in heads]
    operands = [one.transpose(1, 2).requires_grad_() for one in operands]
    return compiled(function, *operands, train=True, **options)


def compiled(
    function: Callable[..., Any], *inputs: torch.Tensor, train: bool = False, **options: Any
) -> Found:
    """The launches of what is compiled for a call: names and arguments, and what the record says."""
    options = {"kernels": "always", "strict": True, **options}
    with generated(TARGET) as made, collect() as records:
        results = torch.compile(function, backend="fxopt", options=options)(*inputs)
        if train:
            results.sum().backward()
    torch._dynamo.reset()
    code = [one.code for one in made]
    runs = [re.findall(r"(\w+)\.run\((.*)\)", text) for text in code]
    (record,) = records
    return {
        "runs": [[name for name, _ in one] for one in runs],
        "arguments": [[arguments.split(", ") for _, arguments in one] for one in runs],
        "allocated": dict(re.findall(r"(\w+) = empty_strided_cuda\((.*), torch\.\w+\)", code[0])),
        "asserted": ["'assert_indirect_indexing': True" in one for one in kernels_in(code[0])],
        "ops": sum("torch.ops.fxopt_kernels" in text for text in code),
        "kernels": [kernel.name for kernel in record.kernels],
        "evidence": [[e.status.value, e.reason] for e in record.evidence if e.rewrite == "emit-kernels"],
        "providers": [list(one) for one in record.providers],
        "failures": [list(one) for one in record.failures],
    }


def kernels_in(code: str) -> list[str]:
    """The definitions of fxopt's kernels that assert something."""
    return [one for one in code.split("async_compile.triton(") if "tl.device_assert(" in one]


def cases() -> Found:
    x, wide = torch.randn(64, 96, device="cuda"), torch.randn(96, 200, device="cuda")
    odd = torch.randn(1025, 1025, device="cuda")  # Inductor pads such rows
    weight = torch.randn(96, 96, device="cuda", requires_grad=True)
    return {
        "keys": keys(),
        "always": compiled(norm, x),
        "auto": compiled(norm, x, kernels="auto"),
        "never": compiled(norm, x, kernels="never"),
        "backward": compiled(lambda a, w: norm(a @ w), x, weight, train=True),
        "unpadded": compiled(lambda a: norm(a.cumsum(0)), odd),
        "padded": compiled(lambda a: norm(a.cumsum(0)), odd, kernels="never"),
        "views": compiled(lambda a, b: norm(a.t() + b[:, 3:67]), x, wide),
        "looked up": compiled(lambda a, i: norm(a[i]), x, torch.arange(60, device="cuda")),
        "written": compiled(write_behind, x),
        "scan": compiled(scanned, x),
        "dynamic": compiled(norm, marked(torch.randn(64, 96, device="cuda"))),
        "window": attention(windowed),
        "window, unasked": attention(windowed, kernels="auto"),
        "window, never": attention(windowed, kernels="never"),
        "window, faster": contested(windowed, kernel=1e-5, host=2e-5),
        "window, slower": contested(windowed, kernel=2e-5, host=1e-5),
        "causal, faster": contested(causal, kernel=1e-5, host=2e-5),
        "causal": attention(causal),
        "dropout": compiled(dropped, x, weight, train=True),
        "dropout, slower": measured(x, kernel=2e-5, host=1e-5, function=dropped_norm),
        "fault": with_fault(x, strict=False),
        "strict": with_fault(x, strict=True),
        "faster": measured(x, kernel=1e-5, host=2e-5),
        "slower": measured(x, kernel=2e-5, host=1e-5),
    }


def write_behind(x: torch.Tensor) -> torch.Tensor:
    before = norm(x)
    x.add_(before)
    return norm(x) * before


def scanned(x: torch.Tensor) -> torch.Tensor:
    """What a scan combines with is written into its kernel."""
    return norm(associative_scan(lambda a, b: torch.exp(a * b) + a, x, dim=0))


def marked(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.mark_dynamic(x, 0)
    return x


def measured(x: torch.Tensor, kernel: float, host: float, function: Callable[..., Any] = norm) -> Found:
    """With a timer that finds so many seconds for every kernel, and for Inductor."""
    timer = made_up(kernel, host)
    with patch("fxopt.codegen.timing.GpuTimer", timer), TemporaryDirectory() as directory:
        found = compiled(function, x, kernels="auto", tune_seconds=5, cache_dir=directory)
    return {**found, "closed": timer.closed}


def contested(function: Callable[..., Any], kernel: float, host: float) -> Found:
    """A training step of attention, where kernels are found to take so many seconds, and other ways to."""
    arena = made_up(kernel, host)
    with (
        patch("fxopt.codegen.timing.GpuTimer", made_up()),
        patch("fxopt.hosts.gpu_contest.GpuArena", arena),
        TemporaryDirectory() as directory,
    ):
        found = attention(function, kernels="auto", tune_seconds=5, cache_dir=directory)
    asked = [
        {"op": call.op, "learned": [each.learned for each in call.examples], "seconds": seconds}
        for call, seconds in arena.asked
    ]
    return {**found, "asked": asked}


def with_fault(x: torch.Tensor, strict: bool) -> Any:
    """Emission fails after it has changed the graph."""

    def broken(graph: torch.fx.Graph) -> int:
        raise RuntimeError("cannot dissolve")

    with patch("fxopt.runtime.launch.dissolve_ops", broken):
        try:
            return compiled(norm, x, strict=strict)
        except Exception as error:
            return {"raised": str(error).splitlines()[0]}


def keys() -> Found:
    """The keys of Inductor's cache of graphs for one graph under several options."""

    def key(options: Options) -> str:
        emit = inductor_kernels.emitter(options, GraphRecord(index=0))
        graph = torch.fx.symbolic_trace(lambda x: x + 1)
        with config.patch(config_patches(options, emit)):
            return compiled_fx_graph_hash(graph, [], {}, [])[0]

    return {
        "same": [key(Options(kernels="always")) for _ in range(2)],
        "others": [
            key(options)
            for options in (
                Options(),
                Options(kernels="never"),
                Options(kernels="always", target="sm_80"),
                Options(tune_seconds=5.0),
            )
        ],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with FakeTensorMode():
        print(json.dumps(cases()))
