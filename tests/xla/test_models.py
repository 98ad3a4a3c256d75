"""The pure functions on XLA: what the CPU computes, also through the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch_xla  # pyright: ignore[reportMissingImports]
import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.func import grad, jvp, vmap

from nfzoo import model
from nfzoo.models.functional import global_mean, standardize_weight
from nfzoo.runtime.device import backend
from nfzoo.step import cross_entropy
from nfzoo.types import Noise
from tests.support.helpers import FAMILIES, SMALL, generator, images, random_params, relative

LOGITS = 1e-5  # of logits around 1: float32, summed in another order
GRADIENT = 1e-4  # relative, of each parameter; of a scalar it is what a sum over the whole image leaves
BFLOAT16 = 0.05  # relative: three significant digits through a dozen layers
LABELS = torch.tensor([0, 3])


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in tensors.items()}


@pytest.mark.parametrize("name", SMALL)
def test_logits(name: str, device: torch.device) -> None:
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg, height=32, width=40)
    expected = model.apply(cfg, params, x)
    logits = model.apply(cfg, moved(params, device), x.to(device)).cpu()
    assert (logits - expected).abs().max() < LOGITS
    assert expected.abs().max() > 0.1


def test_dense_output(device: torch.device) -> None:
    cfg = SMALL["nfnet"].replace(output_stride=8)
    params, x = random_params(cfg), images(cfg, height=36)
    logits = model.apply(cfg, moved(params, device), x.to(device)).cpu()
    assert (logits - model.apply(cfg, params, x)).abs().max() < LOGITS


@pytest.mark.parametrize("name", [*FAMILIES, "nfnet-timm-eca"])
def test_the_gradient_of_every_parameter(name: str, device: torch.device) -> None:
    cfg = SMALL[name].replace(drop_rate=0.3, stochastic_depth=0.5)
    params, x = random_params(cfg), images(cfg)
    noise = model.sample_noise(cfg, 2, generator=generator(3))

    def loss(params: Mapping[str, Tensor], x: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        return cross_entropy(model.apply(cfg, params, x, noise), labels, 0.1)

    expected = grad(loss)(params, x, LABELS, noise)
    found = grad(loss)(moved(params, device), x.to(device), LABELS.to(device), moved(noise, device))
    torch_xla.sync()
    for key, value in expected.items():
        assert value.abs().max() > 0, key
        assert relative(found[key].cpu(), value) < GRADIENT, key
    assert any("skip_gain" in key for key in expected) == cfg.rule.skip_gain


def test_gradients_of_each_image_and_along_a_direction(device: torch.device) -> None:
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg)
    direction = random_params(cfg, seed=7)

    def loss(params: Mapping[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(model.apply(cfg, params, x[None]), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    expected = each(params, x, LABELS)
    found = each(moved(params, device), x.to(device), LABELS.to(device))
    torch_xla.sync()
    for key, value in expected.items():
        assert relative(found[key].cpu(), value) < GRADIENT, key

    expected = jvp(lambda p: model.apply(cfg, p, x), (params,), (direction,))[1]
    x = x.to(device)
    found = jvp(lambda p: model.apply(cfg, p, x), (moved(params, device),), (moved(direction, device),))[1]
    assert relative(found.cpu(), expected) < GRADIENT


def test_mixed_precision(device: torch.device) -> None:
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg)
    leaves = {name: p.to(device).requires_grad_() for name, p in params.items()}
    with backend(device).autocast(torch.bfloat16):
        logits = model.apply(cfg, leaves, x.to(device))
    assert logits.dtype == torch.bfloat16
    assert 0 < relative(logits.float().cpu(), model.apply(cfg, params, x)) < BFLOAT16
    cross_entropy(logits, LABELS.to(device)).backward()
    torch_xla.sync()
    assert all(
        p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in leaves.values()
    )


def test_what_mixed_precision_keeps_in_float32(device: torch.device) -> None:
    weight = (1 + 1e-3 * torch.randn((8, 4, 3, 3), generator=generator())).bfloat16()
    gain, x = torch.ones(8), (256 + torch.rand((2, 8, 16, 16), generator=generator())).bfloat16()
    with backend(device).autocast(torch.bfloat16):
        found = standardize_weight(weight.to(device), gain.to(device)), global_mean(x.to(device))
        programs = [xm.get_stablehlo([t]) for t in found]
    # Mean and variance of the kernel, and the mean over pixels, of which bfloat16 would keep nothing.
    for program in programs:
        sums = [line for line in program.splitlines() if "stablehlo.reduce(" in line]
        assert sums
        assert all("xf32>" in line and "bf16" not in line for line in sums)
    assert torch.equal(found[0].cpu(), standardize_weight(weight, gain))
    assert torch.equal(found[1].cpu(), global_mean(x))


def test_activation_checkpointing(device: torch.device) -> None:
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), images(cfg)
    found = []
    for checkpointed in (False, True):
        leaves = {name: p.to(device).requires_grad_() for name, p in params.items()}
        out = x.to(device)  # asks for no gradient itself, which must not cost the first block's its own
        for block in model.plan(cfg):
            local = model.block_params(block, leaves)
            if checkpointed:
                out = backend(device).checkpoint(lambda x, b=block, p=local: b.fn(p, x, b.beta, None), out)
            else:
                out = block.fn(local, out, block.beta, None)
        cross_entropy(out, LABELS.to(device)).backward()
        torch_xla.sync()
        found.append({name: p.grad.cpu() for name, p in leaves.items() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() == params.keys()
    for key in plain:
        assert relative(recomputed[key], plain[key]) < GRADIENT, key


def test_reductions_over_no_dimension_do_nothing_here(device: torch.device) -> None:
    """Why no module writes `dim=[]`, and why exported sums are checked: torch on the CPU reduces over all of them."""
    x = torch.arange(6.0).reshape(2, 3)
    assert x.sum(dim=[]).shape == ()
    assert x.to(device).sum(dim=[]).cpu().shape == (2, 3)
    assert x.to(device).sum().cpu() == x.sum()
    for factor in (torch.tensor(0.5), torch.tensor([0.5])):
        leaf = factor.to(device).requires_grad_()
        (x.to(device) * leaf.reshape(())).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.cpu() == x.sum()
