"""Why a weight stays with the library that has quantized it."""

from __future__ import annotations


class CannotConvert(Exception):  # noqa: N818 - a typed refusal, not an error: it becomes evidence
    """fxopt's layout has no place for a weight. `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
