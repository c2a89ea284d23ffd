"""`fxopt explain`: builds the model that was named and prints what fxopt did at every place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fxopt.commands.outputs import check_output, writing
from fxopt.commands.targets import Request, resolve


def run(
    target: str,
    request: Request,
    console: Console,
    *,
    options: Mapping[str, Any] | None = None,
    as_json: bool = False,
    verbose: bool = False,
    html: Path | None = None,
) -> int:
    """Explain `target` and print the report. Exit code 1 when a stage of fxopt failed on it.

    Raises:
        UserError: the target, an option or the request is wrong.
    """
    import torch
    import transformers

    import fxopt

    transformers.logging.set_verbosity_error()
    explain = fxopt.explain.with_options(options=options)
    check_output(html)
    with console.status(f"building {target}"):
        subject = resolve(target, request)
    with console.status(f"compiling {target}"), torch.set_grad_enabled(request.training):
        report = explain(subject.model, *subject.args, **subject.kwargs)
    if as_json:
        print(report.to_json())
    else:
        console.print(report.verbose() if verbose else report)
    if html is not None:
        with writing(html):
            report.to_html(html)
        Console(stderr=True).print(f"written to {html}")
    return int(any(record.failures for record in report.graphs))
