"""timm's names: what libraries written for timm's models ask of one, they may ask of ours."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx, nn

from nfzoo import ConfigError, NFNet, create, model, param_groups
from nfzoo.models import functional as nf
from tests.support.helpers import FAMILIES, SMALL, assert_same, images, random_params, relative

FLOAT32 = 1e-5
small = pytest.mark.parametrize("name", SMALL)
forms = pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])


def shell(name: str = "nfnet", *, folded: bool = False, **changes: Any) -> NFNet:
    made = NFNet(SMALL[name].replace(**changes), name="mine").eval()
    made.load_state_dict(random_params(made.config))
    return made.for_inference() if folded else made


def has_final_conv(net: NFNet) -> bool:
    return any(block.name == "final_conv" for block in net.plan)


@small
@forms
def test_features_and_head_compose_to_the_model(name: str, folded: bool) -> None:
    net = shell(name, folded=folded)
    x = images(net.config, 2, 45, 61)
    maps = net.forward_features(x)
    assert maps.shape == (2, net.num_features, 2, 2)
    assert relative(net.forward_head(maps), net(x)) < FLOAT32
    assert relative(net.forward_head(maps, pre_logits=True), net.embed(x)) < FLOAT32
    assert net.head_hidden_size == net.num_features == net.embed(x).shape[1]
    assert net.num_classes == 5


@pytest.mark.parametrize("name", ["nfnet", "nf-resnet-timm"])
def test_in_training_they_draw_the_noise_of_the_model(name: str) -> None:
    net = shell(name, stochastic_depth=0.5, drop_rate=0.5).train()
    x = images(net.config, 8)
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    maps = net.forward_features(x)
    state = torch.get_rng_state()
    assert torch.equal(net.forward_head(maps), expected)
    torch.set_rng_state(state)
    mask = model.sample_masks(net.plan[-1:], 8)["head"]
    torch.set_rng_state(state)
    assert torch.equal(net.forward_head(maps, pre_logits=True), maps.mean((2, 3)) * mask)
    torch.manual_seed(0)
    final, _ = net.forward_intermediates(x)
    assert torch.equal(final, maps)


@small
@forms
@pytest.mark.parametrize("output_stride", [32, 8])
def test_intermediates_are_those_that_feature_info_lists(name: str, folded: bool, output_stride: int) -> None:
    net = shell(name, folded=folded, output_stride=output_stride)
    x = images(net.config, 2, 64, 96)
    final, maps = net.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == [96 // m.shape[3] for m in maps] == net.feature_info.reduction()
    features = net.features(x)
    assert all(torch.equal(a, b) for a, b in zip(maps[:-1], features[:-1], strict=True))
    assert relative(final, net.forward_features(x)) < FLOAT32
    # The last is after the final convolution, before its activation.
    gamma = 1.0 if net.config.rule.gamma_on_weight else nf.GAMMA[net.config.activation]
    assert relative(nf.activate(maps[-1], net.config.activation) * gamma, final) < FLOAT32
    assert torch.equal(maps[-1], features[-1]) != has_final_conv(net)


@small
def test_feature_info_names_the_blocks_that_return_the_maps(name: str) -> None:
    net = shell(name)
    x = images(net.config)
    outputs: dict[str, torch.Tensor] = {}
    for path in net.feature_info.module_name():
        net.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: outputs.update({path: y}))
    _, maps = net.forward_intermediates(x)
    assert_same(outputs, dict(zip(net.feature_info.module_name(), maps, strict=True)))


def test_feature_info_is_a_list_of_dictionaries() -> None:
    info = create("nfnet-test").feature_info
    assert info == [
        {"num_chs": 16, "reduction": 2, "module": "stem.conv2"},
        {"num_chs": 32, "reduction": 4, "module": "stages.0.0"},
        {"num_chs": 64, "reduction": 8, "module": "stages.1.0"},
        {"num_chs": 128, "reduction": 16, "module": "stages.2.0"},
        {"num_chs": 256, "reduction": 32, "module": "final_conv"},
    ]
    assert (info.channels(1), info.reduction([0, -1]), info.module_name((2,))) == (32, [2, 32], ["stages.1.0"])


@forms
@pytest.mark.parametrize(("indices", "taken"), [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), ([-1, 1], [1, 4]), ((0,), [0])])
def test_maps_are_selected_by_index(folded: bool, indices: Any, taken: list[int]) -> None:
    net = shell(folded=folded)
    x = images(net.config)
    final, maps = net.forward_intermediates(x)
    options: Any
    for options in ({}, {"stop_early": True}):
        out, some = net.forward_intermediates(x, indices, **options)
        alone: Any = net.forward_intermediates(x, indices, intermediates_only=True, **options)
        for got in (some, alone):
            assert all(torch.equal(a, maps[i]) for a, i in zip(got, taken, strict=True))
        assert torch.equal(out, final if taken[-1] == 4 or not options else some[-1])
    features = net.features(x)
    assert all(torch.equal(a, features[i]) for a, i in zip(net.features(x, indices), taken, strict=True))
    assert all(torch.equal(a, features[i]) for a, i in zip(net.features(x, out_indices=indices), taken, strict=True))


@pytest.mark.parametrize("indices", [0, 6, [5], [-6], [], "01", [True], [1.0], True])
def test_maps_that_do_not_exist_are_refused(indices: Any) -> None:
    net = shell()
    for call in (net.features, net.forward_intermediates):
        with pytest.raises(ConfigError, match="from -5 to 4, or a number of last maps from 1 to 5"):
            call(images(net.config), indices)


def test_other_layouts_and_inputs_are_refused() -> None:
    net = shell()
    with pytest.raises(ConfigError, match="output_fmt must be 'NCHW', not 'NLC'"):
        net.forward_intermediates(images(net.config), output_fmt="NLC")
    for call in (net.forward_features, net.forward_intermediates):
        with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\)"):
            call(torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_compiled_models_give_the_same_maps(name: str) -> None:
    net = shell(name, folded=True)
    x = images(net.config)
    final, maps = net.forward_intermediates(x)
    net.compile_blocks(backend="eager")
    out, compiled = net.forward_intermediates(x)
    assert all(relative(a, b) < FLOAT32 for a, b in zip([out, *compiled], [final, *maps], strict=True))
    early, some = net.forward_intermediates(x, [1, 2], stop_early=True)
    assert early is some[-1]
    assert relative(net.forward_head(net.forward_features(x)), net(x)) < FLOAT32


@small
def test_classifier(name: str) -> None:
    net = shell(name)
    x = images(net.config)
    head: Any = net.get_classifier()
    assert head is net.head
    assert (head.in_features, head.out_features) == (net.num_features, 5)
    assert torch.equal(head(net.embed(x)), nn.functional.linear(net.embed(x), head.weight, head.bias))
    net.reset_classifier(3, "avg")
    assert (net.num_classes, net.get_classifier().out_features, net(x).shape) == (3, 3, (2, 3))
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert net.num_classes == 0
    assert net(x).shape == (2, net.num_features)
    assert torch.equal(net.forward_head(net.forward_features(x)), net(x))
    assert net.forward_features(x).ndim == 4
    net.head = nn.Linear(net.num_features, 2)
    assert net.get_classifier() is net.head
    assert net.num_classes == 2


@pytest.mark.parametrize("pooling", ["", "max", "catavgmax", ["a", "b", "c"]])
def test_other_poolings_are_refused(pooling: Any) -> None:
    net = shell()
    before = net.head
    with pytest.raises(ConfigError, match="global_pool must be 'avg'"):
        net.reset_classifier(3, pooling)
    assert net.head is before


def test_another_module_as_pool_pools() -> None:
    net = shell()
    x = images(net.config)
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    net.pool = pool
    assert torch.equal(net.forward_head(net.forward_features(x)), net(x))
    final, maps = net.forward_intermediates(x)
    assert torch.equal(pool(final), net.embed(x))
    assert torch.equal(final, maps[-1])


@small
@forms
def test_default_cfg_names_layers_and_sizes(name: str, folded: bool) -> None:
    net = shell(name, folded=folded, in_channels=4)
    cfg = net.default_cfg
    keys = net.state_dict()
    assert f"{cfg['classifier']}.weight" in keys
    assert keys[f"{cfg['first_conv']}.weight"].shape[1] == 4
    assert cfg == net.pretrained_cfg
    assert cfg["architecture"] == (None if net.name is None else "nfzoo_" + net.name.replace("-", "_"))
    assert cfg["input_size"] == (4, 224, 224)
    assert net.forward_features(torch.zeros(1, 4, 64, 64)).shape[-2:] == (2, 2)
    assert cfg["pool_size"] == (7, 7)
    assert (cfg["mean"], cfg["std"]) == (net.preprocessing.mean, net.preprocessing.std)
    assert (cfg["interpolation"], cfg["crop_mode"], cfg["num_classes"]) == ("bicubic", "squash", 5)
    assert int(224 / cfg["crop_pct"]) == 224 + net.preprocessing.margin


@small
def test_every_parameter_has_a_gradient_and_a_group(name: str) -> None:
    net = shell(name).train()
    net.set_grad_checkpointing()
    net(images(net.config)).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.set_grad_checkpointing(enable=False)
    for coarse in (False, True):
        matcher = net.group_matcher(coarse=coarse)
        patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
        groups = {}
        for key in net.state_dict():
            found = [m for m in (re.match(pattern, key) for pattern in patterns) if m]
            assert len(found) == (0 if key.startswith("head.") else 1), key
            groups.setdefault(found[0].group() if found else "head", key)
        assert len(groups) == (4 if coarse else 5) + 2 + has_final_conv(net)


def test_checkpointing_is_that_of_the_blocks() -> None:
    net = shell()
    net.set_grad_checkpointing()
    assert net.get_submodule("stages.0.0").checkpointed
    net.set_grad_checkpointing(False)
    assert not net.get_submodule("stages.0.0").checkpointed


@small
def test_weight_decay_is_that_of_param_groups(name: str) -> None:
    net = shell(name)
    names = {p: key for key, p in net.named_parameters()}
    groups = param_groups(net, weight_decay=0.1)
    assert net.no_weight_decay() == {names[p] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert all(key in net.for_inference().state_dict() for key in net.for_inference().no_weight_decay())


def test_graphs_of_torch_fx_hold_the_features() -> None:
    class Backbone(nn.Module):
        def __init__(self, net: NFNet) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> Any:
            return self.net.forward_features(x), self.net.forward_intermediates(x, 2), self.net.features(x, [1])

    net = shell()
    traced = fx.symbolic_trace(Backbone(net))
    x = images(net.config, 3, 45, 61)
    features, (final, maps), (first,) = traced(x)
    for got, expected in ((features, net.forward_features(x)), (final, features), (maps[0], net.features(x)[3])):
        assert torch.equal(got, expected)
    assert torch.equal(first, net.features(x)[1])
