"""The judge is judged: faults that real rewrites make must be rejected, and an honest reordering accepted."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from support.numerics import VacuousReferenceError, assert_closer, run_reference64, to_double

BATCH, SEQ, HEADS, HEAD_DIM = 2, 24, 3, 8
WIDTH = HEADS * HEAD_DIM  # equal to SEQ, so that a transposed result has the right shape
Tensors = dict[str, torch.Tensor]


def _inputs(dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return {
        # A small variance, so that the epsilon of the norm matters in every dtype.
        "x": normal(BATCH, SEQ, WIDTH, scale=5e-3),
        "weight": normal(WIDTH, scale=0.2),
        "qkv": normal(3 * WIDTH, WIDTH, scale=WIDTH**-0.5),
        "bias": normal(3 * WIDTH, scale=0.3),
    }


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _heads(projected: torch.Tensor) -> torch.Tensor:
    return projected.reshape(BATCH, SEQ, HEADS, HEAD_DIM).transpose(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, torch.finfo(q.dtype).min)
    probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (probabilities @ v).transpose(1, 2).reshape(BATCH, SEQ, WIDTH)


def _block(x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Gemma-style norm (1 + w), then causal attention: what all faults below are faults in."""
    q, k, v = map(_heads, F.linear(_norm(x, 1 + weight, 1e-5), qkv, bias).chunk(3, -1))
    return _attend(q, k, v, torch.ones(SEQ, SEQ, dtype=torch.bool).tril(), HEAD_DIM**-0.5)


