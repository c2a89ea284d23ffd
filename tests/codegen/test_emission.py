"""Emitted kernels in Triton's interpreter, in processes of their own: Triton is imported in that mode."""

from __future__ import annotations

from typing import Any

import pytest

from support.programs import findings


def test_random_programs() -> None:
    found = findings("support.emission_fuzz", "--programs", "60")
    assert found["failure"] == ""
    assert found["kernels"] > 40


@pytest.mark.slow
def test_many_random_programs() -> None:
    found = findings("support.emission_fuzz", "--programs", "2000")
    assert (found["mismatches"], found["failure"]) == (0, "")
    assert found["programs"] >= 2000


def test_random_programs_compile() -> None:
    found = findings("support.compiled_fuzz", "--programs", "20", interpreted=False)
    assert found["failures"] == []
    assert found["kernels"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_many_random_programs_compile(target: str) -> None:
    found = findings("support.compiled_fuzz", "--programs", "800", "--target", target, interpreted=False)
    assert found["failures"] == []
    assert found["programs"] >= 800


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("support.emitted", str(tmp_path_factory.mktemp("kernels")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("support.emitted", str(tmp_path_factory.mktemp("whole")), "whole")


def test_programs_that_kernels_are_known_to_get_wrong(cases: dict[str, Any]) -> None:
    assert {name: found for name, found in cases["programs"].items() if found} == {}


def test_products_with_few_rows(cases: dict[str, Any]) -> None:
    assert {name: found for name, found in cases["products"].items() if found} == {}


@pytest.mark.parametrize("split_k", ["deterministic", "atomic", "never"])
def test_products_with_many_rows(cases: dict[str, Any], split_k: str) -> None:
    assert {name: found for name, found in cases["large products"][split_k].items() if found} == {}


@pytest.mark.parametrize("fault", ["rows", "columns", "rounding", "mask"])
def test_a_fault_in_the_kernel_is_seen(cases: dict[str, Any], fault: str) -> None:
    assert cases["faults"][fault], "the check cannot fail"


def test_a_third_of_the_configurations_computes_the_same(cases: dict[str, Any]) -> None:
    found = cases["configurations"]
    assert len(found) >= 20
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.slow
def test_products_of_all_sizes(whole: dict[str, Any]) -> None:
    parts = [whole["products"], *whole["large products"].values()]
    assert [len(part) >= least for part, least in zip(parts, (40, 48, 15, 15), strict=True)] == [True] * 4
    assert {name: found for part in parts for name, found in part.items() if found} == {}


@pytest.mark.slow
def test_every_configuration_computes_the_same(whole: dict[str, Any]) -> None:
    found = whole["configurations"]
    assert len(found) >= 60
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize("part", ["loss", "logits", "gradients"])
def test_a_model_runs_through_kernels(cases: dict[str, Any], part: str) -> None:
    assert cases["model"][part] == ""


def test_a_model_is_mostly_kernels(cases: dict[str, Any]) -> None:
    assert cases["model"]["kernels"] >= 15


def test_kernels_are_called_with_other_sizes(cases: dict[str, Any]) -> None:
    assert cases["dynamic"] == {"graphs": 2, "differences": [], "products": 2}


def test_dropout_is_the_same_forward_and_backward(cases: dict[str, Any]) -> None:
    found = dict(cases["dropout"])
    assert 0.22 < found.pop("share") < 0.28  # of 3200: four standard deviations
    assert found and all(found.values()), found
