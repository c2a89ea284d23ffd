"""Launches that fit their target, by what the assembler says of them: no spills, and no more than it has.

Sizes of tiles are chosen by a model or a table, neither of which knows how many registers a formula takes.
Where nothing can be measured, the first of a kernel's launches that compiles without problems is taken,
each of its launches for itself; where a GPU is at hand and time is given, `fxopt.codegen.tune` measures the
same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxopt.codegen.compile import CompiledKernel, compile_launches
from fxopt.codegen.configurations import configuration, proposals
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.settings import identity, settings, versions, with_settings
from fxopt.errors import CannotCompile, UnsupportedTarget
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache

FORMAT = "1"  # of what is remembered
Compiled = tuple[KernelFile, tuple[CompiledKernel, ...]]


def fitted(
    kernels: Sequence[KernelFile], target: Target, *, cache: KernelCache | None = None
) -> list[Compiled]:
    """The kernels, with other launches where theirs do not fit and others do, and what they compile to.

    Raises:
        CannotCompile: of the first that fails.
        UnsupportedTarget: as `compile_launches`.
    """
    places = [(kernel, place) for kernel in kernels for place in range(len(kernel.launches))]
    done = iter(compile_launches(places, target, cache=cache) if places else [])
    found = [(kernel, tuple(next(done) for _ in kernel.launches)) for kernel in kernels]
    return [one if _fits(one[1]) else _refitted(*one, target, cache) for one in found]


def fitting(kernel: KernelFile, target: Target, cache: KernelCache) -> KernelFile:
    """The kernel, or with other launches, as `fitted` has it; what was found is remembered.

    A kernel that cannot be compiled stays as it is: whoever launches it has the error.
    """
    key = ("fit", FORMAT, identity(kernel), repr(settings(kernel)), target.name, *versions())
    found = cache.recall(*key)
    if found is None:
        try:
            ((chosen, _),) = fitted([kernel], target, cache=cache)
        except (CannotCompile, UnsupportedTarget):
            return kernel
        said = chosen.about.configuration[-1:] if chosen is not kernel else ()
        found = {"settings": settings(chosen), "said": list(said)}
        cache.remember(found, *key)
    about = replace(kernel.about, configuration=(*kernel.about.configuration, *found["said"]))
    return replace(with_settings(kernel, found["settings"]), about=about, alternatives=())


def _refitted(
    kernel: KernelFile, compiled: tuple[CompiledKernel, ...], target: Target, cache: KernelCache | None
) -> Compiled:
    forms = [one for one in proposals(kernel, target)[1:] if one.jit == kernel.jit]
    chosen, best = kernel, list(compiled)
    for place, first in enumerate(compiled):
        if not first.problems():
            continue
        tried = {kernel.launches[place]}
        for form in forms:
            if (launch := form.launches[place]) in tried:
                continue
            tried.add(launch)
            launches = (*chosen.launches[:place], launch, *chosen.launches[place + 1 :])
            other = replace(chosen, launches=launches, alternatives=())
            (result,) = compile_launches([(other, place)], target, cache=cache)
            if not result.problems():
                chosen, best[place] = other, result
                break
    if chosen is kernel:
        return kernel, compiled
    why = f"instead, without spills on {target.name}: {configuration(chosen)}"
    about = replace(kernel.about, configuration=(*kernel.about.configuration, why))
    return replace(chosen, about=about), tuple(best)


def _fits(compiled: Sequence[CompiledKernel]) -> bool:
    return not any(one.problems() for one in compiled)
