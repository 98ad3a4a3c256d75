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

from nfzoo import AGCSGD, NFNet, agc_, param_groups
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
    "compiled": lambda: torch.compile(network()),
    "compiled-ddp": lambda: torch.compile(DistributedDataParallel(network())),
    "ddp-compiled": lambda: DistributedDataParallel(torch.compile(network())),
    "averaged": lambda: AveragedModel(network()),
    "averaged-compiled": lambda: AveragedModel(torch.compile(network())),
    "fsdp2": lambda: fully_shard(network()),
    "fsdp2-parts": lambda: fully_shard(with_head(fully_shard)),
    "sequence": lambda: nn.Sequential(network(), nn.Flatten()),
    "backbone": lambda: Detector(network()),
    "two": lambda: Detector(network(), network()),
    "backbone-ddp": lambda: DistributedDataParallel(Detector(network())),
    "subclass": lambda: type("Mine", (NFNet,), {})(SMALL["nfnet"]),
    "compiled-head": lambda: with_head(torch.compile),
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
@pytest.mark.parametrize("wrap", [torch.compile, Detector, DataParallel], ids=["compiled", "backbone", "data-parallel"])
def test_a_folded_model_is_refused_inside_too(call, wrap) -> None:
    with pytest.raises(ConfigError, match="folded for inference"):
        call(wrap(network().for_inference()))


@pytest.mark.filterwarnings("ignore")  # of torch, about one process
@pytest.mark.parametrize("call", [agc_, param_groups])
@pytest.mark.usefixtures("process_group")
def test_flattened_parameters_are_refused(call) -> None:
    with pytest.raises(ValueError, match="fully_shard"):
        call(FullyShardedDataParallel(network(), device_id=torch.device("cpu")))
