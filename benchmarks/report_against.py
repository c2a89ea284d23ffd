"""Two runs of the same benchmark: what became slower by more than both of them are noisy."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report_runs import Run
from fxopt.measure.noise import floor, name_of
from fxopt.measure.results import Row

# Two runs of the same code have geometric means that differ by less.
SAME = 0.03


@dataclass(frozen=True)
class Change:
    """A row of both runs, or of the old one alone. `allowed`: the part by which it may be slower."""

    name: str
    before: float
    after: float | None
    allowed: float
    reason: str = ""

    @property
    def regressed(self) -> bool:
        return bool(self.reason) or self.after is None or self.after < self.before * (1 - self.allowed)

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.name}: {self.before:.3f}, now {self.reason}"
        change = self.after / self.before - 1
        told = f"{self.name}: {self.before:.3f} -> {self.after:.3f} ({change:+.1%}, noise {self.allowed:.1%})"
        return told + (f"; {self.reason}" if self.reason else "")


def changes(old: Run, new: Run) -> list[Change]:
    """All rows of the old run, and the geometric mean of the rows that both have.

    Raises:
        ValueError: they measure different things, or on different hardware.
    """
    if old.keys != new.keys or old.suite != new.suite:
        raise ValueError(f"{old.file} and {new.file} measure different things")
    if old.hardware != new.hardware:
        raise ValueError(f"other hardware: {old.hardware}, and {new.hardware}")
    now = {name_of(row, new.keys): row for row in new.rows}
    found = [_change(name_of(row, old.keys), row, now) for row in old.good]
    both = [one for one in found if one.after is not None]
    return [*found, _mean(both)] if both else found


def _change(name: str, before: Row, now: dict[str, Row]) -> Change:
    after, ratio = now.get(name), before["ratio"]["median"]
    if after is None or "ratio" not in after:
        reason = "not measured" if after is None else f"an error: {after.get('error', '')}"
        return Change(name, ratio, None, 0.0, reason)
    right = [row.get("dashboard", row.get("accepted", True)) is not False for row in (before, after)]
    wrong = "the answer is wrong now" if right == [True, False] else ""
    return Change(name, ratio, after["ratio"]["median"], floor(before) + floor(after), wrong)


def _mean(both: list[Change]) -> Change:
    product, count = 1.0, len(both)
    for one in both:
        assert one.after is not None
        product *= (one.after / one.before) ** (1 / count)
    allowed = max(SAME, sum(one.allowed for one in both) / count / count**0.5)
    return Change("geometric mean of the ratios", 1.0, product, allowed)
