"""Attention over caches inside of what Inductor generates, for a GPU that is assumed: in another process."""

from __future__ import annotations

from typing import Any

import pytest

from support.programs import findings

BOTH = ["_decode_attention_kernel", "_decode_attention_total_kernel"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result: dict[str, Any] = findings("support.hosted_decoding", interpreted=False)
    return result


def launches(case: dict[str, Any]) -> list[str]:
    """Those of attention."""
    return [name.rpartition("_")[0] for name in case["runs"] if name[1:].startswith(("decode_", "append_"))]


def test_a_length_on_the_device_takes_two_launches_and_no_mask(found: dict[str, Any]) -> None:
    case = found["length"]
    assert launches(case) == BOTH
    assert len(case["runs"]) == 2
    assert not case["opaque"]


def test_launches_are_chosen_by_what_the_assembler_says_where_nothing_is_measured(
    found: dict[str, Any],
) -> None:
    assert found["length"]["fitted"] == 1
    assert found["append"]["fitted"] == 1
    assert found["length, faster"]["fitted"] == 0


def test_where_it_was_measured_to_be_faster_the_kernels_are_the_same(found: dict[str, Any]) -> None:
    for name in ("length", "mask"):
        case = found[f"{name}, faster"]
        assert launches(case) == launches(found[name])
        assert {provider[1] for provider in case["providers"]} == {"cached"}
    # Half of the 512 keys are live.
    (asked,) = found["length, faster"]["asked"]
    assert asked[-1] == 256


def test_layers_share_what_is_known_of_a_mask(found: dict[str, Any]) -> None:
    case = found["mask"]
    assert launches(case) == BOTH * 2
    ends = [name for name in case["runs"] if "amin" in name]
    assert len(ends) == 1, case["runs"]
    first, second = (
        set(given) for name, given in zip(case["runs"], case["arguments"], strict=True) if BOTH[0] in name
    )
    # A copy for each layer would be written by one kernel with many results.
    assert [one for one in first & second if one.startswith("buf")], case["arguments"]


def test_without_a_mask_torch_has_a_kernel(found: dict[str, Any]) -> None:
    case = found["none"]
    assert case["kernels"] == []
    assert case["providers"][0][1] == "sdpa"
    assert "without a mask" in case["providers"][0][2]


def test_rows_of_8_bits_are_read_as_they_are(found: dict[str, Any]) -> None:
    case = found["rows"]
    assert launches(case) == BOTH
    assert case["providers"][0][:2] == ["quantized_attention", "cached"]


@pytest.mark.parametrize("name", ["append", "append int8", "append fp8"])
def test_caches_are_written_in_place_by_the_kernel_that_reads_them(found: dict[str, Any], name: str) -> None:
    case = found[name]
    assert launches(case) == ["_append_attention_kernel", BOTH[1]]
    (taken,) = (a for name, a in zip(case["runs"], case["arguments"], strict=True) if "_append" in name)
    assert [each for each in taken if each.startswith("arg")], taken
    assert not [name for name in case["runs"] if "copy" in name or "index" in name]
    assert case["runs"] == found["append"]["runs"]
    assert not case["opaque"]
    assert case["providers"][0][:2] == ["append_attention", "cached"]


def test_a_growing_cache_needs_no_ends(found: dict[str, Any]) -> None:
    case = found["growing"]
    assert launches(case) == BOTH * 2
    assert len(case["runs"]) == 4, case["runs"]
