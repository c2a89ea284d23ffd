"""bitsandbytes: rows of int8, and blocks of NF4 or FP4 with scales that may be quantized themselves.

Dettmers et al., "LLM.int8()", 2022, and "QLoRA", 2023; the layouts are those of bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.bits import nibbles
from fxopt.ir.sources.refusal import CannotConvert
from fxopt.ir.weight_formats import FORMATS

# Rows that are interleaved in the layout for CPUs with AVX512-BF16.
CPU_ROWS = 32
# Blocks that run over the end of a row are cut where rows end, but not into pieces shorter than this.
SHORTEST = 16


def from_int8(codes: torch.Tensor, absmax: torch.Tensor) -> QuantizedWeight:
    """w = codes * absmax / 127.

    Args:
        codes: int8 (N, K), called CB there.
        absmax: (N,) float32, the largest magnitude of each row, called SCB.
    """
    if codes.dtype is not torch.int8 or codes.dim() != 2 or absmax.numel() != codes.shape[0]:
        raise CannotConvert(f"int8 codes of {codes.dtype} {tuple(codes.shape)}, {absmax.numel()} scales")
    scales = absmax.float().reshape(-1, 1) * (1.0 / 127.0)
    return QuantizedWeight.from_codes("int8", codes, scales)


def from_4bit(
    packed: torch.Tensor, shape: Sequence[int], absmax: torch.Tensor, block: int, kind: str
) -> QuantizedWeight:
    """Codes of a weight (N, K) in row-major order, the first of two in the high bits, in blocks.

    Args:
        packed: of any dtype and shape, ceil(N K / 2) bytes. shape: (N, K). absmax: of each block, float32.
        kind: "nf4" or "fp4".
    """
    rows, columns = shape
    count = rows * columns
    data = packed.detach().contiguous().view(torch.uint8).flatten()
    if data.numel() != -(-count // 2) or absmax.numel() != -(-count // block):
        raise CannotConvert(f"{data.numel()} bytes and {absmax.numel()} blocks for {rows} x {columns}")
    codes = nibbles(data, high_first=True)[:count].view(rows, columns)
    group = math.gcd(columns, block)
    if group < min(SHORTEST, columns):
        raise CannotConvert(f"blocks of {block} run over the ends of rows of {columns}")
    starts = torch.arange(0, count, group, device=absmax.device) // block
    scales = absmax.float().flatten()[starts].view(rows, columns // group)
    return QuantizedWeight.from_codes(_known(kind), codes, scales, group_size=group)


def from_cpu_4bit(packed: torch.Tensor, absmax: torch.Tensor, block: int, kind: str) -> QuantizedWeight:
    """The layout that bitsandbytes makes in the first call on a CPU with AVX512-BF16.

    Of each 32 rows and 2 columns the 64 codes, row by row, are stored in 32 bytes: the first half in the low
    bits, the second in the high bits.

    Args:
        packed: uint8 (N, K / 2). absmax: (K / block, N) bfloat16.
    """
    rows, half = packed.shape
    if packed.dtype is not torch.uint8 or rows % CPU_ROWS or absmax.shape != (2 * half // block, rows):
        raise CannotConvert(f"blocks {tuple(absmax.shape)} of {packed.dtype} {tuple(packed.shape)} for CPUs")
    pieces = packed.detach().reshape(-1, CPU_ROWS)
    both = torch.cat((pieces & 15, pieces >> 4), -1).view(rows // CPU_ROWS, half, CPU_ROWS, 2)
    codes = both.transpose(1, 2).reshape(rows, 2 * half)
    return QuantizedWeight.from_codes(_known(kind), codes, absmax.t().contiguous(), group_size=block)


def nested_absmax(
    codes: torch.Tensor, table: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor, block: int
) -> torch.Tensor:
    """The scales of blocks that are quantized themselves: table[codes] * absmax + offset, in float32.

    Args:
        codes: uint8 (B,). table: (256,). absmax: (ceil(B / block),). offset: one number.
    """
    wide = absmax.float().repeat_interleave(block)[: codes.numel()]
    return table.float()[codes.flatten().long()] * wide + offset.float()


def kind_of_table(table: torch.Tensor) -> str:
    """Which format has the 16 values of `table`."""
    for name in ("nf4", "fp4"):
        if table.numel() == 16 and torch.equal(table.detach().float().cpu().flatten(), FORMATS[name].table):
            return name
    raise CannotConvert("a table of values that is neither NF4's nor FP4's")


def _known(kind: str) -> str:
    if kind not in ("nf4", "fp4"):
        raise CannotConvert(f"a format of bitsandbytes that is not known: {kind}")
    return kind
