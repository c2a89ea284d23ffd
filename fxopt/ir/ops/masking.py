"""What the masks of an attention mean."""

from __future__ import annotations

# What a row of scores gives whose keys are all masked: 0, as SDPA has it; NaN, as softmax of -inf has it; the
# mean of V, as softmax of equal finite scores has it. NONE promises an additive mask without an infinite
# entry, with which all ways to compute agree.
ZERO, NAN, MEAN, NONE = "zero", "nan", "mean", "none"
# An entry of a mask below this share of its dtype's lowest number absorbs a score.
LOWEST_SHARE = 0.5
