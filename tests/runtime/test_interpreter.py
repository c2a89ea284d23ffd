"""Kernels in Triton's interpreter, in a process of its own: the mode is fixed when Triton is imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.programs import findings


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("support.interpreted", tmp_path_factory.mktemp("kernels"))


def test_bfloat16_is_exact_with_the_remedy(found: dict[str, Any]) -> None:
    assert {name: counts[0] for name, counts in found["bfloat16"].items() if counts[0]} == {}


@pytest.mark.parametrize("name", ["add", "multiply", "negate", "compare", "widen", "round", "truth"])
def test_bfloat16_is_wrong_without_the_remedy(found: dict[str, Any], name: str) -> None:
    """When Triton's own interpreter passes this, the remedy can go."""
    assert found["bfloat16"][name][1] != 0


def test_products_are_wrong_without_the_remedy(found: dict[str, Any]) -> None:
    assert not found["reductions"]["error of a product"] < 1


def test_a_sum_in_bfloat16_loses_what_bfloat16_loses(found: dict[str, Any]) -> None:
    exact, made = found["reductions"]["exact"], found["reductions"]["accumulated"]
    assert float(torch.tensor(exact).bfloat16()) != made
    assert made == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("name", ["add_vectors", "softmax_rows", "product_of_tiles", "scale_and_total"])
def test_kernels_are_right_by_their_own_check(found: dict[str, Any], name: str) -> None:
    code, said = found["checks"][name]
    assert (code, said.split(",")[0]) == (0, "right in Triton's interpreter")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("constant", "largest error"),
        ("sign", "rms error"),
        ("unwritten", "1 entries are not finite"),
        ("vacuous", "could not fail"),
    ],
)
def test_the_check_rejects_wrong_kernels(found: dict[str, Any], name: str, says: str) -> None:
    assert any(says in line for line in found["broken"][name])


def test_ops_run_on_cpu_tensors(found: dict[str, Any]) -> None:
    ops = found["ops"]
    assert ops["eager"]
    assert ops["same op"]
    assert ops["compiled"]


def test_an_op_writes_to_its_input_and_says_so(found: dict[str, Any]) -> None:
    ops = found["ops"]
    assert ops["written"]
    assert ops["schema"] == "Tensor(a0!) x, float factor) -> (Tensor, Tensor)"
    assert ops["totals"] == pytest.approx(ops["wanted"], rel=1e-5)
