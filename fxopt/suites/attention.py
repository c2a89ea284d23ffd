"""Attention alone, by mask, spelling and length, beside Inductor, stock SDPA and FlexAttention.

The two others are what a user would write by hand who knows the mask: SDPA with `is_causal` where that is the
whole mask and with a tensor of bools else, and FlexAttention with a block mask, compiled by Inductor. Their
masks are made beforehand and cost them nothing; Inductor and fxopt get the code as models have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fxopt.measure.compare import compare
from fxopt.measure.compiled import BASELINE, apart
from fxopt.measure.jobs import Job
from fxopt.measure.models import Subject
from fxopt.measure.results import Row
from fxopt.measure.suite import release
from fxopt.suites.plan import Plan, chosen, milliseconds, over

Value = torch.Tensor
SDPA, FLEX = "sdpa", "flex attention"
TITLE = "attention: time of inductor / time of fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor ms": milliseconds("inductor"),
    "fxopt ms": milliseconds("fxopt"),
    "over eager": over("eager"),
    "over sdpa": over(SDPA),
    "over flex": over(FLEX),
    "why": lambda row: row["why"],
}
LENGTHS = {"tiny": (128,), "small": (512, 1024, 2048, 4096), "full": (1024, 4096, 16384)}
# Batch, heads, width of a head, window.
SHAPES = {"tiny": (1, 2, 16, 32), "small": (1, 4, 64, 256), "full": (4, 16, 128, 1024)}


@dataclass(frozen=True)
class Case:
    """One line. `padded`: a padding mask is given too, with the last tenth masked."""

    mask: str
    spelling: str
    length: int
    padded: bool
    training: bool
    dtype: str


def jobs(plan: Plan) -> list[Job]:
    """One for each case; the suite has no models to choose from."""
    chosen("--models", plan.models, ())
    return [Job(asdict(case), functools.partial(_measure, plan, case)) for case in cases(plan)]


def cases(plan: Plan) -> Iterator[Case]:
    """All masks and spellings by length, in inference; `--train` is with backward passes only."""
    for length in plan.lengths or LENGTHS[plan.size]:
        for mask in ("causal", "window"):
            for spelling in ("eager", "sdpa"):
                for padded in (False, True):
                    for training in [False] * plan.infer + [True] * (plan.train and not plan.infer):
                        yield Case(mask, spelling, length, padded, training, plan.dtype)


def subject_of(case: Case, size: str, device: str) -> Subject:
    """Random queries, keys and values, and the padding mask."""
    torch.manual_seed(0)
    batch, heads, depth, window = SHAPES[size]
    dtype: torch.dtype = getattr(torch, case.dtype)
    shape = (batch, heads, case.length, depth)
    tensors = [torch.randn(shape).to(device, dtype).requires_grad_(case.training) for _ in range(3)]
    keep = torch.ones(batch, case.length, dtype=torch.int64, device=device)
    keep[:, case.length - case.length // 10 :] = 0
    return Subject(str(case), _attend(case, window), (*tensors, keep), training=case.training)


def _live(case: Case, window: int, length: int, keep: torch.Tensor) -> torch.Tensor:
    place = torch.arange(length, device=keep.device)
    i, j = place[:, None], place[None, :]
    mask = j <= i
    if case.mask == "window":
        mask = mask & (j > i - window)
    return mask & keep.bool()[:, None, None, :] if case.padded else mask[None, None]


def _attend(case: Case, window: int) -> Callable[..., torch.Tensor]:
    """A function of its own: compiled code is kept by function."""

    def sdpa(q: Value, k: Value, v: Value, keep: Value) -> Value:
        return scaled_dot_product_attention(q, k, v, attn_mask=_live(case, window, q.shape[2], keep))

    def eager(q: Value, k: Value, v: Value, keep: Value) -> Value:
        low = torch.finfo(q.dtype).min
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        live = _live(case, window, q.shape[2], keep)
        scores = scores + torch.where(live, torch.zeros((), dtype=q.dtype, device=q.device), low)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.softmax(scores, -1, dtype=wide).to(q.dtype) @ v

    return sdpa if case.spelling == "sdpa" else eager


def _measure(plan: Plan, case: Case) -> Row:
    subject = subject_of(case, plan.size, plan.device)
    window = SHAPES[plan.size][3]
    others, refused = {SDPA: _stock(case, subject, window)}, ""
    torch._dynamo.reset()
    try:
        flex = _flex(case, subject, window)
        flex()
    except Exception as error:  # FlexAttention has no backward pass on a CPU, and no CPU code for some
        refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    else:
        others[FLEX] = flex
    release()
    how: dict[str, Any] = {"check": plan.check, "eager": True, "tuned": plan.tuned, "mode": plan.mode}
    found = compare(subject, options=plan.options, others=others, budget_seconds=plan.budget, **how)
    evidence = [entry for record in found.records for entry in record.evidence]
    programs = [e.reason for e in evidence if e.rewrite in ("recover-mask", "fold-causal-mask")]
    row = found.row() | {"why": programs[-1] if programs else ""}
    release()
    return row | ({"no_flex_attention": refused} if refused else {})


def _stock(case: Case, subject: Subject, window: int) -> Callable[[], Any]:
    """SDPA with the mask that is known beforehand."""
    keep = subject.args[3]
    plain = case.mask == "causal" and not case.padded
    how: dict[str, Any] = {"is_causal": True} if plain else {
        "attn_mask": _live(case, window, case.length, keep)
    }  # fmt: skip
    return subject.step(lambda q, k, v, keep: scaled_dot_product_attention(q, k, v, **how))


def _flex(case: Case, subject: Subject, window: int) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, keep = subject.args[0], subject.args[3].bool()

    def live(b: Any, h: Any, i: Any, j: Any) -> Any:
        mask = j <= i
        if case.mask == "window":
            mask = mask & (j > i - window)
        return mask & keep[b, j] if case.padded else mask

    batch = q.shape[0] if case.padded else None
    block = create_block_mask(live, batch, None, case.length, case.length, device=str(q.device))
    compiled = torch.compile(flex_attention, backend=BASELINE, **apart())
    return subject.step(lambda q, k, v, keep: compiled(q, k, v, block_mask=block))
