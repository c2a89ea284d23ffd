"""Dense weights -> quantized weights, such that the outputs for given inputs change least.

For inputs x the error of a row w of the weight is (w - v) H (w - v)^T with H = sum of x^T x. Columns are
rounded one after the other, those with the largest inputs first, and what rounding one costs is made up for
by those that are still dense. Scales are chosen before, among some that cut off the extremes of a group.

Source: Frantar et al., "GPTQ", 2022, algorithm 1; the order is that of its later "act-order". Scales of
groups stay those of neighbouring columns, whatever the order.
"""

from __future__ import annotations

import torch

from fxopt.ir.quantize import group_scales, nearest_codes, spread
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS, INT4, Format

# Columns after which the rest of the weight is brought up to date by one product.
_BLOCK = 128
# Added to the diagonal of H, as a share of its mean: section 3.3.
_DAMPING = 0.01
# Shares of the range of a group that its codes are tried to cover.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def quantize_calibrated(
    dense: torch.Tensor, hessian: torch.Tensor, name: str, group_size: int | None = None
) -> QuantizedWeight:
    """Round a weight to a format.

    Args:
        dense: (N, K), floating and finite.
        hessian: (K, K) in float32: the sum of x^T x over inputs x.
        name: of one of `FORMATS`.
        group_size: as `quantize` has it.

    Returns:
        a weight of the same layout and size as that of `quantize`.
    """
    kind = FORMATS[name]
    group = kind.default_group if group_size is None else group_size
    group = min(group or dense.shape[1], dense.shape[1])
    wide = dense.detach().float()
    scales, offsets = _best_scales(wide, hessian.diagonal(), kind, group)
    codes = _rounded_in_turn(
        wide, hessian, kind, *(spread(each, group, wide.shape[1]) for each in (scales, offsets))
    )
    return QuantizedWeight.from_codes(name, codes, scales, group_size=group, offsets=offsets)


def _best_scales(
    wide: torch.Tensor, importance: torch.Tensor, kind: Format, group: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of each group the scale (and offset) with the least error, weighted by the inputs' squares."""
    columns = wide.shape[1]
    best: tuple[torch.Tensor, torch.Tensor | None] | None = None
    least = torch.empty(0)
    for share in _SHARES:
        given = wide if share == 1 else _shrunk(wide, group, share, kind)
        scales, offsets = group_scales(given, kind, group, symmetric=False)
        spread_out = [spread(each, group, columns) for each in (scales, offsets)]
        codes = nearest_codes(wide, kind, *spread_out)
        error = (wide - _value(codes, kind, *spread_out)).square() * importance
        missing = -columns % group
        of_groups = torch.nn.functional.pad(error, (0, missing)).unflatten(1, (-1, group)).sum(-1)
        if best is None:
            best, least = (scales, offsets), of_groups
            continue
        better = of_groups < least
        least = torch.where(better, of_groups, least)
        kept = None if best[1] is None or offsets is None else torch.where(better, offsets, best[1])
        best = torch.where(better, scales, best[0]), kept
    assert best is not None
    return best


def _shrunk(wide: torch.Tensor, group: int, share: float, kind: Format) -> torch.Tensor:
    """`wide` with the range of each group made smaller: around its middle for int4, around 0 for others."""
    if kind is not INT4:
        return wide * share
    missing = -wide.shape[1] % group
    groups = torch.cat((wide, wide[:, -1:].expand(-1, missing)), 1).unflatten(1, (-1, group))
    middle = (groups.amax(-1, keepdim=True) + groups.amin(-1, keepdim=True)) / 2
    smaller: torch.Tensor = (middle + (groups - middle) * share).flatten(1)
    return smaller[:, : wide.shape[1]]


def _value(
    codes: torch.Tensor, kind: Format, scales: torch.Tensor | None, offsets: torch.Tensor | None
) -> torch.Tensor:
    assert scales is not None
    plain: torch.Tensor = kind.table.to(codes.device)[codes.long()] if kind.values else codes.float()
    wide = plain * scales
    return wide if offsets is None else wide + offsets


def _rounded_in_turn(
    wide: torch.Tensor,
    hessian: torch.Tensor,
    kind: Format,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """The codes (N, K). `scales` and `offsets` are those of each entry."""
    assert scales is not None
    order = hessian.diagonal().argsort(descending=True)
    factor = _factor(hessian[order][:, order])
    # Columns as rows, which are contiguous.
    left = wide.t()[order].contiguous()
    scales, offsets = scales.t()[order], None if offsets is None else offsets.t()[order]
    codes = torch.empty_like(left, dtype=kind.storage)
    for start in range(0, left.shape[0], _BLOCK):
        stop = min(start + _BLOCK, left.shape[0])
        errors = torch.empty_like(left[start:stop])
        for place in range(start, stop):
            parts = scales[place], None if offsets is None else offsets[place]
            codes[place] = nearest_codes(left[place], kind, *parts)
            error = (left[place] - _value(codes[place], kind, *parts)) / factor[place, place]
            left[place:stop] -= factor[place, place:stop, None] * error
            errors[place - start] = error
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    found = torch.empty_like(codes)
    found[order] = codes
    turned: torch.Tensor = found.t().contiguous()
    return turned


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, (K, K)."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
