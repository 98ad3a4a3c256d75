"""The tree of layers computes what the plan does, takes what tools do to layers, and gives its parameters back."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import nfzoo
from nfzoo import ConfigError, NFNet, model
from nfzoo.models.modules import KernelPad, LayerTree, Residual, StandardizedWeight, module_tree, tree_keys
from nfzoo.variants import VARIANTS
from tests.support.helpers import FAMILIES, SMALL, images, random_params, relative

FORMS = {"trained": lambda net: net, "folded": NFNet.for_inference}
ODD = (45, 38)
"""Pixels of which no half is whole, so that each padding differs from the next."""


def network(name: str = "nfnet", dtype: torch.dtype = torch.float32, **changes: Any) -> NFNet:
    net = NFNet(SMALL[name].replace(**changes), dtype=dtype)
    net.load_state_dict(random_params(net.config, dtype=dtype))
    return net.eval()


def zoo_network() -> NFNet:
    net = nfzoo.create("nfnet-test", num_classes=10)
    net.load_state_dict(random_params(net.config))
    return net.eval()


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_the_model(name, stride, form):
    net = FORMS[form](network(name, output_stride=stride))
    tree = net.as_modules()
    for size in (ODD, (32, 32)):
        x = images(net.config, 2, *size)
        assert relative(tree(x), net(x)) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_the_model(name):
    net = network(name, torch.float64, output_stride=16)
    tree = net.as_modules()
    x = images(net.config, 2, *ODD).double()
    for module in (net, tree):
        module(x).square().mean().backward()
    for key, own in tree_keys(net.plan).items():
        assert relative(tree.get_parameter(own).grad, net.get_parameter(key).grad) < 1e-11  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_in_training_mode_images_skip_the_same_blocks(name):
    net = network(name, stochastic_depth=0.5).train()
    tree = net.as_modules()
    assert tree.training
    x = images(net.config, 8)
    drawn = []
    for module in (net, tree):
        torch.manual_seed(0)
        drawn.append(module(x))
    assert relative(drawn[1], drawn[0]) < 1e-6
    assert relative(tree.eval()(x), drawn[0]) > 1e-2


def test_dropout_is_torchs():
    tree = network(drop_rate=0.25).as_modules()
    (dropout,) = (m for m in tree.modules() if isinstance(m, nn.Dropout))
    assert dropout.p == 0.25
    assert [*tree][-2] is dropout
    assert not [m for m in network(drop_rate=0.25).for_inference().as_modules().modules() if isinstance(m, nn.Dropout)]


def test_no_classes_and_another_head():
    for net in (network(num_classes=0), network()):
        if net.config.num_classes:
            net.head = nn.Linear(64, 3)
        for form in FORMS.values():
            x = images(net.config)
            assert relative(form(net).as_modules()(x), net(x)) < 1e-6


def test_a_folded_tree_is_nothing_but_layers_of_torch():
    ours = (Residual, KernelPad)
    tree = zoo_network().for_inference().as_modules()
    foreign = {type(m).__name__ for m in tree.modules() if not type(m).__module__.startswith("torch.nn")}
    assert foreign == {"LayerTree", "Residual", "KernelPad", "SqueezeExcite", "Scale"}
    assert not [m for m in tree.modules() if isinstance(m, StandardizedWeight)]
    for m in tree.modules():
        if isinstance(m, ours):
            assert set(m._parameters) <= {"scale"}


@pytest.mark.parametrize("folded", [False, True])
def test_every_variant_has_a_tree(folded):
    for name in ("nfnet-f0", "nfnet-f0-plus", "nf-resnet-50", "nf-regnet-b0", *(v for v in VARIANTS if "eca" in v)):
        cfg = VARIANTS[name].config
        tree = module_tree(model.plan(cfg), folded=folded)
        shapes = {key: tuple(p.shape) for key, p in tree.named_parameters()}
        form = cfg.replace(folded=folded)
        keys = tree_keys(model.plan(form))
        assert shapes == {keys[key]: shape for key, (shape, _) in model.specs(form).items()}, name


def test_a_tree_has_parameters_of_its_own_and_the_flags_of_the_model():
    net = network()
    net.get_parameter("stem.conv0.weight").requires_grad_(False)
    tree = net.as_modules()
    assert not tree.training
    frozen = [key for key, p in tree.named_parameters() if not p.requires_grad]
    assert frozen == ["stem.conv0.parametrizations.weight.original"]
    own = {p.data_ptr() for p in net.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in tree.parameters())
    last = cast(NFNet, nn.Module.to(net, memory_format=torch.channels_last)).as_modules()  # type: ignore[call-overload]
    assert last.get_submodule("stem.conv1").weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator,union-attr]
    assert {p.dtype for p in copy.deepcopy(net).bfloat16().as_modules().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_trees_are_traced_with_sizes_left_open(name, form):
    tree = FORMS[form](network(name, output_stride=16)).as_modules()
    traced = fx.symbolic_trace(tree)
    for size in (ODD, (32, 33)):
        x = images(SMALL[name], 2, *size)
        assert torch.equal(traced(x), tree(x))


# ---------------------------------------------------------------- the way back


def train(tree: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in tree.parameters() if p.requires_grad], lr=0.1)
    tree.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(tree(x), torch.arange(len(x)) % 5).backward()
        optimizer.step()
    tree.eval()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", FORMS)
def test_trained_weights_go_back_bit_by_bit(name, form):
    net = FORMS[form](network(name))
    tree = net.as_modules().requires_grad_(True)
    x = images(net.config)
    train(tree, x)
    before = net(x)
    assert net.load_modules(tree) is net
    keys = tree_keys(net.plan)
    assert all(torch.equal(p, tree.get_parameter(keys[key])) for key, p in net.named_parameters())
    assert relative(net(x), tree(x)) < 1e-6
    assert relative(net(x), before) > 1e-3


def test_other_trees_are_refused():
    net = network()
    pruned = net.as_modules()
    prune.l1_unstructured(pruned.get_submodule("stages.0.0.se.fc0"), "weight", amount=0.5)
    more = net.as_modules()
    more.add_module("more", nn.Linear(5, 5))
    before = {key: p.clone() for key, p in net.state_dict().items()}
    for other in (
        net.for_inference().as_modules(),
        network("nfnet-plain").as_modules(),
        network(num_classes=3).as_modules(),
        nn.Sequential(net.as_modules()),
        pruned,
        more,
    ):
        with pytest.raises(ConfigError, match="the tree is not one of this model"):
            net.load_modules(other)
    with pytest.raises(ConfigError, match="is on the meta device"):
        net.load_modules(net.as_modules().to("meta"))
    assert all(torch.equal(p, before[key]) for key, p in net.state_dict().items())


def test_models_that_a_tree_would_not_tell_all_of_are_refused():
    class Twice(NFNet):
        def forward(self, x, noise=None):
            return 2 * super().forward(x, noise)

    with pytest.raises(ConfigError, match="forward of its own"):
        Twice(SMALL["nfnet"]).as_modules()
    net = network()
    prune.l1_unstructured(net.get_submodule("stages.0.0.conv0"), "weight", amount=0.5)
    with pytest.raises(ConfigError, match=r"prune\.remove"):
        net.as_modules()
    net = network()
    net.head = nn.Sequential(nn.Linear(64, 5))
    with pytest.raises(ConfigError, match="Sequential as head"):
        net.as_modules()


# ---------------------------------------------------------------- tools


def test_lora_trains_merges_and_goes_back():
    from peft import LoraConfig, get_peft_model

    net = zoo_network()
    lean = net.for_inference()
    x = images(net.config)
    before = lean(x)
    adapted: Any = get_peft_model(lean.as_modules(), LoraConfig(r=2, target_modules=["conv0", "conv2", "head"]))  # type: ignore[arg-type]
    assert relative(adapted(x), before) < 1e-6
    trainable = [key for key, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in key for key in trainable)
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in trainable} == {"conv0", "conv2", "head"}
    with pytest.raises(ConfigError, match="merge adapters"):
        lean.load_modules(adapted)
    train(adapted, x)
    expected = adapted(x)
    lean.load_modules(adapted.merge_and_unload())
    assert relative(lean(x), expected) < 1e-5
    assert relative(lean(x), before) > 1e-2


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantises_the_linear_layers(kind):
    from torchao import quantization

    net = zoo_network()
    tree = net.for_inference().as_modules()
    quantization.quantize_(tree, getattr(quantization, kind)())
    for path in ("head", "stages.0.0.se.fc0", "stages.3.0.se.fc1"):
        assert type(tree.get_submodule(path).weight) is not nn.Parameter
    x = images(net.config)
    with torch.no_grad():
        assert 1e-4 < relative(tree(x), net(x)) < 0.05
    with pytest.raises(ConfigError, match="is a Int8Tensor, not a tensor of floating-point"):
        net.for_inference().load_modules(tree)


def test_torchinfo_counts_what_we_count():
    import torchinfo

    net = zoo_network()
    for form in FORMS.values():
        parameters = torchinfo.summary(form(net).as_modules(), verbose=0).total_params
        assert parameters == model.parameter_count(form(net).config)
    tree, cfg = net.for_inference().as_modules(), net.for_inference().config
    # It takes the addition of a bias for one more multiplication.
    biases = 0

    def count(module: Any, args: Any, out: Tensor) -> None:
        nonlocal biases
        biases += 0 if module.bias is None else out.numel()

    layers = [m for m in tree.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(count) for m in layers]
    tree(torch.randn(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    summary = torchinfo.summary(tree, (1, 3, 32, 32), verbose=0)
    assert summary.total_mult_adds - biases == model.mac_count(cfg, 32)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_captum_attributes_to_pixels_and_layers():
    from captum.attr import GuidedBackprop, IntegratedGradients, LayerGradCam, Saliency

    net = network("nf-resnet-se")
    x = images(net.config).requires_grad_()
    for form in FORMS.values():
        tree = form(net).as_modules()
        attribution = IntegratedGradients(tree).attribute(x, target=1, n_steps=300)
        difference = tree(x)[:, 1] - tree(torch.zeros_like(x))[:, 1]
        assert relative(attribution.sum((1, 2, 3)), difference) < 1e-2
        guided, plain = GuidedBackprop(tree).attribute(x, target=1), Saliency(tree).attribute(x, target=1, abs=False)
        assert relative(guided, plain) > 1e-2  # it found the activations
        cam: Any = LayerGradCam(tree, tree.get_submodule("stages.1")).attribute(x, target=1)
        features = net.features(x)[2]
        assert cam.shape[-2:] == features.shape[-2:]
        (gradient,) = torch.autograd.grad(net_from(net, features), features)
        assert relative(cam, (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)) < 1e-4


def net_from(net: NFNet, features: Tensor) -> Tensor:
    """The sum of the second logits, from the features of stage 1 on."""
    x, params = features, dict(net.named_parameters())
    for block in net.plan[[b.name for b in net.plan].index("stages.2.0") :]:
        x = model.run_block(block, params, x)
    return x[:, 1].sum()


@pytest.mark.parametrize("folded", [False, True])
def test_the_classifier_of_a_tree_is_not_clipped(folded):
    model = zoo_network()
    tree = (model.for_inference() if folded else model).as_modules()
    assert isinstance(tree, LayerTree)
    kinds = tree.parameter_kinds()
    assert kinds.keys() == dict(tree.named_parameters()).keys()
    assert [name for name, kind in kinds.items() if kind == "head"] == ["head.weight"]
    for p in tree.parameters():
        p.requires_grad_()
        p.grad = torch.full_like(p, 100.0)
    nfzoo.clip_grad_agc_(tree, 0.01)
    for name, p in tree.named_parameters():
        assert p.grad is not None
        assert bool((p.grad == 100).all()) == (name == "head.weight"), name


def test_a_tree_that_brings_nothing_new_is_told_of(caplog):
    """As after LoRA's merge in the trained form, which writes to a weight that a parametrization computes."""
    model = zoo_network()
    tree = model.as_modules()
    model.load_modules(tree)
    assert "the tree has the parameters that the model has already" in caplog.text
    caplog.clear()
    tree.get_parameter("head.bias").data += 1
    model.load_modules(tree)
    assert not caplog.text
