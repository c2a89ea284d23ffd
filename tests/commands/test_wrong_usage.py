"""Wrong arguments of commands: exit code 2 and a sentence that says what to do, before anything is done."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from fxopt import cli

MODULE = """
import torch

def raises():
    raise RuntimeError("no weights [/here]")

def one_tensor():
    return (lambda x: x.relu() * x.shape[0]), torch.randn(3, 2), None

def wrong_arguments():
    return (lambda x: x), (torch.randn(3),), [("x", 1)]
"""


def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program says on the way out with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["fxopt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 2, error
    assert error.startswith("error: ")
    return error


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(MODULE)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Not a folder, in which nothing can be made."""
    path = tmp_path / "file"
    path.write_text("")
    return path


class TestTargets:
    def test_a_function_that_raises(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Path
    ) -> None:
        """Brackets in a message are no markup."""
        said = message(monkeypatch, capsys, "explain", f"{module}:raises")
        assert "it raised RuntimeError" in said
        assert "my_model.py:5" in "".join(said.split())
        assert "no weights [/here]" in said

    @pytest.mark.parametrize("text", ["1 / 0", "def f(:", "import no_such_module"])
    def test_a_module_that_cannot_be_imported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Path, text: str
    ) -> None:
        module.write_text(text)
        said = message(monkeypatch, capsys, "explain", f"{module}:f")
        assert "ZeroDivisionError" in said or "SyntaxError" in said or "No module named" in said

    @pytest.mark.parametrize("target", [":f", "..a:f"])
    def test_a_module_without_a_name(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
    ) -> None:
        assert "a function without required parameters" in message(monkeypatch, capsys, "explain", target)

    def test_a_file_without_a_function(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Path
    ) -> None:
        assert ":function" in message(monkeypatch, capsys, "explain", str(module))

    def test_arguments_by_name_that_are_no_dict(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Path
    ) -> None:
        assert "is no dict" in message(monkeypatch, capsys, "explain", f"{module}:wrong_arguments")

    def test_one_tensor_is_one_argument(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Path
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["fxopt", "explain", f"{module}:one_tensor", "--host", "eager"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code in (0, None), capsys.readouterr().err

    def test_weights_that_cannot_be_read(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 1}')
        (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
        said = message(monkeypatch, capsys, "explain", str(tmp_path))
        assert "cannot be loaded" in said


@pytest.mark.parametrize("command", [["explain", "llama"], ["bench", "hf", "bert", "--size", "tiny"]])
@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], device: str
) -> None:
    said = message(monkeypatch, capsys, *command, "--device", device)
    assert f"device '{device}' cannot be used here" in said
    assert "fxopt doctor" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--mode", "fast"], "mode 'fast'"),
        (["--disable", "no-such-pass"], "no value 'no-such-pass'"),
        (["--attn", "flahs"], "flahs"),
    ],
)
def test_nothing_is_measured_with_options_that_there_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert text in message(monkeypatch, capsys, "bench", "hf", "bert", "--size", "tiny", *arguments)


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "llama", "--html"],
        ["demo", "--out"],
        ["bench", "hf", "bert", "--size", "tiny", "--out"],
        ["cache", "export"],
    ],
)
def test_files_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], file: Path
) -> None:
    """Known before the work whose results they are to hold."""
    said = message(monkeypatch, capsys, *command, str(file / "result.png"))
    assert "cannot be written: Not a directory" in said
    assert "cannot be written: it is a folder" in message(monkeypatch, capsys, *command, str(file.parent))


def test_pictures_have_formats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ".png" in message(monkeypatch, capsys, "demo", "--out", str(tmp_path / "picture.docx"))


def test_a_damaged_archive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", "x" * 10_000)
    content = bytearray(path.read_bytes())
    content[36:50] = b"\xff" * 14
    path.write_bytes(bytes(content))
    assert "cannot be read as an archive" in message(monkeypatch, capsys, "cache", "import", str(path))
