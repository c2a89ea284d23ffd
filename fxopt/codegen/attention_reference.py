"""What a kernel of attention computes as plain torch: the text of the `reference` in its file."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.codegen.attention_functions import RANDOM_BITS
from fxopt.codegen.attention_spec import LOG2E, Spec
from fxopt.codegen.formula_reference import TorchText
from fxopt.ir.formula import numbered


def operand_names(spec: Spec) -> list[str]:
    """The parameters of a kernel's `launch`, those of the forward."""
    found = ["query", "key", "value", *(one.name for one in spec.captures)]
    found += ["sinks"] if spec.sinks is not None else []
    found += ["seed"] if spec.dropout_p else []
    return [*found, *spec.sizes]


def forward_reference(spec: Spec, name: str = "reference") -> str:
    """``def reference(query, key, value, ...)``: all scores at once."""
    text = TorchText(spec.captures)
    lines = [
        "batch, heads, rows = query.shape[:3]",
        "columns = key.shape[2]",
        "sizes = ((batch, heads, rows, columns)[axis] for axis in range(4))",
        "b, h, q, k = (",
        "    torch.arange(size, device=query.device).view([-1 if at == axis else 1 for at in range(4)])",
        "    for axis, size in enumerate(sizes)",
        ")",
        f"key, value = (one.repeat_interleave({spec.group}, 1) for one in (key, value))",
        f"s = (query @ key.mT).float() * {spec.scale!r}",
        f"live = ({text.condition(spec.mask.live)}).expand(s.shape)",
        *_weights(spec, text),
        "out = weights.to(value.dtype) @ value",
        "return out, torch.stack([top, total])",
    ]
    return f"def {name}({', '.join(operand_names(spec))}):\n" + "\n".join(f"    {line}" for line in lines)


def _weights(spec: Spec, text: TorchText) -> list[str]:
    """Softmax, what stands for rows without a live key, and dropout."""
    unit = LOG2E if spec.factor else 1.0
    lines = [
        f"scored = torch.where(live, {text.number(spec.score.result)}, float('-inf'))",
        "top = scored.amax(-1)",
    ]
    if spec.sinks is not None:
        lines += ["sink = sinks.float().view(1, -1, 1)", "top = torch.maximum(top, sink)"]
    lines += [
        "dead = top == float('-inf')",
        "top = top.masked_fill(dead, 0.0)",
        "shares = torch.exp(scored - top[..., None])",
        "total = shares.sum(-1)" + (" + torch.exp(sink - top)" if spec.sinks is not None else ""),
        "weights = shares / total.masked_fill(dead, 1.0)[..., None]",
        f"top = top * {unit!r}",
        *_dead_weights(spec, text),
    ]
    if spec.dropout_p:
        kept = 1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0
        lines += [
            f"drawn = philox_uniform(s.shape, seed, {RANDOM_BITS})",
            f"weights = torch.where(drawn >= {spec.dropout_p!r}, weights * {kept!r}, 0.0)",
        ]
    return lines


def _dead_weights(spec: Spec, text: TorchText) -> list[str]:
    """Equal weights, of which the scores get a gradient unless a number has replaced them."""
    if spec.dead_code == 0:
        return []
    if spec.stops:
        number = "float('nan')" if spec.dead_code == 2 else "1.0 / columns"
        return [f"weights = torch.where(dead[..., None], {number}, weights)"]
    stopped = [f"c{place}" for place in spec.stopped]
    nan = spec.dead_code == 2
    held = [f"{name} = {name}.detach()" for name in stopped if name in spec.score.captures]
    return [
        *held,
        f"alike = {text.number(spec.score.result)}",
        "alike = torch.softmax((alike - alike.detach()).expand(s.shape), -1)",
        "weights = torch.where(dead[..., None], alike, weights)",
        *(["weights = weights * torch.where(dead[..., None], float('nan'), 1.0)"] if nan else []),
    ]


def backward_reference(spec: Spec, learned: Sequence[int]) -> str:
    """``def reference(grad, out, sums, query, ...)``, by autograd, behind the forward."""
    names = operand_names(spec)
    wanted = ["query", "key", "value", *(["sinks"] if spec.sinks is not None else [])]
    wanted += list(numbered("c", [None] * len(spec.captures)))
    wanted = [name for name in wanted if not name.startswith("c") or int(name[1:]) in learned]
    lines = [
        f"wanted = [one.detach().requires_grad_() for one in ({', '.join(wanted)},)]",
        f"{', '.join(wanted)}, = wanted",
        "with torch.enable_grad():",
        f"    result = attention({', '.join(names)})[0]",
        "return torch.autograd.grad(result, wanted, grad)",
    ]
    head = f"def reference(grad, out, sums, {', '.join(names)}):"
    return f"{forward_reference(spec, 'attention')}\n\n\n{head}\n" + "\n".join(f"    {one}" for one in lines)
