"""Device functions that emitted kernels may call, by name; a kernel's file has the text of those it uses."""

from __future__ import annotations

import builtins
import keyword

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
_RINT = '''@triton.jit
def rint(x):
    """To the nearest integer, halves to the even one; from 2**23 on (2**52 in float64) all are integers."""
    large = tl.full([], 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0, x.dtype)
    near = tl.where(x < 0, (x - large) + large, (x + large) - large)
    return tl.where(tl.abs(x) < large, tl.where(near == 0, x * 0, near), x)
'''
_E4M3 = '''@triton.jit
def e4m3(code):
    """The number that 8 bits stand for in e4m3, NaN excepted: an exponent has 120 less than in float32."""
    bits = ((code & 128).to(tl.uint32) << 24) | ((code & 127).to(tl.uint32) << 20)
    return bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
'''
_NEAREST_E4M3 = '''@triton.jit
def nearest_e4m3(x):
    """To the nearest number of e4m3, for magnitudes up to 448: a multiple of an eighth of the power of two
    below, or of 2**-9. Sums with 1.5 * 2**23 times the step are rounded to multiples of it."""
    exponent = tl.maximum((tl.abs(x).to(tl.int32, bitcast=True)) >> 23, 121)
    large = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * 12582912.0
    return (x + large) - large
'''
_ACROSS = '''@triton.jit
def repeated_across(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column of `x` (ROWS, ...) so often that there are COLUMNS."""
    spread = tl.broadcast_to(x[:, :, None], [ROWS, x.shape[1], COLUMNS // x.shape[1]])
    return tl.reshape(spread, [ROWS, COLUMNS])
'''
_DOWN = '''@triton.jit
def repeated_down(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row of `x` (..., COLUMNS) so often that there are ROWS."""
    spread = tl.broadcast_to(x[:, None, :], [x.shape[0], ROWS // x.shape[0], COLUMNS])
    return tl.reshape(spread, [ROWS, COLUMNS])
'''
HELPERS = {
    "tanh": _TANH,
    "maximum": _MAXIMUM,
    "minimum": _MINIMUM,
    "uniform": _UNIFORM,
    "rint": _RINT,
    "e4m3": _E4M3,
    "nearest_e4m3": _NEAREST_E4M3,
    "repeated_across": _ACROSS,
    "repeated_down": _DOWN,
}

# names that kernels use for other things
_OWN = {
    "x",
    "r",
    "piece",
    "tile",
    "tiles",
    "row_tile",
    "row_tiles",
    "program",
    "first",
    "first_row",
    "height",
    "column",
    "tl",
    "triton",
    "torch",
    "start",
    "inside",
    "inside_x",
    "inside_r",
    *HELPERS,
}
RESERVED = frozenset({*_OWN, *dir(builtins), *keyword.kwlist})
