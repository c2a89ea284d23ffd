"""A hash of all of fxopt's own source files: what decides a result must be in the key of every cache."""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def source_fingerprint() -> str:
    """SHA-256 over the names and contents of the Python files of `fxopt` and `fxopt.passes`."""
    digest = hashlib.sha256()
    for root in package_roots():
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def package_roots() -> list[Path]:
    """The directories that the two packages are loaded from."""
    roots: list[Path] = []
    for name in ("fxopt", "fxopt.passes"):
        spec = find_spec(name)
        roots += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return roots
