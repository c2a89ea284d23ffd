"""Inductor's caches: a warm start hits, another version of fxopt or other options miss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
if sys.argv[1] != "same":
    import fxopt.hosts.inductor as host
    host.source_fingerprint = lambda: sys.argv[1]
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Dropout(0.0))
compiled = torch.compile(model, backend="fxopt", options={"host": "inductor"})
compiled(torch.randn(4, 8)).sum().backward()
found = counters["aot_autograd"]
print("hit", found["autograd_cache_hit"], "miss", found["autograd_cache_miss"],
      "bypass", found["autograd_cache_bypass"])
"""


def run(cache: Path, version: str) -> str:
    import os

    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, version], capture_output=True, text=True, check=True, env=env
    )
    return done.stdout.strip().splitlines()[-1]


def test_warm_start_hits_and_another_version_misses(tmp_path: Path) -> None:
    assert run(tmp_path, "same") == "hit 0 miss 1 bypass 0"
    assert run(tmp_path, "same") == "hit 1 miss 0 bypass 0"
    assert run(tmp_path, "edited") == "hit 0 miss 1 bypass 0"


def test_the_fingerprint_covers_every_source_file(tmp_path: Path) -> None:
    """A copy of the package with one line changed in one file, any file, has another fingerprint."""
    import shutil

    from fxopt.runtime.fingerprint import package_roots

    program = "from fxopt.runtime.fingerprint import source_fingerprint; print(source_fingerprint())"
    fxopt_root = next(root for root in package_roots() if root.name == "fxopt")
    copy = tmp_path / "fxopt"
    shutil.copytree(fxopt_root, copy)

    def fingerprint() -> str:
        return subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = fingerprint()
    target = copy / "ir" / "facts.py"
    target.write_text(target.read_text() + "\n# changed\n")
    assert fingerprint() != first
