"""What AGC, weight decay and their exceptions apply to: wrapped models, models within modules, lists, names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nfzoo import AGCSGD, NFNet, agc_, param_groups, with_agc
from nfzoo.errors import ConfigError
from nfzoo.runtime.distributed import full_tensor
from tests.support.helpers import SMALL, generator


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def network() -> NFNet:
    return NFNet(SMALL["nfnet"], generator=generator())


def compiled(model: Any) -> Any:
    return torch.compile(model)


class Detector(nn.Module):
    """A zoo model as the backbone of another module, with a linear and a norm of its own."""

    def __init__(self, *models: NFNet) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(models)
        self.boxes = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)


def with_head(head: Callable[[Any], Any]) -> NFNet:
    model: Any = network()
    model.head = head(model.head)
    return model


def tied(model: Any) -> nn.Module:
    """A module of which a linear shares the classifier's weight, and comes first."""
    outer = nn.Module()
    outer.first = nn.Linear(*reversed(model.head.weight.shape))
    outer.first.weight = model.head.weight
    outer.model = model
    return outer


WRAPPERS: dict[str, Callable[[], Any]] = {
    "plain": network,
    "ddp": lambda: DistributedDataParallel(network()),
    "data-parallel": lambda: DataParallel(network()),
    "compiled": lambda: compiled(network()),
    "compiled-ddp": lambda: compiled(DistributedDataParallel(network())),
    "ddp-compiled": lambda: DistributedDataParallel(compiled(network())),
    "averaged": lambda: AveragedModel(network()),
    "averaged-compiled": lambda: AveragedModel(compiled(network())),
    "fsdp2": lambda: fully_shard(network()),
    "fsdp2-parts": lambda: fully_shard(with_head(fully_shard)),
    "sequence": lambda: nn.Sequential(network(), nn.Flatten()),
    "backbone": lambda: Detector(network()),
    "two": lambda: Detector(network(), network()),
    "backbone-ddp": lambda: DistributedDataParallel(Detector(network())),
    "subclass": lambda: type("Mine", (NFNet,), {})(SMALL["nfnet"]),
    "compiled-head": lambda: with_head(compiled),
    "checkpointed-head": lambda: with_head(checkpoint_wrapper),
    "replaced-head": lambda: with_head(lambda old: nn.Sequential(nn.Dropout(), nn.Linear(*reversed(old.weight.shape)))),
    "normed-head": lambda: with_head(torch.nn.utils.parametrizations.weight_norm),
    "tied": lambda: tied(network()),
}


def is_head(name: str) -> bool:
    return ".head." in f".{name}" and not name.endswith("bias")


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_the_classifier_of_a_wrapped_model_is_not_clipped(name: str) -> None:
    module = WRAPPERS[name]()
    for p in module.parameters():
        p.grad = torch.full_like(p, 1e3)
    agc_(module)
    kept = {name for name, p in module.named_parameters() if bool((full_tensor(p.grad) == 1e3).all())}
    heads = {name for name, p in module.named_parameters() if p.ndim > 1 and is_head(name)}
    assert kept == ({"first.weight"} if name == "tied" else heads)
    assert kept


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_groups_of_a_wrapped_model(name: str) -> None:
    module = WRAPPERS[name]()
    groups = param_groups(module, weight_decay=0.5, clip=0.25)
    names = {p: key for key, p in module.named_parameters()}
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(names[p] for p in grouped) == sorted(names.values())  # each once
    for group in groups:
        for p in group["params"]:
            head = p.ndim > 1 and (is_head(names[p]) or names[p] == "first.weight")
            assert group["clip"] == (None if head else 0.25), names[p]
            assert group["weight_decay"] == (0.5 if p.ndim > 1 else 0.0), names[p]
            p.grad = torch.ones_like(p)
    AGCSGD(groups, lr=0.1).step()


def test_a_module_without_a_zoo_model_is_clipped_whole() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    for p in module.parameters():
        p.grad = torch.full_like(p, 1e3)
    agc_(module)
    assert all(p.grad is not None and bool((p.grad < 1e3).all()) for p in module.parameters())
    assert [(g["clip"], g["weight_decay"]) for g in param_groups(module)] == [(0.01, 2e-5), (0.01, 0.0)]


def test_frozen_parameters_of_a_wrapped_model_are_left_out() -> None:
    module = Detector(network().requires_grad_(False))
    assert {p for g in param_groups(module) for p in g["params"]} == {
        *module.boxes.parameters(),
        *module.norm.parameters(),
    }


