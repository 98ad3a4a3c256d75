"""AGCSGD, the torch optimizer: groups, state, schedulers, scalers; its arithmetic is that of `nfzoo.optim.sgd.sgd`."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nfzoo import AGCSGD, NFNet, param_groups
from nfzoo.optim.clipping import agc
from nfzoo.optim.sgd import ema, sgd, sgd_init
from nfzoo.runtime.distributed import full_tensor
from tests.support.helpers import SMALL, assert_same, generator, images, random_params, relative
from tests.support.processes import in_processes

FLOAT32 = 1e-6  # the same sums in another order
SHAPES = [(6, 4, 3, 3), (5, 7), (8,), (1,)]


def leaves() -> list[nn.Parameter]:
    g = generator()
    return [nn.Parameter(torch.randn(s, generator=g)) for s in SHAPES]


def give_gradients(parameters, step: int, scale: float = 1.0) -> None:
    g = generator(100 + step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=g)


def norm_of(parameters) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def shell() -> NFNet:
    made = NFNet(SMALL["nfnet"])
    made.load_state_dict(random_params(made.config))
    return made.eval()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_without_clipping_it_is_torchs_sgd(nesterov, weight_decay):
    a, b = leaves(), leaves()
    mine = AGCSGD(a, lr=0.1, clip=None, nesterov=nesterov, weight_decay=weight_decay)
    theirs = torch.optim.SGD(b, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    for step in range(5):
        for parameters, optimizer in ((a, mine), (b, theirs)):
            give_gradients(parameters, step)
            optimizer.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32)
    assert mine.clipped_fraction is None


def test_groups_of_a_model():
    model = shell()
    kinds = model.parameter_kinds()
    groups = param_groups(model, weight_decay=0.5, clip=0.25)
    name_of = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        for p in group["params"]:
            kind = kinds[name_of[id(p)]]
            seen.append(name_of[id(p)])
            assert group["weight_decay"] == (0.5 if kind in ("weight", "head") else 0.0)
            assert group["clip"] == (None if kind == "head" else 0.25)
    assert sorted(seen) == sorted(kinds)
    assert all(g["clip"] is None for g in param_groups(model, clip=None))


def test_frozen_parameters_are_left_out():
    model = shell()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head."))
    groups = param_groups(model)
    assert sorted(p.shape for g in groups for p in g["params"]) == sorted(p.shape for p in model.head.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(images(model.config)).sum().backward()
    AGCSGD(groups, lr=0.1).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def test_clip_is_a_group_option():
    a, b, c = (nn.Parameter(torch.ones(1, 4)) for _ in range(3))
    optimizer = AGCSGD([{"params": [a]}, {"params": [b], "clip": None}, {"params": [c], "clip": 0.5}], lr=1, momentum=0)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, change in ((a, 0.01), (b, 1.0), (c, 0.5)):
        torch.testing.assert_close(p.detach(), torch.full((1, 4), 1 - change))
    assert optimizer.clipped_fraction is not None
    assert optimizer.clipped_fraction.item() == 1.0


def test_clipped_fraction_is_of_units():
    p = nn.Parameter(torch.ones(4, 2))
    optimizer = AGCSGD([p], lr=0.1)
    assert optimizer.clipped_fraction is None
    p.grad = torch.tensor([[1.0], [0.0], [1e-3], [1.0]]).repeat(1, 2)
    optimizer.step()
    assert optimizer.clipped_fraction is not None
    assert optimizer.clipped_fraction.item() == 0.5


@pytest.mark.parametrize("clip", [0.01, None])
def test_the_gradients_are_not_touched(clip):
    parameters = leaves()
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    AGCSGD(parameters, lr=0.1, weight_decay=0.1, clip=clip).step()
    assert same(before, [p.grad for p in parameters])


def test_an_old_state_lacks_options_that_came_later():
    optimizer = AGCSGD(leaves(), lr=0.1)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for name in ("ema_decay", "compiled", "steps"):
            del group[name]
    old = AGCSGD.__new__(AGCSGD)
    old.__setstate__(state)
    parameters = [p for group in old.param_groups for p in group["params"]]
    give_gradients(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    old.step()
    assert not same(before, parameters)
    assert {group["steps"] for group in old.param_groups} == {1}


def test_state_dict_goes_on_bit_for_bit(tmp_path):
    model = shell()
    optimizer = AGCSGD(param_groups(model), lr=0.1)

    def step(m, o, seed):
        o.zero_grad()
        m(images(m.config, seed=seed)).square().mean().backward()
        o.step()

    for seed in range(2):
        step(model, optimizer, seed)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = shell()
    resumed = AGCSGD(param_groups(other, weight_decay=1.0, clip=None), lr=99.0)
    saved = torch.load(tmp_path / "state.pt")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for seed in range(2, 5):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert same(model.parameters(), other.parameters())
    assert not same(model.parameters(), shell().parameters())


def test_deepcopy_goes_on_bit_for_bit():
    parameters = leaves()
    optimizer = AGCSGD(parameters, lr=0.1)
    give_gradients(parameters, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    copies = twin.param_groups[0]["params"]
    for group in (parameters, copies):
        give_gradients(group, 1)
    optimizer.step()
    twin.step()
    assert same(parameters, copies)
    assert parameters[0] is not copies[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=6),
    ],
    ids=["cosine", "one-cycle"],
)
def test_schedulers_move_the_learning_rate(make):
    """As torch's SGD does under the same scheduler; OneCycleLR moves the momentum too."""
    a, b = leaves(), leaves()
    mine = AGCSGD(a, lr=0.1, clip=None)
    theirs = torch.optim.SGD(b, lr=0.1, momentum=0.9, nesterov=True)
    rates = set()
    for step, (parameters, optimizer) in enumerate([(a, mine), (b, theirs)]):
        scheduler = make(optimizer)
        for step in range(5):
            give_gradients(parameters, step)
            optimizer.step()
            scheduler.step()
            rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) == 5  # five different rates, the same for both
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_tensor_learning_rate():
    a, b = leaves(), leaves()
    for parameters, lr in ((a, 0.25), (b, torch.tensor(0.25))):
        give_gradients(parameters, 0)
        AGCSGD(parameters, lr=lr).step()
    assert same(a, b)


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(1))
    optimizer = AGCSGD([p], lr=1.0, clip=None, momentum=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (3 * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
    assert p.item() == pytest.approx(-2)
    assert optimizer.step() is None


def test_under_a_grad_scaler():
    a, b = leaves(), leaves()
    scaled, plain = AGCSGD(a, lr=0.1), AGCSGD(b, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(torch.zeros(()))
        give_gradients(a, step, scaler.get_scale())
        give_gradients(b, step)
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert same(a, b)
    give_gradients(a, 9)
    assert a[0].grad is not None
    a[0].grad[0] = math.inf
    scaler.step(scaled)
    scaler.update()
    assert same(a, b)  # skipped
    assert scaler.get_scale() == 2.0**9


def test_no_gradient_no_step():
    a, b = leaves()[:2]
    optimizer = AGCSGD([a, b], lr=0.1, weight_decay=0.1)
    before = b.detach().clone()
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"lr": -0.1}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"eps": 0.0}, "eps"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_bad_options_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        AGCSGD(leaves(), **{"lr": 0.1, **bad})
    with pytest.raises(ValueError, match=match):  # in a group as well
        AGCSGD([{"params": leaves(), **bad}], lr=0.1)
    optimizer = AGCSGD(leaves(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": leaves(), **bad})
    assert len(optimizer.param_groups) == 1


# ---------------------------------------------------------------- the one update in its several forms


def pure_trajectory(parameters, *, steps: int, lr: float, weight_decay: float, ema_decay: float) -> Any:
    """Parameters and averages after some steps of the pure functions."""
    params = {str(i): p.detach().clone() for i, p in enumerate(parameters)}
    state, average = sgd_init(params), {k: p.clone() for k, p in params.items()}
    for step in range(steps):
        give_gradients(parameters, step)
        grads = agc({str(i): p.grad for i, p in enumerate(parameters)}, params)
        params, state = sgd(params, grads, state, lr=lr, weight_decay=weight_decay)
        average = ema(average, params, step, decay=ema_decay)
    return params, average


# Each session starts g++ for the two shapes of kernels, which takes half a minute.
COMPILED = pytest.param(True, marks=pytest.mark.slow)
FORMS = pytest.mark.parametrize("compiled", [False, COMPILED], ids=["foreach", "compiled"])


@FORMS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_trajectory_of_the_pure_functions(compiled, tensor_lr):
    options: Any = {"weight_decay": 0.01, "ema_decay": 0.9}
    parameters = leaves()
    params, average = pure_trajectory(leaves(), steps=4, lr=0.3, **options)
    lr = torch.tensor(0.3) if tensor_lr else 0.3
    optimizer = AGCSGD(parameters, lr=lr, compiled=compiled, **options)
    for step in range(4):
        give_gradients(parameters, step)
        optimizer.step()
    found = optimizer.averages({str(i): p for i, p in enumerate(parameters)})
    for i, p in enumerate(parameters):
        torch.testing.assert_close(p.detach(), params[str(i)], rtol=FLOAT32, atol=FLOAT32)
        torch.testing.assert_close(found[str(i)], average[str(i)], rtol=FLOAT32, atol=FLOAT32)


@FORMS
def test_units_below_the_floor_of_the_norm_can_move(compiled):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    give_gradients(parameters, 0)
    grads = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
    limited = agc(grads, {name: torch.zeros_like(g) for name, g in grads.items()}, clip=0.5, eps=0.25)
    AGCSGD(parameters, lr=1.0, momentum=0.0, nesterov=False, clip=0.5, eps=0.25, compiled=compiled).step()
    for i, p in enumerate(parameters):
        assert p.detach().abs().max() > 0
        torch.testing.assert_close(p.detach(), -limited[str(i)], rtol=FLOAT32, atol=FLOAT32)


@FORMS
def test_a_shut_gate_changes_nothing_whatever_the_gradients(compiled):
    parameters = leaves()
    optimizer = AGCSGD(parameters, lr=0.3, weight_decay=0.01, ema_decay=0.9, compiled=compiled)
    for step in range(2):
        give_gradients(parameters, step)
        optimizer.gate = norm_of(parameters).isfinite()
        optimizer.step()
    before = copy.deepcopy(parameters)
    states = [copy.deepcopy(dict(optimizer.state[p])) for p in parameters]
    give_gradients(parameters, 2)
    for p, value in zip(parameters, (math.nan, math.inf, -math.inf, math.nan), strict=True):
        assert p.grad is not None
        p.grad.view(-1)[0] = value
    optimizer.gate = norm_of(parameters).isfinite()
    assert not optimizer.gate
    optimizer.step()
    for p, q, state in zip(parameters, before, states, strict=True):
        assert torch.equal(p, q)
        assert same(optimizer.state[p].values(), state.values())
    give_gradients(parameters, 3)
    optimizer.gate = torch.tensor(True)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(parameters, before, strict=False))


@FORMS
def test_an_open_gate_is_no_gate(compiled):
    a, b = leaves(), leaves()
    for parameters, gate in ((a, None), (b, torch.tensor(True))):
        optimizer = AGCSGD(parameters, lr=0.3, weight_decay=0.01, ema_decay=0.9, compiled=compiled)
        optimizer.gate = gate
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32)


def test_the_update_has_few_kernels():
    """Of a deep model's parameters most are vectors; all of them together cost what one kernel costs."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for vectors in (10, 1000):
        parameters = [nn.Parameter(torch.randn(3)) for _ in range(vectors)]
        for p in parameters:
            p.grad = torch.randn(3)
        optimizer = AGCSGD(parameters, lr=0.1, weight_decay=0.1, ema_decay=0.9)
        optimizer.step()
        Count.calls = 0
        with Count():
            optimizer.step()
        counts.append(Count.calls)
    assert counts[0] == counts[1] < 40


# Dynamo takes equal sizes of the first call for one size, and sizes of 0 and 1 for constants.
@pytest.mark.slow
@pytest.mark.parametrize(("first", "graphs"), [((4, 3, 3, 3), 2), ((6, 6), 3)], ids=["general", "square"])
def test_compiled_updates_of_all_shapes_share_a_graph_and_do_not_recompile(first, graphs):
    torch.compiler.reset()
    counters.clear()
    g = generator()
    shapes = [first, (4, 5, 1, 1), (7, 2), (6, 6), (33, 17, 3, 3), (0, 3), (4, 3, 3, 3)]
    parameters = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    optimizer = AGCSGD(parameters, lr=0.1, compiled=True, ema_decay=0.9)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        give_gradients(parameters, step)
        versions = [p._version for p in parameters]
        optimizer.step()
        assert all(p._version > v for p, v in zip(parameters, versions, strict=True))  # autograd may look
    assert counters["stats"]["unique_graphs"] <= graphs


def test_averages_want_a_decay():
    with pytest.raises(ValueError, match="ema_decay"):
        AGCSGD(leaves(), lr=0.1).averages({})


def test_averages_are_saved_and_go_on():
    a, b = leaves(), leaves()
    first = AGCSGD(a, lr=0.1, ema_decay=0.9)
    for step in range(2):
        give_gradients(a, step)
        first.step()
    second = AGCSGD(b, lr=1.0, ema_decay=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    for parameters, optimizer in ((a, first), (b, second)):
        give_gradients(parameters, 2)
        optimizer.step()
    names = [str(i) for i in range(len(a))]
    assert_same(first.averages(dict(zip(names, a, strict=True))), second.averages(dict(zip(names, b, strict=True))))


def _sharded_rank(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = shell()
    for module in model.modules():
        if hasattr(module, "block"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AGCSGD(param_groups(model), lr=0.1, ema_decay=0.9)
    for step in range(3):
        optimizer.zero_grad()
        whole_batch = images(model.config, batch=4, seed=step)
        model(whole_batch[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    named = dict(model.named_parameters())
    found = {k: full_tensor(p).detach() for k, p in named.items()}
    averages = {k: full_tensor(p).detach() for k, p in optimizer.averages(named).items()}
    assert bool(full_tensor(norm_of(named.values())).isfinite())
    if rank == 1:
        broken: Any = named["head.bias"].grad
        broken.to_local()[0] = math.nan
    assert not bool(full_tensor(norm_of(named.values())).isfinite())
    assert optimizer.clipped_fraction is not None
    if rank == 0:
        torch.save((found, averages, optimizer.clipped_fraction), f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_sharded_parameters(tmp_path):
    in_processes(_sharded_rank, (str(tmp_path),), 2, tmp_path, 300)
    found, averages, fraction = torch.load(tmp_path / "result.pt")
    model = shell()
    optimizer = AGCSGD(param_groups(model), lr=0.1, ema_decay=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(images(model.config, batch=4, seed=step)).square().mean().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    assert optimizer.clipped_fraction == fraction
    for key, average in optimizer.averages(named).items():
        assert relative(found[key], named[key]) < FLOAT32, key
        assert relative(averages[key], average) < FLOAT32, key


@pytest.mark.parametrize("gate", [torch.tensor(1.0), torch.tensor([True])], ids=["a number", "a vector"])
def test_a_gate_of_another_kind_is_refused_before_anything_changes(gate):
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = AGCSGD([p], lr=0.1)
    optimizer.gate = gate
    with pytest.raises(ValueError, match="boolean tensor without dimensions"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2, 2))


# ---------------------------------------------------------------- copies, pickles, and states of other origin

COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])


@COPIES
def test_copies_and_pickles_keep_the_gate_and_the_fraction(copied):
    parameters = leaves()
    optimizer = AGCSGD(parameters, lr=0.1, ema_decay=0.9)
    give_gradients(parameters, 0)
    optimizer.step()
    optimizer.gate = torch.tensor(False)
    twin = copied(optimizer)
    assert twin.gate is not None
    assert not twin.gate
    assert twin.clipped_fraction == optimizer.clipped_fraction
    copies = [p for group in twin.param_groups for p in group["params"]]
    give_gradients(copies, 1)
    before = [p.detach().clone() for p in copies]
    twin.step()
    assert same(copies, before)
    twin.gate = None
    twin.step()
    assert not same(copies, before)


@COPIES
def test_copies_without_a_gate_have_none(copied):
    twin = copied(AGCSGD(leaves(), lr=0.1))
    assert twin.gate is None
    assert twin.clipped_fraction is None


OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", "clip", "eps", "ema_decay", "compiled", "steps")


def optimizer_of_groups(parameters, **options: Any) -> AGCSGD:
    """Two groups, of which the second has options of its own."""
    defaults = {"lr": 0.3, "momentum": 0.5, "nesterov": False, "weight_decay": 0.01, "clip": 0.5, "eps": 0.1}
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "clip": None, "weight_decay": 0.0, "steps": 7}]
    return AGCSGD(groups, **{**defaults, "ema_decay": 0.9, **options})


@pytest.mark.parametrize("missing", [*[(name,) for name in OPTIONS], OPTIONS, ("clip", "eps", "ema_decay")])
def test_options_that_a_state_lacks_stay_those_of_the_groups(missing):
    saved = AGCSGD([{"params": leaves()[:2]}, {"params": leaves()[2:]}], lr=0.1).state_dict()
    for group in saved["param_groups"]:
        for name in missing:
            del group[name]
    parameters = leaves()
    optimizer = optimizer_of_groups(parameters)
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, old, new in zip(optimizer.param_groups, before, saved["param_groups"], strict=True):
        for name in OPTIONS:
            assert group[name] == (old[name] if name in missing else new[name]), name
    assert all(name not in saved["param_groups"][0] for name in missing)  # the caller's own
    give_gradients(parameters, 0)
    optimizer.step()


@pytest.mark.parametrize("missing", OPTIONS[1:])
def test_a_pickle_that_lacks_an_option_takes_the_default(missing):
    optimizer = AGCSGD(leaves(), lr=0.1)
    state = optimizer.__getstate__()
    del state["defaults"][missing], state["param_groups"][0][missing]
    old = AGCSGD.__new__(AGCSGD)
    old.__setstate__(state)
    assert old.param_groups[0][missing] == AGCSGD(leaves(), lr=0.1).param_groups[0][missing]
    give_gradients(old.param_groups[0]["params"], 0)
    old.step()


@FORMS
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_goes_on_from_torchs_sgd(compiled, momentum):
    a, b = leaves(), leaves()
    theirs = torch.optim.SGD(a, lr=0.1, momentum=momentum, nesterov=momentum > 0, weight_decay=0.01)
    for step in range(2):
        give_gradients(a, step)
        theirs.step()
    mine = AGCSGD(b, lr=99.0, clip=None, ema_decay=0.5, compiled=compiled)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch does not copy it
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    for step in range(2, 4):
        for parameters, optimizer in ((a, theirs), (b, mine)):
            give_gradients(parameters, step)
            optimizer.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32)
    assert mine.param_groups[0]["steps"] == 2
    again = AGCSGD(leaves(), lr=1.0)
    again.load_state_dict(mine.state_dict())
    assert again.param_groups[0]["ema_decay"] == 0.5


def test_momenta_of_none_are_made_anew():
    """Older versions of torch save them for SGD without momentum."""
    parameters = leaves()
    saved = torch.optim.SGD(parameters, lr=0.1).state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(parameters))}
    optimizer = AGCSGD(parameters, lr=0.1)
    optimizer.load_state_dict(saved)
    give_gradients(parameters, 0)
    optimizer.step()
    assert all(isinstance(optimizer.state[p]["momentum_buffer"], torch.Tensor) for p in parameters)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening.*0.5"),
        (torch.optim.AdamW, "another optimizer"),
        (torch.optim.Adagrad, "another optimizer"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), "another optimizer"),
    ],
    ids=["maximize", "dampening", "adamw", "adagrad", "rmsprop"],
)
def test_a_state_that_would_be_ignored_in_part_is_refused(other, match, stepped):
    parameters = leaves()
    theirs = other(parameters)
    give_gradients(parameters, 0)
    if stepped:
        theirs.step()
    optimizer = AGCSGD(parameters, lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(("name", "bad"), [("clip", 0.0), ("eps", -1.0), ("lr", math.nan), ("ema_decay", 1.0)])
def test_bad_options_of_a_state_are_refused(name, bad):
    saved = AGCSGD(leaves(), lr=0.1).state_dict()
    saved["param_groups"][0][name] = bad
    with pytest.raises(ValueError, match=name):
        AGCSGD(leaves(), lr=0.1).load_state_dict(saved)


def test_a_state_of_other_groups_is_refused_by_torch():
    saved = AGCSGD([{"params": leaves()[:1]}, {"params": leaves()[1:]}], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="parameter groups"):
        AGCSGD(leaves(), lr=0.1).load_state_dict(saved)


def test_named_parameters_keep_their_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = AGCSGD(model.named_parameters(), lr=0.1)
    twin = AGCSGD(copy.deepcopy(model).named_parameters(), lr=0.2)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert twin.param_groups[0]["lr"] == 0.1
