"""The results of `benchmarks.attention_traffic` as the page docs/attention_traffic.md."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import table

Row = dict[str, Any]
MOST_OF_A_CACHE = 1.02  # that decoding reads, relative to its live keys and values

_HEAD = """# Bytes and operations of attention's kernels

Counted load by load and product by product while the kernels' files, made for sm_90, run in Triton's
interpreter (torch {torch}). Written by `python -m benchmarks.attention_traffic`. Nothing was measured on a
GPU for it.

- *least* bytes: every input once and every result once. For decoding: the live keys and values.
- *memory*: every byte that a launch reads or writes, once for the launch, as if the L2 cache held what its
  programs share. For decoding: every byte of keys and values, each time that it is read.
- *requested*: all that programs read and write, from the L2 cache, too.
- *least* operations: the products of the scores that the mask leaves, two in the forward, five in the
  backward. *done*: all products of the tiles that are visited, in all launches: the backward computes the
  scores once for dQ, once for dK and dV, and once more for D where that is summed from the weights. A tile
  of decoding has at least 16 rows.

"""


def render(results: dict[str, Any]) -> str:
    """The whole page."""
    names = ("kernel", "case", "launches", "least KiB", "memory", "requested", "least Mflop", "done")
    lines = table(names, map(cells, results["rows"]))
    return _HEAD.format(torch=results["machine"]["torch"]) + lines + "\n" + _SIZES


_SIZES = """Forward and backward: 1 sequence, 4 heads that share one of K and V, 256 tokens, D = 64, float16;
of a window 64 keys are seen, of a prefix 100, there are two documents of 128. Decoding: 2 sequences, 2 heads
of K and V, D = 128, a cache with room for 1024 keys.
"""


def cells(row: Row) -> list[str]:
    """One line of the table."""
    return [
        row["kernel"],
        row["case"],
        str(row["launches"]),
        f"{row['least'] / 1024:.1f}",
        f"{row['memory'] / row['least']:.2f} x",
        f"{row['requested'] / row['least']:.2f} x",
        f"{row['least_flops'] / 1e6:.1f}",
        f"{row['flops'] / row['least_flops']:.2f} x",
    ]
