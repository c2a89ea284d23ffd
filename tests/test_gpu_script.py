"""The script for machines with a GPU, as far as one without can tell."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": "/usr/bin:/bin", **environment}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False)


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
    names = ["install", "doctor", "kernels", "kernel-tests", "generation-tests", "decode", "decode-tests"]
    for name in names[1:]:
        (tmp_path / f"{name}.done").touch()
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 9\n")
    slow.chmod(0o755)
    assert "install: exit 124" in call(tmp_path, PYTHON=str(slow), LIMIT="0.1").stdout
    assert call(tmp_path, PYTHON="true").stdout.count("==") == 1
    assert call(tmp_path, PYTHON="true").stdout.count("==") == 0
