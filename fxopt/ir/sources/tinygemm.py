"""PyTorch's packed int4: the operand of `_weight_int4pack_mm` and of `_weight_int4pack_mm_for_cpu`.

The layout depends on the device and, on a CPU, on its instruction set. It is found out instead of assumed:
the op that packs is given weights whose codes spell, digit by digit, where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.bits import nibbles
from fxopt.ir.sources.refusal import CannotConvert

aten = torch.ops.aten

# Codes (N, K) uint8, from 0 to 15 -> the packed tensor.
Packer = Callable[[torch.Tensor], torch.Tensor]
BLOCK_ROWS = 64


def from_int4pack(
    packed: torch.Tensor,
    scales_and_zeros: torch.Tensor,
    shape: Sequence[int],
    group_size: int,
    pack: Packer | None = None,
) -> QuantizedWeight:
    """w = (codes - 8) * scales + zeros.

    Args:
        packed: what the packing op makes of the codes (N', K'), which may be padded.
        scales_and_zeros: (K' / G, N', 2). shape: (N, K), of the weight without padding.
        pack: the op that packs; None is PyTorch's for the device.
    """
    groups, rows = scales_and_zeros.shape[:2]
    columns = groups * group_size
    if packed.numel() * packed.element_size() * 2 != rows * columns:
        raise CannotConvert(f"{tuple(packed.shape)} for {rows} x {columns}")
    packer = pack or _packer(packed)
    codes = _codes(packed, packer, rows, columns)
    table = scales_and_zeros.detach().permute(2, 1, 0)
    wanted_rows, wanted = int(shape[0]), int(shape[1])
    within = -(-wanted // group_size)
    return QuantizedWeight.from_codes(
        "int4",
        codes[:wanted_rows, :wanted].contiguous(),
        table[0, :wanted_rows, :within].contiguous(),
        group_size=min(group_size, wanted),
        offsets=table[1, :wanted_rows, :within].contiguous(),
    )


def _codes(packed: torch.Tensor, pack: Packer, rows: int, columns: int) -> torch.Tensor:
    """The codes (rows, columns)."""
    stored = _in_memory(packed)
    # Rows are packed in blocks, as far as is known; packing what was found tells whether that holds.
    for block in (BLOCK_ROWS, rows):
        if rows % block:
            continue
        origin = _origin(pack, block, columns, packed.device)
        found = torch.empty_like(stored).view(rows // block, -1)
        found[:, origin] = stored.view_as(found)
        codes = found.view(rows, columns)
        if torch.equal(_in_memory(pack(codes)), stored):
            return codes
    raise CannotConvert("a packed int4 weight that the packing op does not reproduce")


def _origin(pack: Packer, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Which code of (rows, columns) each packed nibble is, read off digits to the base 16."""
    count = rows * columns
    places = torch.arange(count, device=device).view(rows, columns)
    origin = torch.zeros(count, dtype=torch.int64, device=device)
    digit = 0
    while digit == 0 or count > 16**digit:
        spelled = ((places >> (4 * digit)) & 15).to(torch.uint8)
        origin |= _in_memory(pack(spelled)).long() << (4 * digit)
        digit += 1
    return origin


def _in_memory(packed: torch.Tensor) -> torch.Tensor:
    """All nibbles, one an entry, in the order of memory."""
    return nibbles(packed.detach().contiguous().view(torch.uint8).flatten(), high_first=False)


def _packer(packed: torch.Tensor) -> Packer:
    if packed.device.type == "cpu" and packed.dtype is torch.uint8 and packed.dim() == 2:
        return lambda codes: aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    if packed.device.type == "cuda" and packed.dtype is torch.int32 and packed.dim() == 4:
        inner = 2 * packed.shape[3]
        return lambda codes: aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner)
    raise CannotConvert(
        f"packed int4 of {packed.dtype} with {packed.dim()} dimensions on {packed.device.type}"
    )