def _wrong_scale(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    q, k, v = map(_heads, F.linear(_norm(x, 1 + weight, 1e-5), qkv, bias).chunk(3, -1))
    return _attend(q, k, v, torch.ones(SEQ, SEQ, dtype=torch.bool).tril(), WIDTH**-0.5)


def _mask_off_by_one(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    q, k, v = map(_heads, F.linear(_norm(x, 1 + weight, 1e-5), qkv, bias).chunk(3, -1))
    return _attend(q, k, v, torch.ones(SEQ, SEQ, dtype=torch.bool).tril(1), HEAD_DIM**-0.5)


def _stale_cache_row(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    q, k, v = map(_heads, F.linear(_norm(x, 1 + weight, 1e-5), qkv, bias).chunk(3, -1))
    k, v = k.clone(), v.clone()
    k[:, :, 5], v[:, :, 5] = k[:, :, 4], v[:, :, 4]
    return _attend(q, k, v, torch.ones(SEQ, SEQ, dtype=torch.bool).tril(), HEAD_DIM**-0.5)


def _swapped_heads(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return _block(x, weight, qkv, bias).reshape(BATCH, SEQ, HEADS, HEAD_DIM)[:, :, [1, 0, 2]].flatten(2)


def _wrong_eps(x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    q, k, v = map(_heads, F.linear(_norm(x, 1 + weight, 1e-6), qkv, bias).chunk(3, -1))
    return _attend(q, k, v, torch.ones(SEQ, SEQ, dtype=torch.bool).tril(), HEAD_DIM**-0.5)


def _missing_bias(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return _block(x, weight, qkv, bias * 0)


def _dropped_one_plus(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return _block(x, weight - 1, qkv, bias)


def _transposed(x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _block(x, weight, qkv, bias).transpose(1, 2).contiguous()


def _summed_in_other_order(
    x: torch.Tensor, weight: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The same mathematics: each contraction runs in another order, the softmax as SDPA accumulates it."""
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    q, k, v = map(
        _heads, F.linear(_norm(x[..., order], 1 + weight[order], 1e-5), qkv[:, order], bias).chunk(3, -1)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(BATCH, SEQ, WIDTH)


FAULTS = [
    _wrong_scale,
    _mask_off_by_one,
    _stale_cache_row,
    _swapped_heads,
    _wrong_eps,
    _missing_bias,
    _dropped_one_plus,
    _transposed,
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_fault_is_rejected(fault: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    with pytest.raises(AssertionError, match="rms error"):
        assert_closer(run_reference64(_block, inputs), fault(**inputs), _block(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_fault_is_rejected_in_the_gradients(fault: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    def gradients(function: Callable[..., torch.Tensor], inputs: Tensors) -> tuple[torch.Tensor, ...]:
        probe = torch.linspace(-1, 1, BATCH * SEQ * WIDTH, dtype=inputs["x"].dtype).reshape(BATCH, SEQ, WIDTH)
        return torch.autograd.grad((function(**inputs) * probe).sum(), list(inputs.values()))

    inputs = {name: tensor.requires_grad_() for name, tensor in _inputs(dtype).items()}
    reference = run_reference64(lambda **wide: gradients(_block, wide), inputs)
    eager = gradients(_block, inputs)
    with pytest.raises(AssertionError, match=r"out\[0\]: rms error"):
        assert_closer(reference, gradients(fault, inputs), eager)
    assert_closer(reference, gradients(_summed_in_other_order, inputs), eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_summation_order_is_accepted(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    eager, candidate = _block(**inputs), _summed_in_other_order(**inputs)
    assert not torch.equal(candidate, eager)
    assert_closer(run_reference64(_block, inputs), candidate, eager)


def test_low_precision_inside_is_rejected_although_the_dtype_is_right() -> None:
    inputs = _inputs(torch.float32)
    candidate = _block(**{name: tensor.bfloat16() for name, tensor in inputs.items()})
    reference, eager = run_reference64(_block, inputs), _block(**inputs)
    with pytest.raises(AssertionError, match="rms error"):
        assert_closer(reference, candidate.float(), eager)
    with pytest.raises(AssertionError, match=r"dtype torch.bfloat16, eager torch.float32"):
        assert_closer(reference, candidate, eager)


def test_other_layout_is_rejected_unless_allowed() -> None:
    inputs = _inputs(torch.float32)
    reference, eager = run_reference64(_block, inputs), _block(**inputs)
    other = eager.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(AssertionError, match="strides"):
        assert_closer(reference, other, eager)
    assert_closer(reference, other, eager, strides=False)


def test_strides_of_singleton_dimensions_mean_nothing() -> None:
    eager = torch.randn(4, 1, 8)
    assert_closer(eager.double(), eager.as_strided((4, 1, 8), (8, 1, 1)), eager)


def test_wrong_row_of_small_numbers_is_seen_beside_large_ones() -> None:
    """Rows of 1e-3 next to rows of 1 in bfloat16: below a unit in the last place of the largest entry."""
    exact = torch.randn(64, 48, dtype=torch.float64)
    exact[7] *= 1e-3
    eager = exact.bfloat16()
    candidate = eager.clone()
    candidate[7] = candidate[7].flip(0)
    with pytest.raises(AssertionError, match="1 differences\n.*row error"):
        assert_closer(exact, candidate, eager)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.finfo(torch.float32).min])
def test_special_values_must_stand_where_eager_has_them(value: float) -> None:
    exact = torch.randn(6, 50, dtype=torch.float64)
    eager = exact.float()
    eager[2, 3] = value
    assert_closer(exact, eager.clone(), eager)
    moved = exact.float()
    moved[2, 4] = value
    with pytest.raises(AssertionError, match="positions"):
        assert_closer(exact, moved, eager)
    with pytest.raises(AssertionError, match="at 0 positions, eager 1"):
        assert_closer(exact, exact.float(), eager)


def test_special_values_do_not_blind_the_rest() -> None:
    exact = torch.randn(6, 50, dtype=torch.float64)
    eager = exact.float()
    eager[2, 3] = torch.finfo(torch.float32).min
    candidate = eager.clone()
    candidate[0] *= 1.00001
    with pytest.raises(AssertionError, match="rms error"):
        assert_closer(exact, candidate, eager)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_and_booleans_must_be_equal(dtype: torch.dtype) -> None:
    eager = torch.arange(12).reshape(3, 4).to(dtype)
    assert_closer(eager, eager.clone(), eager)
    candidate = eager.clone()
    candidate[1, 1] = 0
    with pytest.raises(AssertionError, match="1 of 12 entries differ"):
        assert_closer(eager, candidate, eager)


def _output(scale: float = 1.0, rows: int = 6) -> BaseModelOutputWithPast:
    state = torch.linspace(0.1, 1, rows * 32).reshape(1, rows, 32)
    cache = DynamicCache()
    cache.update(state[:, None] * scale, state[:, None], 0)
    return BaseModelOutputWithPast(last_hidden_state=state, past_key_values=cache)


def test_tensors_inside_a_cache_are_compared() -> None:
    def widen(output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        cache = DynamicCache()
        layer = output.past_key_values.layers[0]
        cache.update(layer.keys.double(), layer.values.double(), 0)
        return BaseModelOutputWithPast(
            last_hidden_state=output.last_hidden_state.double(), past_key_values=cache
        )

    assert_closer(widen(_output()), _output(), _output())
    with pytest.raises(AssertionError, match=r"out.past_key_values.layers\[0\].keys: rms error"):
        assert_closer(widen(_output()), _output(scale=1.001), _output())
    with pytest.raises(AssertionError, match=r"layers\[0\].keys: shape"):
        assert_closer(widen(_output()), _output(rows=7), _output())


@pytest.mark.parametrize(
    "candidate",
    [(torch.ones(3),), [torch.ones(3), None], (torch.ones(3), 2), {"a": torch.ones(3), "b": None}],
)
def test_structure_must_be_the_same(candidate: object) -> None:
    with pytest.raises(AssertionError, match="structure differs"):
        assert_closer((torch.ones(3).double(), None), candidate, (torch.ones(3), None))


def test_constants_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"out\[1\]: 4, eager 3"):
        assert_closer((torch.ones(3).double(), 3), (torch.ones(3), 4), (torch.ones(3), 3))


def test_requires_grad_must_be_the_same() -> None:
    eager = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="requires_grad False, eager True"):
        assert_closer(eager.double(), eager.detach(), eager)


def test_gradient_that_algebra_makes_zero_may_be_any_noise_but_not_a_value() -> None:
    large = torch.randn(64, 64, dtype=torch.float64)
    noise = torch.randn(64, dtype=torch.float64)
    reference, eager = (large, noise * 1e-17), (large.float(), noise.float() * 1e-9)
    assert_closer(reference, (large.float(), noise.float() * 1e-8), eager)
    with pytest.raises(AssertionError, match="algebra gives 0"):
        assert_closer(reference, (large.float(), noise.float() * 1e-5), eager)


def test_scalar_is_judged_by_the_pooled_error_and_still_strictly() -> None:
    """A loss that eager happens to round exactly gives no licence to demand the same luck."""
    logits = torch.randn(32, 64, dtype=torch.float64)
    eager = logits.float() * (1 + 1e-6)
    loss = torch.tensor(4.0, dtype=torch.float64)
    assert_closer((loss, logits), (loss.float() * (1 + 1e-6), eager), (loss.float(), eager))
    with pytest.raises(AssertionError, match=r"out\[0\]: max error"):
        assert_closer((loss, logits), (loss.float() * (1 + 1e-5), eager), (loss.float(), eager))
    with pytest.raises(AssertionError, match="out: max error"):
        assert_closer(loss, loss.float() * (1 + 1e-6), loss.float())


def test_comparison_that_cannot_fail_is_an_error() -> None:
    exact = torch.randn(40, dtype=torch.float64)
    eager = exact.float() * 1.1
    with pytest.raises(VacuousReferenceError, match="eager is 0.1"):
        assert_closer(exact, eager.clone(), eager)
    with pytest.raises(VacuousReferenceError, match="not float64"):
        assert_closer(exact.float(), exact.float(), exact.float())
    with pytest.raises(VacuousReferenceError, match="not finite"):
        assert_closer(exact / 0, exact.float(), exact.float())


def test_complex_results_are_compared_by_their_parts() -> None:
    eager = torch.randn(8, 9, dtype=torch.complex64)
    exact = torch.view_as_complex(torch.view_as_real(eager).double())
    assert_closer(exact, eager.clone(), eager)
    with pytest.raises(AssertionError, match="rms error"):
        assert_closer(exact, eager.conj().resolve_conj(), eager)


def test_empty_and_zero_results() -> None:
    for eager in (torch.zeros(0, 4), torch.zeros(4, 40)):
        assert_closer(eager.double(), eager.clone(), eager)
    with pytest.raises(AssertionError, match="max error|algebra gives 0"):
        assert_closer(torch.zeros(4).double(), torch.ones(4) * 1e-6, torch.zeros(4))


class _NamesPrecisions(torch.nn.Module):
    """Names float32 in all the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(40, 40)
        self.frequency: torch.Tensor
        self.register_buffer("frequency", torch.rand(40))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[:, None].float() * self.frequency.to(torch.float32)
        x = self.linear(x).to(dtype=torch.float32) + angle.cos().type_as(x)
        bias = torch.full((40,), 1 / 3) + torch.arange(40, dtype=torch.float32) / 7
        return F.softmax(x + bias, -1, dtype=torch.float32).to(torch.bfloat16) + torch.tensor(0.1)


def test_reference_is_float64_throughout() -> None:
    model, x, positions = _NamesPrecisions(), torch.randn(5, 40), torch.arange(5)
    weight, bias = (parameter.detach().double() for parameter in model.parameters())
    frequency = model.frequency.double()
    logits = F.linear(x.double(), weight, bias) + (positions[:, None] * frequency).cos()
    logits = logits + 1 / 3 + torch.arange(40, dtype=torch.float64) / 7
    torch.testing.assert_close(
        run_reference64(model, (x, positions)), logits.softmax(-1) + 0.1, rtol=1e-13, atol=0
    )


def test_reference_run_leaves_everything_as_it_was() -> None:
    model, x = _NamesPrecisions(), torch.randn(5, 40, requires_grad=True)
    run_reference64(model, {"x": x, "positions": torch.arange(5)}).sum().backward()
    assert model.linear.weight.dtype == torch.float32
    assert model.linear.weight.grad is None
    assert x.grad is None
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).float().dtype == torch.float32


def test_double_inputs_are_leaves_that_keep_requires_grad() -> None:
    wide = to_double({"x": torch.randn(3, requires_grad=True), "ids": torch.arange(3), "flags": (True, None)})
    assert wide["x"].dtype == torch.float64
    assert wide["x"].requires_grad
    assert wide["x"].is_leaf
    assert wide["ids"].dtype == torch.int64
    assert wide["flags"] == (True, None)
