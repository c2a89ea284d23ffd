"""Makes `support` importable from every test, and keeps each test's compiler state and threads its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Model hubs are never asked: every model is built from a config with random weights.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest puts this directory on the path in its `prepend` import mode only; `importlib` mode needs it said.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest  # noqa: E402
import torch  # noqa: E402

from support.cli import Run, invoke  # noqa: E402

# The process sees more cores than it may use under xdist; tiny models only lose by threading.
torch.set_num_threads(1)


@pytest.fixture
def run() -> Run:
    """`fxopt` with some arguments, in this process."""
    return invoke


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test starts from the same random state and from empty Dynamo caches and counters."""
    torch.manual_seed(0)
    yield
    # Tests that compile nothing do not pay for importing Dynamo.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture
def blocks_at_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if tiles of attention cost nothing but their scores, on two threads."""
    from fxopt.ir.ops import attention_providers, tile_plan

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tile_plan, "SECONDS_OF_A_TILE", 0.0)
    for name in ("PADDED_SCORES", "DENSE_SCORES", "DROPOUT_SCORES"):
        monkeypatch.setattr(attention_providers, name, 0)
    tile_plan.plan.cache_clear()
    yield
    tile_plan.plan.cache_clear()
