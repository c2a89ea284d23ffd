"""`generate` as users call it: prompts and tokens a second, by cache, batch and length of the prompt.

A row is timed twice in turns, writing one token and writing many: the first is the prompt's time, and what
the others add is theirs. The floor of a token is the time in which the memory hands over all weights and the
keys and values, at the speed of a large copy that is timed beside. Where `weights` are quantized they are
fxopt's, which reads fewer bytes; eager and Inductor have the dense ones.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

import fxopt
from fxopt.commands.targets import resolve
from fxopt.measure.compare import faults_of, figures
from fxopt.measure.compiled import BASELINE, CANDIDATE, EAGER, TWIN, how
from fxopt.measure.full_models import FULL
from fxopt.measure.jobs import Job
from fxopt.measure.memory import copy_bandwidth, peak_bytes, stored_bytes
from fxopt.measure.results import Row
from fxopt.measure.suite import release
from fxopt.measure.timing import Timings, interleave
from fxopt.options import KV_CACHE_DTYPES
from fxopt.report.record import collect
from fxopt.suites.plan import Plan, chosen, megabytes, over
from fxopt.suites.quant import KNOWN, rule

TITLE = "time of inductor / time of fxopt in `generate`: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "over eager": over(EAGER),
    "inductor tokens/s": lambda row: f"{row['tokens_per_second'][BASELINE]:.4g}",
    "fxopt tokens/s": lambda row: f"{row['tokens_per_second'][CANDIDATE]:.4g}",
    "of the floor": lambda row: f"{row['floor'][CANDIDATE]:.0%}" if "floor" in row else "-",
    "MB": megabytes,
    "weights, MB": lambda row: " → ".join(f"{each / 2**20:.3g}" for each in row["weight_bytes"].values()),
    "same tokens": lambda row: f"{row['same_tokens']:.0%}",
}
MODELS = ("llama", "qwen3", "gemma2")
# (batches, lengths of prompts) by size.
SHAPES = {
    "tiny": ((1, 4), (16, 64)),
    "small": ((1, 8), (64, 512)),
    "full": ((1, 8), (512, 4096)),
}
PHASES = ("prompt", "decode")
DENSE = "dense"
# Of the first model, for one text at a time: what its weights weigh decides most there.
QUANTIZED = ("int8", "int4")
CACHES = ("dynamic", "static")
Step = Callable[[], Any]
Case = tuple[str, str, str, str, int, int]


def jobs(plan: Plan) -> list[Job]:
    """Two for each model, weights, cache, its dtype, batch and length, which share what they measure.

    Raises:
        UnknownChoice: weights, a cache or a dtype of it that there is not.
    """
    batches: Sequence[int]
    batches, lengths = SHAPES[plan.size]
    decoders = tuple(name for name, model in FULL.items() if model.decoder)
    models = plan.targets(decoders if plan.size == "full" else MODELS)
    batches = plan.batches or batches
    caches, kv = chosen("--caches", plan.caches, CACHES), chosen("--kv", plan.kv, KV_CACHE_DTYPES)
    weights = chosen("--quantize", plan.quantize, (DENSE, *KNOWN)) or (DENSE, *QUANTIZED)
    cases = itertools.product(models, weights, caches, kv, batches, plan.lengths or lengths)
    kept = [case for case in cases if plan.quantize or case[1] == DENSE or _first(case, models, batches)]
    return list(_both_phases(plan, kept))


def _first(case: Case, models: Sequence[str], batches: Sequence[int]) -> bool:
    model, _, _, kv, batch, _ = case
    return model == models[0] and batch == min(batches) and kv == "auto"


def _both_phases(plan: Plan, cases: Iterable[Case]) -> Iterator[Job]:
    for case in cases:
        names = ("model", "weights", "cache", "kv", "batch", "length")
        key: Row = dict(zip(names, case, strict=True))
        once = functools.cache(functools.partial(_measure, plan, **key))
        for phase in PHASES:
            yield Job(key | {"phase": phase}, functools.partial(_row, phase, once, key, plan.tokens))


def _row(phase: str, measured: Callable[[], Row], key: Row, tokens: int) -> Row:
    found = measured()
    times: Timings = found[phase]
    count = key["batch"] * (key["length"] if phase == "prompt" else 1)
    row = figures(times)
    seconds = row["seconds"]
    row |= {
        "tokens_per_second": {name: count / each for name, each in seconds.items()},
        "same_tokens": found["same_tokens"],
        "accepted": found["accepted"],
        "faults": found["faults"],
        "peak_bytes": found["peak_bytes"],
        "weight_bytes": found["weight_bytes"],
    }
    if phase == "decode":
        read, rate = found["bytes"], found["bandwidth"]
        row["floor"] = {name: read[name] / rate / each for name, each in seconds.items()}
        row |= {"bytes": read, "bandwidth": rate}
    return row


def _measure(plan: Plan, model: str, weights: str, cache: str, kv: str, batch: int, length: int) -> Row:
    subject = resolve(model, plan.request(batch=batch, seq=length))
    release()
    ours, prompt = subject.model, subject.kwargs["input_ids"]
    if weights != DENSE:
        ours = fxopt.prepare(copy.deepcopy(ours), rule(plan, model, weights))
    read = {EAGER: subject.model, BASELINE: subject.model, CANDIDATE: ours}
    with collect() as records:
        steps = {
            name: (writing(one, prompt, cache, 1), writing(one, prompt, cache, plan.tokens + 1))
            for name, one in _writers(plan, subject.model, ours, kv).items()
        }
        for _ in range(2):  # compiles: for the first length of the cache, and for all others
            texts = {name: long() for name, (_, long) in steps.items()}
        for short, _ in steps.values():
            short()
    meant = texts[EAGER] if weights == DENSE else writing(ours, prompt, cache, plan.tokens + 1)()
    steps[TWIN] = steps[BASELINE]
    turns = {f"{name}/{place}": step for name, pair in steps.items() for place, step in enumerate(pair)}
    times = interleave(turns, budget_seconds=4 * plan.budget)
    same = (texts[CANDIDATE] == meant).double().mean().item()
    found = {
        **phases(times, list(steps), plan.tokens),
        "same_tokens": same,
        # Rounding may choose another token: in float32, with rows as they are, it does not.
        "accepted": same == 1.0 or plan.dtype != "float32" or kv != "auto",
        "faults": faults_of(records),
        "peak_bytes": {name: peak_bytes(steps[name][1]) for name in (EAGER, BASELINE, CANDIDATE)},
        "weight_bytes": {name: stored_bytes(read[name]) for name in (BASELINE, CANDIDATE)},
        "bytes": {name: _token_bytes(one, batch, length + plan.tokens // 2) for name, one in read.items()},
        "bandwidth": copy_bandwidth(plan.device),
    }
    release()
    return found


def _writers(plan: Plan, dense: Any, own: Any, kv: str) -> dict[str, Any]:
    """Who has `generate`. All share the weights, unless fxopt has its `own`."""
    options = {**plan.options, **({"kv_cache_dtype": kv} if kv != "auto" else {})}
    theirs = copy.copy(dense)
    theirs.compile(**how(BASELINE, mode=plan.mode))
    ours = torch.compile(own, **how(CANDIDATE, mode=plan.mode, options=options))
    return {EAGER: dense, BASELINE: theirs, CANDIDATE: ours}


def writing(model: Any, prompt: torch.Tensor, cache: str, tokens: int) -> Step:
    """Greedily, always so many tokens."""
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None, "disable_compile": True,
    }  # fmt: skip
    if cache == "static":
        given |= {"cache_implementation": "static"}

    def write() -> Any:
        with torch.no_grad():
            return model.generate(prompt, **given)

    return write


def phases(times: Timings, names: Sequence[str], tokens: int) -> dict[str, Timings]:
    """The prompt, and one token: the difference of two texts in the same round, by the tokens.

    Args:
        times: of one token, `<name>/0`, and of so many more, `<name>/1`.
    """
    short, long = ({name: times.seconds[f"{name}/{place}"] for name in names} for place in (0, 1))
    tiny = 1e-9  # a difference that the noise of a round makes negative is no time
    decode = {
        name: [max(b - a, tiny) / tokens for a, b in zip(short[name], long[name], strict=True)]
        for name in names
    }
    return {"prompt": Timings(short), "decode": Timings(decode)}


def _token_bytes(model: Any, batch: int, length: int) -> int:
    """What one token must read: all weights but the rows of embeddings, and the keys and values."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rows = 2 * batch * length * groups * width * config.num_hidden_layers
    return stored_bytes(model) + int(rows * model.get_input_embeddings().weight.element_size())
