"""The suites of `fxopt bench`: what they measure, and that rivals compute the same."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.commands.targets import UnknownChoice, UnknownTarget
from fxopt.measure.accuracy import allowed_error, max_error
from fxopt.measure.compare import exact_result
from fxopt.measure.compiled import BASELINE, CANDIDATE, EAGER, TUNED, TWIN, caches_in, how
from fxopt.measure.full_models import FULL
from fxopt.measure.models import build, model_class
from fxopt.measure.noise import name_of
from fxopt.measure.shrink import SCALES
from fxopt.measure.suite import SUITE, UNTRAINED, Case
from fxopt.measure.timing import Timings
from fxopt.suites import attention, compile, fusion, generate, hf, quant, quant_rivals, train
from fxopt.suites.plan import SUITES, Plan, UnknownSuite, load

# What the publishers say, in millions of parameters.
MILLIONS = {
    "llama-3.2-1b": 1236, "llama-3.1-8b": 8030, "qwen2.5-7b": 7616, "gemma-2-9b": 9242, "bert-large": 335,
    "t5-large": 738, "vit-large": 304, "whisper-large": 1543,
}  # fmt: skip


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_rows_of_every_size_and_their_names_differ(name: str, size: str) -> None:
    suite = load(name)
    jobs = suite.jobs(Plan(suite=name, size=size))
    assert jobs
    assert len({tuple(job.key.items()) for job in jobs}) == len({job.name for job in jobs}) == len(jobs)
    assert suite.TITLE
    assert suite.COLUMNS


def test_models_are_chosen() -> None:
    jobs = load("hf").jobs(Plan(models=("t5", "BartForCausalLM"), train=False))
    assert [name_of(job.key, list(job.key)) for job in jobs] == ["t5 infer", "BartForCausalLM infer"]


def test_what_does_not_fit_is_not_trained() -> None:
    jobs = load("hf").jobs(Plan(size="full"))
    trained = {job.key["model"] for job in jobs if job.key["phase"] == "train"}
    assert trained == {name for name, model in FULL.items() if model.trained}


def test_the_quick_size_infers_with_all_and_trains_one_layer_of_some() -> None:
    def rows(**chosen: Any) -> list[tuple[str, str]]:
        jobs = load("hf").jobs(Plan(size="tiny", **chosen))
        return [(job.key["model"], job.key["phase"]) for job in jobs]

    models = {phase: [model for model, its in rows() if its == phase] for phase in ("infer", "train")}
    assert len(models["infer"]) >= 40
    assert models["train"] == [model for model in SUITE if model not in UNTRAINED]
    assert rows(infer=False) == [(model, "train") for model in models["infer"]]
    assert rows(models=("glm4",)) == [("glm4", "infer"), ("glm4", "train")]
    plan = Plan(size="tiny")
    training, inference = (hf._request(plan, Case("llama", phase)).scale() for phase in (True, False))
    assert (training.layers, inference.layers) == (1, SCALES["tiny"].layers)


def test_an_unknown_suite() -> None:
    with pytest.raises(UnknownSuite, match="no suite 'hff'"):
        load("hff")


@pytest.mark.parametrize("name", ["hf", "generate", "train", "compile", "quant"])
def test_a_model_that_there_is_not_is_known_before_anything_is_measured(name: str) -> None:
    with pytest.raises(UnknownTarget, match="llama"):
        load(name).jobs(Plan(suite=name, models=("bert", "llamma")))


def test_a_suite_that_is_misspelled_is_no_model() -> None:
    with pytest.raises(UnknownTarget, match="Nearest suites: train"):
        load("hf").jobs(Plan(models=("trian",)))


def test_a_path_that_there_is_not_is_no_model_id() -> None:
    with pytest.raises(UnknownTarget):
        load("hf").jobs(Plan(models=("/no/such/directory",)))


@pytest.mark.parametrize(("name", "valid"), [("attention", "none"), ("fusion", "gate")])
def test_suites_without_models(name: str, valid: str) -> None:
    with pytest.raises(UnknownChoice, match=valid):
        load(name).jobs(Plan(suite=name, models=("llama",)))


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"dtype": "float17"}])
def test_a_size_or_dtype_that_there_is_not(wrong: dict[str, str]) -> None:
    Plan(size="full").validate()
    with pytest.raises(UnknownChoice):
        Plan(**wrong).validate()


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_is_the_published_one(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(FULL[name].kind, **FULL[name].config)
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.01)


class TestCandidates:
    def test_who_compiles_how(self) -> None:
        assert how(BASELINE, mode="reduce-overhead", options={"x": 1})["mode"] == "reduce-overhead"
        assert "options" not in how(BASELINE, options={"x": 1})
        ours = how(CANDIDATE, mode="max-autotune", options={"strict": True}, cache="c")
        assert ours["options"] == {"strict": True, "mode": "max-autotune", "cache_dir": "c"}
        assert how(TUNED)["backend"] == BASELINE
        assert how(TUNED)["mode"].startswith("max-autotune")

    def test_caches_are_where_they_were_afterwards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        before = cache_dir()
        with caches_in(tmp_path):
            assert Path(cache_dir()).is_relative_to(tmp_path)
            assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path))
        assert cache_dir() == before
        assert "TRITON_CACHE_DIR" not in os.environ


class TestAttention:
    @pytest.mark.parametrize("case", list(attention.cases(Plan(size="tiny"))), ids=str)
    def test_sdpa_with_the_known_mask_is_the_same(self, case: attention.Case) -> None:
        subject = attention.subject_of(case, "tiny", "cpu")
        window = attention.SHAPES["tiny"][3]
        rows = slice(0, case.length - case.length // 10)  # those whose own key is live
        ours = subject.step(subject.model)()[:, :, rows]
        theirs = attention._stock(case, subject, window)()[:, :, rows]
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.slow
    @pytest.mark.parametrize("padded", [False, True])
    def test_flex_attention_is_the_same(self, padded: bool) -> None:
        case = attention.Case("window", "sdpa", 128, padded, False, "float32")
        subject = attention.subject_of(case, "tiny", "cpu")
        found = attention._flex(case, subject, attention.SHAPES["tiny"][3])()
        torch.testing.assert_close(found, subject.step(subject.model)())


class TestGenerate:
    def test_a_token_is_what_the_longer_text_adds(self) -> None:
        seconds = {"fxopt/0": [1.0, 2.0], "fxopt/1": [3.0, 6.0]}
        found = generate.phases(Timings(seconds), ["fxopt"], 4)
        assert found["prompt"].seconds == {"fxopt": [1.0, 2.0]}
        assert found["decode"].seconds == {"fxopt": [0.5, 1.0]}

    def test_a_token_reads_the_weights_once_and_the_keys_and_values(self) -> None:
        subject = build("llama", SCALES["tiny"])
        model, config = subject.model, subject.model.config
        rows = 2 * 3 * 10 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        weights = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
        table = model.get_input_embeddings().weight.numel()
        before = generate._token_bytes(model, 3, 10)
        assert before == 4 * (weights - table + rows)
        notes = fxopt.prepare(model, quant.rule(Plan(size="tiny"), "llama", "int8")).fxopt_linears
        saved = before - generate._token_bytes(model, 3, 10)
        named = 200 * len(notes)  # what says of each layer how it is quantized
        assert 0 <= notes.bytes_before - notes.bytes_after - saved < named

    def test_two_phases_share_one_measurement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def measure(plan: Plan, **key: Any) -> dict[str, Any]:
            calls.append(key)
            times = Timings({name: [1.0, 1.0] for name in (EAGER, BASELINE, CANDIDATE, TWIN)})
            told = {"same_tokens": 1.0, "accepted": True, "faults": [], "peak_bytes": {}}
            read = dict.fromkeys(times.seconds, 10)
            return {"prompt": times, "decode": times, "bytes": read, "bandwidth": 20.0,
                    "weight_bytes": {}, **told}  # fmt: skip

        monkeypatch.setattr(generate, "_measure", measure)
        plan = Plan(suite="generate", models=("llama",), caches=("dynamic",), batches=(2,), lengths=(8,),
                    quantize=("dense",))  # fmt: skip
        prompt, decode = [job.measure() for job in generate.jobs(plan)]
        assert len(calls) == 1
        assert prompt["tokens_per_second"][CANDIDATE] == 16.0
        assert (decode["tokens_per_second"][CANDIDATE], decode["floor"][CANDIDATE]) == (2.0, 0.5)

    def test_quantized_weights_are_of_one_model_and_of_one_text_unless_they_are_asked_for(self) -> None:
        own = generate.jobs(Plan(suite="generate"))
        found = {(job.key["model"], job.key["batch"]) for job in own if job.key["weights"] != "dense"}
        assert found == {("llama", 1)}
        asked = generate.jobs(Plan(suite="generate", quantize=("int4",)))
        assert {job.key["model"] for job in asked} == set(generate.MODELS)
        assert {job.key["weights"] for job in asked} == {"int4"}

    @pytest.mark.parametrize(
        ("flag", "plan"),
        [
            ("--caches", {"caches": ("fixed",)}),
            ("--kv", {"kv": ("int3",)}),
            ("--quantize", {"quantize": ("x",)}),
        ],
    )
    def test_a_choice_that_there_is_not(self, flag: str, plan: dict[str, Any]) -> None:
        with pytest.raises(UnknownChoice, match=flag):
            generate.jobs(Plan(suite="generate", **plan))


class TestQuant:
    plan = Plan(suite="quant", size="tiny", dtype="float32", seconds=0.05, options={"host": "eager"})

    @pytest.mark.parametrize("target", ["96x64", "llama"])
    def test_the_reference_has_the_weights_of_fxopt_and_no_others(self, target: str) -> None:
        dense = quant.dense_layers(self.plan, target, "int4", 3)
        ours = fxopt.prepare(copy.deepcopy(dense.subject.model), dense.rule)
        plain = quant.plainly(ours)
        assert sum(isinstance(one, quant._Plain) for one in plain.modules()) == sum(
            note.is_quantized for note in ours.fxopt_linears
        )
        found = [dense.subject.step(one)() for one in (ours, plain, dense.subject.model)]
        exact = exact_result(replace(dense.subject, model=plain))
        assert max_error(found[0], exact) <= allowed_error(found[1], exact)
        assert max_error(found[2], exact) > 1e-2

    def test_heads_stay_dense(self) -> None:
        dense = quant.dense_layers(self.plan, "bert", "int8", 3)
        ours = fxopt.prepare(dense.subject.model, dense.rule)
        names = [note.name for note in ours.fxopt_linears if note.is_quantized]
        assert names
        assert all("encoder.layer" in name for name in names)

    def test_as_many_layers_as_no_cache_holds(self) -> None:
        plan = Plan(suite="quant", size="small")
        dense = quant.dense_layers(plan, "4096x8192", "int8", 1)
        assert dense.products == 4
        assert [tuple(one.shape) for one in dense.subject.args] == [(4, 1, 8192)]

    def test_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quant_rivals.importlib.util, "find_spec", lambda name: None)
        (job,) = quant.jobs(replace(self.plan, models=("96x64",), lengths=(2,), quantize=("int8",)))
        row = job.measure()
        assert row["accepted"] is True
        assert row["decibels"]["inductor"] > 100 > row["decibels"]["fxopt"] > 30
        assert set(row["over"]) == {"eager", "inductor freezing"}
        assert row["weight_bytes"]["inductor"] == 4 * 96 * 64
        assert 96 * 64 < row["weight_bytes"]["fxopt"] < 2 * 96 * 64
        read = row["bytes"]["fxopt"]
        assert row["floor"]["fxopt"] == pytest.approx(read / row["bandwidth"] / row["seconds"]["fxopt"])

    def test_an_answer_that_is_wrong_is_not_accepted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dense = quant.dense_layers(self.plan, "96x64", "int8", 2)
        ours = fxopt.prepare(copy.deepcopy(dense.subject.model), dense.rule)
        answer = dense.subject.step(ours)()
        assert quant._quality(dense.subject, ours, {CANDIDATE: answer})["accepted"]
        wrong = [one * 1.01 for one in answer]
        assert not quant._quality(dense.subject, ours, {CANDIDATE: wrong})["accepted"]

    def test_a_scheme_that_there_is_not(self) -> None:
        with pytest.raises(UnknownChoice, match="int9"):
            quant.jobs(Plan(suite="quant", quantize=("int9",)))

    def test_a_model_without_large_layers(self) -> None:
        plan = replace(self.plan, size="small", models=("96x64",), lengths=(1,), quantize=("int8",))
        small = quant.dense_layers(plan, "96x64", "int8", 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quant, "dense_layers", lambda *_: replace(small, rule={"*": "int8"}))
            with pytest.raises(quant.NothingToQuantize, match="96x64"):
                quant.jobs(plan)[0].measure()

    def test_a_rival_that_cannot_be_compiled_runs_eagerly_and_one_that_cannot_run_is_left_out(self) -> None:
        subject = quant.dense_layers(self.plan, "96x64", "int8", 1).subject
        measured = quant._Measured(subject)

        def refuse(model: torch.nn.Module) -> Any:
            raise ValueError("no kernel\nand more")

        measured.try_to_add("eager only", lambda: subject.model, refuse)
        measured.try_to_add("broken", lambda: refuse(subject.model), refuse)
        assert list(measured.steps) == ["eager only"]
        assert measured.refused == dict.fromkeys(("eager only", "broken"), "ValueError: no kernel")

    def test_rivals_are_those_that_are_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        has = {"torchao"}
        found = quant_rivals.importlib.util
        monkeypatch.setattr(found, "find_spec", lambda name: name if name in has else None)
        assert quant_rivals.rivals("int8-dynamic") == ["torchao"]
        assert quant_rivals.rivals("nf4") == []
        has.add("bitsandbytes")
        assert quant_rivals.rivals("nf4") == ["bitsandbytes"]


class TestTrain:
    @pytest.mark.parametrize("by", [train._by_loop, train._by_trainer])
    def test_a_step_trains(self, by: Any, tmp_path: Path) -> None:
        subject = build("llama", SCALES["tiny"], training=True).without_chance()
        expected = subject.answering(subject.step(subject.model))()
        before = [parameter.detach().clone() for parameter in subject.model.parameters()]
        answer, step = by(Plan(suite="train"), subject, EAGER, str(tmp_path))
        for ours, theirs in zip(answer(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        step()
        changed = [not torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True)]
        assert all(changed)

    @pytest.mark.parametrize("installed", [True, False])
    def test_the_trainer_needs_accelerate(self, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        real = train.importlib.util.find_spec

        def find_spec(name: str, *rest: Any) -> Any:
            return installed or None if name == "accelerate" else real(name, *rest)

        monkeypatch.setattr(train.importlib.util, "find_spec", find_spec)
        found = [job.key["by"] for job in train.jobs(Plan(suite="train", models=("bert",)))]
        assert found == (["loop", "trainer"] if installed else ["loop"])


class TestFusion:
    def test_bytes_are_of_what_is_read_and_made(self) -> None:
        x, weight = torch.randn(4, 128), torch.randn(128)
        for name, count in (("gate", 3), ("rope", 2), ("softmax", 3)):
            region = fusion.REGIONS[name]
            assert fusion._bytes([x, x, weight][: region.read], region.run(x, x, weight)) == count * x.nbytes
        region = fusion.REGIONS["add_rms_norm"]
        moved = fusion._bytes([x, x, weight][: region.read], region.run(x, x, weight))
        assert moved == 4 * x.nbytes + weight.nbytes


class TestCompile:
    def test_a_row_is_of_processes_that_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, bool]] = []

        def run(plan: Plan, key: dict[str, Any], backend: str, folder: Path) -> dict[str, Any]:
            cold = not (folder / "seen").exists()
            (folder / "seen").touch()
            calls.append((backend, cold))
            seconds = {BASELINE: 10.0, CANDIDATE: 8.0}[backend] * (1.0 if cold else 0.1)
            stages = {"normalize": 0.3, "passes": 0.2, "host": 5.0}
            return {"seconds": seconds, "stages": stages, "passes": {}, "sites": 3, "graphs": [False]}

        monkeypatch.setattr(compile, "_in_new_process", run)
        plan = Plan(suite="compile", models=("bert",), layers=(4,), train=False, repeats=2)
        (job,) = compile.jobs(plan)
        row = job.measure()
        assert calls.count((BASELINE, True)) == calls.count((BASELINE, False)) == 4
        assert calls.count((CANDIDATE, True)) == calls.count((CANDIDATE, False)) == 2
        assert (row["ratio"]["median"], row["noise"]["median"]) == (1.25, 1.0)
        assert row["warm"] == {BASELINE: 1.0, CANDIDATE: pytest.approx(0.8)}
        assert (row["own"], row["share"]) == (0.5, 0.05)

    @pytest.mark.slow
    def test_the_second_process_finds_what_the_first_left(self, tmp_path: Path) -> None:
        key = {"model": "bert", "phase": "infer", "layers": 1}
        plan = Plan(suite="compile", size="tiny")
        cold, warm = [compile._in_new_process(plan, key, CANDIDATE, tmp_path) for _ in range(2)]
        assert warm["seconds"] < cold["seconds"]
        assert warm["stages"]["host"] < cold["stages"]["host"]

    def test_a_process_that_fails_says_why(self) -> None:
        key = {"model": "no_such_model", "phase": "infer", "layers": 1}
        with pytest.raises(compile.CompilationFailed, match="no_such_model"):
            compile._in_new_process(Plan(suite="compile", size="tiny"), key, CANDIDATE, Path("unused"))
