"""Writing a file so that a reader, or another process, never sees half of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` and return it. Missing folders are made."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    """The process's mask can only be read by setting it, which other threads would see; Linux shows it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0o022
    line = next((line for line in status.splitlines() if line.startswith("Umask:")), "Umask: 0022")
    return int(line.split()[1], 8)
