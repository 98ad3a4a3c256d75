"""Which parameters fine-tuning trains."""

from __future__ import annotations

import pytest

import nfzoo
from nfzoo.model import specs
from nfzoo.optim.fine_tuning import freeze_, tuned_names
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
