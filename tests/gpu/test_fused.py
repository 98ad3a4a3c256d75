"""The update of all parameters in a few kernels: the formulas' numbers, and kernels that a GPU's compiler takes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nfzoo import AGCSGD, NFNet, param_groups
from nfzoo.model import specs
from nfzoo.optim import agc_sgd as adapter
from nfzoo.optim.clipping import unit_shape
from nfzoo.optim.counting import KindCounter
from nfzoo.optim.triton_update import LONGEST, FusedUpdate
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, random_params
from tests.support.helpers import relative as relative_on_cpu

# The interpreter reads numbers out of arrays of one element, which numpy will not like one day.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

EXACT = 1e-6  # the same operations on float32, sums in another order


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Without a GPU let the CPU, on whose memory the interpreter works, stand for one."""
    monkeypatch.setattr(adapter, "has_fused", lambda device: True)


def relative(a: Tensor, b: Tensor) -> float:
    return relative_on_cpu(a.detach().cpu(), b.detach().cpu())


def shell(seed: int = 0) -> NFNet:
    made = NFNet(SMALL["nfnet"])
    made.load_state_dict(random_params(made.config, seed))
    return made.to(DEVICE)


def pair(**options: Any) -> list[tuple[NFNet, AGCSGD]]:
    """Equal models with the eager and the fused optimizer."""
    models = [shell(), shell()]
    return [
        (m, AGCSGD(param_groups(m, weight_decay=1e-2, clip=0.1), lr=0.1, compiled=i > 0, **options))
        for i, m in enumerate(models)
    ]


def give_gradients(models: list[NFNet], step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        value = torch.randn(parameters[0].shape, generator=g) * 10 ** float(torch.randint(-4, 1, (), generator=g))
        for p in parameters:
            p.grad = value.clone().to(p.device, memory_format=layout(p))


def layout(p: Tensor) -> torch.memory_format:
    return torch.contiguous_format if p.is_contiguous() else torch.channels_last


def count_fused(monkeypatch) -> list[int]:
    """How many parameters each call of the fused update takes."""
    seen: list[int] = []
    plain = FusedUpdate.__call__

    def call(self: FusedUpdate, params: Any, *args: Any, **options: Any) -> Any:
        seen.append(len(params))
        return plain(self, params, *args, **options)

    monkeypatch.setattr(FusedUpdate, "__call__", call)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9},
        {"nesterov": False},
        {"momentum": 0.0, "ema_decay": 0.99},
    ],
    ids=lambda o: "-".join(o),
)
def test_it_is_the_eager_update(monkeypatch, options):
    seen = count_fused(monkeypatch)
    (plain, eager), (model, fused) = pair(**options)
    for network, optimizer in ((plain, eager), (model, fused)):
        kinds: dict[torch.Tensor, int] = {p: i % 3 for i, p in enumerate(network.parameters())}
        optimizer.count_kinds = KindCounter(kinds, {p: unit_shape(p.shape)[0] for p in kinds})
    for step in range(3):
        give_gradients([plain, model], step)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        eager.step()
        fused.step()
        assert fused.clipped_fraction == eager.clipped_fraction
        assert 0 < float(eager.clipped_fraction if eager.clipped_fraction is not None else 0) < 1
        assert eager.clipped_kinds is not None
        assert fused.clipped_kinds is not None
        assert fused.clipped_kinds.tolist() == eager.clipped_kinds.tolist()
        assert all(
            p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)
        )
    assert sum(seen) == 3 * len(list(model.parameters()))  # none was left to the eager form
    compare(plain, eager, model, fused)


def compare(plain: NFNet, eager: AGCSGD, model: NFNet, fused: AGCSGD) -> None:
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert relative(q, p) < EXACT, name
        assert set(eager.state[p]) == set(fused.state[q])
        for key, value in eager.state[p].items():
            assert relative(fused.state[q][key], value) < EXACT, (name, key)


def test_channels_last_weights(monkeypatch):
    seen = count_fused(monkeypatch)
    models = [shell(), shell().to(memory_format=torch.channels_last)]  # pyright: ignore[reportCallIssue]
    assert not all(p.is_contiguous() for p in models[1].parameters())
    optimizers = [AGCSGD(param_groups(m), lr=0.1, ema_decay=0.9, compiled=i > 0) for i, m in enumerate(models)]
    for step in range(2):
        give_gradients(models, step)
        for optimizer in optimizers:
            optimizer.step()
    assert sum(seen) == 2 * len(list(models[1].parameters()))
    compare(models[0], optimizers[0], models[1], optimizers[1])


def test_what_it_does_not_take_is_updated_all_the_same(monkeypatch):
    seen = count_fused(monkeypatch)
    values = [torch.randn(8, 4).t(), torch.randn(8, 4), torch.empty(0, 3), torch.randn(6, 5, dtype=torch.float64)]
    params = [torch.nn.Parameter(value.to(DEVICE)) for value in values]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    AGCSGD(params, lr=0.1, compiled=True).step()
    AGCSGD(twins, lr=0.1).step()
    assert seen == [1]
    for p, q in zip(params, twins, strict=True):
        assert p.numel() == 0 or relative(p, q) < EXACT


