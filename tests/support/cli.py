"""Runs the command line in the test's own process."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import CliRunner, Result

Run = Callable[..., Result]


def invoke(*arguments: str) -> Result:
    """`fxopt` with `arguments`."""
    from fxopt import cli

    return CliRunner().invoke(cli.app, list(arguments))
