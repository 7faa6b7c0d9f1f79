"""Which layer norms a method may train."""

from __future__ import annotations

import pytest
from torch import nn

from confrere.backbones.anatomy import Anatomy
from confrere.errors import BackboneError


def whole(*modules: nn.Module) -> Anatomy:
    return Anatomy(root=nn.Sequential(*modules), family="made-up", width=4, patch=(1, 1), whole=lambda x: x)


def test_of_a_module_that_cannot_be_cut_all_norms_are_trained_and_none_is_an_error() -> None:
    found = whole(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)).norms_after(0)
    assert sorted(found) == ["1.bias", "1.weight", "2.bias", "2.weight"]
    with pytest.raises(BackboneError, match="no layer norm"):
        whole(nn.Linear(4, 4)).norms_after(0)
