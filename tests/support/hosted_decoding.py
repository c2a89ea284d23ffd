"""Run as a program: attention over caches in what Inductor generates for an assumed GPU; findings as JSON."""

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
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fxopt.codegen import fit  # noqa: E402
from fxopt.ir.row_codes import dequantized, quantized, write_rows  # noqa: E402
from fxopt.report.record import collect  # noqa: E402
from support.made_up_timer import made_up  # noqa: E402

Tensor = torch.Tensor


def with_length(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    live = torch.arange(key.shape[2], device=query.device) <= length
    return F.scaled_dot_product_attention(query, key, value, live[None, None, None], enable_gqa=True)


def with_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Two layers with one mask."""
    first = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return F.scaled_dot_product_attention(first, key, value, mask, enable_gqa=True)


def without_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def of_rows(query: Tensor, key: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    """Keys and values of 8 bits."""
    wide = (key.to(scale.dtype) * scale).to(query.dtype)
    return F.scaled_dot_product_attention(query, wide, wide, mask, enable_gqa=True)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def appending(
    x: Tensor, angles: Tensor, position: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """A layer with a static cache: eight heads of queries, two of keys, and two of values."""
    query, new = (rotated(each, angles.cos(), angles.sin()) for each in (x[:, :8], x[:, 8:10]))
    key.index_copy_(2, position, new)
    value.index_copy_(2, position, x[:, 10:])
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def rounding(
    x: Tensor,
    angles: Tensor,
    position: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    mask: Tensor,
) -> Tensor:
    """The same, with a cache of 8 bits."""
    query, new = (rotated(each, angles.cos(), angles.sin()) for each in (x[:, :8], x[:, 8:10]))
    read = []
    for cache, scales, states in ((key, key_scale, new), (value, value_scale, x[:, 10:])):
        rows, of_rows = quantized(states, cache.dtype)
        write_rows(cache, position, rows)
        scales.index_copy_(2, position, of_rows)
        read.append(dequantized(cache, scales, x.dtype))
    return F.scaled_dot_product_attention(query, *read, mask, enable_gqa=True)


def compiled(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> dict[str, Any]:
    """The launches, what they take, and what the record says."""
    options = {"kernels": "always", "strict": True, **options}
    torch._dynamo.reset()
    asked = patch("fxopt.codegen.emit.fitting", wraps=fit.fitting)
    with torch.no_grad(), generated(TARGET) as made, collect() as records, asked as fitting:
        torch.compile(function, backend="fxopt", options=options)(*inputs)
    runs = [each for one in made for each in re.findall(r"(\w+)\.run\((.*)\)", one.code)]
    return {
        "runs": [name for name, _ in runs],
        "arguments": [arguments.split(", ") for _, arguments in runs],
        "fitted": fitting.call_count,
        "opaque": any("torch.ops.fxopt" in one.code for one in made),
        "kernels": [kernel.name for record in records for kernel in record.kernels],
        "providers": [list(each) for record in records for each in record.providers],
    }


def contested(*call: Any) -> dict[str, Any]:
    """Where kernels are found to be faster, and with which numbers that is asked."""
    arena = made_up()
    patched = patch("fxopt.hosts.gpu_contest.GpuArena", arena)
    with patched, TemporaryDirectory() as directory:
        found = compiled(*call, kernels="auto", tune_seconds=60, cache_dir=directory)
    return {**found, "asked": [[each.number for each in one.examples] for one, _ in arena.asked]}


def cases() -> dict[str, Any]:
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16)
    value = torch.randn(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 1, 512, device="cuda", dtype=torch.bool)
    rows = torch.zeros(2, 2, 512, 64, device="cuda", dtype=torch.int8)
    scales = [torch.ones(2, 2, 512, 1, device="cuda") for _ in range(2)]
    growing = [torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    padding = torch.ones(2, 1, 1, 300, device="cuda", dtype=torch.bool)
    new = (
        torch.randn(2, 12, 1, 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(2, 1, 1, 64, device="cuda", dtype=torch.bfloat16),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
    )
    for each, dim in ((growing[0], 2), (growing[1], 2), (padding, 3)):
        torch._dynamo.mark_dynamic(each, dim)
    length = torch.zeros((), dtype=torch.int64, device="cuda")
    return {
        "length": compiled(with_length, query, key, value, length),
        "length, faster": contested(with_length, query, key, value, length),
        "mask": compiled(with_mask, query, key, value, mask),
        "mask, faster": contested(with_mask, query, key, value, mask),
        "none": compiled(without_mask, query, key, value),
        "rows": compiled(of_rows, query, rows, torch.ones(2, 2, 512, 1, device="cuda"), mask),
        "growing": compiled(with_mask, query, *growing, padding),
        "append": compiled(appending, *new, key, value, mask),
        "append int8": compiled(rounding, *new, rows, rows.clone(), *scales, mask),
        "append fp8": compiled(
            rounding, *new, *(rows.to(torch.float8_e4m3fn) for _ in range(2)), *scales, mask
        ),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with FakeTensorMode():
        print(json.dumps(cases()))
