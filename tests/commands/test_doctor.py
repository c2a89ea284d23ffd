"""fxopt doctor: what it finds, what it recommends, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from fxopt.commands import doctor
from fxopt.integrations import autoload
from support.cli import Run


class TestDoctor:
    def test_here_all_is_well(self, run: Run) -> None:
        result = run("doctor", "--json")
        report = json.loads(result.stdout)
        assert result.exit_code == 0
        assert report["usable"] is True
        statuses = {(check["group"], check["name"]): check["status"] for check in report["checks"]}
        assert statuses["plugin", "backend"] == "ok"
        assert statuses["trial", "host eager"] == "ok"
        assert ("trial", "host inductor") not in statuses

    def test_table(self, run: Run) -> None:
        result = run("doctor")
        assert result.exit_code == 0
        assert "fxopt can be used" in result.stdout

    @pytest.mark.parametrize("found", [None, "2.4.1"])
    def test_without_a_usable_torch(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, found: str | None
    ) -> None:
        original = doctor.version
        monkeypatch.setattr(doctor, "version", lambda name: found if name == "torch" else original(name))
        result = run("doctor", "--json")
        assert result.exit_code == 1
        (failed,) = _failed(result)
        assert failed["name"] == "torch"
        assert failed["fix"] == "pip install -U 'torch>=2.11'"

    def test_backend_not_registered(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude_tags=(): ["inductor"])
        result = run("doctor", "--json")
        assert result.exit_code == 1
        assert [check["name"] for check in _failed(result)] == ["backend"]

    def test_compilation_that_fails(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no compiler today")

        monkeypatch.setattr(torch, "compile", broken)
        result = run("doctor", "--json")
        assert result.exit_code == 1
        (failed,) = _failed(result)
        assert failed["name"] == "host eager"
        assert "no compiler today" in failed["value"]

    def test_compilation_that_is_wrong(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: lambda *args: function(*args) + 1)
        result = run("doctor", "--json")
        assert result.exit_code == 1
        assert [check["name"] for check in _failed(result)] == ["host eager"]

    def test_failure_of_the_plugin_is_shown(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(autoload, "_failures", {"accelerate": "ValueError: changed"})
        monkeypatch.setattr(autoload, "_outcomes", {"accelerate": "failed: ValueError: changed"})
        result = run("doctor", "--json")
        assert result.exit_code == 0
        checks = json.loads(result.stdout)["checks"]
        assert ("accelerate", "note", "failed: ValueError: changed") in [
            (check["name"], check["status"], check["value"]) for check in checks
        ]

    def test_plugin_that_was_not_loaded(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(autoload, "_outcomes", {})
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        result = run("doctor")
        assert "unset TORCH_DEVICE_BACKEND_AUTOLOAD" in " ".join(result.stdout.split())

    def test_no_compiler_is_no_failure(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fxopt.hosts.inductor.missing_compiler", lambda: "no g++")
        result = run("doctor", "--json")
        checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        assert result.exit_code == 0
        assert "apt-get install g++" in checks["c++"]["fix"]
        assert checks["host on the CPU"]["value"] == "eager"

    def test_cache_that_cannot_be_written(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(doctor, "_is_writable", lambda path: False)
        result = run("doctor", "--json")
        assert result.exit_code == 1
        assert "TORCHINDUCTOR_CACHE_DIR" in _failed(result)[0]["fix"]

    def test_a_check_that_breaks_is_reported(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> Any:
            raise OSError("gone")

        monkeypatch.setattr(doctor, "_caches", broken)
        result = run("doctor", "--json")
        assert result.exit_code == 1
        assert "OSError: gone" in _failed(result)[0]["value"]


def test_kernels_that_cannot_be_written_are_a_note(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    assert _kernels(run)["value"] == f"{tmp_path}: 0 MiB in 0 files"
    monkeypatch.setattr(doctor, "_is_writable", lambda path: path != tmp_path)
    found = _kernels(run)
    assert (found["status"], "FXOPT_CACHE_DIR" in found["fix"]) == ("note", True)


def _kernels(run: Run) -> dict[str, str]:
    (found,) = [
        check for check in json.loads(run("doctor", "--json").stdout)["checks"] if check["name"] == "kernels"
    ]
    return found


def _failed(result: Result) -> list[dict[str, str]]:
    return [check for check in json.loads(result.stdout)["checks"] if check["status"] == "fail"]
