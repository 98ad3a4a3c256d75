"""Weight standardisation under transforms and tracers: what torch derives from the formula, and what it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap

from nfzoo import NFNet
from nfzoo.models.weight_standardization import standardize_weight
from tests.support.helpers import SMALL, generator, images, random_params

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # forward derivatives call it too

GAIN = torch.tensor([0.5, 2.0], dtype=torch.float64)


def weight() -> Tensor:
    return torch.randn(2, 2, 1, 2, generator=generator(), dtype=torch.float64)


def formula(w: Tensor) -> Tensor:
    """Compute the standardised kernel by what the paper says, without a floor, as no row here is small."""
    rows = w.flatten(1)
    var, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    return ((rows - mean) * GAIN[:, None] / (var * rows.shape[1]).sqrt()).reshape(w.shape)


def scalar(standardize):
    return lambda w: (standardize(w).sin() * torch.arange(8.0, dtype=torch.float64).view(2, 2, 1, 2)).sum()


def ours(w: Tensor) -> Tensor:
    return standardize_weight(w, GAIN)


@pytest.mark.parametrize(
    "second",
    [
        hessian,
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(jacrev(f)),
        lambda f: functionalize(hessian(f)),
        lambda f: jacrev(functionalize(jacrev(f))),
    ],
    ids=["hessian", "ff", "rf", "fr", "rr", "functionalized", "functionalized within"],
)
def test_second_derivatives(second):
    w = weight()
    torch.testing.assert_close(second(scalar(ours))(w), second(scalar(formula))(w), rtol=1e-9, atol=1e-11)


def test_a_batch_of_second_derivatives_along_directions():
    def along(f):
        return vmap(grad(lambda w, v: jvp(f, (w,), (v,))[1]), in_dims=(None, 0))

    w, directions = weight(), torch.eye(8, dtype=torch.float64).view(8, 2, 2, 1, 2)
    made, wanted = (along(scalar(f))(w, directions) for f in (ours, formula))
    torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-11)


def test_third_derivatives():
    w = weight()
    third = jacfwd(jacfwd(jacfwd(scalar(ours))))(w)
    torch.testing.assert_close(third, jacfwd(jacfwd(jacfwd(scalar(formula))))(w), rtol=1e-8, atol=1e-10)


def test_functionalized():
    assert torch.equal(functionalize(ours)(weight()), ours(weight()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SMALL)
def test_a_traced_model_is_saved_and_loaded(name: str, tmp_path: Path):
    model = NFNet(SMALL[name])
    model.load_state_dict(random_params(model.config))
    model.eval()
    x = images(model.config, 2)
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, x)
        traced.save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        torch.testing.assert_close(loaded(x), model(x))
        torch.testing.assert_close(loaded(x[:1]), model(x[:1]))
