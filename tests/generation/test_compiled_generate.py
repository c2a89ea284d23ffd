"""`torch.compile(model, backend="fxopt").generate(...)`: compiled, with the model's own tokens."""

from __future__ import annotations

import threading
import types
import warnings
from typing import Any

import pytest
import torch
from generation.test_generate import NEW, STRATEGIES, gpt2, llama, prompts, t5, tokens
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import fxopt
from fxopt.backend import reset
from fxopt.integrations.generate import extend_optimized_module, restore_optimized_module
from fxopt.report.record import collect
from support.compiled import all_handled

EAGER = {"host": "eager"}


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="fxopt", options=EAGER | options)


@pytest.mark.parametrize(("build", "strategy"), [(llama, "greedy"), (gpt2, "sampling"), (t5, "beam")])
def test_runs_compiled(build: Any, strategy: str) -> None:
    model = build()
    how = {**prompts(), **STRATEGIES[strategy]}
    wanted = tokens(model, **how)
    with all_handled() as found:
        assert torch.equal(tokens(compiled(model), **how), wanted)
    assert found, "nothing was compiled"


def test_the_original_model_stays_as_it_is() -> None:
    model = llama()
    fast = compiled(model)
    state = dict(vars(model))
    tokens(fast, **prompts())
    assert vars(model).keys() == state.keys()
    assert type(model).generate is type(llama()).generate
    with collect() as found:
        tokens(model, **prompts())
    assert not found, "the original model runs compiled"


def test_reads_and_keeps_the_state_of_the_original_model() -> None:
    """Its generation config of today counts; what generate keeps on the model is kept there."""
    model = llama()
    fast = compiled(model)
    assert fast.generate(**prompts(), max_new_tokens=2).shape[1] == 11
    model.generation_config = GenerationConfig(max_new_tokens=4, pad_token_id=0, bos_token_id=1)
    assert fast.generate(**prompts()).shape[1] == 13
    model.kept = 3
    assert fast.kept == 3


def test_a_second_call_compiles_nothing() -> None:
    fast = compiled(llama())
    tokens(fast, **prompts())
    with collect() as found:
        tokens(fast, **prompts())
    assert not found


def test_static_cache_is_compiled_by_fxopt_alone() -> None:
    """transformers would compile decoding once more, with its own backend, where it can."""
    model = llama()
    how = {**prompts(), "do_sample": False, "cache_implementation": "static"}
    wanted = tokens(model, **how, disable_compile=True)
    config = fxopt.compile_config(mode=None, backend="inductor")
    with all_handled() as found:
        assert torch.equal(tokens(compiled(model), **how, compile_config=config), wanted)
    assert {record.host for record in found} == {"eager"}


def test_compile_config_reaches_fxopt_on_a_cpu() -> None:
    model = llama()
    how = {**prompts(), "do_sample": False, "cache_implementation": "static"}
    wanted = tokens(model, **how, disable_compile=True)
    config = fxopt.compile_config(options=EAGER)
    assert (config.backend, config.mode) == ("fxopt", None)
    assert fxopt.compile_config().mode == "reduce-overhead"
    with all_handled() as found:
        assert torch.equal(tokens(model, **how, compile_config=config), wanted)
    assert found


def test_from_two_threads_while_the_original_runs_too() -> None:
    model = llama()
    fast = compiled(model)
    wanted = tokens(model, **prompts(), do_sample=False)
    tokens(fast, **prompts(), do_sample=False)
    results: list[torch.Tensor] = []

    def run(which: Any) -> None:
        results.append(which.generate(**prompts(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False))

    threads = [threading.Thread(target=run, args=(which,)) for which in (fast, model, fast)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, wanted) for result in results)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(61)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w2")


def test_in_a_pipeline() -> None:
    model, words = llama(), tokenizer()
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    prompt = "w3 w4 w5 w6"
    wanted = pipeline("text-generation", model=model, tokenizer=words)(prompt, **how)
    with all_handled() as found:
        assert pipeline("text-generation", model=compiled(model), tokenizer=words)(prompt, **how) == wanted
    assert found


def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    model, words = llama(), tokenizer()
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "input_ids": prompts(1)["input_ids"]}
    model.generate(**how, streamer=TextStreamer(words))  # type: ignore[operator]
    wanted = capsys.readouterr().out
    fast = compiled(model)
    fast.generate(**how, streamer=TextStreamer(words))
    assert capsys.readouterr().out == wanted
    pieces = TextIteratorStreamer(words)
    thread = threading.Thread(target=fast.generate, kwargs={**how, "streamer": pieces})
    thread.start()
    assert "".join(pieces) == wanted.rstrip("\n")
    thread.join()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_not_for_other_backends(backend: str) -> None:
    model = llama()
    assert torch.compile(model, backend=backend).generate.__self__ is model


def test_not_when_the_option_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    assert compiled(model, generate=False).generate.__self__ is model
    monkeypatch.setenv("FXOPT_GENERATE", "0")
    assert compiled(model).generate.__self__ is model


def test_removed_and_installed_again() -> None:
    from torch._dynamo import eval_frame

    model = llama()
    fast = compiled(model)
    restore_optimized_module(eval_frame)
    try:
        assert fast.generate.__self__ is model
        restore_optimized_module(eval_frame)
    finally:
        extend_optimized_module(eval_frame)
    assert not hasattr(fast.generate, "__self__")


def test_after_a_reset_it_is_compiled_anew() -> None:
    fast = compiled(llama())
    wanted = tokens(fast, **prompts())
    torch.compiler.reset()
    reset()
    with all_handled() as found:
        assert torch.equal(tokens(fast, **prompts()), wanted)
    assert found


class Writer(torch.nn.Module):
    """A model with a `generate` of its own."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.step, self.whole = torch.nn.Linear(4, 4), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x).sin()

    def generate(self, x: torch.Tensor, *, steps: int) -> torch.Tensor:
        for _ in range(steps):
            x = self(x) if self.whole else self.step(x).sin()
        return x


def test_generate_of_any_module() -> None:
    model, x = Writer(whole=True), torch.randn(2, 4)
    with all_handled() as found:
        torch.testing.assert_close(compiled(model).generate(x, steps=3), model.generate(x, steps=3))
    assert found


def test_warns_when_generate_does_not_call_the_model() -> None:
    model, x = Writer(whole=False), torch.randn(2, 4)
    with pytest.warns(
        UserWarning, match=r"generate of Writer did not call the model itself.*module\.compile"
    ):
        assert torch.equal(compiled(model).generate(x, steps=3), model.generate(x, steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Writer(whole=True)).generate(x, steps=1)


def test_a_generate_that_was_replaced_on_the_model() -> None:
    """A method is handed the compiled model; of anything else it is said that it cannot be."""
    model, x = Writer(whole=True), torch.randn(2, 4)
    wanted, original = model.generate(x, steps=2), model.generate
    model.generate = lambda x, steps: original(x, steps=steps)  # type: ignore[method-assign,misc]
    with pytest.warns(UserWarning, match=r"generate of Writer was replaced.*model\.compile"):
        assert torch.equal(compiled(model).generate(x, steps=2), wanted)
    model.generate = types.MethodType(Writer.generate, model)  # type: ignore[method-assign]
    with all_handled(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxopt")
        torch.testing.assert_close(compiled(model).generate(x, steps=2), wanted)
