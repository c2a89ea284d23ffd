"""rewrite-attention: batch and heads in any number of dimensions, and in the order of an einsum."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softmax

from fxopt.passes.attention_layout import Layout
from support.attention import B, D, H, S, Site, assert_recovered, assert_refused, inputs
from support.golden import assert_golden
from support.rewriting import rewriting

T = torch.Tensor


def added(keep: T, dtype: torch.dtype) -> T:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def einsum(q: T, k: T, v: T, keep: T) -> T:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    w = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + added(keep, q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", softmax(w, -1), v)


def xlnet(q: T, k: T, v: T, keep: T) -> T:
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    w = torch.einsum("ibnd, jbnd -> bnij", q + 0.1, k) * 0.5
    w = w - 1e30 * torch.einsum("ijbn->bnij", (~keep).float().permute(2, 3, 0, 1)).to(w.dtype)
    return torch.einsum("bnij,jbnd->ibnd", softmax(w, 3), v)


def einsum_of_value_first(q: T, k: T, v: T, keep: T) -> T:
    w = torch.einsum("bhkd,bhqd->bhqk", k, q) + added(keep, q.dtype)
    return torch.einsum("bhkd,bhqk->bhdq", v, softmax(w, -1))


def one_matrix(q: T, k: T, v: T, keep: T) -> T:
    w = softmax(torch.mm(q[0, 0], k[0, 0].t()) * 0.5 + added(keep[0, 0], q.dtype), -1)
    return torch.mm(w, v[0, 0])


def one_batch(q: T, k: T, v: T, keep: T) -> T:
    w = torch.baddbmm(added(keep[0], q.dtype), q[0], k[0].transpose(1, 2), alpha=0.5)
    return torch.bmm(softmax(w, -1), v[0])


def windows(q: T, k: T, v: T, keep: T) -> T:
    """Swin: the batch is images times windows; each window has its own mask."""
    q, k, v = (t.repeat(3, 1, 1, 1) for t in (q, k, v))
    bias = torch.linspace(-1, 1, H * S * S, dtype=q.dtype).view(1, H, S, S)
    w = q @ k.transpose(-2, -1) * 0.5 + bias
    mask = (1.0 - keep[:, 0].to(q.dtype)) * -100.0
    w = w.view(3, B, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
    return softmax(w.view(-1, H, S, S), -1) @ v


def groups(q: T, k: T, v: T, keep: T) -> T:
    """Three query heads for each key head, which is broadcast."""
    q = q.reshape(B, 1, 3, S, D)
    k, v = k[:, :1].unsqueeze(2), v[:, :1].unsqueeze(2)
    w = torch.matmul(q, k.mT) * 0.5 + added(keep.unsqueeze(1), q.dtype)
    return torch.matmul(softmax(w, -1), v).reshape(B, H, S, D)


def several_groups(q: T, k: T, v: T, keep: T) -> T:
    q = torch.cat([q, q * 0.5], 1).reshape(B, H, 2, S, D)
    w = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * 0.5 + added(keep[:, None], q.dtype)
    return torch.einsum("bhgqk,bhkd->bqhgd", softmax(w, -1), v).reshape(B, S, 2 * H * D)


def video(q: T, k: T, v: T, keep: T) -> T:
    """Frames in front of the heads, one mask for all heads and frames."""
    q, k, v = (torch.stack([t, t * 0.5], 1) for t in (q, k, v))
    w = q @ k.mT + added(keep[:, None], q.dtype)
    return softmax(w, -1) @ v


def pooling(q: T, k: T, v: T, keep: T) -> T:
    """One learned query for all batches."""
    w = torch.matmul(q[:1, :, :2], k.mT) + added(keep[:, :, -1:], q.dtype)
    return torch.matmul(softmax(w, -1), v)


def bias_of_the_last_dimensions(q: T, k: T, v: T, keep: T) -> T:
    return softmax(q @ k.mT + torch.arange(S, dtype=q.dtype) * 0.1, -1) @ v


def perceiver(q: T, k: T, v: T, keep: T) -> T:
    """An einsum without labels of the lead, and rows in front of what stands for them."""
    w = torch.einsum("...id, ...jd -> ...ij", q, k) * 0.5 + added(keep, q.dtype)
    return torch.einsum("...ij,...jd->i...d", softmax(w, -1), v)


def image_in_columns(q: T, k: T, v: T, keep: T) -> T:
    """The decoder of latent diffusion: V, and so the result, have channels in front of the pixels."""
    q, k, v = (t.reshape(B, H * S, D).transpose(1, 2) for t in (q, k, v))
    w = torch.bmm(q.permute(0, 2, 1), k) * D**-0.5
    w = softmax(w, dim=2).permute(0, 2, 1)
    return torch.bmm(v, w).reshape(B, D, H, S)


def turned_probabilities(q: T, k: T, v: T, keep: T) -> T:
    w = softmax(q @ k.mT * 0.5 + added(keep, q.dtype), -1).mT.contiguous()
    return torch.einsum("bhkq,bhkd->bqhd", w.to(v.dtype), v)


SITES = [
    einsum, xlnet, einsum_of_value_first, one_matrix, one_batch, windows, groups, several_groups, video,
    pooling, bias_of_the_last_dimensions, perceiver, image_in_columns, turned_probabilities,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES, ids=lambda f: f.__name__)
def test_fires(site: Site, dtype: torch.dtype) -> None:
    assert_recovered(site, inputs(dtype))


DYNAMIC = [einsum, groups, video, perceiver, turned_probabilities]


@pytest.mark.parametrize("site", DYNAMIC, ids=lambda f: f.__name__)
def test_fires_with_dynamic_shapes(site: Site) -> None:
    assert_recovered(site, inputs(), dynamic=True)


def test_fires_on_windows_of_a_number_that_changes() -> None:
    """Only the guard of the first view says that images times windows are the batch."""

    def attend(q: T, k: T, v: T, mask: T) -> T:
        w, count = q @ k.mT * 0.5, mask.shape[0]
        w = w.view(q.shape[0] // count, count, H, S, S) + mask[:, None]
        return softmax(w.view(-1, H, S, S), -1) @ v

    found = rewriting(attend, ("eliminate-noops", "rewrite-attention"), dynamic=True)
    for images, windows in ((4, 11), (5, 11), (4, 13)):
        args = [*(torch.randn(images * windows, H, S, D) for _ in range(3)), torch.randn(windows, S, S)]
        torch.testing.assert_close(found.call(*args), attend(*args))
    assert found.graphs == 1
    assert found.applied("rewrite-attention") == 1, found.reasons()


def test_heads_that_share_a_key_head_are_not_repeated() -> None:
    for site in (groups, several_groups):
        found = assert_recovered(site, inputs())
        assert "enable_gqa=True" in found.after[0]
        assert "expand" not in found.after[0]


def test_fires_golden() -> None:
    for site in (xlnet, windows):
        found = assert_recovered(site, inputs())
        assert_golden(found.before[0], "rewrite_attention", f"{site.__name__}_before")
        assert_golden(found.after[0], "rewrite_attention", f"{site.__name__}_after")


@pytest.mark.parametrize(
    ("product", "key", "widest", "layout"),
    [
        ((), (), (), Layout(1, 1)),
        ((6,), (6,), (6,), Layout(1, 6)),
        ((6,), (6,), (2, 3), Layout(2, 3)),
        ((2, 3), (2, 3), (2, 3), Layout(2, 3)),
        ((2, 4, 3), (2, 4, 3), (2, 4, 3), Layout(8, 3)),
        ((2, 4, 3), (2, 4, 1), (2, 4, 3), Layout(2, 12)),
    ],
)
def test_layout(
    product: tuple[int, ...], key: tuple[int, ...], widest: tuple[int, ...], layout: Layout
) -> None:
    assert Layout.of(product, key, widest) == layout


@pytest.mark.parametrize("own", [(2, 4, 3), (1, 1, 1), (2, 1, 3), (1, 4, 1), (4, 3), (3,), ()])
@pytest.mark.parametrize("layout", [Layout(8, 3), Layout(2, 12)])
def test_steps_place_every_entry_where_it_belongs(own: tuple[int, ...], layout: Layout) -> None:
    at = (2, 4, 3)
    tensor = torch.randn(*own, 5, 7)
    steps = layout.mask_steps(own, at)
    assert steps is not None
    placed = tensor
    for target, args in steps:
        placed = target(placed, *args)
    wanted = tensor.expand(*at, 5, 7).reshape(int(layout.batch), int(layout.heads), 5, 7)
    assert placed.dim() == 4
    assert torch.equal(placed.expand_as(wanted), wanted)
    assert (placed.shape[0] > 1, placed.shape[1] > 1) == layout.extent(own, at)


def heads_after_rows(q: T, k: T, v: T, keep: T) -> T:
    w = torch.einsum("bhqd,bhkd->bqhk", q, k)
    return torch.einsum("bqhk,bhkd->bhqd", softmax(w, -1), v)


def summed_over_two(q: T, k: T, v: T, keep: T) -> T:
    w = torch.einsum("bhqd,bhkd->bqk", q, k)
    return torch.einsum("bqk,bhkd->bhqd", softmax(w, -1), v)


def softmax_over_queries(q: T, k: T, v: T, keep: T) -> T:
    return (softmax(k @ q.mT, dim=-2).mT @ v).clone()


def rows_mixed(q: T, k: T, v: T, keep: T) -> T:
    w = (q @ k.mT).view(B, H, S * S)
    return softmax(w, -1).view(B, H, S, S) @ v


def value_of_other_heads(q: T, k: T, v: T, keep: T) -> T:
    return torch.einsum("bhqk,bgkd->bhgqd", softmax(q @ k.mT, -1), v)


def turned_and_not_back(q: T, k: T, v: T, keep: T) -> T:
    return softmax(q @ k.mT, -1).mT @ v


def value_in_front(q: T, k: T, v: T, keep: T) -> T:
    return v.mT @ softmax(q @ k.mT, -1)


def multiplied_with_themselves(q: T, k: T, v: T, keep: T) -> T:
    w = softmax(q @ k.mT, -1)
    return w @ w


def cut_when_turned(q: T, k: T, v: T, keep: T) -> T:
    """The last query goes, not the last key."""
    return v.mT @ softmax(q @ k.mT, -1).mT[..., :-1]


def one_ellipsis_summed(q: T, k: T, v: T, keep: T) -> T:
    return torch.einsum("bhqk,...kd->bhqd", softmax(q @ k.mT, -1), v)


NEAR_MISSES: dict[Site, str] = {
    turned_and_not_back: "over the last dimension of the probabilities",
    value_in_front: "over the last dimension of the probabilities",
    multiplied_with_themselves: "product",
    cut_when_turned: "casts, dropout and the product with V",
    one_ellipsis_summed: "a product of matrices",
    heads_after_rows: "scores with queries as rows",
    summed_over_two: "a product of matrices",
    softmax_over_queries: "softmax over the last dimension",
    rows_mixed: "aten.view.default",
    value_of_other_heads: "product with V",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])
