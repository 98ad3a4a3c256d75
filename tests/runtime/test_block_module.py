"""The modules around a block's function: what is put in their place takes effect."""

from __future__ import annotations

import copy

import pytest
import torch

from nfzoo import NFNet, model
from tests.support.helpers import SMALL, images, random_params


def shell() -> NFNet:
    made = NFNet(SMALL["nfnet"])
    made.load_state_dict(random_params(made.config))
    return made.eval()


@pytest.mark.parametrize(
    "path", ["head", "stages", "stages.0", "stages.1.0", "stages.1.1.conv0", "stem", "stages.1.0.se.fc0"]
)
def test_a_module_that_is_replaced_takes_effect(path):
    module, other = shell(), shell()
    other.load_state_dict({name: p + 0.1 for name, p in other.state_dict().items()})
    x = images(module.config)
    module(x)  # what a call finds may not be kept
    for twin in (copy.deepcopy(module), module):
        owner, _, name = path.rpartition(".")
        setattr(twin.get_submodule(owner), name, other.get_submodule(path))
        expected = model.apply(twin.config, dict(twin.named_parameters()), x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.embed(x), model.embed(twin.config, dict(twin.named_parameters()), x))
    assert not torch.equal(module(x), shell()(x))
