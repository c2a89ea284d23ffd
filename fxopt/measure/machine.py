"""What a measurement was made on: hardware, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fxopt.measure.versions import version

PACKAGES = ("torch", "triton", "transformers", "accelerate", "fxopt")


def describe() -> dict[str, Any]:
    """Plain values, for the head of a results file."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(figure, 2) for figure in os.getloadavg()],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def command() -> str:
    """What was called, as it can be called in any other checkout: paths are relative to the repository."""
    words = [_relative(word) for word in sys.argv[1:]]
    return shlex.join(["python", "-m", *_module(), *words])


def _relative(word: str) -> str:
    """A path, also behind `--option=`; outside of the repository only its last part says anything."""
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    root = _root()
    inside = path.is_relative_to(root)
    return f"{option}{equals}{path.relative_to(root) if inside else path.name}"


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The commit of the checkout that fxopt is loaded from, with `+` when its files were changed since.

    Where it is installed elsewhere, what a file COMMIT in the package says.
    """
    root = _root()
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None or _git(root, "rev-parse", "--show-toplevel") != str(root):
        note = root / "fxopt" / "COMMIT"
        return note.read_text().strip() or None if note.is_file() else None
    return head + ("+" if _git(root, "status", "--porcelain", "--", "fxopt", "passes") else "")


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _module() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [spec.name.removesuffix(".__main__")] if spec is not None else ["fxopt"]
