"""Models at the sizes that they were published in: the architecture of each is built, and tells every tensor's role."""

from __future__ import annotations

import pytest
from model_types import PUBLISHED, published

from acemerge.checkpoints.header import TensorSpec
from acemerge.models.architecture import meta_model
from acemerge.models.roles import roles_from_model


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_model_of_its_published_size_is_built_and_gives_roles(architecture: str) -> None:
    model, why_not = meta_model(published(architecture), 0)
    assert model is not None, why_not
    state = model.state_dict()
    roles = roles_from_model(model, {n: TensorSpec(n, v.dtype, tuple(v.shape)) for n, v in state.items()}, "test")
    assert {role.origin for role in roles.by_name.values()} == {"architecture"}
    layers = [n for n, role in roles.by_name.items() if role.name in ("linear", "conv1d", "experts", "convolution")]
    assert sum(state[name].numel() for name in layers) > 1_000_000
