"""Targets: named, found, refused; the roofline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from fxopt.errors import UnsupportedTarget
from fxopt.ir.target import Target, all_targets, from_properties
from fxopt.options import TARGETS, Options


def _properties(**changes: Any) -> SimpleNamespace:
    """As `torch.cuda.get_device_properties` describes an H200."""
    found = {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "shared_memory_per_multiprocessor": 233472,
        "shared_memory_per_block_optin": 232448,
        "max_threads_per_multi_processor": 2048,
        "regs_per_multiprocessor": 65536,
        "warp_size": 32,
        "L2_cache_size": 62914560,
        "memory_clock_rate": 3201000,
        "memory_bus_width": 6144,
    }
    return SimpleNamespace(**(found | changes))


@pytest.mark.parametrize("name", TARGETS)
def test_every_name_has_a_target_with_plausible_figures(name: str) -> None:
    target = Target.named(name)
    assert target.name == f"sm_{target.arch}"
    assert target.source
    assert target.shared_per_block == target.shared_per_sm - 1024
    # The matrix units are the faster, and the narrower the dtype the faster they are.
    rates = [target.rate(dtype, tensor_cores=True) for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    assert rates == sorted(rates)
    assert target.rate(torch.float32, tensor_cores=False) <= rates[0]


def test_names_are_read_leniently() -> None:
    assert Target.named(" SM-90 ") == Target.named("sm_90")
    assert Target.named("h200").bandwidth > Target.named("h100").bandwidth
    assert len({target.card for target in all_targets()}) == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gfx942", "AMD GPU"),
        ("MI300", "AMD GPU"),
        ("xpu", "Intel GPU"),
        ("cpu", "no GPU"),
        ("sm_91", "not known"),
    ],
)
def test_what_triton_cannot_compile_for_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedTarget, match=reason) as caught:
        Target.named(name)
    assert "sm_90" in str(caught.value)
    with pytest.raises(UnsupportedTarget, match=reason):
        Options.parse(options={"target": name}, environ={})


def test_without_a_gpu_nothing_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert Target.detect() is None


def test_the_driver_is_believed_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _properties(L2_cache_size=1))
    target = Target.detect()
    assert target is not None
    assert (target.name, target.l2_bytes, target.card) == ("sm_90", 1, "NVIDIA H200")
    assert target.bandwidth == pytest.approx(4.917e12, rel=1e-3)


def test_a_part_of_a_card_has_that_part_of_its_rates() -> None:
    whole = from_properties(_properties())
    half = from_properties(_properties(multi_processor_count=66))
    assert half.rate(torch.bfloat16, tensor_cores=True) * 2 == pytest.approx(
        whole.rate(torch.bfloat16, tensor_cores=True)
    )


def test_bandwidth_comes_from_the_table_where_the_driver_is_silent() -> None:
    assert from_properties(_properties(memory_clock_rate=0)).bandwidth == Target.named("h200").bandwidth


def test_a_newer_card_takes_the_rates_of_the_newest_older_one() -> None:
    found = from_properties(_properties(name="GeForce RTX 6090", major=13, multi_processor_count=170))
    assert (found.name, found.arch) == ("sm_130", 130)
    assert found.matrix_rates == Target.named("sm_120").matrix_rates


def test_matrix_units_of_geforce_cards_are_not_those_of_the_data_center() -> None:
    found = {target.name: target.multiplies_from_shared for target in all_targets()}
    assert [name for name, shared in found.items() if shared] == ["sm_90", "sm_100"]


def test_a_card_that_is_too_old_is_refused() -> None:
    with pytest.raises(UnsupportedTarget, match="'sm_75' is too old: Triton needs sm_80"):
        from_properties(_properties(name="Tesla T4", major=7, minor=5))


def test_an_amd_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    with pytest.raises(UnsupportedTarget, match="gfx942"):
        Target.detect()


def test_roofline_is_the_larger_of_two_times() -> None:
    target = Target.named("sm_90")
    assert target.time(3.352e12, 1, torch.float32) == pytest.approx(1.0)
    assert target.time(1, 989.4e12, torch.bfloat16, tensor_cores=True) == pytest.approx(1.0)
    assert target.time(1, 494.7e12, torch.float32, tensor_cores=True) == pytest.approx(1.0)
    assert target.time(1, 66.9e12, torch.bfloat16) == pytest.approx(1.0)


def test_roofline_of_symbolic_sizes() -> None:
    n = sympy.Symbol("n", positive=True, integer=True)
    target = Target.named("sm_90")
    time = target.time(4 * n, 100 * n**2, torch.float32)
    for size in (8, 1 << 20):
        assert float(time.subs(n, size)) == pytest.approx(target.time(4 * size, 100 * size**2, torch.float32))


def test_the_target_is_in_the_fingerprint() -> None:
    plain, named = (Options.parse(options=given, environ={}) for given in ({}, {"target": "sm_90"}))
    assert plain.fingerprint != named.fingerprint
    assert Options.parse(environ={"FXOPT_TARGET": "SM-90"}).fingerprint == named.fingerprint
