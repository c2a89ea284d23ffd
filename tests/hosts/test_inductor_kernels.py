"""fxopt's kernels inside of what Inductor generates, for a GPU that is assumed: in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from support.programs import findings


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result: dict[str, Any] = findings("support.hosted_kernels", interpreted=False)
    return result


def test_kernels_take_their_regions(found: dict[str, Any]) -> None:
    one = found["always"]
    assert [len(runs) for runs in one["runs"]] == [1]
    assert one["runs"][0][0].startswith(one["kernels"][0])
    assert one["ops"] == 0, "Inductor sees the kernel, not an op around it"
    assert [status for status, _ in one["evidence"]] == ["applied"]


def test_the_backward_graph_has_kernels_too(found: dict[str, Any]) -> None:
    forward, backward = found["backward"]["runs"]
    assert [name.startswith("fused") for name in forward] == [True]
    assert any(name.startswith("fused") for name in backward)
    assert len(found["backward"]["kernels"]) >= 2


def test_dropout_is_in_kernels(found: dict[str, Any]) -> None:
    forward, backward = found["dropout"]["runs"]
    assert any(name.startswith("fused_uniform") for name in forward)
    assert len(backward) == 1, "what was kept decides there"


def test_random_numbers_are_drawn_by_a_kernel_where_their_region_is_the_hosts(found: dict[str, Any]) -> None:
    one = found["dropout, slower"]
    assert one["kernels"] == ["fused_uniform"]
    assert one["runs"][0][-1].startswith("triton_per_fused")
    assert one["failures"] == []


def test_unmeasured_kernels_are_not_used_unasked(found: dict[str, Any]) -> None:
    one = found["auto"]
    assert one["kernels"] == []
    assert all(name.startswith("triton_") for name in one["runs"][0])
    ((status, reason),) = one["evidence"]
    assert status == "disabled"
    assert "tune_seconds" in reason


def test_never(found: dict[str, Any]) -> None:
    assert found["never"]["kernels"] == found["never"]["evidence"] == []


def test_memory_has_the_strides_that_the_kernel_counts_on(found: dict[str, Any]) -> None:
    """Inductor pads rows where it may choose; the index arithmetic of a kernel is fixed."""
    assert found["padded"]["allocated"]["buf0"] != "(1025, 1025), (1025, 1)", "Inductor pads no longer"
    one = found["unpadded"]
    read = one["arguments"][0][-1][0]
    assert one["runs"][0][-1].startswith("fused")
    assert one["allocated"][read] == "(1025, 1025), (1025, 1)"


def test_views_of_inputs_are_not_copied(found: dict[str, Any]) -> None:
    one = found["views"]
    (arguments,) = one["arguments"][0]
    assert arguments[:2] == ["arg0_1", "arg1_1"]
    assert len(one["allocated"]) == 1, "the result alone"


def test_places_of_gathers_are_asserted(found: dict[str, Any]) -> None:
    """Inductor compiles what a kernel asserts in, as in its own."""
    assert found["looked up"]["runs"][0][0].startswith("fused")
    assert found["looked up"]["asserted"] == [True]


def test_an_input_is_written_behind_its_readers(found: dict[str, Any]) -> None:
    one = found["written"]
    readers = [place for place, arguments in enumerate(one["arguments"][0]) if arguments[0] == "arg0_1"]
    (writer,) = [place for place, name in enumerate(one["runs"][0]) if "copy" in name]
    assert readers
    assert max(readers) < writer
    assert "arg0_1" in one["arguments"][0][writer]


def test_a_symbolic_size_is_an_argument_and_a_grid(found: dict[str, Any]) -> None:
    (arguments,) = found["dynamic"]["arguments"][0]
    symbols = [one for one in arguments if one.startswith("s")]
    assert symbols, arguments
    assert any("//" in one and symbols[0] in one for one in arguments), arguments


def test_what_a_scan_combines_with_has_no_kernels(found: dict[str, Any]) -> None:
    one = found["scan"]
    assert one["failures"] == []
    assert len(one["kernels"]) == 1, "the norm behind it"


def test_a_fault_leaves_the_graph_to_inductor(found: dict[str, Any]) -> None:
    one = found["fault"]
    assert one["failures"] == [["emit-kernels", "RuntimeError: cannot dissolve"]]
    assert one["runs"] == found["never"]["runs"]
    assert one["kernels"] == []
    assert found["strict"] == {"raised": "RuntimeError: cannot dissolve"}


def test_attention_under_a_window_is_fxopts_kernels(found: dict[str, Any]) -> None:
    forward, backward = found["window"]["runs"]
    assert any(one.startswith("_attention_forward_kernel") for one in forward)
    kinds = ("delta", "dq", "dkdv")
    assert all(any(one.startswith(f"_attention_{kind}_kernel") for one in backward) for kind in kinds)
    assert found["window"]["ops"] == 0, "Inductor sees the kernels, not an op around them"
    assert found["window"]["failures"] == []


def test_causal_attention_is_left_to_flash_and_what_is_not_asked_for_to_inductor(
    found: dict[str, Any],
) -> None:
    for name in ("causal", "window, never", "window, unasked"):
        assert not any("_attention_" in one for runs in found[name]["runs"] for one in runs)
        assert found[name]["kernels"] == []


def test_a_kernel_that_was_measured_to_be_faster_is_used(found: dict[str, Any]) -> None:
    one = found["faster"]
    assert len(one["kernels"]) == 1
    assert one["evidence"][0][0] == "applied"
    assert one["evidence"][0][1].endswith("on a card: 10.0 us in the kernel, 20.0 us in TorchInductor")
    assert one["closed"] == 1


def test_a_kernel_that_was_measured_to_be_slower_is_not(found: dict[str, Any]) -> None:
    one = found["slower"]
    assert one["kernels"] == []
    assert one["runs"] == found["never"]["runs"]
    reason = "measured on a card: 20.0 us in the kernel, 10.0 us in TorchInductor, slower"
    assert one["evidence"] == [["unprofitable", reason]]


def test_attention_is_fxopts_kernels_where_it_was_measured_to_be_faster_with_them(
    found: dict[str, Any],
) -> None:
    one = found["window, faster"]
    assert one["runs"] == found["window"]["runs"]
    assert one["failures"] == []
    # A training step: gradients of Q, K and V, within the time that there is for measuring.
    (asked,) = one["asked"]
    assert (asked["op"], asked["learned"][:3]) == ("attention", [True] * 3)
    assert 0 < asked["seconds"] <= 5
    (provider,) = one["providers"]
    assert provider[:2] == ["attention", "triton"]
    assert provider[2].endswith("; measured on a card: 10.0 us in the kernel, 20.0 us without")


def test_attention_is_left_to_inductor_where_it_was_measured_to_be_slower_with_kernels(
    found: dict[str, Any],
) -> None:
    one = found["window, slower"]
    assert not any("_attention_" in each for runs in one["runs"] for each in runs)
    (provider,) = one["providers"]
    assert provider[1] != "triton"
    assert "triton: measured on a card: 20.0 us in the kernel, 10.0 us without, slower" in provider[2]


def test_what_flash_has_is_not_measured(found: dict[str, Any]) -> None:
    assert found["causal, faster"]["asked"] == []
    assert found["causal, faster"]["runs"] == found["causal"]["runs"]


def test_options_are_in_the_keys_of_inductors_cache(found: dict[str, Any]) -> None:
    same, others = found["keys"]["same"], found["keys"]["others"]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)
