"""Installed versions, read without importing anything."""

from __future__ import annotations

import importlib.metadata


def version(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
