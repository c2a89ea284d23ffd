"""The script that makes the Makefile's environment: when it does nothing, and when it starts afresh."""

from __future__ import annotations

import http.server
import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "scripts" / "make_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Steps:
    """Stands in for the slow steps and writes down which were taken; its `python` is a shell script."""

    def __init__(self, script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self.install_works = True
        self.script = script
        self.folder = folder
        monkeypatch.setattr(script, "create", self.create)
        monkeypatch.setattr(script, "install", self.install)
        monkeypatch.setattr(sys, "argv", ["make_venv.py", str(folder)])

    def create(self, folder: Path, python: Path) -> bool:
        self.taken.append("create")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text("#!/bin/sh\nexit 0\n")
        python.chmod(0o755)
        return True

    def install(self, python: Path) -> bool:
        self.taken.append("install")
        return self.install_works

    def run(self) -> tuple[int, list[str]]:
        self.taken = []
        return self.script.main(), self.taken


@pytest.fixture
def steps(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    for name in script.INPUTS:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    return Steps(script, tmp_path / ".venv", monkeypatch)


def test_second_run_does_nothing(steps: Steps) -> None:
    assert steps.run() == (0, ["create", "install"])
    assert steps.run() == (0, [])


def test_half_made_environment_is_made_anew(steps: Steps) -> None:
    (steps.folder / "bin").mkdir(parents=True)
    assert steps.run() == (0, ["create", "install"])


def test_interrupted_installation_is_made_anew(steps: Steps) -> None:
    steps.install_works = False
    assert steps.run() == (1, ["create", "install"])
    steps.install_works = True
    assert steps.run() == (0, ["create", "install"])


def test_interrupted_update_is_made_anew(steps: Steps) -> None:
    steps.run()
    (steps.folder.parent / "constraints.txt").write_text("changed")
    steps.install_works = False
    assert steps.run() == (1, ["install"])
    steps.install_works = True
    assert steps.run() == (0, ["create", "install"])


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "constraints.txt"])
def test_changed_input_installs_again(steps: Steps, name: str) -> None:
    steps.run()
    (steps.folder.parent / name).write_text("changed")
    assert steps.run() == (0, ["install"])
    assert steps.run() == (0, [])


def test_environment_whose_python_is_gone_is_made_anew(steps: Steps) -> None:
    steps.run()
    (steps.folder / "bin" / "python").unlink()
    assert steps.run() == (0, ["create", "install"])


def test_moved_environment_installs_again(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts in bin name the old place."""
    steps.run()
    moved = steps.folder.rename(steps.folder.with_name("moved"))
    monkeypatch.setattr(sys, "argv", ["make_venv.py", str(moved)])
    assert steps.run() == (0, ["install"])


def test_old_python_is_refused(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert steps.run() == (1, [])
    assert "fxopt needs Python 3.10 or newer" in capsys.readouterr().err


def test_environment_is_made_over_what_was_there(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("not a program")
    assert script.create(folder, folder / "bin" / "python")
    assert script.succeeds([folder / "bin" / "python", "-m", "pip", "--version"])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def answering_port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()


def test_silent_index_costs_little(script: ModuleType, silent_port: int) -> None:
    start = time.monotonic()
    assert not script.is_reachable(f"http://127.0.0.1:{silent_port}/", seconds=0.5)
    assert time.monotonic() - start < 5


def test_index_that_answers_is_reachable(script: ModuleType, answering_port: int) -> None:
    assert script.is_reachable(f"http://127.0.0.1:{answering_port}/")
    assert not script.is_reachable(f"http://127.0.0.1:{answering_port}/no-such-page")


@pytest.mark.parametrize(
    ("gpu", "reachable", "first"),
    [
        (True, True, []),
        (False, True, ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        (False, False, []),
    ],
)
def test_cpu_index_is_for_machines_without_a_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: bool, reachable: bool, first: list[str]
) -> None:
    monkeypatch.setattr(script, "succeeds", lambda command: gpu)
    monkeypatch.setattr(script, "is_reachable", lambda url: reachable)
    attempts = script.torch_indexes()
    assert attempts[0] == first
    assert attempts[-1] == []  # whatever happens, pip's own indexes are tried
