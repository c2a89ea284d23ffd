"""transformers without its remarks, and as loud as before afterwards."""

from __future__ import annotations

import logging

import pytest

from fxopt.measure.quiet import quiet_transformers


def test_remarks_are_dropped_and_errors_are_not() -> None:
    log = logging.getLogger("transformers")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        with quiet_transformers():
            log.warning("a new head")
            log.error("no weights")
    finally:
        log.removeHandler(handler)
    assert seen == ["no weights"]


def test_the_level_is_as_before_also_after_an_error() -> None:
    log = logging.getLogger("transformers")
    before = log.level
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert log.level == before
