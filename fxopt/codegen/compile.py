"""Kernels compiled ahead of time for a target that need not be on this machine.

Triton, and the assembler and disassembler of its wheel, run without a GPU. What they say of a kernel
(registers, spills, shared memory) is bounded by `CompiledKernel.check`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.codegen.kernel_file import KernelFile, Launch
from fxopt.errors import CannotCompile, KernelTooLarge, UnsupportedTarget
from fxopt.ir.target import Target
from fxopt.options import TARGETS, environment_without
from fxopt.runtime.direct_launch import ASSERTING
from fxopt.runtime.kernel_cache import KernelCache, default_cache


@dataclass(frozen=True)
class CompiledKernel:
    """One launch of a kernel, compiled.

    Attributes:
        kernel: name of the kernel's file. entry: of the jit function. file: where it was read from.
        registers: per thread. spilled: bytes per thread of stack into which registers are spilled, without
            what the code itself keeps there.
        shared: bytes of shared memory per block.
    """

    kernel: str
    entry: str
    file: str
    target: Target
    ttgir: str
    ptx: str
    cubin: bytes
    registers: int
    spilled: int
    shared: int
    num_warps: int
    num_stages: int

    def problems(self) -> tuple[str, ...]:
        """Why the kernel cannot run on its target, or cannot run fast there."""
        limit = self.target.shared_per_block
        found = []
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {self.target.card} has {limit} per block")
        if self.spilled:
            found.append(f"{self.spilled} bytes per thread are spilled to memory")
        if self.num_warps * self.target.warp_size > 1024:
            found.append(f"{self.num_warps} warps, a block has 1024 threads at most")
        return tuple(found)

    def check(self) -> None:
        """Raises KernelTooLarge with all problems."""
        if problems := self.problems():
            raise KernelTooLarge(
                kernel=self.kernel, target=self.target.name, problems="; ".join(problems), file=self.file
            )


def compile_kernel(
    kernel: KernelFile, target: Target, launch: int = 0, *, cache: KernelCache | None = None
) -> CompiledKernel:
    """Compile one launch of a kernel for a target. In interpreter mode this is done by another process.

    Raises:
        CannotCompile: with Triton's message and the kernel's file.
    """
    return compile_launches([(kernel, launch)], target, cache=cache)[0]


def compile_launches(
    launches: Sequence[tuple[KernelFile, int]], target: Target, *, cache: KernelCache | None = None
) -> list[CompiledKernel]:
    """`compile_kernel` for several launches, in interpreter mode by one process for all.

    Raises:
        CannotCompile: of the first that fails.
        UnsupportedTarget: not a GPU of NVIDIA: what Triton makes for others cannot be checked here.
    """
    if target.backend != "cuda":
        reason = f"is compiled by Triton's back end {target.backend!r}, which fxopt has not been tried with"
        raise UnsupportedTarget(target=target.name, reason=reason, valid=", ".join(TARGETS))
    cache = cache or default_cache()
    if _interpreting():
        return _in_another_process(launches, target, cache)
    return [_compiled(kernel, kernel.launches[place], target, cache) for kernel, place in launches]


def _interpreting() -> bool:
    """Whether the functions of Triton's own library are the interpreter's, which its compiler cannot read."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.softmax, JITFunction)


def _compiled(kernel: KernelFile, launch: Launch, target: Target, cache: KernelCache) -> CompiledKernel:
    file = str(cache.path(kernel.name, kernel.render()))
    try:
        more = ASSERTING if kernel.asserts else {}
        found = _triton_compile(getattr(cache.load(kernel), launch.entry), launch, target, **more)
        registers, stack = _resources(found.asm["cubin"], launch.entry)
    except Exception as error:
        detail = str(error) if "triton" in type(error).__module__ else f"{type(error).__name__}: {error}"
        raise CannotCompile(kernel=kernel.name, target=target.name, detail=detail, file=file) from error
    return CompiledKernel(
        kernel=kernel.name,
        entry=launch.entry,
        file=file,
        target=target,
        ttgir=found.asm["ttgir"],
        ptx=found.asm["ptx"],
        cubin=found.asm["cubin"],
        registers=registers,
        spilled=max(0, stack - _declared(found.asm["ptx"])),
        shared=found.metadata.shared,
        num_warps=found.metadata.num_warps,
        num_stages=found.metadata.num_stages,
    )


def _triton_compile(function: Any, launch: Launch, target: Target, **more: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {argument.name: argument.type for argument in launch.arguments}
    constants = dict(launch.constants)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = [argument.name for argument in launch.arguments if argument.is_aligned]
    source = ASTSource(
        function,
        signature,
        constexprs={name: constants[name] for name in function.arg_names if name in constants},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    options |= more
    return triton.compile(source, _triton_target(target, GPUTarget), options)


def _triton_target(target: Target, kind: Any) -> Any:
    return kind(target.backend, target.arch, target.warp_size)


def _resources(cubin: bytes, entry: str) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as the disassembler reads them from the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(rf"Function {re.escape(entry)}:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", listing)
    if found is None:
        raise ValueError(f"no resources of {entry} in: {listing}")
    return int(found[1]), int(found[2]) + int(found[3])


def _declared(ptx: str) -> int:
    """Bytes of stack that the code itself asks for: sin and cos keep the digits of 2/pi for large arguments
    there, in a branch that is hardly ever taken."""
    arrays = re.findall(r"\.local \.align \d+ \.b8 \s*\w+\[(\d+)\]", ptx)
    return sum(-(-int(size) // 8) * 8 for size in arrays)


def _in_another_process(
    launches: Sequence[tuple[KernelFile, int]], target: Target, cache: KernelCache
) -> list[CompiledKernel]:
    job = pickle.dumps((list(launches), target, cache.directory, cache.limit))
    done = subprocess.run(
        [sys.executable, "-m", "fxopt.codegen.compile"],
        input=job,
        capture_output=True,
        env=environment_without("TRITON_INTERPRET"),
    )
    if done.returncode:
        names = ", ".join(dict.fromkeys(kernel.name for kernel, _ in launches))
        detail = f"the compiling process ended with {done.returncode}: {done.stderr.decode()[-2000:]}"
        raise CannotCompile(kernel=names, target=target.name, detail=detail, file=str(cache.directory))
    answer = pickle.loads(done.stdout)
    if isinstance(answer, CannotCompile):
        raise answer
    return list(answer)


def _answer() -> None:
    """The other process: a pickled job on stdin, the pickled answer on stdout."""
    launches, target, directory, limit = pickle.loads(sys.stdin.buffer.read())
    answer: list[CompiledKernel] | CannotCompile
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = compile_launches(launches, target, cache=KernelCache(Path(directory), limit))
        except CannotCompile as error:
            answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


@contextlib.contextmanager
def assumed_device(target: Target) -> Iterator[None]:
    """Meanwhile Triton, and torch's tracing of Triton kernels, take the target for the GPU of this machine.

    Without a GPU torch cannot ask Triton which arguments a kernel writes to, and takes it that it writes to
    all. Nothing can be launched meanwhile.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    kept, driver._active = driver._active, _AssumedDriver(_triton_target(target, GPUTarget))
    try:
        yield
    finally:
        driver._active = kept


class _AssumedDriver:
    """As much of Triton's driver as compilation asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0


if __name__ == "__main__":
    # The classes must be those of the module that the other process knows.
    from fxopt.codegen import compile as this_module

    this_module._answer()
