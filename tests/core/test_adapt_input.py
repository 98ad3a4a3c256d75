"""Pretrained weights for images of other channels: timm's rule for kernels, and gains that keep the function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nfzoo
from nfzoo import ConfigError, NFNet, Preprocessing, model
from nfzoo.conversion.timm import write_timm
from nfzoo.nn import load
from tests.support.helpers import SMALL, images, random_params, relative

FLOAT32 = 1e-5
small = pytest.mark.parametrize("name", SMALL)


def stem(name: str) -> str:
    return model.plan(SMALL[name])[0].name


def timms_rule(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The rule of timm 1.0's `adapt_input_conv`, written out; kernels are OIHW."""
    out, old, height, width = kernel.shape
    if channels == 1:
        return sum(kernel[:, c : c + 1] for c in range(old))  # pyright: ignore[reportReturnType]
    result = np.empty((out, channels, height, width), kernel.dtype)
    for c in range(channels):
        result[:, c] = kernel[:, c % old] * (old / channels)
    return result


@small
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_kernels_are_timms_and_the_rest_is_kept(name: str, channels: int) -> None:
    cfg, params = SMALL[name], random_params(SMALL[name])
    adapted, new = model.adapt_input(cfg, params, channels)
    assert adapted == cfg.replace(in_channels=channels)
    assert {k: tuple(v.shape) for k, v in new.items()} == {k: s for k, (s, _) in model.specs(adapted).items()}
    key = f"{stem(name)}.weight"
    assert relative(new[key], timms_rule(params[key].numpy(), channels)) < 1e-6
    assert all(new[k] is params[k] for k in params if k not in (key, f"{stem(name)}.gain"))


@small
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_equal_channels_have_the_same_output(name: str, channels: int) -> None:
    cfg, params = SMALL[name], random_params(SMALL[name])
    adapted, new = model.adapt_input(cfg, params, channels)
    grey = images(cfg.replace(in_channels=1))
    expected = model.apply(cfg, params, grey.expand(-1, 3, -1, -1))
    assert relative(model.apply(adapted, new, grey.expand(-1, channels, -1, -1)), expected) < FLOAT32
    # Without the gains the standardised kernels would have another norm.
    other = {**new, f"{stem(name)}.gain": params[f"{stem(name)}.gain"]}
    far = relative(model.apply(adapted, other, grey.expand(-1, channels, -1, -1)), expected)
    assert far > 0.01 if channels != 3 else far < FLOAT32


@small
@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_differ_by_the_kernels_means(name: str, channels: int) -> None:
    cfg, params = SMALL[name], random_params(SMALL[name], dtype=torch.float64)
    adapted, new = model.adapt_input(cfg, params, channels)
    old_kernel, kernel = (
        model.fold(c, p)[1][f"{stem(name)}.weight"].numpy() for c, p in ((cfg, params), (adapted, new))
    )
    target = timms_rule(old_kernel, channels)
    np.testing.assert_allclose(kernel, target - target.mean((1, 2, 3), keepdims=True), atol=1e-12)


def test_kernels_of_zero_and_below_the_floor() -> None:
    cfg, params = SMALL["nfnet"], random_params(SMALL["nfnet"])
    key = f"{stem('nfnet')}.weight"
    params[key][0] = 0
    params[key][1] *= 1e-4
    adapted, new = model.adapt_input(cfg, params, 1)
    grey = images(adapted)
    assert torch.isfinite(new[f"{stem('nfnet')}.gain"]).all()
    expected = model.apply(cfg, params, grey.expand(-1, 3, -1, -1))
    assert relative(model.apply(adapted, new, grey), expected) < FLOAT32


@pytest.mark.parametrize("layout", ["nfzoo", "file", "timm"])
def test_from_pretrained(layout: str, tmp_path: Path) -> None:
    name = "timm-nf-resnet-26" if layout == "timm" else None
    config = nfzoo.variant(name).config.replace(num_classes=5) if name else SMALL["nfnet"]
    net = NFNet(config, name=name).eval()
    net.load_state_dict(random_params(config))
    folder: Any = net.save_pretrained(tmp_path / "model")
    if layout == "timm":
        folder = write_timm(tmp_path / "timm", net.description, net.state_dict())
    source = folder / "model.safetensors" if layout == "file" else folder
    x = images(config.replace(in_channels=1), height=64)
    grey = nfzoo.from_pretrained(source, in_channels=1, num_classes=5)
    assert relative(grey(x), net(x.expand(-1, 3, -1, -1))) < FLOAT32
    assert not grey.training
    assert grey.preprocess(np.zeros((40, 40), np.uint8)).shape[0] == 1
    assert np.allclose(grey.preprocessing.mean, np.mean(net.preprocessing.mean))
    assert torch.equal(nfzoo.from_pretrained(source, in_channels=3)(images(config)), net(images(config)))
    again = NFNet.from_pretrained(grey.save_pretrained(tmp_path / "grey"))
    assert torch.equal(again(x), grey(x))
    assert json.loads((tmp_path / "grey" / "config.json").read_text())["preprocessing"]["mean"] == list(
        grey.preprocessing.mean
    )
    five = nfzoo.from_pretrained(source, in_channels=5, num_classes=2, dtype=torch.bfloat16)
    assert five(images(five.config, height=64).bfloat16()).shape == (2, 2)
    assert five.preprocessing.std == (*net.preprocessing.std, *net.preprocessing.std[:2])


def test_preprocessing_follows() -> None:
    old = Preprocessing(train_size=8, test_size=9, mean=(0.1, 0.2, 0.6), std=(0.2, 0.3, 0.4))
    assert old.adapted(1).mean == pytest.approx((0.3,))
    assert old.adapted(1).std == pytest.approx((0.3,))
    assert old.adapted(4).mean == (0.1, 0.2, 0.6, 0.1)
    assert old.adapted(3) == old


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "1"])
def test_wrong_numbers_are_refused_before_anything_is_read(bad: Any) -> None:
    for call in (nfzoo.from_pretrained, load):
        with pytest.raises(ConfigError, match=r"in_channels must be an integer from 1 on"):
            call("no/such/file", in_channels=bad)


def test_folded_models_are_refused(tmp_path: Path) -> None:
    net = NFNet(SMALL["nfnet"]).eval()
    folder = net.for_inference().save_pretrained(tmp_path / "model")
    assert load(folder, in_channels=3).config.folded
    for call in (nfzoo.from_pretrained, load):
        with pytest.raises(ConfigError, match="adapt the trained model, then fold it"):
            call(folder, in_channels=1)
    grey = model.adapt_input(net.config, dict(net.named_parameters()), 1)
    assert model.fold(*grey)[0].in_channels == 1
    with pytest.raises(ConfigError, match="not those of the configuration"):
        model.adapt_input(net.config, {}, 1)
