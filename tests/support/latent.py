"""Small sites of multi-head latent attention: one query each, over keys and values made of shared latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

Site = Callable[..., torch.Tensor]

# Batch, heads, keys; widths of the latents, of the two parts of a head's key, and of its values.
B, H, S = 2, 3, 19
N, DK, DR, DV = 16, 8, 4, 6


def inputs(dtype: torch.dtype = torch.float32, rows: int = 1, keys: int = S) -> list[torch.Tensor]:
    """Queries, latents, the keys' shared part, the weight, and which keys are live."""
    live = torch.ones(B, 1, rows, keys, dtype=torch.bool)
    live[0, :, :, :3] = False
    live[:, :, :, keys - 2 :] = False
    shapes = ((B, H, rows, DK + DR), (B, 1, keys, N), (B, 1, keys, DR), (H * (DK + DV), N))
    return [*(torch.randn(shape).to(dtype) for shape in shapes), live]


def expanded(c: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    made = linear(c, w).view(B, -1, H, DK + DV).transpose(1, 2)
    return torch.split(made, [DK, DV], dim=-1)


def deepseek(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    k, v = expanded(c, w)
    key = k.new_empty(*k.shape[:-1], DK + DR)
    key[..., :DK].copy_(k)
    key[..., DK:].copy_(r.expand(-1, H, -1, -1))
    return sdpa(q, key, v, attn_mask=live, scale=0.3)


def spelled(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """Split before the transposition, latents without heads, scores in one tensor."""
    made = linear(c.squeeze(1), w).unflatten(-1, (H, DK + DV))
    k, v = made[..., :DK].permute(0, 2, 1, 3), made[..., DK:].permute(0, 2, 1, 3).contiguous()
    key = torch.cat([k, r.repeat_interleave(1, 1).expand(B, H, -1, DR)], dim=-1)
    scores = (q @ key.transpose(-1, -2) * 0.3).masked_fill(~live, torch.finfo(q.dtype).min)
    return softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def two_weights(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """Rows before heads until the end, the shared part first, no scale."""
    c = c.transpose(1, 2)
    k = linear(c, w[: H * DK]).reshape(B, -1, H, DK)
    v = linear(c, w[H * DK :]).reshape(B, -1, H, DV)
    key = torch.cat([r.transpose(1, 2).expand(B, -1, H, DR), k], dim=3)
    return sdpa(q, key.transpose(1, 2), v.transpose(1, 2), attn_mask=live)


def keys_then_values(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """All keys, then all values; nothing besides; a soft cap."""
    k, v = linear(c[:, 0], w).split([H * DK, H * DV], dim=-1)
    k, v = k.view(B, -1, H, DK).transpose(1, 2), v.view(B, -1, H, DV).transpose(1, 2)
    scores = 5.0 * torch.tanh(q[..., :DK] @ k.transpose(2, 3) / 5.0)
    return softmax(scores.masked_fill(~live, -torch.inf), -1) @ v


def grouped(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """Two query heads for each head of keys."""
    k, v = expanded(c, w)
    key = torch.cat([k, r.expand(-1, H, -1, -1)], -1)
    return sdpa(
        torch.cat([q, q.flip(1)], 1), *(each.repeat_interleave(2, 1) for each in (key, v)), attn_mask=live
    )


def own_rests(
    q: torch.Tensor, c: torch.Tensor, r: torch.Tensor, w: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    """Each head has its own rest of the key."""
    k, v = expanded(c, w)
    rests = r * torch.arange(1.0, H + 1, dtype=r.dtype)[:, None, None]
    return sdpa(q, torch.cat([k, rests], -1), v, attn_mask=live)


SITES: dict[str, Site] = {
    each.__name__: each for each in (deepseek, spelled, two_weights, keys_then_values, grouped, own_rests)
}