def test_a_closed_gate_keeps_everything_as_it_is():
    (_, _), (model, fused) = pair(ema_decay=0.9)
    give_gradients([model], 0)
    fused.step()
    kept = copy.deepcopy((model.state_dict(), [dict(fused.state[p]) for p in model.parameters()]))
    give_gradients([model], 1)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(float("nan"))
    fused.gate = torch.tensor(False, device=DEVICE)
    fused.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[0][key]), key
    for p, state in zip(model.parameters(), kept[1], strict=True):
        assert all(torch.equal(fused.state[p][key], value) for key, value in state.items())
    fused.gate = torch.tensor(True, device=DEVICE)
    give_gradients([model], 2)
    fused.step()
    assert not torch.equal(model.state_dict()["head.bias"], kept[0]["head.bias"])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 144, LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST + 5])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_rows_of_any_length(length, clip):
    g = torch.Generator().manual_seed(length)
    p = [torch.randn(n, length, generator=g) for n in (1, 67 if length < 200 else 3)] + [
        torch.randn(length, generator=g)
    ]
    grads = [torch.randn(t.shape, generator=g) * torch.rand(len(t), *[1] * (t.ndim - 1), generator=g) for t in p]
    results = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(t.to(DEVICE, copy=True)) for t in p]
        for q, grad in zip(params, grads, strict=True):
            q.grad = grad.to(DEVICE, copy=True)
        optimizer = AGCSGD(params, lr=torch.tensor(0.3, device=DEVICE), clip=clip, compiled=compiled)
        optimizer.step()
        results.append((params, optimizer.clipped_fraction))
    assert results[0][1] == results[1][1]
    for q, r in zip(results[0][0], results[1][0], strict=True):
        assert relative(r, q) < EXACT


def test_other_gradient_tensors_in_every_step_and_a_copied_optimizer():
    (plain, eager), (model, fused) = pair(ema_decay=0.9)
    for step in range(2):
        for m in (plain, model):
            m.zero_grad(set_to_none=True)
        give_gradients([plain, model], step)
        eager.step()
        fused.step()
    again = AGCSGD(param_groups(model, weight_decay=1e-2, clip=0.1), lr=0.1, compiled=True, ema_decay=0.9)
    again.load_state_dict(copy.deepcopy(fused.state_dict()))
    give_gradients([plain, model], 2)
    eager.step()
    again.step()
    compare(plain, eager, model, again)


def test_gradients_at_odd_addresses_and_now_and_then():
    """As views into a bucket, of which some come in some steps alone."""
    (plain, eager), (model, fused) = pair(ema_decay=0.9)
    for step in range(4):
        give_gradients([plain, model], step)
        for i, (p, q) in enumerate(zip(plain.parameters(), model.parameters(), strict=True)):
            assert q.grad is not None
            if i % 5 == step:
                p.grad = q.grad = None
            elif q.is_contiguous():
                bucket = torch.zeros(q.numel() + 1, device=q.device)
                bucket[1:] = q.grad.flatten()
                q.grad = bucket[1:].view(q.shape)
        eager.step()
        fused.step()
    assert len(fused._fused) > 4
    compare(plain, eager, model, fused)


def test_autograd_notices_the_update():
    model = shell()
    optimizer = AGCSGD(param_groups(model), lr=0.1, compiled=True, ema_decay=0.9)
    loss = model(torch.randn(1, 3, 32, 32).to(DEVICE), {}).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["nfnet-f0", "nfnet-f6"])
def test_the_number_of_launches_does_not_grow_with_depth(name):
    shapes = [shape for shape, kind in specs(VARIANTS[name].config).values() if kind != "head"]
    launches = FusedUpdate([torch.empty(shape, device="meta") for shape in shapes])._launches
    assert len(launches) <= 12
    assert sum(launch.tiles.shape[0] for launch in launches if not launch.aligned) < 200


@pytest.mark.parametrize("capability", [80, 90])
def test_a_gpu_compiler_takes_it(capability):
    """Compiled as a GPU would: loads of 16 bytes, and nothing spilled from registers."""
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert kernel["spilled"] == 0, kernel
        assert (kernel["wide_loads"] > 0) == kernel["aligned"], kernel


def test_parameters_of_one_unit(monkeypatch):
    """Linears and kernels of fan-in 1 are vectors to AGC."""
    seen = count_fused(monkeypatch)
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=g) for shape in ((6, 1), (40, 1, 1, 1), (1, 1, 3), (1, 7), (5,), (5, 2))]
    lists = [[torch.nn.Parameter(value.to(DEVICE, copy=True)) for value in values] for _ in range(2)]
    optimizers = [AGCSGD(parameters, lr=0.1, clip=0.5, compiled=i > 0) for i, parameters in enumerate(lists)]
    for p, q in zip(*lists, strict=True):
        p.grad = torch.randn(p.shape, generator=g).to(DEVICE)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert seen == [len(values)]
    assert FusedUpdate(lists[1]).units == 10  # five of (5, 2), and one of each other
    assert optimizers[0].clipped_fraction == optimizers[1].clipped_fraction
    for p, q in zip(*lists, strict=True):
        assert relative(q, p) < EXACT, p.shape
