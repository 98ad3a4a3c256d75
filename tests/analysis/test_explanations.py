"""Grad-CAM and occlusion, against captum's, a computation by hand, and pictures in which one part matters."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nfzoo import Preprocessing
from nfzoo.analysis import explanations
from nfzoo.analysis.explanations import explain, grad_cam, occlusion, overlay
from nfzoo.cli.main import main
from nfzoo.errors import ConfigError
from nfzoo.model import fold
from nfzoo.nn import NFNet
from tests.support.helpers import FAMILIES, SMALL, images, random_params, relative
from tests.support.loops import each

ROUNDING = 1e-4  # of float32, in another order of sums and with weights standardised elsewhere


@each("name", FAMILIES)
def test_grad_cam_is_captums(name: str) -> None:
    from captum.attr import LayerGradCam

    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg, 3, 96)
    classes = torch.tensor([0, 3, 1])
    found = grad_cam(cfg, params, x, classes)
    assert found.shape == (3, 3, 3)
    model = NFNet(cfg)
    model.load_state_dict(params)
    tree = model.eval().as_modules()
    expected = LayerGradCam(tree, tree.get_submodule("stages.3.0")).attribute(x, classes, relu_attributions=True)
    assert isinstance(expected, Tensor)
    assert 0 < (found > 0).sum() < found.numel()
    assert relative(found, expected[:, 0]) < ROUNDING
    folded = grad_cam(*fold(cfg, params), x, classes)
    assert relative(folded, found) < ROUNDING


def test_grad_cam_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two maps, followed by means and a matrix: alpha is the matrix's row, divided by the number of pixels."""
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 5.0]]]])
    head = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    monkeypatch.setattr(explanations, "feature_blocks", lambda cfg: ["tower"])
    monkeypatch.setattr(explanations, "plan", lambda cfg: ["tower", "head"])
    monkeypatch.setattr(
        explanations, "run_block", lambda block, _, x: maps if block == "tower" else x.mean((2, 3)) @ head.T
    )
    found = grad_cam(SMALL["nfnet"], {}, torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    # (2 A_0 - A_1) / 4, of which nothing is negative but for the last pixel's 8 - 5 = 3, 2 * 2, 2 * 3 and 2 - 1.
    assert found.tolist() == [[[0.25, 1.0], [1.5, 0.75]]]
    maps[0, 1, 1, 1] = 9.0
    assert grad_cam(SMALL["nfnet"], {}, torch.zeros(1, 3, 8, 8), torch.tensor([0]))[0, 1, 1] == 0


def test_occlusion_is_captums() -> None:
    from captum.attr import Occlusion

    cfg = SMALL["nfnet"]
    params, x, classes = random_params(cfg), images(cfg, 2, 40, 48), torch.tensor([1, 4])
    model = NFNet(cfg)
    model.load_state_dict(params)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = Occlusion(model.eval()).attribute(
            x, sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8), target=classes, baselines=0
        )
    assert isinstance(expected, Tensor)
    for batch_size in (5, 64):
        found = occlusion(cfg, params, x, classes, patch=8, stride=8, batch_size=batch_size)
        assert relative(found, expected[:, 0]) < ROUNDING


def test_squares_that_overlap_are_averaged_and_reach_the_edges() -> None:
    cfg = SMALL["nfnet"]
    params, x, classes = random_params(cfg), images(cfg, 1, 32), torch.tensor([2])
    found = occlusion(cfg, params, x, classes, patch=20, stride=8)[0]
    falls = {}
    for top in (0, 8, 12):
        for left in (0, 8, 12):
            covered = x.clone()
            covered[..., top : top + 20, left : left + 20] = 0
            model = NFNet(cfg)
            model.load_state_dict(params)
            with torch.no_grad():
                falls[top, left] = float((model.eval()(x) - model(covered))[0, 2])
    assert found[0, 0] == pytest.approx(falls[0, 0], abs=ROUNDING)
    assert found[31, 31] == pytest.approx(falls[12, 12], abs=ROUNDING)
    assert found[15, 15] == pytest.approx(np.mean(list(falls.values())), abs=ROUNDING)
    assert found[9, 9] == pytest.approx(np.mean([falls[t, s] for t in (0, 8) for s in (0, 8)]), abs=ROUNDING)


def test_maps_reach_from_0_to_1() -> None:
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg, 2, 64)
    for method in explanations.METHODS:
        heat = explain(cfg, params, x, method)
        assert heat.shape == (2, 64, 64)
        assert heat.min() >= 0
        assert heat.amax((1, 2)).tolist() == pytest.approx([1, 1])
    silent = {key: torch.zeros_like(value) if key.startswith("head") else value for key, value in params.items()}
    assert explain(cfg, silent, x, "occlusion").count_nonzero() == 0
    with pytest.raises(ConfigError, match="of 32 x 32 has one pixel, which gradcam cannot tell apart"):
        explain(cfg, params, x[..., :32, :32], "gradcam")
    with pytest.raises(ConfigError, match="gradcam or occlusion, not 'lime'"):
        explain(cfg, params, x, "lime")


def test_the_overlay_is_orange_where_the_heat_is() -> None:
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1.0
    for channels in (1, 3):
        preprocessing = Preprocessing(train_size=8, test_size=8).adapted(channels)
        found = np.asarray(overlay(torch.randn(channels, 8, 8), heat, preprocessing)).astype(int)
        saturation = found.max(2) - found.min(2)
        assert np.argwhere(saturation > 0).tolist() == [[2, 5]]
        assert found[2, 5, 0] > found[2, 5, 1] > found[2, 5, 2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = NFNet(SMALL["nfnet"], preprocessing=Preprocessing(train_size=64, test_size=64))
    model.load_state_dict(random_params(SMALL["nfnet"]))
    folder = model.save_pretrained(tmp_path / "model")
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    command = ["predict", str(folder), str(tmp_path / "photo.png")]
    for method in explanations.METHODS:
        assert main([*command, "--explain", method, "--sheet", str(tmp_path / f"{method}.png")]) == 0
        with Image.open(tmp_path / f"{method}.png") as sheet:
            pixels = np.asarray(sheet.convert("RGB")).astype(int)
        assert ((pixels[..., 0] - pixels[..., 2]) > 60).sum() > 100  # orange, of which a sheet has none otherwise
    assert main([*command, "--explain", "gradcam"]) == 2
    assert "add --sheet PNG" in capsys.readouterr().err
