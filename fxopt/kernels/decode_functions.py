"""Device functions by which the templates of attention over caches are specialised, in their plainest form.

In a kernel's file those of its problem stand in their place. Indices are as `fxopt.codegen.attention_program`
has them.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Stored numbers in the dtype of the computation."""
    return x.to(dtype)


@triton.jit
def narrow(x, scale):
    """Numbers divided by the scales of their rows, as they are stored."""
    return tl.div_rn(x, scale)


@triton.jit
def is_live(b, h, q, k, columns, captured):
    """Which keys take part: int1, that broadcasts to rows by keys."""
    return k >= 0


@triton.jit
def scored(s, b, h, q, k, columns, captured):
    """What becomes of scaled scores."""
    return s


@triton.jit
def live_span(b, last, extent, captured):
    """The first key that one of the queries 0..last may see, and the one behind the last."""
    return 0, extent
