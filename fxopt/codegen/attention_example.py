"""Inputs on which the file of a kernel of attention checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.codegen.attention_reference import operand_names
from fxopt.codegen.attention_spec import Spec
from fxopt.ir.cost import hint

# Of an example. Its reference holds several tensors of scores at once, 8 GiB each in float64.
MOST_SCORES = 1 << 30


def example_text(spec: Spec, operands: Sequence[Any], *, backward: bool = False) -> str:
    """``def example_inputs(device)``, of the sizes seen while compiling, with fewer sequences and heads where
    those have more than `MOST_SCORES` scores.

    Args:
        operands: of ``fxopt::block_attention``; none for a file that is not to be run.
    """
    lines = [f"{name} = {text}" for name, text in _inputs(spec, operands)]
    names = operand_names(spec) if operands else []
    given = "".join(f"{name}, " for name in names)
    if backward and operands:
        lines += [f"out, sums = attention({given})", "sums = sums.float()"]
        given = f"torch.randn_like(out), out, sums, {given}"
    lines.append(f"return ({given})")
    return "def example_inputs(device):\n" + "\n".join(f"    {line}" for line in lines)


def _inputs(spec: Spec, operands: Sequence[Any]) -> list[tuple[str, str]]:
    if not operands:
        return []
    query, key, value, sinks, _, captures, sizes = operands
    batch, groups = _sequences_and_groups(query, key)
    heads = {"query": groups * spec.group, "key": groups, "value": groups}
    found = [
        (name, _tensor(each, batch, heads[name]))
        for name, each in zip(heads, (query, key, value), strict=True)
    ]
    found += [(f"c{place}", _tensor(each)) for place, each in enumerate(captures)]
    found += [("sinks", _tensor(sinks, heads["query"]))] if sinks is not None else []
    found += [("seed", "torch.tensor(77, device=device)")] if spec.dropout_p else []
    return [*found, *((f"n{place}", str(hint(each))) for place, each in enumerate(sizes))]


def _sequences_and_groups(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """As many as are seen, or half of them, a quarter, ..."""
    batch, groups = hint(query.shape[0]), int(key.shape[1])
    of_group = int(query.shape[1]) // groups * hint(query.shape[2]) * hint(key.shape[2])
    while batch > 1 and batch * groups * of_group > MOST_SCORES:
        batch //= 2
    while groups > 1 and batch * groups * of_group > MOST_SCORES:
        groups //= 2
    return batch, groups


def _tensor(value: torch.Tensor, *first: int) -> str:
    """Random numbers; booleans of which most are true; integers that are an index of anything.

    Args:
        first: the first sizes, where these are not the tensor's own.
    """
    shape = (*first, *(hint(size) for size in value.shape[len(first) :]))
    if value.dtype.is_floating_point:
        return f"torch.randn({shape}, device=device).to({value.dtype})"
    if value.dtype is torch.bool:
        return f"torch.rand({shape}, device=device) < 0.9"
    return f"torch.zeros({shape}, dtype={value.dtype}, device=device)"
