"""The reference and the example in the file of a kernel for attention over a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.codegen.decode_problem import Problem
from fxopt.codegen.formula_reference import TorchText
from fxopt.ir.cost import hint
from fxopt.ir.ops.masking import MEAN, NAN, NONE
from fxopt.ir.row_codes import SMALLEST, largest_of

_DEAD = {
    NAN: 'out = torch.where(alive, out, float("nan"))',
    MEAN: "out = torch.where(alive, out, value.mean(2, keepdim=True))",
    NONE: "out = torch.where(alive, out, value.mean(2, keepdim=True))",
}


def reference_text(problem: Problem, names: Sequence[str]) -> str:
    """``def reference(<names>)`` in plain torch."""
    lines = ["batch, heads, rows, _ = query.shape", "k = torch.arange(key.shape[2], device=query.device)"]
    for name in ("key", "value") if problem.has("key_scale") else ():
        lines.append(f"{name} = ({name}.to({name}_scale.dtype) * {name}_scale).to(query.dtype)")
    if problem.has("key_rest"):
        lines += ["query = torch.cat([query, query_rest], -1)", "key = torch.cat([key, key_rest], -1)"]
    lines += [*_attention(problem), *_dead_rows(problem)]
    return _function("reference", names, [*lines, "return out"])


def _function(name: str, parameters: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"def {name}({', '.join(parameters)}):", *(f"    {line}" for line in lines)])


def _attention(problem: Problem, value: str = "value") -> list[str]:
    """`out` of query, key and value, where the keys are at the positions k; `live` is left as well."""
    text = TorchText(problem.captured)
    lines = [
        f"{name} = {name}.repeat_interleave({problem.group}, 1)"
        for name in ("key", "value")
        if problem.group > 1
    ]
    lines += [
        f"{letter} = torch.arange({extent}, device=query.device).view{shape}"
        for letter, extent, shape in _AXES
    ]
    lines.append(f"live = {text.condition(problem.mask.live)}")
    if problem.has("span"):
        lines.append("live = live & (k >= span[0]) & (k < span[1])")
    lines.append(f"s = (query @ key.transpose(2, 3)) * {problem.scale!r}")
    if not problem.score.is_identity:
        lines.append(f"s = ({text.number(problem.score.result)}).to(query.dtype)")
    lines.append('s = torch.where(live, s, float("-inf"))')
    if problem.has("sinks"):
        lines.append("sink = sinks.view(1, -1, 1, 1).to(s.dtype).expand(batch, heads, rows, 1)")
        lines.append("s = torch.cat([s, sink], -1)")
    lines.append("weights = torch.softmax(s, -1, dtype=torch.float32).nan_to_num(0.0)")
    return [*lines, f"out = weights[..., : len(k)].to(query.dtype) @ {value}"]


def _dead_rows(problem: Problem) -> list[str]:
    if problem.dead_rows not in _DEAD or problem.has("sinks"):
        return []
    alive = "alive = live.expand(batch, heads, rows, len(k)).any(-1, keepdim=True)"
    return [alive, _DEAD[problem.dead_rows]]


_AXES = (("b", "batch", "(-1, 1, 1, 1)"), ("h", "heads", "(-1, 1, 1)"), ("q", "rows", "(-1, 1)"))


def append_reference_text(problem: Problem, names: Sequence[str], interleaved: bool, ring: bool) -> str:
    """``def reference(<names>)`` of an attention that appends first, in plain torch."""
    lines = ["batch, heads, rows, _ = query.shape"]
    if problem.has("cos"):
        lines += ["query, k_new = rotated(query, cos, sin), rotated(k_new, cos, sin)"]
    lines += ["columns = key.shape[2]", "slot = torch.arange(columns, device=key.device)"]
    lines += [f"start = {'int(length.flatten()[0])' if problem.has('length') else 'columns - rows'}"]
    lines += ["places = start + torch.arange(rows, device=key.device)"]
    lines += ["old = slot + (start - 1 - slot) // columns * columns" if ring else "old = slot"]
    kept = "(slot < start) & (old + columns >= start + rows)" if ring else "(slot - start) // rows != 0"
    lines += [f"kept = {kept}", "k = torch.cat([old[kept], places])"]
    lines += ["places = places % columns"] if ring else []
    for cache, new in (("key", "k_new"), ("value", "v_new")):
        lines += (_appended_codes if problem.has("key_scale") else _appended)(cache, new)
    # Whatever a row of the cache holds that nobody sees has no part in the sum.
    seen = "torch.where(live.expand(batch, heads, rows, len(k)).any(2)[..., None], value, 0)"
    lines += [*_attention(problem, seen), f"value = cached.repeat_interleave({problem.group}, 1)"]
    lines += [*_dead_rows(problem), "return out"]
    functions = [_function("reference", names, lines)]
    if problem.has("key_scale"):
        functions.insert(0, _rounded(problem))
    if problem.has("cos"):
        functions.insert(0, _ROTATED.format(turn=_INTERLEAVED if interleaved else _HALVES))
    return "\n\n".join(functions)


def _appended(cache: str, new: str) -> list[str]:
    """Seen are the rows that are kept, and the new ones; `cached` is all that the cache holds."""
    return [
        f"cached, {cache} = {cache}, torch.cat([{cache}[:, :, kept], {new}], 2)",
        f"cached.index_copy_(2, places, {new})",
    ]


def _appended_codes(cache: str, new: str) -> list[str]:
    """The same, of rows of 8 bits."""
    scale = f"{cache}_scale"
    return [
        f"codes, scale = rounded({new}, {cache}.dtype)",
        f"of_kept = {cache}[:, :, kept].to({scale}.dtype) * {scale}[:, :, kept]",
        "of_new = codes.to(scale.dtype) * scale",
        "for place, code, one in zip(places, codes.unbind(2), scale.unbind(2)):",
        f"    {cache}[:, :, place].copy_(code)",
        f"    {scale}[:, :, place].copy_(one)",
        f"cached = ({cache}.to({scale}.dtype) * {scale}).to(query.dtype)",
        f"{cache} = torch.cat([of_kept, of_new], 2).to(query.dtype)",
    ]


def _rounded(problem: Problem) -> str:
    stored = problem.tensors["key"].dtype
    lines = [
        f"scale = (x.float().abs().amax(-1, keepdim=True) / {largest_of(stored)}).clamp_min({SMALLEST!r})",
        "codes = x.float() / scale" if stored.is_floating_point else "codes = (x.float() / scale).round()",
        f"return codes.clamp(-{largest_of(stored)}, {largest_of(stored)}).to(dtype), scale",
    ]
    return _function("rounded", ["x", "dtype"], lines) + "\n"


_ROTATED = """def rotated(x, cos, sin):
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    {turn}
    return torch.cat([part * cos[:, None] + turned * sin[:, None], rest], -1)