@pytest.mark.parametrize("call", [agc_, param_groups])
@pytest.mark.parametrize("wrap", [compiled, Detector, DataParallel], ids=["compiled", "backbone", "data-parallel"])
def test_a_folded_model_is_refused_inside_too(call, wrap) -> None:
    with pytest.raises(ConfigError, match="folded for inference"):
        call(wrap(network().for_inference()))


@pytest.mark.filterwarnings("ignore")  # of torch, about one process
@pytest.mark.parametrize("call", [agc_, param_groups])
@pytest.mark.usefixtures("process_group")
def test_flattened_parameters_are_refused(call) -> None:
    with pytest.raises(ValueError, match="fully_shard"):
        call(FullyShardedDataParallel(network(), device_id=torch.device("cpu")))


# ---------------------------------------------------------------- tensors, names, and what is excluded


class Classifier(nn.Module):
    """Another library's model, with the gradients of a loss that is far too steep."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        for p in self.parameters():
            p.grad = torch.full_like(p, 1e3)


def clipped(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and bool((p.grad < 1e3).all())}


ALL = {"body.weight", "body.bias", "head.weight", "head.bias"}
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: m,
    "generator": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "twice": lambda m: [*m.parameters(), *m.parameters()],
    "named": lambda m: m.named_parameters(),
    "dict": lambda m: dict(m.named_parameters()),
    "map": lambda m: map(torch.nn.Parameter.requires_grad_, m.parameters()),
    "parameter list": lambda m: nn.ParameterList(m.parameters()),
}
NAMED = ("module", "named", "dict")
EXCLUDED: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda m: m.head.weight,
    "list": lambda m: [m.head.weight],
    "set": lambda m: {m.head.weight},
    "generator": lambda m: (p for p in [m.head.weight]),
    "pairs": lambda m: [("head.weight", m.head.weight)],
    "dict": lambda m: {"head.weight": m.head.weight},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("excluded", EXCLUDED)
def test_parameters_and_exceptions_come_in_many_forms(form: str, excluded: str) -> None:
    model = Classifier()
    agc_(FORMS[form](model), exclude=EXCLUDED[excluded](model))
    assert clipped(model) == ALL - {"head.weight"}
    assert model.head.weight.grad is not None
    assert torch.equal(model.head.weight.grad, torch.full((2, 3), 1e3))


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_clip_the_same(form: str) -> None:
    model, other = Classifier(), Classifier()
    other.load_state_dict(model.state_dict())
    agc_(FORMS[form](model))
    agc_(other)
    assert clipped(model) == ALL
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (), (2, 1), (4, 3, 2, 2)])
def test_a_single_tensor(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.full(shape, 1e3)
    agc_(p)
    assert bool((p.grad <= 0.011).all())


@pytest.mark.parametrize("form", NAMED)
@pytest.mark.parametrize("names", ["head.weight", ["head.weight"], ("head.weight",), {"head.weight": 0}.keys()])
def test_names_are_excluded_where_they_are_known(form: str, names: Any) -> None:
    model = Classifier()
    agc_(FORMS[form](model), exclude=names)
    assert clipped(model) == ALL - {"head.weight"}


def test_a_module_is_excluded_with_all_of_its_parameters() -> None:
    for exclude in ("module", "list"):
        model = Classifier()
        agc_(model.parameters(), exclude=model.head if exclude == "module" else [model.head])
        assert clipped(model) == {"body.weight", "body.bias"}


def test_exceptions_of_several_kinds() -> None:
    model = Classifier()
    agc_(model, exclude=("head.weight", model.body.bias))
    assert clipped(model) == {"body.weight", "head.bias"}


def test_the_other_name_of_a_shared_parameter() -> None:
    model = Classifier()
    model.other = model.head
    agc_(model, exclude="other.weight")
    assert clipped(model) == ALL - {"head.weight"}


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "name of none": (lambda m: (m, "head.weigth"), ValueError, r"'head.weigth', .* 'head.weight'"),
    "name of a module": (lambda m: (m, "head"), ValueError, r"'head', .* 'head.weight' or 'head.bias'"),
    "name in a wrapper": (lambda m: (DataParallel(m), ["head.bias"]), ValueError, "did you mean 'module.head.bias'"),
    "name of tensors": (lambda m: (m.parameters(), "head.weight"), ValueError, "'head.weight'.*named_parameters"),
    "name of a tensor": (lambda m: (m.head.weight, ["head.weight"]), ValueError, "'head.weight'.*no names"),
    "ambiguous name": (
        lambda m: ([*m.named_parameters(), *Classifier().named_parameters()], "head.bias"),
        ValueError,
        "'head.bias', which 2 parameters have",
    ),
    "tensor of another": (lambda m: (m, Classifier().head.weight), ValueError, r"\(2, 3\).*not among"),
    "data": (lambda m: (m, m.head.weight.data), ValueError, r"\(2, 3\).*\.data"),
    "tensor left out": (lambda m: ([m.head.bias], [m.head.weight]), ValueError, r"\(2, 3\).*not among"),
    "module of another": (lambda m: (m, nn.Linear(7, 5)), ValueError, r"\(5, 7\).*not among"),
    "module of none": (lambda m: (m, [nn.ReLU()]), ValueError, "ReLU without parameters"),
    "nothing": (lambda m: (m, None), TypeError, "exclude.*None"),
    "number": (lambda m: (m, [3]), TypeError, r"exclude.*3 \(int\)"),
    "function": (lambda m: (m, lambda name: True), TypeError, "exclude.*function"),
    "nested": (lambda m: (m, [[m.head.weight]]), TypeError, r"exclude.*\(list\)"),
    "no parameters": (lambda m: (None, ()), TypeError, "parameters.*None"),
    "groups": (lambda m: ([{"params": list(m.parameters())}], ()), TypeError, r"parameters.*\(dict\)"),
    "names as parameters": (lambda m: (["head.weight"], ()), TypeError, r"parameters.*'head.weight' \(str\)"),
    "a name as parameters": (lambda m: ("head.weight", ()), TypeError, r"parameters.*'head.weight' \(str\)"),
    "a pair as parameters": (lambda m: (("head.bias", m.head.bias), ()), TypeError, r"parameters.*'head.bias'"),
    "modules": (lambda m: ([m], ()), TypeError, r"parameters.*\(Classifier\)"),
    "none among parameters": (lambda m: ([m.head.bias, None], ()), TypeError, "parameters.*None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_is_clipped(case: str) -> None:
    model = Classifier()
    build, error, message = REFUSED[case]
    parameters, exclude = build(model)
    with pytest.raises(error, match=message):
        agc_(parameters, exclude=exclude)
    assert not clipped(model)


@pytest.mark.parametrize(("parameters", "exclude"), [(iter(()), ()), ([], iter(())), ((p for p in ()), ())])
def test_an_exhausted_iterator_is_warned_of(parameters, exclude) -> None:
    with pytest.warns(UserWarning, match="exhausted iterator"):
        agc_(parameters, exclude=exclude)


def test_nothing_to_clip_is_no_error() -> None:
    agc_([])
    agc_(nn.ReLU())


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("excluded", [*EXCLUDED, "name", "module"])
def test_with_agc_takes_the_same_exceptions(named: bool, excluded: str) -> None:
    model = Classifier()
    optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.0)
    exclude: Any = {"name": "head.weight", "module": model.head}.get(excluded)
    exclude = EXCLUDED[excluded](model) if exclude is None else exclude
    if excluded == "name" and not named:
        with pytest.raises(ValueError, match=r"'head.weight'.*named_parameters"):
            with_agc(optimizer, exclude=exclude)
        return
    with_agc(optimizer, exclude=exclude).step()
    assert clipped(model) == ALL - ({"head.weight", "head.bias"} if excluded == "module" else {"head.weight"})


@pytest.mark.parametrize(
    "exclude", ["head", torch.ones(2, 3), nn.Linear(7, 5), nn.ReLU(), None, [3], [["head.weight"]]]
)
def test_with_agc_refuses_other_exceptions(exclude: Any) -> None:
    optimizer = torch.optim.SGD(Classifier().named_parameters(), lr=0.0)
    with pytest.raises((ValueError, TypeError), match="exclude"):
        with_agc(optimizer, exclude=exclude)


@pytest.mark.parametrize("model", [nn.Linear(2, 2).parameters(), torch.ones(2), [nn.Linear(2, 2)]])
def test_groups_are_of_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match="needs a module"):
        param_groups(model)


def test_sparse_gradients_are_refused_before_anything_is_clipped() -> None:
    model = Classifier()
    model.table = nn.Embedding(5, 3, sparse=True)
    model.table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"\(5, 3\) is sparse"):
        agc_(model)
    parameters = [p for name, p in model.named_parameters() if name != "table.weight"]
    assert all(p.grad is not None and bool((p.grad == 1e3).all()) for p in parameters)
    agc_(model, exclude="table.weight")
    assert all(p.grad is not None and bool((p.grad < 1e3).all()) for p in parameters)
