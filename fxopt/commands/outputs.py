"""Files that a command is to write: whether they can be, before the work whose results they are to hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxopt.errors import UserError


class CannotWrite(UserError, OSError):
    """A file that a command was told to write, and cannot."""

    message = "{path} cannot be written: {reason}. Name a file in a folder that you may write to."


def check_output(path: Path | None) -> None:
    """Try the folder of a file that is to be written later, or the one in which that would be made.

    Raises:
        CannotWrite: with the system's reason.
    """
    if path is None:
        return
    path = path.expanduser()
    if path.is_dir():
        raise CannotWrite(path=path, reason="it is a folder")
    with writing(path):
        folder = next(each for each in path.absolute().parents if each.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against a file that is written inside becomes `CannotWrite`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(path=path, reason=error.strerror or error) from error
