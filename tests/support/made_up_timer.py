"""A stand-in for what measures on a GPU: it finds every kernel right, and the seconds that it is told."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.codegen.contest import Contest
from fxopt.codegen.lone_call import LoneCall
from fxopt.codegen.tune import Samples


class MadeUpTimer:
    """In the place of `GpuTimer` and of `GpuArena`.

    Attributes:
        kernel, host: seconds. asked: calls, with the time that there is for them. closed: how many were.
    """

    device = "a card"
    kernel: float
    host: float
    asked: list[tuple[LoneCall, float]]
    closed: int

    def __init__(self, *_: object) -> None:
        pass

    def samples(self, kernels: Sequence[object]) -> list[Samples]:
        return [*(Samples((self.kernel,)) for _ in kernels), Samples((self.host,))]

    def problems(self, kernel: object) -> list[str]:
        return []

    def contest(self, call: LoneCall, options: object, seconds: float) -> Contest:
        self.asked.append((call, seconds))
        return Contest(Samples((self.kernel,)), Samples((self.host,)))

    def close(self) -> None:
        type(self).closed += 1


def made_up(kernel: float = 1e-5, host: float = 2e-5) -> type[MadeUpTimer]:
    """A class of its own, which finds so many seconds for every kernel, and for Inductor."""
    return type("MadeUp", (MadeUpTimer,), {"kernel": kernel, "host": host, "asked": [], "closed": 0})
