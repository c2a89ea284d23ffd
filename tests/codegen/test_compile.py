"""Kernels compiled for GPUs that are not here."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from fxopt.codegen.compile import CompiledKernel, compile_kernel, compile_launches
from fxopt.codegen.kernel_file import KernelFile
from fxopt.errors import CannotCompile, KernelTooLarge
from fxopt.ir.target import Target
from fxopt.options import environment_without
from fxopt.runtime.kernel_cache import KernelCache
from support import kernels

NAMES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = (kernels.add(), kernels.softmax(), kernels.product(), kernels.accumulate())
Compiled = dict[tuple[str, str], list[CompiledKernel]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def compiled(cache: KernelCache) -> Compiled:
    return {
        (kernel.name, name): compile_launches(
            [(kernel, place) for place in range(len(kernel.launches))], Target.named(name), cache=cache
        )
        for kernel in KERNELS
        for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_compile_and_fit(compiled: Compiled, kernel: KernelFile, name: str) -> None:
    for launch, found in zip(kernel.launches, compiled[kernel.name, name], strict=True):
        found.check()
        assert found.entry == launch.entry
        assert found.cubin.startswith(b"\x7fELF")
        assert f".target {name}" in found.ptx
        assert f'"cuda:{name.removeprefix("sm_")}"' in found.ttgir
        assert 0 < found.registers <= found.target.max_registers
        assert (found.num_warps, found.num_stages) == (launch.num_warps, launch.num_stages)
        assert Path(found.file).exists()


def test_each_architecture_has_its_own_code(compiled: Compiled) -> None:
    assert len({compiled["product_of_tiles", name][0].cubin for name in NAMES}) == len(NAMES)


def test_alignment_is_passed_on(cache: KernelCache) -> None:
    """Pointers and sizes that are known to be multiples of 16 let a thread load 16 bytes at once."""
    kernel = kernels.add("float32")
    (launch,) = kernel.launches
    known = tuple(replace(argument, aligned=True) for argument in launch.arguments)
    wide = replace(kernel, launches=(replace(launch, arguments=known, num_warps=1),))
    narrow = replace(kernel, launches=(replace(launch, num_warps=1),))
    target = Target.named("sm_90")
    assert "ld.global.v4" in compile_kernel(wide, target, cache=cache).ptx
    assert "ld.global.v4" not in compile_kernel(narrow, target, cache=cache).ptx


def test_an_error_carries_tritons_message_and_the_file(cache: KernelCache) -> None:
    kernel = replace(kernels.add(), jit=kernels.add().jit.replace("* 1.5", "* nothing"))
    with pytest.raises(CannotCompile, match="nothing is not defined") as caught:
        compile_kernel(kernel, Target.named("sm_90"), cache=cache)
    assert str(cache.path(kernel.name, kernel.render())) in str(caught.value)


def test_a_file_that_is_no_python_is_an_error_of_the_same_kind(cache: KernelCache) -> None:
    kernel = replace(kernels.add(), jit="@triton.jit\ndef _add_kernel(:")
    with pytest.raises(CannotCompile, match="SyntaxError"):
        compile_kernel(kernel, Target.named("sm_90"), cache=cache)


def test_spills_and_shared_memory_are_problems(compiled: Compiled) -> None:
    (found,) = compiled["add_vectors", "sm_80"]
    limit = found.target.shared_per_block
    with pytest.raises(KernelTooLarge, match=f"{limit + 1} bytes of shared memory.*A100.*{limit}"):
        replace(found, shared=limit + 1).check()
    with pytest.raises(KernelTooLarge, match="8 bytes per thread are spilled"):
        replace(found, spilled=8).check()
    with pytest.raises(KernelTooLarge, match="64 warps"):
        replace(found, num_warps=64).check()


def test_spills_are_read_from_the_binary(cache: KernelCache) -> None:
    """A row of which one thread would have to hold 256 numbers."""
    kernel = kernels.softmax()
    launch = replace(kernel.launches[0], constants=(("BLOCK", 1 << 13),), num_warps=1)
    found = compile_kernel(replace(kernel, launches=(launch,)), Target.named("sm_80"), cache=cache)
    assert found.spilled > 0
    assert any("spilled" in problem for problem in found.problems())


def test_in_interpreter_mode_another_process_compiles(
    monkeypatch: pytest.MonkeyPatch, cache: KernelCache, compiled: Compiled
) -> None:
    monkeypatch.setattr("fxopt.codegen.compile._interpreting", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment_without("TRITON_INTERPRET")
    found = compile_kernel(kernels.add(), Target.named("sm_90"), cache=cache)
    assert found == compiled["add_vectors", "sm_90"][0]


def test_errors_come_back_from_another_process() -> None:
    error = CannotCompile(kernel="k", target="sm_90", detail="why", file="k.py")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (CannotCompile, str(error))


def test_an_array_that_the_code_asks_for_is_no_spill(cache: KernelCache) -> None:
    """Sine and cosine have one; whether it ends up on the stack depends on the version of Triton."""
    kernel = kernels.add("float32", body="tl.sin(x) + tl.cos(y)")
    found = compile_kernel(kernel, Target.named("sm_90"), cache=cache)
    assert ".local .align" in found.ptx
    assert found.spilled == 0
