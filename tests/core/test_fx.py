"""`torch.fx` records a model as a graph of its blocks' functions, with parameters as attributes and sizes left open."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize, prune

from nfzoo import ConfigError, NFNet
from tests.support.helpers import FAMILIES, SMALL, images, random_params

small = pytest.mark.parametrize("name", SMALL)
forms = pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])


def shell(name: str, *, folded: bool = False, seed: int = 0, **changes: Any) -> NFNet:
    made = NFNet(SMALL[name].replace(**changes)).eval()
    made.load_state_dict(random_params(made.config, seed))
    return made.for_inference() if folded else made


@small
@forms
@pytest.mark.parametrize("output_stride", [32, 8])
def test_a_traced_model_computes_the_same_at_every_size(name: str, folded: bool, output_stride: int) -> None:
    module = shell(name, folded=folded, output_stride=output_stride)
    traced = fx.symbolic_trace(module)
    for batch, height, width in ((2, 32, 32), (1, 45, 61)):
        x = images(module.config, batch, height, width)
        assert torch.equal(traced(x), module(x))


@small
@forms
def test_parameters_are_attributes_of_the_graph(name: str, folded: bool) -> None:
    module, other = (shell(name, folded=folded, seed=seed) for seed in (0, 1))
    traced = fx.symbolic_trace(module)
    assert traced.state_dict().keys() == module.state_dict().keys()  # no constants
    assert {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"} == module.state_dict().keys()
    x = images(module.config)
    traced.load_state_dict(other.state_dict())
    assert torch.equal(traced(x), other(x))


@small
def test_gradients_reach_the_parameters_of_a_traced_model(name: str) -> None:
    module = shell(name)
    traced = fx.symbolic_trace(module)
    x = images(module.config)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    traced(x).square().sum().backward()
    own = dict(traced.named_parameters())
    for (key, _), gradient in zip(module.named_parameters(), expected, strict=True):
        assert torch.equal(own[key].grad, gradient)  # pyright: ignore[reportArgumentType]


def test_a_model_traced_in_training_mode_draws_noise_in_each_call() -> None:
    module = shell("nfnet", stochastic_depth=0.5, drop_rate=0.5).train()
    traced = fx.symbolic_trace(module)
    x = images(module.config, 8)
    torch.manual_seed(0)
    first, second = traced(x), traced(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(fx.symbolic_trace(module.eval())(x), module(x))


@forms
def test_a_graph_checks_its_input(folded: bool) -> None:
    module = shell("nfnet", folded=folded)
    traced = fx.symbolic_trace(module)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\), not \(3, 32, 32\)"):
        traced(images(module.config)[0])
    with pytest.raises(ConfigError, match="takes no noise"):
        traced(images(module.config), {})


@pytest.mark.parametrize("name", FAMILIES)
@forms
def test_a_graph_is_interpreted_pickled_and_traced_again(name: str, folded: bool) -> None:
    module = shell(name, folded=folded)
    traced = fx.symbolic_trace(module)
    x = images(module.config)
    for twin in (fx.Interpreter(traced).run, pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    ("folded", "changed"),
    [
        (False, lambda m: m.compile_blocks(backend="eager")),
        (True, lambda m: m.compile_blocks(backend="eager")),
        (False, lambda m: m.checkpoint_blocks()),
        (True, lambda m: m.prepack()),
    ],
)
def test_a_graph_holds_the_plain_blocks(folded: bool, changed: Callable[[NFNet], NFNet]) -> None:
    module = shell("nfnet", folded=folded)
    plain = fx.symbolic_trace(module)
    assert fx.symbolic_trace(changed(module)).code == plain.code


def test_what_stands_in_the_place_of_a_block_is_traced() -> None:
    module = shell("nfnet", stochastic_depth=0.5, drop_rate=0.5)
    x = images(module.config)
    module.head = nn.Linear(module.embed(x).shape[1], 2)
    module.get_submodule("stages.1.1").add_module("conv0", shell("nfnet", seed=1).get_submodule("stages.1.1.conv0"))
    assert torch.equal(fx.symbolic_trace(module)(x), module(x))
    traced = fx.symbolic_trace(module.train())
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    assert torch.equal(traced(x), expected)


def test_parametrized_weights_are_traced_and_hooks_on_weights_are_refused() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    module = shell("nfnet")
    x = images(module.config)
    conv = module.get_submodule("stages.1.1.conv0")
    parametrize.register_parametrization(conv, "weight", Half())
    traced = fx.symbolic_trace(module)
    assert torch.equal(traced(x), module(x))
    assert "stages.1.1.conv0.parametrizations.weight.original" in dict(traced.named_parameters())
    parametrize.remove_parametrizations(conv, "weight")
    prune.l1_unstructured(conv, "weight", 0.5)  # a graph would keep the weight as it is now
    with pytest.raises(ConfigError, match=r"prune\.remove"):
        fx.symbolic_trace(module)
    prune.remove(conv, "weight")
    assert torch.equal(fx.symbolic_trace(module)(x), module(x))


class PathTracer(fx.Tracer):
    """Remember in which module each node was recorded, as torchvision's `create_feature_extractor` does."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.paths: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        outer, self.current = self.current, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.current = outer

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.paths[node] = self.current
        return node


@pytest.mark.parametrize("name", FAMILIES)
@forms
def test_feature_extractors_find_the_outputs_of_blocks_by_name(name: str, folded: bool) -> None:
    module = shell(name, folded=folded)
    names = [block.name for block in module.plan if block.feature]
    tracer = PathTracer()
    graph = tracer.trace(module)
    last = {path: node for node, path in tracer.paths.items()}
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ({name: last[name] for name in names},)
    graph.eliminate_dead_code()
    extractor = fx.GraphModule(module, graph)
    assert not any(key.startswith("head.") for key in extractor.state_dict())
    x = images(module.config, 3, 45, 61)
    for found, expected in zip(extractor(x).values(), module.features(x), strict=True):
        assert torch.equal(found, expected)
