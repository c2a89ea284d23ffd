"""What ``fxopt::dequantized``, ``fxopt::wide_product`` and ``fxopt::round_e4m3`` compute, in plain torch."""

import torch

# --- All below is copied into kernels' files as it stands.


def dequantized(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    values: torch.Tensor | None,
    columns: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Codes (N, .) as a matrix (N, columns) of `dtype`, computed in float32.

    Codes of 4 bits: byte 16 b + j of a row holds columns 32 b + j, in its low bits, and 32 b + j + 16; with
    `values` they are places among these, else a number plus 8. Codes of 8 bits: int8, or uint8 as the bits of
    e4m3.
    """
    if bits == 4:
        blocks = codes.unflatten(1, (-1, 16))
        codes = torch.stack((blocks & 15, blocks >> 4), 2).flatten(1)[:, :columns]
        wide = codes.to(torch.float32) - 8 if values is None else values[codes.to(torch.int64)]
    elif codes.dtype is torch.uint8:
        wide = codes.view(torch.float8_e4m3fn).to(torch.float32)
    else:
        wide = codes.to(torch.float32)
    for numbers, add in ((scales, False), (offsets, True)):
        if numbers is not None:
            spread = numbers.to(torch.float32).repeat_interleave(group_size, 1)[:, :columns]
            wide = wide + spread if add else wide * spread
    return wide.to(dtype)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (M, K) @ right (K, N) in float32; exact, in int32, of int8."""
    if left.dtype is torch.int8:
        return (left.to(torch.float64) @ right.to(torch.float64)).to(torch.int32)
    return left.to(torch.float32) @ right.to(torch.float32)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that e4m3 has, halves to even, of magnitudes up to 448."""
    exponent = torch.frexp(x.detach())[1].clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return torch.round(x / step) * step
