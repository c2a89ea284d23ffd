"""Device functions that emitted kernels may call, by name; a kernel's file has the text of those it uses."""

from __future__ import annotations

_TANH = '''@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial where exp would cancel."""
    z = x * x
    p = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
         - 3.33332819422e-1) * z * x + x
    e = tl.exp(2 * tl.abs(x))
    far = 1 - tl.div_rn(tl.full([], 2, x.dtype), e + 1)
    return tl.where(tl.abs(x) < 0.625, p, tl.where(x < 0, -far, far))
'''
_MAXIMUM = '''@triton.jit
def maximum(a, b):
    """NaN if either is NaN, as torch.amax."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
'''
_MINIMUM = '''@triton.jit
def minimum(a, b):
    """NaN if either is NaN, as torch.amin."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
'''
_UNIFORM = '''@triton.jit
def uniform(seed, place, BITS: tl.constexpr):
    """Numbers in [0, 1): the first word of Philox-4x32-10 of the place, with the seed as key."""
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word_0, word_1 = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    word_2 = word_0 * 0
    word_3 = word_2
    for _ in tl.static_range(10):
        a = word_0.to(tl.uint64) * 0xD2511F53
        b = word_2.to(tl.uint64) * 0xCD9E8D57
        word_0 = (b >> 32).to(tl.uint32) ^ word_1 ^ key_0
        word_2 = (a >> 32).to(tl.uint32) ^ word_3 ^ key_1
        word_1 = b.to(tl.uint32)
        word_3 = a.to(tl.uint32)
        key_0 = (key_0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_1 = (key_1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return (word_0 >> (32 - BITS)).to(tl.float32) * (1.0 / (1 << BITS))
'''
HELPERS = {"tanh": _TANH, "maximum": _MAXIMUM, "minimum": _MINIMUM, "uniform": _UNIFORM}
