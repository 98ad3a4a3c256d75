"""Against the numbers of other people's code: DeepMind's (JAX) and timm's. See reference/README.md."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nfzoo import AGCSGD, ModelConfig, NFNet, NFNetConfig, model, param_groups
from nfzoo.analysis.signal_propagation import signal_metrics
from nfzoo.checkpoint.model_folder import Description
from nfzoo.config import RULES
from nfzoo.conversion.haiku import haiku_names
from nfzoo.conversion.timm import from_timm, timm_names
from nfzoo.optim.sgd import ema
from nfzoo.step import StepConfig, cross_entropy, init_state, train_step
from nfzoo.types import Params
from nfzoo.variants import VARIANTS
from tests.reference.refweights import unit_noise
from tests.support.helpers import (
    REFERENCE_MODELS,
    TIMM,
    reference_array,
    reference_input,
    reference_params,
    relative,
    timm_golden,
)

LOGITS = 1e-5  # float32 in two frameworks agrees to 1e-6 here; timm's rounding against float64 is 1e-6 as well
WRONG_RULES = 1e-4  # the smallest mistake, exact GELU for its tanh form, moves the logits by 1.8e-4
SIGNAL = 5e-6  # float32 averages over up to 10⁶ terms in another order: 7e-7 was measured
LOSS = 1e-4  # absolute, after up to two steps
# A skip gain is one number whose gradient is a sum of 10⁵ terms that cancel: it keeps three digits, the others six.
WORST_PARAMETER = 5e-4
MEDIAN_PARAMETER = 1e-5
TRAJECTORY = "traj_nfnet_F0_64x64_1000"
LABELS = torch.tensor([3, 7])
LR = 0.1
F0 = REFERENCE_MODELS["nfnet_F0"]


# ---------------------------------------------------------------- DeepMind, forward


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("nfnet_F0", 64, 64), ("nfnet_F0", 75, 53), ("nf_resnet_ResNet50", 64, 64), ("nf_regnet_B0", 64, 64)],
)
def test_deepminds_logits(name, height, width):
    cfg, params, x = REFERENCE_MODELS[name], reference_params(name), reference_input(height, width)
    golden = reference_array(f"{name}_{height}x{width}_1000")
    with torch.no_grad():
        pool = model.embed(cfg, params, x)
        logits = model.apply(cfg, params, x)
    assert relative(pool, golden["pool"]) < LOGITS
    assert relative(logits, golden["logits"]) < LOGITS


@pytest.mark.parametrize("change", [{"activation": "gelu"}, {"alpha": 0.21}, {"attention": "none"}])
def test_the_comparison_notices_small_mistakes(change):
    params, x = reference_params("nfnet_F0"), reference_input(64, 64)
    with torch.no_grad():
        logits = model.apply(F0.replace(**change), params, x)
    assert relative(logits, reference_array("nfnet_F0_64x64_1000")["logits"]) > WRONG_RULES


def test_deepminds_signal_metrics():
    golden = reference_array("signal_nfnet_F0_64x64_1000")
    rows = signal_metrics(F0, reference_params("nfnet_F0"), reference_input(64, 64))
    assert [row.name for row in rows] == ["stem.conv3", *(b.name for b in model.plan(F0) if b.branches is not None)]
    assert rows[0].res_avg_var is None
    for key in golden:
        values = [value for row in rows if (value := getattr(row, key)) is not None]
        np.testing.assert_allclose(np.array([float(v) for v in values]), golden[key], rtol=SIGNAL, atol=0)


# ---------------------------------------------------------------- DeepMind, three training steps


class Trajectory(NamedTuple):
    start: Params
    grads: Params
    losses: list[float]
    after: dict[int, Params]
    average: Params


def pure_trajectory() -> Trajectory:
    """Through `train_step`."""
    params, x = reference_params("nfnet_F0"), reference_input(64, 64)
    grads = torch.func.grad(lambda p: cross_entropy(model.apply(F0, p, x), LABELS))(params)
    config = StepConfig(label_smoothing=0.0)
    state = init_state(params, config)
    losses, after = [], {}
    for step in (1, 2, 3):
        state, metrics = train_step(F0, state, (x, LABELS), None, LR, config=config)
        losses.append(metrics.loss.item())
        after[step] = state.params
    assert state.ema is not None
    assert state.step == 3
    return Trajectory(params, grads, losses, after, state.ema)


def shell_trajectory() -> Trajectory:
    """Through the module, autograd and the torch optimizer."""
    start, x = reference_params("nfnet_F0"), reference_input(64, 64)
    shell = NFNet.from_params(Description(F0, VARIANTS["nfnet-f0"].preprocessing), reference_params("nfnet_F0")).eval()
    optimizer = AGCSGD(param_groups(shell), lr=LR)
    average = {k: v.clone() for k, v in start.items()}
    losses, after, grads = [], {}, {}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss = cross_entropy(shell(x), LABELS)
        loss.backward()
        if step == 1:
            grads = {k: p.grad.clone() for k, p in shell.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
        now = {k: p.detach().clone() for k, p in shell.named_parameters()}
        average = ema(average, now, step - 1)
        after[step] = now
    return Trajectory(start, grads, losses, after, average)


@pytest.fixture(
    scope="module",
    params=[pure_trajectory, pytest.param(shell_trajectory, marks=pytest.mark.slow)],
    ids=["train_step", "AGCSGD"],
)
def trajectory(request: pytest.FixtureRequest) -> Trajectory:
    return request.param()


GOLDEN = reference_array(TRAJECTORY)
_KEY = {name: key for key, name in haiku_names(F0).items()}
KEYS = [_KEY[tuple(name.split(":"))] for name in GOLDEN["names"]]


def assert_norms(a: Params, b: Params | None, golden: np.ndarray) -> None:
    norms = [(a[k].double() - (b[k].double() if b else 0)).norm().item() for k in KEYS]
    errors = np.abs(np.array(norms) - golden) / np.abs(golden)
    worst = int(errors.argmax())
    assert errors[worst] < WORST_PARAMETER, (KEYS[worst], errors[worst])
    assert np.median(errors) < MEDIAN_PARAMETER


def firsts(params: Params) -> np.ndarray:
    """The first element of each, which no transposition of kernels moves."""
    return np.array([params[k].flatten()[0].item() for k in KEYS])


def test_the_trajectory_has_every_parameter():
    assert sorted(KEYS) == sorted(model.specs(F0))


def test_losses(trajectory):
    np.testing.assert_allclose(trajectory.losses, GOLDEN["losses"], rtol=0, atol=LOSS)


def test_gradients(trajectory):
    assert_norms(trajectory.grads, None, GOLDEN["grad_norm"])
    # One element of a gradient may be a small difference of large terms: its error is measured against its tensor's
    # root mean square.
    sizes = np.array([trajectory.grads[k].numel() for k in KEYS])
    scale = np.abs(GOLDEN["grad_first"]) + GOLDEN["grad_norm"] / np.sqrt(sizes)
    errors = np.abs(firsts(trajectory.grads) - GOLDEN["grad_first"]) / scale
    assert errors.max() < WORST_PARAMETER
    assert np.median(errors) < MEDIAN_PARAMETER


@pytest.mark.parametrize("steps", [1, 3])
def test_parameters_after(trajectory, steps):
    after = trajectory.after[steps]
    golden = GOLDEN[f"delta_norm_{steps}"]
    assert_norms(after, trajectory.start, golden)
    # First elements: the error of the change, against the root mean square change of the tensor, plus what float32
    # keeps of the value itself.
    sizes = np.array([after[k].numel() for k in KEYS])
    expected = GOLDEN[f"param_first_{steps}"]
    scale = np.abs(expected - firsts(trajectory.start)) + golden / np.sqrt(sizes)
    errors = np.abs(firsts(after) - expected)
    assert (errors < WORST_PARAMETER * scale + np.finfo(np.float32).eps * np.abs(expected)).all()


def test_average_after_three(trajectory):
    assert_norms(trajectory.average, trajectory.start, GOLDEN["ema_delta_norm"])


# ---------------------------------------------------------------- timm


def timm_state(cfg: ModelConfig) -> dict[str, Tensor]:
    """The weights that make_timm_golden.py gave timm, from names and shapes alone."""
    state = {}
    shell = {timm_names(cfg)[key]: shape for key, (shape, _) in model.specs(cfg).items()}
    for name, shape in shell.items():
        if name.endswith("skipinit_gain"):
            value = 0.5 + 0.2 * unit_noise((), name)
            shape = ()
        elif name.endswith("gain"):
            value = 1.0 + 0.1 * unit_noise(shape, name)
            shape = (*shape, 1, 1, 1)
        elif name.endswith("weight"):
            fan_in = int(np.prod(shape[1:]))
            value = 0.02 / fan_in**0.5 + unit_noise(shape, name) / fan_in**0.5
            shape = (*shape, 1, 1) if ".attn" in name and len(shape) == 2 else shape
        else:
            value = 0.1 * unit_noise(shape, name)
        state[name] = torch.from_numpy(np.asarray(value, np.float32).reshape(shape))
    return state


# timm's own test model, which the zoo has no row for; its form says what the rules do far from the other models.
TIMM_TEST = NFNetConfig(
    depths=(1, 1, 1, 1),
    widths=(32, 64, 96, 128),
    rules="timm",
    activation="silu",
    bottleneck=0.25,
    group_width=8,
    se_ratio=0.25,
    head_ratio=1.5,
)
WITH_LOGITS = sorted({key.split(":")[0] for key in reference_array("timm_golden")})


def assert_timms_logits(arch: str, cfg: ModelConfig) -> None:
    params = from_timm(cfg, timm_state(cfg))
    golden = reference_array("timm_golden")
    for height, width in ((64, 64), (75, 53)):
        with torch.no_grad():
            logits = model.apply(cfg, params, reference_input(height, width))
        assert relative(logits, golden[f"{arch}:{height}x{width}"]) < LOGITS


def timm_config(arch: str) -> ModelConfig:
    """The configuration of a network of timm_golden.json under timm's rules."""
    return (TIMM_TEST if arch == "test_nfnet" else VARIANTS[TIMM[arch]].config).replace(num_classes=10)


