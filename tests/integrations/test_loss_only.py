"""fxopt.loss_only: what a model returns, when, and that its loss is then computed in chunks."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import fxopt
import fxopt.passes.fuse_linear_cross_entropy as fused
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer, reference_mode
from support.reference import double_model

NAME = "fuse-linear-cross-entropy"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_WITH_GRADIENTS", 0)


def model(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(0, 120, (2, 9))
    labels = tokens.clone()
    labels[:, :4] = -100
    return {"input_ids": tokens, "labels": labels, "num_items_in_batch": torch.tensor(10)}


def test_logits_are_left_out_in_training_with_labels() -> None:
    changed, given = fxopt.loss_only(model()), batch()
    assert set(changed(**given)) == {"loss"}
    assert set(changed(given["input_ids"])) == {"logits"}
    assert set(changed.eval()(**given)) == {"loss", "logits"}
    assert len(changed.train()(**given, return_dict=False)) == 2


def test_the_forward_keeps_its_signature_and_follows_a_copy() -> None:
    plain = model()
    wanted = inspect.signature(plain.forward)
    changed = fxopt.loss_only(plain)
    assert inspect.signature(changed.forward) == wanted
    other = copy.deepcopy(changed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(**batch()).loss, changed(**batch()).loss)


def gradients(call: Any, of: Any, given: dict[str, Any]) -> Any:
    of.zero_grad()
    loss = call(**given).loss
    loss.backward()
    return [loss, {name: each.grad.clone() for name, each in of.named_parameters()}]


def test_the_loss_is_computed_in_chunks_with_gradients_as_exact_as_eagers() -> None:
    """Tied embeddings: both of their uses add to one gradient."""
    changed = fxopt.loss_only(model())
    given = batch()
    with all_handled() as records:
        found = gradients(compile_fxopt(changed), changed, given)
    assert [entry.status.value for each in records for entry in each.evidence if entry.rewrite == NAME] == [
        "applied"
    ]
    plain = model()
    wide = double_model(plain)
    with reference_mode():
        exact = gradients(wide, wide, given)
    assert_closer(exact, found, gradients(plain, plain, given))


def test_returned_logits_are_named_as_the_obstacle() -> None:
    with all_handled() as records:
        compile_fxopt(model())(**batch())
    (entry,) = [entry for each in records for entry in each.evidence if entry.rewrite == NAME]
    assert entry.status.value == "miss"
    assert "fxopt.loss_only(model)" in entry.reason
