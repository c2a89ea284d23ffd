"""The text of kernels' files: complete, deterministic, harmless whatever the user's source holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fxopt.codegen.kernel_file import About, KernelFile
from fxopt.options import environment_without
from support import kernels

ALL = (kernels.add(), kernels.softmax(), kernels.product(), kernels.accumulate())


@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
def test_the_file_is_python_that_imports_torch_and_triton_alone(kernel: KernelFile) -> None:
    tree = ast.parse(kernel.render())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    # The interpreter of Triton computes with numpy.
    assert imported - set(sys.stdlib_module_names) <= {"torch", "triton", "numpy"}
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name in ("outputs", "launch", "reference", "example_inputs", "cost", "main"):
        assert functions.count(name) == 1


def test_the_head_says_where_the_kernel_comes_from() -> None:
    head = ast.get_docstring(ast.parse(kernels.add().render()))
    assert head is not None
    for part in (
        "add_vectors: adds.",
        "model.py:7: return x * 1.5 + y  # ''' \\",
        "aten.mul.Tensor, aten.add.Tensor",
        "x: [131]",
        "bytes: 3 * n * x.element_size()",
        "BLOCK=128: the smallest",
    ):
        assert " ".join(part.split()) in head


def test_source_lines_cannot_break_out_of_the_head() -> None:
    evil = '"""\nraise SystemExit(3)\n"""\\'
    kernel = replace(kernels.add(), about=About(summary="adds", lines=(evil,)))
    tree = ast.parse(kernel.render())
    assert isinstance(tree.body[0], ast.Expr)
    assert not any(isinstance(node, ast.Raise) for node in tree.body)


def test_equal_kernels_give_equal_files_in_every_process() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; from support import kernels; print(kernels.add().digest)"
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(tests), str(tests.parent)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert other == kernels.add().digest


@pytest.mark.parametrize(
    "changed",
    [
        replace(kernels.add(), about=About(summary="adds up")),
        replace(kernels.add(), launches=(replace(kernels.add().launches[0], num_warps=8),)),
        replace(kernels.add(), launches=(replace(kernels.add().launches[0], constants=(("BLOCK", 64),)),)),
        kernels.add("float32"),
    ],
)
def test_different_kernels_give_different_files(changed: KernelFile) -> None:
    assert changed.digest != kernels.add().digest


def test_a_file_runs_without_fxopt(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"
    file.write_text(kernels.product().render() + "\n")
    # Nothing of fxopt is found, not even by torch's entry points.
    code = (
        "import sys, runpy\n"
        "sys.modules['fxopt'] = None\n"
        "try:\n    runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "finally:\n    assert not [name for name in sys.modules if name.startswith('fxopt.')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        env=environment_without("PYTHONPATH") | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        check=False,
    )
    assert (done.returncode, done.stdout.split(",")[0]) == (0, "right in Triton's interpreter"), done.stderr


def test_only_kernels_with_bfloat16_carry_the_remedy_for_it() -> None:
    assert "class Bfloat16Builder" in kernels.add().render()
    assert "class Bfloat16Builder" in kernels.product().render()
    assert "class Bfloat16Builder" not in kernels.softmax().render()
