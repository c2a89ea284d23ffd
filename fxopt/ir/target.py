"""What a kernel is compiled for, as a plain value: a GPU named by the user or found on this machine.

A `Target` says what the compiler must respect (architecture, shared memory, registers) and what a roofline
needs (bandwidth and peak rates). It never touches a device, so a Hopper can be the target on a laptop.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fxopt.errors import UnsupportedTarget
from fxopt.options import TARGETS, check_target

if TYPE_CHECKING:
    import torch

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Target:
    """One GPU. Sizes are in bytes, rates per second; matrix rates are dense, with fp32 accumulation.

    Attributes:
        name: the architecture as compilers write it, ``"sm_90"``. card: whose figures these are.
        backend: Triton's name of the vendor's back end. arch: Triton's number of the architecture.
        shared_per_block: the most that one block may ask for (the opt-in maximum).
        vector_rates: operations per second outside of the matrix units, by dtype.
        matrix_rates: operations per second of the matrix units, by dtype; ``"tf32"`` is for fp32 operands.
        source: the vendor's publication that the figures are taken from.
    """

    name: str
    card: str
    arch: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    l2_bytes: int
    bandwidth: float
    vector_rates: tuple[tuple[str, float], ...]
    matrix_rates: tuple[tuple[str, float], ...]
    source: str
    backend: str = "cuda"
    warp_size: int = 32
    registers_per_sm: int = 65536
    max_registers: int = 255

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether matrix units take operands from shared memory: those of Hopper and of Blackwell's data
        center cards, not of GeForce ones (sm_120), which take them from registers as Ampere's do."""
        return self.backend == "cuda" and self.arch // 10 in (9, 10, 11)

    @staticmethod
    def named(text: str) -> Target:
        """The target of an architecture (``"sm_90"``) or of a card (``"h200"``).

        Raises:
            UnsupportedTarget: nothing here is called so, or Triton cannot compile for it here.
        """
        return _BY_NAME[check_target(text)]

    @staticmethod
    def detect(device: torch.device | int | None = None) -> Target | None:
        """The GPU of this machine, or None without one.

        What the driver reports replaces the figures of the table: sizes always, bandwidth where clock and
        width of the memory are known. A card that the table lacks has the rates of its architecture's card,
        in proportion to the number of SMs.

        Raises:
            UnsupportedTarget: the GPU is one that Triton cannot compile for here.
        """
        import torch

        if torch.version.hip is not None and torch.cuda.is_available():
            return Target.named(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
        if torch.xpu.is_available() and not torch.cuda.is_available():
            return Target.named("xpu")
        if not torch.cuda.is_available():
            return None
        return from_properties(torch.cuda.get_device_properties(device))

    def rate(self, dtype: torch.dtype, *, tensor_cores: bool) -> float:
        """Peak operations per second. Outside of the matrix units all but fp64 is computed in fp32."""
        vector, matrix = dict(self.vector_rates), dict(self.matrix_rates)
        key = _rate_name(dtype)
        if not tensor_cores:
            return vector["fp64" if key == "fp64" else "fp32"]
        if key == "fp32":
            return matrix["tf32"]
        # Operands that the matrix units of this card do not know are widened to the next type that they do.
        wider = {"fp8": "fp16", "int8": "fp16"}.get(key, key)
        return matrix.get(key) or matrix.get(wider) or vector["fp64" if key == "fp64" else "fp32"]

    def time(self, moved: Any, flops: Any, dtype: torch.dtype, *, tensor_cores: bool = False) -> Any:
        """Seconds below which no kernel can come: the roofline of bytes moved and operations done.

        With sympy expressions for `moved` or `flops` the result is one, too.
        """
        memory: Any = moved / self.bandwidth
        arithmetic: Any = flops / self.rate(dtype, tensor_cores=tensor_cores)
        if isinstance(memory, (int, float)) and isinstance(arithmetic, (int, float)):
            return max(memory, arithmetic)
        import sympy

        return sympy.Max(memory, arithmetic)


def from_properties(found: Any) -> Target:
    """A target from what `torch.cuda.get_device_properties` returns."""
    arch = 10 * found.major + found.minor
    table = _nearest(found.name, arch)
    share = found.multi_processor_count / table.sms
    clock, width = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    return replace(
        table,
        name=f"sm_{arch}",
        card=found.name,
        arch=arch,
        sms=found.multi_processor_count,
        shared_per_sm=found.shared_memory_per_multiprocessor,
        shared_per_block=getattr(found, "shared_memory_per_block_optin", table.shared_per_block),
        threads_per_sm=found.max_threads_per_multi_processor,
        registers_per_sm=found.regs_per_multiprocessor,
        warp_size=found.warp_size,
        l2_bytes=found.L2_cache_size,
        # Clock in kHz, width in bits, two transfers a cycle.
        bandwidth=2e3 * clock * width / 8 if clock and width else table.bandwidth,
        vector_rates=tuple((name, rate * share) for name, rate in table.vector_rates),
        matrix_rates=tuple((name, rate * share) for name, rate in table.matrix_rates),
        source=f"{table.card} ({table.source}) in proportion to {found.multi_processor_count} SMs",
    )


def _nearest(card: str, arch: int) -> Target:
    """The card of the table with that name; else the newest whose architecture is not newer."""
    words = card.lower().replace("-", " ").split()
    by_name = [one for key, one in _CARDS.items() if key in words and one.arch == arch]
    older = [one for one in _ARCHITECTURES.values() if one.arch <= arch]
    if not older:
        raise UnsupportedTarget(
            target=f"sm_{arch}", reason="is too old: Triton needs sm_80", valid=", ".join(TARGETS)
        )
    return by_name[0] if by_name else max(older, key=lambda one: one.arch)


def _rate_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return "fp8"
    names = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
    return names.get(name, "fp32")


def _tera(**rates: float) -> tuple[tuple[str, float], ...]:
    return tuple((name, rate * 1e12) for name, rate in rates.items())


_A100 = Target(
    name="sm_80",
    card="A100 SXM 80GB",
    arch=80,
    sms=108,
    shared_per_sm=164 * KIB,
    shared_per_block=163 * KIB,
    threads_per_sm=2048,
    l2_bytes=40 * MIB,
    bandwidth=2.039e12,
    vector_rates=_tera(fp64=9.7, fp32=19.5),
    matrix_rates=_tera(fp64=19.5, tf32=156, bf16=312, fp16=312, int8=624),
    source="NVIDIA A100 datasheet; NVIDIA A100 Tensor Core GPU Architecture; CUDA C++ Programming Guide",
)
_RTX_3090 = Target(
    name="sm_86",
    card="GeForce RTX 3090",
    arch=86,
    sms=82,
    shared_per_sm=100 * KIB,
    shared_per_block=99 * KIB,
    threads_per_sm=1536,
    l2_bytes=6 * MIB,
    bandwidth=0.936e12,
    vector_rates=_tera(fp64=0.556, fp32=35.6),
    matrix_rates=_tera(tf32=35.6, bf16=71, fp16=71, int8=284),
    source="NVIDIA Ampere GA102 GPU Architecture, appendix A; CUDA C++ Programming Guide",
)
_L40S = Target(
    name="sm_89",
    card="L40S",
    arch=89,
    sms=142,
    shared_per_sm=100 * KIB,
    shared_per_block=99 * KIB,
    threads_per_sm=1536,
    l2_bytes=96 * MIB,
    bandwidth=0.864e12,
    vector_rates=_tera(fp64=1.43, fp32=91.6),
    matrix_rates=_tera(tf32=183, bf16=362, fp16=362, fp8=733, int8=733),
    source="NVIDIA L40S datasheet; NVIDIA Ada GPU Architecture, appendix; CUDA C++ Programming Guide",
)
_H100 = Target(
    name="sm_90",
    card="H100 SXM5",
    arch=90,
    sms=132,
    shared_per_sm=228 * KIB,
    shared_per_block=227 * KIB,
    threads_per_sm=2048,
    l2_bytes=50 * MIB,
    bandwidth=3.352e12,
    vector_rates=_tera(fp64=33.5, fp32=66.9),
    matrix_rates=_tera(fp64=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9),
    source="NVIDIA H100 Tensor Core GPU Architecture, tables 3 and 4; CUDA C++ Programming Guide",
)
_H200 = replace(
    _H100,
    card="H200 SXM",
    l2_bytes=60 * MIB,
    bandwidth=4.8e12,
    source="NVIDIA H200 datasheet; L2 as its driver reports it; the rest is the H100's",
)
_B200 = Target(
    name="sm_100",
    card="B200",
    arch=100,
    sms=148,
    shared_per_sm=228 * KIB,
    shared_per_block=227 * KIB,
    threads_per_sm=2048,
    l2_bytes=126 * MIB,
    bandwidth=7.7e12,
    vector_rates=_tera(fp64=37, fp32=75),
    matrix_rates=_tera(fp64=37, tf32=1125, bf16=2250, fp16=2250, fp8=4500, int8=4500),
    source="NVIDIA HGX B200 datasheet, an eighth of the board; CUDA Blackwell Tuning Guide; driver (SMs, L2)",
)
_RTX_5090 = Target(
    name="sm_120",
    card="GeForce RTX 5090",
    arch=120,
    sms=170,
    shared_per_sm=100 * KIB,
    shared_per_block=99 * KIB,
    threads_per_sm=1536,
    l2_bytes=96 * MIB,
    bandwidth=1.792e12,
    vector_rates=_tera(fp64=1.64, fp32=104.8),
    matrix_rates=_tera(tf32=104.8, bf16=209.5, fp16=209.5, fp8=419, int8=838),
    source="NVIDIA RTX Blackwell GPU Architecture, appendix A; CUDA C++ Programming Guide",
)

_CARDS = {
    "a100": _A100,
    "3090": _RTX_3090,
    "l40s": _L40S,
    "h100": _H100,
    "h200": _H200,
    "b200": _B200,
    "5090": _RTX_5090,
}
_ARCHITECTURES = {one.name: one for one in (_A100, _RTX_3090, _L40S, _H100, _B200, _RTX_5090)}
_BY_NAME = _ARCHITECTURES | {key: one for key, one in _CARDS.items() if key in TARGETS}


def all_targets() -> Iterable[Target]:
    """Every target that can be named, each once."""
    return dict.fromkeys(_BY_NAME[name] for name in TARGETS)


@functools.cache
def launch_bytes() -> float:
    """Bytes that no target needs longer for than the launch of a kernel takes, 2 us."""
    return 2e-6 * min(one.bandwidth for one in all_targets())


@functools.cache
def least_balance() -> float:
    """Operations in float32 that every target does while it reads a byte."""
    return min(dict(one.vector_rates)["fp32"] / one.bandwidth for one in all_targets())
