"""Models, forward and backward, compile for a GPU with every kernel that can be made."""

from __future__ import annotations

import pytest

from support.programs import findings
from support.zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(ZOO))
def test_a_model_compiles_with_all_kernels(model: str) -> None:
    assert findings("support.hosted_models", "sm_90", model, interpreted=False) == {}
