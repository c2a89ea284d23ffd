"""What the tiles of all kernels are chosen with."""

from __future__ import annotations

from fxopt.ir.target import Target

TYPICAL_SMS = 128  # where no target is known


def power_of_two(value: int) -> int:
    """The first that is not below `value`; at least one."""
    return 1 << max(0, value - 1).bit_length()


def sms_of(target: Target | None) -> int:
    """The SMs that are to have work."""
    return TYPICAL_SMS if target is None else target.sms


def warps_of(threads: int, target: Target | None) -> int:
    """As many warps as have so many threads."""
    return max(1, threads // (target or Target).warp_size)
