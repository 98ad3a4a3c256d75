"""The pure training step: made of the parts that are tested elsewhere, in the papers' order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nfzoo import AGCSGD, NFNet, model, param_groups
from nfzoo.optim.clipping import agc
from nfzoo.optim.sgd import CLIPPED, DECAYED
from nfzoo.step import StepConfig, binary_cross_entropy, cross_entropy, init_state, parameter_kinds, train_step
from tests.support.helpers import FAMILIES, SMALL, assert_same, generator, images, random_params, relative

FLOAT64 = 1e-9  # three steps in float64, summed in another order
COUNTER = 1e-6  # the step counter, and with it the average's decay, is float32
LR = 0.125  # exact in float32, so that a tensor and a number are the same rate
LABELS = torch.tensor([0, 4])


def batch64(name: str):
    cfg = SMALL[name].replace(stochastic_depth=0.5, drop_rate=0.3)
    return cfg, random_params(cfg, dtype=torch.float64), images(cfg).double()


def test_the_defaults_are_the_papers():
    c = StepConfig()
    assert (c.clip, c.agc_eps, c.momentum, c.nesterov, c.weight_decay) == (0.01, 1e-3, 0.9, True, 2e-5)
    assert (c.label_smoothing, c.ema_decay) == (0.1, 0.99999)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("clip", [0.01, None])
def test_the_first_step_by_hand(name, clip):
    cfg, params, x = batch64(name)
    noise = model.sample_noise(cfg, 2, generator=generator(), dtype=torch.float64)
    kinds, lr, wd = parameter_kinds(cfg), 0.3, 0.01
    config = StepConfig(clip=clip, weight_decay=wd)
    state, metrics = train_step(cfg, init_state(params, config), (x, LABELS), noise, lr, config=config)

    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    logits = model.apply(cfg, leaves, x, noise)
    loss = F.cross_entropy(logits, LABELS, label_smoothing=0.1)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    if clip:
        grads = agc(grads, params, clip=clip, where=lambda n: kinds[n] in CLIPPED)
    for key, g in grads.items():
        d = g + wd * params[key] * (kinds[key] in DECAYED)
        torch.testing.assert_close(state.params[key], params[key] - lr * 1.9 * d, rtol=FLOAT64, atol=FLOAT64)
        torch.testing.assert_close(state.sgd.momentum[key], d, rtol=FLOAT64, atol=FLOAT64)
        assert state.ema is not None
        torch.testing.assert_close(
            state.ema[key], 0.1 * params[key] + 0.9 * state.params[key], rtol=COUNTER, atol=COUNTER
        )
    assert state.step == 1
    torch.testing.assert_close(metrics.loss, loss.detach())
    torch.testing.assert_close(metrics.logits, logits.detach())
    assert not metrics.loss.requires_grad


def test_kinds():
    kinds = parameter_kinds(SMALL["nfnet"])
    assert kinds["head.weight"] == "head"
    assert kinds["head.bias"] == kinds["stages.0.0.se.fc0.bias"] == "bias"
    assert kinds["stages.0.0.skip_gain"] == "skip_gain"
    assert kinds["stages.0.0.conv1.gain"] == "gain"
    assert kinds["stages.0.0.se.fc0.weight"] == kinds["stages.0.0.conv1.weight"] == "weight"
    assert [k for k, v in kinds.items() if v == "head"] == ["head.weight"]


def test_a_step_changes_nothing_in_place():
    cfg, params, x = batch64("nfnet")
    before = {k: v.clone() for k, v in params.items()}
    state = init_state(params)
    train_step(cfg, state, (x, LABELS), None, 0.1)
    assert_same(params, before)
    assert state.ema is not None
    assert_same(state.ema, before)
    assert state.step == 0
    assert all(state.ema[k] is not params[k] for k in params)


def test_no_average_is_kept_without_a_decay():
    cfg, params, x = batch64("nf-resnet")
    config = StepConfig(ema_decay=None)
    state, _ = train_step(cfg, init_state(params, config), (x, LABELS), None, 0.1, config=config)
    assert state.ema is None


@pytest.mark.parametrize("name", FAMILIES)
def test_shell_and_optimizer_take_the_same_steps(name):
    cfg, params, x = batch64(name)
    shell = NFNet(cfg)
    shell.load_state_dict(params, assign=True)
    shell.double()
    optimizer = AGCSGD(param_groups(shell, weight_decay=0.01, clip=0.05), lr=LR)
    config = StepConfig(clip=0.05, weight_decay=0.01)
    # Copies: assign=True shared the tensors with the shell, whose optimizer works in place.
    state = init_state({k: v.clone() for k, v in params.items()}, config)
    for step in range(3):
        noise = model.sample_noise(cfg, 2, generator=generator(step), dtype=torch.float64)
        state, metrics = train_step(cfg, state, (x, LABELS), noise, torch.tensor(LR), config=config)
        optimizer.zero_grad()
        loss = cross_entropy(shell(x, noise), LABELS, 0.1)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss.detach(), metrics.loss, rtol=FLOAT64, atol=0)
    for key, p in shell.named_parameters():
        assert relative(p, state.params[key]) < FLOAT64, key


def test_soft_labels_are_labels():
    cfg, params, x = batch64("nf-regnet")
    soft = F.one_hot(LABELS, cfg.num_classes).double()
    a, _ = train_step(cfg, init_state(params), (x, LABELS), None, 0.1)
    b, _ = train_step(cfg, init_state(params), (x, soft), None, 0.1)
    for key in a.params:
        torch.testing.assert_close(a.params[key], b.params[key], rtol=FLOAT64, atol=FLOAT64)


def test_cross_entropy_is_in_float32():
    logits = torch.tensor([[100.0, -100.0]], dtype=torch.bfloat16)
    assert cross_entropy(logits, torch.tensor([1])).dtype == torch.float32
    assert cross_entropy(logits, torch.tensor([1])).item() == 200
    assert cross_entropy(logits.double(), torch.tensor([1])).dtype == torch.float64


def test_training_learns():
    """A fresh network learns to tell two constant images apart."""
    cfg = SMALL["nfnet"]
    state = init_state(model.init(cfg, generator=generator()))
    x = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, 1.0)])
    config = StepConfig(clip=0.1, label_smoothing=0.0)
    losses = []
    for _ in range(30):
        state, metrics = train_step(cfg, state, (x, torch.tensor([0, 1])), None, 0.1, config=config)
        losses.append(metrics.loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_class_weights_are_torchs_for_soft_labels_whatever_the_share_of_the_batch():
    """Torch divides the sum over soft labels by the number of images, and that over hard ones by their weights."""
    logits = torch.randn(12, 5, generator=generator(), dtype=torch.float64)
    labels = torch.arange(12) % 5
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.5])
    soft = torch.rand(12, 5, generator=generator(1), dtype=torch.float64)
    soft = soft / soft.sum(1, keepdim=True)
    for targets, smoothing in ((labels, 0.0), (labels, 0.1), (soft, 0.0), (soft, 0.1)):
        found = cross_entropy(logits, targets, smoothing, weight)
        hot = targets if targets.ndim == 2 else F.one_hot(labels, 5).double()
        golden = F.cross_entropy(logits, hot, weight=weight.double(), label_smoothing=smoothing)
        torch.testing.assert_close(found, golden, rtol=FLOAT64, atol=FLOAT64)
        q = (1 - smoothing) * hot + smoothing / 5
        by_hand = -(weight * q * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(found, by_hand, rtol=FLOAT64, atol=FLOAT64)
        shares = [cross_entropy(logits[i : i + 4], targets[i : i + 4], smoothing, weight) for i in (0, 4, 8)]
        torch.testing.assert_close(found, torch.stack(shares).mean(), rtol=FLOAT64, atol=FLOAT64)
        ones = cross_entropy(logits, targets, smoothing, torch.ones(5))
        torch.testing.assert_close(ones, cross_entropy(logits, targets, smoothing), rtol=FLOAT64, atol=FLOAT64)
    assert cross_entropy(logits.float(), labels, 0.1, weight).dtype == torch.float32


def test_binary_cross_entropy_is_the_formula_and_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, generator=g), (torch.rand(6, 4, generator=g) > 0.6).float()
    targets[0] = torch.tensor([0.3, 0.7, 1.0, 0.0])  # as MixUp makes them
    weight = torch.tensor([0.5, 1.0, 3.0, 9.0])
    p = logits.double().sigmoid()
    for smoothing in (0.0, 0.1):
        q = targets.double() * (1 - smoothing) + smoothing / 4  # timm's: on 1 - s + s / classes, off s / classes
        by_hand = -(weight * q * p.log() + (1 - q) * (1 - p).log()).mean()
        found = binary_cross_entropy(logits, targets, smoothing, weight)
        assert float(found) == pytest.approx(float(by_hand), rel=1e-6)
        # The mean over shares is that of the batch, which torch's own weighting keeps.
        shares = [binary_cross_entropy(logits[i : i + 3], targets[i : i + 3], smoothing, weight) for i in (0, 3)]
        assert float(sum(shares) / 2) == pytest.approx(float(by_hand), rel=1e-6)
    hard = targets[1:].bool()
    torchs = torch.nn.BCEWithLogitsLoss(pos_weight=weight)(logits[1:], hard.float())
    assert torch.equal(binary_cross_entropy(logits[1:], hard, 0.0, weight), torchs)
    assert binary_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32
