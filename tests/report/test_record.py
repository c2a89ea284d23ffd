"""Records: what is noted, and that a fault of the reporting never reaches the user."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.report import record as record_module
from fxopt.report.record import GraphRecord, collect, describe_error, forget, records

EAGER = {"host": "eager"}


def compile_and_run(function: Any = torch.sin, *args: torch.Tensor, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="fxopt", options=EAGER | options)(*(args or (torch.ones(3),)))


@pytest.fixture
def said() -> Any:
    """Messages of fxopt's logger, which may be detached from the root."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("fxopt").addHandler(listener)
    yield found
    logging.getLogger("fxopt").removeHandler(listener)


def test_what_is_noted() -> None:
    model = nn.Linear(3, 2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(x).relu()

    torch._dynamo.reset()
    with collect() as found:
        torch.compile(forward, backend="fxopt", options=EAGER, dynamic=True)(torch.ones(4, 3))
    (one,) = found
    assert one.compile_id == "0/0"
    assert one.location.startswith(f"{__file__}:")
    assert (one.dynamic, one.trains, one.normalized, one.host) == (True, True, True, "eager")
    assert one.nodes > one.inputs > 2
    assert one.error == ""
    assert records()[-1] is one
    forget()
    assert records() == []


@pytest.mark.parametrize("broken", ["announce", "_read"])
def test_a_fault_of_the_reporting_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, said: list[str], broken: str
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("in the report")

    monkeypatch.setattr(record_module, broken, fail)
    out = compile_and_run(strict=True)
    assert torch.equal(out, torch.ones(3).sin())
    assert len([text for text in said if "ZeroDivisionError: in the report" in text]) == 1


def test_a_fault_of_the_logging_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from fxopt.integrations import logging as integration

    def fail(*args: object) -> str:
        raise ZeroDivisionError("in the line")

    monkeypatch.setattr(integration, "summary_line", fail)
    logger = logging.getLogger("fxopt")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    try:
        assert torch.equal(compile_and_run(), torch.ones(3).sin())
    finally:
        monkeypatch.undo()
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert any("ZeroDivisionError: in the line" in text for text in said)


def test_errors_that_cannot_be_printed() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert describe_error(Mute()) == "Mute"
    one = GraphRecord(0)
    one.fail("passes", Mute())
    assert one.failures == [("passes", "Mute")]


def test_a_compilation_that_ends_in_an_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise LookupError("no host here")

    monkeypatch.setattr("fxopt.pipeline.choose_host", fail)
    with collect() as found, pytest.raises(Exception, match="no host here"):
        compile_and_run()
    assert [one.error for one in found] == ["LookupError: no host here"]


def test_private_collection_is_of_one_thread() -> None:
    forget()
    seen: dict[str, list[GraphRecord]] = {}

    def elsewhere() -> None:
        with collect(private=True) as found:
            torch.compile(lambda x: x.cos(), backend="fxopt", options=EAGER)(torch.ones(2))
        seen["private"] = found

    with collect() as everyone, collect(private=True) as mine:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(seen["private"]) == len(everyone) == 1
    assert mine == []
    assert records() == []
