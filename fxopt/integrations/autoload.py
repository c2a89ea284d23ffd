"""What fxopt does at the end of `import torch` (entry point group `torch.backends`)."""

from __future__ import annotations


def autoload() -> None:
    """Hook fxopt into accelerate and `torch.compile`; never raises."""
