"""The command line: what it prints, where it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt import __version__, cli
from fxopt.commands import bench
from fxopt.suites import hf
from support.cli import Run

TARGETS = """
import torch

class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, shift=None):
        y = torch.softmax(self.linear(x), -1) * 1.0
        return y if shift is None else y + shift

def three():
    return Twice(), (torch.randn(2, 4),), {"shift": torch.ones(4)}

def two_with_tensor():
    return Twice(), torch.randn(2, 4)

def two_with_dict():
    return Twice(), {"x": torch.randn(2, 4)}

def plain_function():
    return (lambda x: x.relu() * 1.0), (torch.randn(3),)

def hugging_face():
    from transformers import BertConfig, BertModel
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    return BertModel(config)

def nothing():
    return 7

def breaks():
    raise_here = torch.zeros(2, 3)
    return Twice(), (raise_here,)
"""


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    path = tmp_path / "my_targets.py"
    path.write_text(TARGETS)
    return path


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the console script."""
    monkeypatch.setattr(sys, "argv", ["fxopt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


class TestProgram:
    def test_version(self, run: Run) -> None:
        result = run("--version")
        assert result.exit_code == 0
        assert result.stdout == f"fxopt {__version__}\n"

    def test_help_names_every_command(self, run: Run) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert all(name in result.stdout for name in ("doctor", "demo", "bench", "explain"))

    def test_parsing_imports_neither_torch_nor_transformers(self) -> None:
        heavy = ("torch", "transformers", "matplotlib")
        code = f"import sys, fxopt.cli; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_runs_as_a_module(self) -> None:
        command = [sys.executable, "-m", "fxopt", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"fxopt {__version__}\n"

    @pytest.mark.parametrize("arguments", [["nonsense"], ["explain"], ["explain", "llama", "--nonsense"]])
    def test_wrong_usage_ends_with_2(self, run: Run, arguments: list[str]) -> None:
        assert run(*arguments).exit_code == 2


class TestExplain:
    def test_model_type(self, run: Run) -> None:
        result = run("explain", "llama", "--attn", "eager", "--host", "eager", "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["subject"] == "LlamaForCausalLM"
        assert report["summary"]["passes"]["rewrite-attention"]["applied"] == 2

    def test_disable(self, run: Run) -> None:
        arguments = ("--host", "eager", "--json", "--disable", "rewrite-attention,fuse_rms_norm")
        result = run("explain", "llama", "--attn", "eager", *arguments)
        passes = json.loads(result.stdout)["summary"]["passes"]
        assert all(
            passes.get(name, {"applied": 0})["applied"] == 0
            for name in ("rewrite-attention", "fuse-rms-norm")
        )

    def test_training_is_seen(self, run: Run) -> None:
        result = run("explain", "bert", "--train", "--host", "eager", "--json")
        assert json.loads(result.stdout)["summary"]["backward_graphs"] == 1

    def test_inference_is_the_default(self, run: Run) -> None:
        result = run("explain", "bert", "--host", "eager", "--json")
        assert json.loads(result.stdout)["summary"]["backward_graphs"] == 0

    def test_table_and_page(self, run: Run, tmp_path: Path) -> None:
        page = tmp_path / "report.html"
        result = run("explain", "gpt2", "--host", "eager", "--html", str(page))
        assert result.exit_code == 0
        assert "GPT2LMHeadModel" in result.stdout
        assert page.read_text().lstrip().lower().startswith("<!doctype html")

    @pytest.mark.parametrize(
        "name", ["three", "two_with_tensor", "two_with_dict", "plain_function", "hugging_face"]
    )
    def test_function(self, run: Run, targets: Path, name: str) -> None:
        result = run("explain", f"{targets}:{name}", "--host", "eager", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["summary"]["graphs"] == 1

    def test_module_in_the_current_directory(
        self, run: Run, targets: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(targets.parent)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert run("explain", "my_targets:three", "--host", "eager").exit_code == 0

    def test_directory_with_a_configuration(self, run: Run, tmp_path: Path) -> None:
        _tiny_bert_config().save_pretrained(tmp_path)
        result = run("explain", str(tmp_path), "--host", "eager", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["summary"]["graphs"] == 1

    def test_directory_with_weights(self, run: Run, tmp_path: Path) -> None:
        from transformers import BertForMaskedLM

        BertForMaskedLM(_tiny_bert_config()).save_pretrained(tmp_path)
        result = run("explain", str(tmp_path / "config.json"), "--host", "eager", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["subject"] == "BertForMaskedLM"


def _tiny_bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )


class TestWrongTargets:
    """Each ends with exit code 2 and a message that says what to do; nothing is compiled."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["llma"], "Nearest model types: llama"),
            (["somebody/some-model"], "HF_HUB_OFFLINE"),
            (["no_such_module:f"], "No module named"),
            (["json:no_such_function"], "has no function"),
            (["math:sqrt"], "it wants arguments (x)"),
            (["math:log"], "a function without required parameters"),
            (["llama", "--dtype", "int3"], "--dtype has no value 'int3'"),
            (["llama", "--size", "huge"], "Valid values: tiny, small"),
            (["llama", "--disable", "no-such-pass"], "no-such-pass"),
            (["llama", "--host", "gpu"], "host"),
            (["rag"], "module:function"),
        ],
    )
    def test_message(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        assert _main(monkeypatch, "explain", *arguments) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert error.startswith("error: ")
        assert message in error

    def test_function_that_returns_something_else(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], targets: Path
    ) -> None:
        assert _main(monkeypatch, "explain", f"{targets}:nothing") == 2
        assert "it returned int" in " ".join(capsys.readouterr().err.split())

    def test_empty_directory(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert _main(monkeypatch, "explain", str(tmp_path)) == 2
        assert "there is no config.json" in " ".join(capsys.readouterr().err.split())


def _row(model: str, ratio: float, **more: Any) -> dict[str, Any]:
    interval = {"median": ratio, "low": ratio, "high": ratio, "best": ratio}
    return {
        "model": model,
        "phase": "infer",
        "ratio": interval,
        "noise": dict.fromkeys(interval, 1.0),
        "over": {},
        "seconds": {"inductor": 0.002, "fxopt": 0.001},
        "dynamo": {"fxopt": {"graphs": 1, "breaks": 0, "recompiles": 0}},
        "sites": {"some-pass": 2},
        "accepted": True,
        "faults": [],
        "errors": {},
        **more,
    }


class TestBench:
    @pytest.mark.parametrize(
        ("words", "suite", "models"),
        [
            ([], "hf", ()),
            (["hf"], "hf", ()),
            (["bert", "t5"], "hf", ("bert", "t5")),
            (["train", "llama", "--models", "bert, t5"], "train", ("llama", "bert", "t5")),
        ],
    )
    def test_the_first_word_may_be_a_suite(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], suite: str, models: tuple[str, ...]
    ) -> None:
        plans = []
        monkeypatch.setattr(bench, "run", lambda plan, console: plans.append(plan) or 0)
        assert run("bench", *words, "--batch", "1,8", "--train", "--no-check").exit_code == 0
        (plan,) = plans
        assert (plan.suite, plan.models, plan.batches) == (suite, models, (1, 8))
        assert (plan.infer, plan.train, plan.check) == (False, True, False)

    def test_other_tokens_are_told(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {name: value for name, value in _row("bert", 1.0, accepted=False).items() if name != "errors"}
        monkeypatch.setattr(hf, "_one", lambda plan, case: dict(row))
        result = run("bench", "bert", "--infer")
        assert (result.exit_code, "other tokens" in result.stdout) == (1, True)

    @pytest.mark.parametrize("wrong", ["0", "x", "1,-2"])
    def test_sizes_are_positive_numbers(self, run: Run, wrong: str) -> None:
        assert run("bench", "--batch", wrong).exit_code == 2

    def test_one_function(self, run: Run, targets: Path, tmp_path: Path) -> None:
        out = tmp_path / "results" / "bench.jsonl"
        threads = torch.get_num_threads()
        result = run("bench", f"{targets}:three", "--infer", "--seconds", "0.2", "--out", str(out))
        torch.set_num_threads(threads)
        assert result.exit_code == 0, result.output
        head, row, summary = (json.loads(line) for line in out.read_text().splitlines())
        assert {head["kind"], row["kind"], summary["kind"]} == {"machine", "row", "summary"}
        assert torch.__version__.startswith(head["torch"])
        assert row["errors"]["fxopt"] <= 1e-6
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["seconds"]["fxopt"] > 0
        assert summary["rows"] == 1

    def test_interruption_keeps_what_was_measured(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        rows = iter([_row("bert", 1.25), KeyboardInterrupt()])
        monkeypatch.setattr(hf, "_one", lambda plan, case: _next(rows))
        out = tmp_path / "b.jsonl"
        result = run("bench", "bert", "gpt2", "t5", "--infer", "--out", str(out))
        assert result.exit_code == 130
        assert "1.250" in result.stdout
        kinds = [json.loads(line)["kind"] for line in out.read_text().splitlines()]
        assert kinds == ["machine", "row", "summary"]

    def test_a_model_that_fails_does_not_stop_the_rest(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measure(case: Any, *rest: Any, **more: Any) -> dict[str, Any]:
            if case.model == "bert":
                raise RuntimeError("boom")
            return _row(case.model, 1.0)

        monkeypatch.setattr(hf, "measure", measure)
        result = run("bench", "bert", "gpt2", "--infer", "--size", "tiny")
        assert result.exit_code == 1
        assert "RuntimeError: boom" in result.stdout
        assert "gpt2" in result.stdout

    @pytest.mark.parametrize(
        "defect", [{"accepted": False}, {"faults": ["host: AssertionError"]}, {"error": "RuntimeError: x"}]
    )
    def test_a_defect_is_an_exit_code(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, defect: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(hf, "_one", lambda plan, case: _row("bert", 1.0, **defect))
        assert run("bench", "bert", "--infer").exit_code == 1

    def test_infinite_errors_are_json(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
    ) -> None:
        row = _row("bert", 1.0, errors={"fxopt": float("inf")}, accepted=False)
        monkeypatch.setattr(hf, "_one", lambda plan, case: dict(row))
        out = tmp_path / "b.jsonl"
        run("bench", "bert", "--infer", "--out", str(out))
        json.loads(out.read_text().splitlines()[1], parse_constant=pytest.fail)


def _next(rows: Any) -> dict[str, Any]:
    value = next(rows)
    if isinstance(value, BaseException):
        raise value
    return dict(value)
