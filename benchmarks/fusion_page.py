"""The results of `benchmarks.fusion` as the page docs/fusion.md."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import table

Row = dict[str, Any]
GOAL = {"decode": 8}  # launches of a layer
SHALLOW = 2  # layers of the model that is subtracted
RED, GREEN = "🔴", "🟢"

_HEAD = """# Launches and bytes of a layer

What one layer of a model launches on a GPU and moves to and from its memory: fxopt's kernels inside of
TorchInductor's graphs (`options={{"kernels": "always"}}`) beside TorchInductor alone. Written by
`python -m benchmarks.fusion` (torch {torch}, transformers {transformers}) for {target}. Nothing was run for
it: models are compiled to the code that Inductor generates, for a GPU that is assumed, with tensors that have
no memory. {red} marks where fxopt has more than Inductor, or more than {goal} launches in decoding.

"""

_METHOD = """
## How it is counted

- A layer is the difference between models of so many *layers* and of {shallow}, by their number: embedding
  and loss are not in it. A layer of T5 is one of the encoder with one of the decoder.
- The sizes are those of Llama 3.2 1B, BERT base, T5 base and ViT base, in bfloat16, without dropout; 4
  sequences of 512 tokens (4 images for ViT). Decoding is one token over a static cache of 1024. Training is
  forward and backward.
- Launches are the calls in the generated code: Triton kernels, matrix products, and other calls of libraries,
  such as fused attention. Of fxopt's, *kernels* are its own, *left* what Inductor makes of the rest.
- Products with more than 16 rows are the library's in both columns (`"gemm": "never"`): which of them would
  be faster in a kernel has not been measured.
- T5's attention with a learned bias is in fxopt's kernels: several launches in the backward where the library
  has one.
- Bytes are, of what Inductor launches, Inductor's own account (`get_read_write_buffers_sizes`); of fxopt's
  kernels what their files say: every tensor that is read or written, once. Weights are part of them. Partial
  sums, which the two launches of a split reduction hand on, are not.
- The layout of convolutions is not optimized (`layout_optimization`): Inductor decides on it by the number of
  nodes, so that models of two depths would not have the same embedding of images.
"""


def render(results: dict[str, Any]) -> str:
    """The whole page."""
    machine = results["machine"]
    told = {name: machine[name] for name in ("torch", "transformers")}
    head = _HEAD.format(**told, target=results["target"], red=RED, goal=GOAL["decode"])
    names = (
        "model",
        "phase",
        "layers",
        "Inductor: launches",
        "fxopt: launches",
        "of which",
        "Inductor: MiB",
        "fxopt: MiB",
    )
    return head + table(names, map(cells, results["rows"])) + _METHOD.format(shallow=SHALLOW)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    theirs, ours = row["inductor"], row["fxopt"]
    before, after = (sum(one["launches"].values()) for one in (theirs, ours))
    more = after > min(before, GOAL.get(row["phase"], before))
    parts = {"fxopt": "kernels", "inductor": "left", "products": "products", "other": "other"}
    told = [f"{ours['launches'].get(kind, 0):g} {name}" for kind, name in parts.items()]
    return [
        row["model"],
        row["phase"],
        str(row["layers"]),
        f"{before:g}",
        f"{_mark(more)} {after:g}",
        ", ".join(told),
        f"{theirs['bytes'] / 2**20:.1f}",
        f"{_mark(ours['bytes'] > theirs['bytes'])} {ours['bytes'] / 2**20:.1f}",
    ]


def _mark(red: bool) -> str:
    return RED if red else GREEN
