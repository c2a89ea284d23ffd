"""The attention coverage table: what is counted, and that the committed page shows the committed rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.attention_coverage import PAGE, RESULTS, Call, call_of, calls, measure, read
from benchmarks.coverage_count import Counts, count, tidy
from benchmarks.coverage_models import ENTRIES, SCALE, WINDOW, Entry
from benchmarks.coverage_page import render
from fxopt.measure.models import CannotBuild
from fxopt.measure.suite import SUITE


def test_padded_bert_is_counted() -> None:
    row = measure(ENTRIES["bert"], Call("eager", "float32", training=False, padded=True), (0, "earlier"))
    assert row is not None
    assert (row["sites"], row["recovered"], row["inductor"]) == (SCALE.layers, SCALE.layers, 0)
    assert row["masks"] == {"c0[b, k]": SCALE.layers}
    assert row["refused"] == row["faults"] == []


def test_mistral_in_training_is_counted_beside_a_known_figure_of_inductor() -> None:
    row = measure(ENTRIES["mistral"], Call("sdpa", "bfloat16", training=True, padded=False), (1, "earlier"))
    assert row is not None
    assert (row["sites"], row["recovered"]) == (SCALE.layers, SCALE.layers)
    assert (row["inductor"], row["inductor_commit"]) == (1, "earlier")
    assert row["masks"] == {f"k <= q and k > q - {WINDOW}": SCALE.layers}
    assert row["faults"] == []


class _Attention(nn.Module):
    """Softmax attention whose scores are also returned: a site that is not recovered."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = q @ k.transpose(-1, -2) / 4.0
        return scores.softmax(-1) @ v, scores


class _Experts(nn.Module):
    """A softmax that chooses experts, whose outputs go into another product: no site."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        weights = (x @ gate).softmax(-1)
        return (weights[..., None] * x[..., None, :]).sum(-2) @ out


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / 4.0).softmax(-1) @ v


def _inputs(*, training: bool = False) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, 3, 8, 16, requires_grad=training) for name in "qkv"}


def test_a_site_that_is_left_has_its_reason() -> None:
    found = count(_Attention(), _inputs())
    assert (found.sites, found.recovered) == (1, 0)
    ((reason, line),) = found.refused
    assert "only the softmax reads" in reason
    assert line.startswith("test_attention_coverage.py:")


def test_a_gate_of_experts_is_no_site() -> None:
    inputs = {"x": torch.randn(6, 8), "gate": torch.randn(8, 4), "out": torch.randn(8, 8)}
    assert count(_Experts(), inputs).as_dict() == Counts(graphs=1).as_dict()


@pytest.mark.parametrize("training", [False, True])
def test_a_match_of_inductor_counts_once(training: bool) -> None:
    found = count(_plain, _inputs(training=training))
    assert (found.sites, found.recovered, found.inductor) == (1, 1, 1)
    assert found.masks == Counter({"none": 1})
    assert found.faults == []


def test_reasons_name_no_layer_and_no_folder() -> None:
    text = "saw add_18 has other readers (/home/me/lib/modeling_x.py:12)"
    assert tidy(text) == "saw add has other readers (modeling_x.py:12)"
    text = "the input l_self_modules_layers_modules_3_modules_attention_parameters_bias_table_"
    assert tidy(text) == "the input bias_table"


def test_a_model_without_sdpa_has_no_such_row() -> None:
    assert measure(ENTRIES["mpt"], Call("sdpa", "float32", training=False, padded=False)) is None


def test_what_cannot_be_built_is_no_missing_form() -> None:
    with pytest.raises(CannotBuild):
        measure(Entry("no_such_model", ""), Call("eager", "float32", training=False, padded=False))


def test_the_rows_are_of_one_commit_and_whole() -> None:
    """Each architecture has all of its calls or none, and the page names those that have none."""
    _, rows = read(RESULTS)
    assert set(SUITE) <= set(ENTRIES)
    assert len({row["commit"] for row in rows}) == 1
    for name, entry in ENTRIES.items():
        measured = [call_of(row) for row in rows if row["model"] == name]
        expected = [call for call in calls(entry) if call.attention in {each.attention for each in measured}]
        assert sorted(map(repr, measured)) == sorted(map(repr, expected)), name
        assert measured or name in PAGE.read_text().partition("Not counted")[2].partition("\n")[0]


@pytest.mark.parametrize(
    ("mask", "known"),
    [("causal", 1), ("c0[b, k] and k <= q; bias k*c1[h]", 1), ("k <= q; bias c0[c1[k - q + 7], h]", 1),
     ("tensor: aten.sort", 0), ("none; bias c0[b, 0, q, k]", 0), ("c0[q, k]", 0)],
)  # fmt: skip
def test_a_tensor_of_queries_by_keys_is_no_formula(mask: str, known: int) -> None:
    machine, rows = read(RESULTS)
    row = rows[0] | {"sites": 1, "recovered": 1, "masks": {mask: 1}, "refused": [], "faults": []}
    share = f"{100.0 * known} % ({known})"
    assert f"knows the formula of {share};" in render(machine, [row])


def test_a_site_lost_by_a_fault_is_listed() -> None:
    machine, rows = read(RESULTS)
    row = rows[0] | {"sites": 2, "recovered": 0, "masks": {}, "refused": [], "faults": ["KeyError: x"]}
    assert "| 2 | " in render(machine, [row])
    assert "failed: KeyError: x" in render(machine, [row])


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == render(*read(RESULTS))