STRIDED = reference_array("timm_output_strides")


@pytest.mark.parametrize("case", [key.removesuffix(":map") for key in STRIDED if key.endswith(":map")])
def test_timms_output_strides(case):
    arch, stride, size = case.split(":")
    cfg = timm_config(arch).replace(output_stride=int(stride))
    x = reference_input(*map(int, size.split("x")))
    params = from_timm(cfg, timm_state(cfg))
    golden = STRIDED[f"{case}:map"]
    with torch.no_grad():
        features = model.features(cfg, params, x)[-1][0, : len(golden)]
        logits = model.apply(cfg, params, x)
    assert relative(features, golden) < LOGITS
    assert relative(logits, STRIDED[f"{case}:logits"]) < LOGITS


def architectures(deepmind: bool) -> list[Any]:
    """Mark those of more than 35 million parameters as slow, whose rules smaller ones have too."""
    names = [arch for arch in WITH_LOGITS if arch.startswith("dm_") == deepmind]
    counts = {arch: timm_golden()["architectures"][arch]["parameters"]["10"] for arch in names}
    limit = max(35e6, min(counts.values()))
    return [pytest.param(arch, marks=[pytest.mark.slow] * (counts[arch] > limit)) for arch in names]


@pytest.mark.parametrize("arch", architectures(deepmind=False))
def test_timms_logits(arch):
    cfg = timm_config(arch)
    assert model.parameter_count(cfg) == timm_golden()["architectures"][arch]["parameters"]["10"]
    assert_timms_logits(arch, cfg)


@pytest.mark.parametrize("arch", architectures(deepmind=True))
def test_timm_runs_deepminds_weights_under_other_rules(arch, monkeypatch):
    """timm's dm_ models are 2 % off DeepMind's logits, by two rules exactly: with them we compute what it does."""
    rules = dataclasses.replace(RULES["deepmind"], variance_floor=False)
    monkeypatch.setitem(RULES, "deepmind in timm", rules)
    deepmind = VARIANTS[TIMM[arch]].config.replace(num_classes=10)
    assert_timms_logits(arch, deepmind.replace(rules="deepmind in timm", activation="gelu"))
