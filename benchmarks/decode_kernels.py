"""Attention of a few queries over a cache, on a GPU: `python -m benchmarks.decode_kernels`.

By heads, group, live keys and room of the cache: the time of fxopt's kernel beside torch's
`scaled_dot_product_attention` (over the live keys alone, which takes a program that knows their number on the
host, and over the whole cache with a mask), compiled FlexAttention with a mask of the length, and a copy of
as many bytes as live keys have. All in one run, on the same tensors, in turns. Without a GPU the kernel runs
in Triton's interpreter (`TRITON_INTERPRET=1`), which shows that it runs, and nothing of time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave
from fxopt.runtime.kernel_cache import default_cache

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Sizes of one attention: `live` of `room` keys for each of `batch` sequences and `kv_heads` heads."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    width: int
    live: int
    room: int

    @property
    def live_bytes(self) -> int:
        return 2 * 2 * self.batch * self.kv_heads * self.live * self.width


# 256 MiB of live keys and values and more, groups of 1 to 16, a cache eight times as long, one sequence.
SETTINGS = (
    *(Setting(16, 8, group, 1, 128, 8192, 8192) for group in (1, 4, 5, 7, 8, 16)),
    Setting(16, 8, 4, 1, 128, 8192, 65536),
    Setting(1, 8, 4, 1, 128, 131072, 131072),
    Setting(64, 8, 4, 1, 64, 8192, 8192),
    Setting(16, 8, 4, 4, 128, 8192, 8192),
    Setting(16, 4, 8, 1, 256, 8192, 8192),
)
TINY = (Setting(1, 2, 3, 1, 32, 37, 64), Setting(2, 1, 4, 2, 64, 50, 64))


def candidates(setting: Setting, device: str) -> dict[str, Step]:
    """The ways to compute it, by name."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = setting.kv_heads * setting.group
    made = {"device": device, "dtype": dtype}
    of_queries = (setting.batch, heads, setting.queries, setting.width)
    query = torch.randn(of_queries, **made)  # type: ignore[call-overload]
    shape = (setting.batch, setting.kv_heads, setting.room, setting.width)
    key, value = (torch.randn(shape, **made) for _ in range(2))  # type: ignore[call-overload]
    length = torch.tensor([setting.live - setting.queries], device=device)
    found = {"fxopt": _ours(query, key, value, length)}
    live = torch.arange(setting.room, device=device) <= (
        length + torch.arange(setting.queries, device=device)[:, None]
    )
    part = key[:, :, : setting.live], value[:, :, : setting.live]
    causal = live[:, : setting.live] if setting.queries > 1 else None
    found["sdpa, live keys"] = lambda: F.scaled_dot_product_attention(query, *part, causal, enable_gqa=True)
    found["sdpa, mask"] = lambda: F.scaled_dot_product_attention(query, key, value, live, enable_gqa=True)
    if device == "cuda":
        found |= _on_a_gpu(setting, query, key, value, length)
    return found


def _ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: torch.Tensor) -> Step:
    tensors = {"query": query, "key": key, "value": value}
    parsed = MaskProgram.parse("k <= q + c0[0]"), ScoreProgram.parse("")
    problem = Problem(tensors, (length,), (), query.shape[-1] ** -0.5, "zero", *parsed)
    launch = default_cache().load(decode_kernel(problem, Target.detect())).launch
    return lambda: launch(query, key, value, length)


def _on_a_gpu(
    setting: Setting, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: torch.Tensor
) -> dict[str, Step]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def live(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q + length[0]

    mask = create_block_mask(live, None, None, setting.queries, setting.room, device="cuda")
    flex = torch.compile(flex_attention)
    source = torch.empty(setting.live_bytes, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return {
        "flex": lambda: flex(query, key, value, block_mask=mask, enable_gqa=True),
        "copy": lambda: target.copy_(source),
    }


def measure(setting: Setting, seconds: float) -> dict[str, Any]:
    """The times of one setting, and whether the results agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, errors = dict[str, Step](), dict[str, str]()
    for name, step in candidates(setting, device).items():
        try:
            step()
            steps[name] = step
        except Exception as error:  # what a peer refuses is part of the result
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    ours, exact = steps["fxopt"](), steps["sdpa, live keys"]()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(exact, torch.Tensor)
    times = interleave(steps, budget_seconds=seconds)
    medians = {name: times.median(name) for name in steps}
    found = {**asdict(setting), "live_bytes": setting.live_bytes, "seconds": medians, "errors": errors}
    found["difference"] = float((ours.float() - exact.float()).abs().max())
    found["ratios"] = {name: times.ratio(name, "fxopt").as_dict() for name in steps if name != "fxopt"}
    if "copy" in steps:
        rate = 2 * setting.live_bytes / medians["copy"]
        found["share_of_copy"] = setting.live_bytes / medians["fxopt"] / rate
    return found


def table_of(found: list[dict[str, Any]]) -> Table:
    """Times in microseconds; the share is of the bandwidth of the copy."""
    names = list(dict.fromkeys(name for one in found for name in one["seconds"]))
    table = Table(title="attention of few queries over a cache, us")
    for heading in ("B x Hkv x group", "queries", "D", "live / room", *names, "share"):
        table.add_column(heading, justify="right")
    for one in found:
        times = (
            f"{one['seconds'][name] * 1e6:.1f}" if name in one["seconds"] else "refused" for name in names
        )
        share = f"{one['share_of_copy']:.0%}" if "share_of_copy" in one else ""
        sizes = f"{one['batch']} x {one['kv_heads']} x {one['group']}"
        table.add_row(
            sizes, str(one["queries"]), str(one["width"]), f"{one['live']} / {one['room']}", *times, share
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write results as JSON")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each setting")
    parser.add_argument("--tiny", action="store_true", help="sizes for an interpreter")
    arguments = parser.parse_args()
    console, found = Console(), list[dict[str, Any]]()
    for setting in TINY if arguments.tiny else SETTINGS:
        found.append(measure(setting, arguments.seconds))
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": describe(), "rows": found}, indent=1) + "\n")
    console.print(table_of(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
