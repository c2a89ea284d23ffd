"""The script for machines with a GPU, as far as one without can tell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": "/usr/bin:/bin", **environment}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False)


def parts() -> list[str]:
    """In their order."""
    (found,) = re.findall(r"^order=\((.+)\)$", SCRIPT.read_text(), re.MULTILINE)
    return str(found).split()


def test_the_parts_are_short_enough() -> None:
    limits = {name: int(limit) for name, limit in re.findall(r"\[([\w-]+)\]=(\d+)", SCRIPT.read_text())}
    assert set(limits) == set(parts())
    assert max(limits.values()) < 9 * 60
    assert sum(limits.values()) <= 25 * 60


@pytest.mark.parametrize("name", ["hf", "generate", "generate-growing"])
def test_a_suite_that_ended_without_its_summary_is_not_done(tmp_path: Path, name: str) -> None:
    call(tmp_path, name, PYTHON="true")
    assert not (tmp_path / f"{name}.done").exists()
    (tmp_path / f"{name}-full-gpu.jsonl").write_text('{"kind": "summary"}\n')
    call(tmp_path, name, PYTHON="true")
    assert (tmp_path / f"{name}.done").exists()


def test_it_says_how_it_is_used() -> None:
    done = call()
    assert done.returncode != 0
    assert "usage" in done.stderr


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    done = call(tmp_path, "install", "doctor", PYTHON="false")
    assert "install: exit 1" in done.stdout
    assert "doctor: exit 1" in done.stdout
    assert (tmp_path / "summary.txt").read_text().count("exit 1") == 2


def test_what_is_done_is_not_done_again_and_what_was_stopped_is(tmp_path: Path) -> None:
    for name in set(parts()) - {"install"}:
        (tmp_path / f"{name}.done").touch()
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 9\n")
    slow.chmod(0o755)
    assert "install: exit 124" in call(tmp_path, PYTHON=str(slow), LIMIT="0.1").stdout
    assert call(tmp_path, PYTHON="true").stdout.count("==") == 1
    assert call(tmp_path, PYTHON="true").stdout.count("==") == 0
