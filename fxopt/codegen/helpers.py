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
HELPERS = {"tanh": _TANH, "maximum": _MAXIMUM, "minimum": _MINIMUM}
