"""Programs of `support`, each in a process of its own: what Triton is, is fixed when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fxopt.options import environment_without

TESTS = Path(__file__).parent.parent


def findings(module: str, *arguments: object, interpreted: bool = True) -> Any:
    """What `python -m module arguments` prints last, a line of JSON.

    `interpreted`: kernels run in Triton's interpreter, on CPU tensors.
    """
    environment = environment_without("PYTHONPATH") | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # Errors go where pytest's go: it shows them, with ``-s`` at once, so that long runs can be watched.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])