"""
_HALVES = "turned = torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], -1)"
_INTERLEAVED = "turned = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)"


def example_text(problem: Problem, names: Sequence[str]) -> str:
    """``def example_inputs(device)``, of the shapes seen while tracing."""
    tensors = dict(problem.tensors) | dict(
        zip((one.name for one in problem.captured), problem.captures, strict=True)
    )
    columns = problem.size("key", 2)
    lines = ["def example_inputs(device):", "    generator = torch.Generator(device).manual_seed(0)"]
    lines += [f"    {name} = {_example(name, each, columns)}" for name, each in tensors.items()]
    values = {name: str(hint(size)) for name, size in zip(problem.size_names, problem.sizes, strict=True)}
    listed = ", ".join(values.get(name, name) for name in names)
    return "\n".join([*lines, f"    return ({listed},)"])


def _example(name: str, value: torch.Tensor, columns: int) -> str:
    shape, strides = (tuple(hint(one) for one in part) for part in (value.shape, value.stride()))
    stored = tuple(1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    made = f"torch.empty_strided({stored}, {strides}, dtype={value.dtype}, device=device)"
    if name == "length":
        return f"torch.full({shape}, {columns // 2}, device=device)"
    if name == "span":
        return f"torch.tensor([0, {columns}, 0], device=device)[:{shape[0]}]"
    if value.dtype.is_floating_point and value.element_size() == 1:
        made += ".copy_(torch.randn(" + f"{stored}, device=device, generator=generator))"
    elif value.dtype.is_floating_point:
        made += ".normal_(generator=generator)" + (".abs_().mul_(0.01)" if name.endswith("_scale") else "")
    elif value.dtype is torch.bool or value.element_size() == 1:
        low, high = (0, 2) if value.dtype is torch.bool else (0 if value.dtype is torch.uint8 else -127, 128)
        made += f".random_({low}, {high}, generator=generator)"
    else:  # a length or a position
        made += f".fill_({columns // 2})"
    return made if stored == shape else f"{made}.expand{shape}"
