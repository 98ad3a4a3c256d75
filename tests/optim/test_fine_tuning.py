"""Which parameters fine-tuning trains."""

from __future__ import annotations

import pytest
import torch

import nfzoo
from nfzoo.model import specs
from nfzoo.optim.fine_tuning import freeze_, lr_scales, split_by_scale, tuned_names
from tests.support.loops import each

HEAD = ("head.",)
LAST = ("stages.3.", "final_conv.", "head.")


@each(
    ("model", "tune", "prefixes"),
    [
        ("nfnet-test", "all", ("",)),
        ("nfnet-test", "head", HEAD),
        ("nfnet-test", "stages:1", LAST),
        ("nf-resnet-50", "stages:1", LAST),  # which has no final convolution
        ("nf-regnet-b0", "stages:2", ("stages.2.", *LAST)),
        ("nfnet-test", "stages:4", ("stages.", "final_conv.", "head.")),
    ],
)
def test_the_parts_of_a_network(model: str, tune: str, prefixes: tuple[str, ...]) -> None:
    names = list(specs(nfzoo.variant(model).config))
    assert tuned_names(names, tune) == {name for name in names if name.startswith(prefixes)}


def test_the_last_call_counts() -> None:
    network = nfzoo.create("nfnet-test")
    for tune in ("head", "stages:1"):
        freeze_(network, tune)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name in dict(network.named_parameters()) if name.startswith(LAST)}


@each(
    ("tune", "said"),
    [("stages:5", "more than the 4 stages"), ("stages:0", "not 'stages:0'"), ("stages", "not"), ("Head", "not 'Head'")],
)
def test_parts_that_there_are_not(tune: str, said: str) -> None:
    names = [f"stages.{i}.0.conv0.weight" for i in range(4)]
    with pytest.raises(ValueError, match=said):
        tuned_names(names, tune)


# timm 1.0's `param_groups_layer_decay(model, layer_decay=0.75)` of its own models: the powers of 0.75.
TIMM_F0 = {"stem": 13, "stages.0.0": 12, "stages.1.0": 11, "stages.1.1": 10, "stages.2.0": 9, "stages.2.1": 8}
TIMM_F0 |= {"stages.2.2": 7, "stages.2.3": 6, "stages.2.4": 5, "stages.2.5": 4, "stages.3.0": 3, "stages.3.1": 2}
TIMM_F0 |= {"stages.3.2": 1, "final_conv": 1, "head": 0}
TIMM_RESNET = {
    "stem": 17,
    "stages.0.0": 16,
    "stages.0.2": 14,
    "stages.1.0": 13,
    "stages.3.0": 3,
    "stages.3.2": 1,
    "head": 0,
}


@each(("model", "powers"), [("nfnet-f0", TIMM_F0), ("nf-resnet-50", TIMM_RESNET)])
def test_rates_fall_with_depth_as_timms(model: str, powers: dict[str, int]) -> None:
    names = list(specs(nfzoo.variant(model).config))
    found = lr_scales(names, layer_decay=0.75)
    for part, power in powers.items():
        assert {found[name] for name in names if name.startswith(f"{part}.")} == {0.75**power}, part
    assert found.keys() == set(names)


def test_the_classifiers_rate_is_multiplied() -> None:
    names = ["stem.conv0.weight", "stages.0.0.conv0.weight", "final_conv.gain", "head.weight", "head.bias"]
    assert lr_scales(names, layer_decay=0.5, head_lr_scale=10.0) == dict(
        zip(names, (0.25, 0.5, 0.5, 10, 10), strict=True)
    )
    assert lr_scales(names, head_lr_scale=2.0) == dict(zip(names, (1, 1, 1, 2, 2), strict=True))


def test_groups_keep_their_options() -> None:
    a, b, c = (torch.ones(1) * i for i in range(3))
    groups = split_by_scale([{"params": [a, b, c], "clip": None}], {a: 0.5, b: 2.0, c: 0.5}, 0.1)
    assert groups == [
        {"params": [a, c], "clip": None, "lr": 0.05, "lr_scale": 0.5},
        {"params": [b], "clip": None, "lr": 0.2, "lr_scale": 2.0},
    ]
