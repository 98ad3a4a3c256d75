"""The modules around a block's function: what is put in their place takes effect."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, prune

from nfzoo import CheckpointError, ConfigError, NFNet, model
from tests.support.helpers import SMALL, generator, images, random_params, relative


def shell() -> NFNet:
    made = NFNet(SMALL["nfnet"])
    made.load_state_dict(random_params(made.config))
    return made.eval()


@pytest.mark.parametrize(
    "path", ["head", "stages", "stages.0", "stages.1.0", "stages.1.1.conv0", "stem", "stages.1.0.se.fc0"]
)
def test_a_module_that_is_replaced_takes_effect(path):
    module, other = shell(), shell()
    other.load_state_dict({name: p + 0.1 for name, p in other.state_dict().items()})
    x = images(module.config)
    module(x)  # what a call finds may not be kept
    for twin in (copy.deepcopy(module), module):
        owner, _, name = path.rpartition(".")
        setattr(twin.get_submodule(owner), name, other.get_submodule(path))
        expected = model.apply(twin.config, dict(twin.named_parameters()), x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.embed(x), model.embed(twin.config, dict(twin.named_parameters()), x))
    assert not torch.equal(module(x), shell()(x))


def l1(holder: nn.Module) -> nn.Module:
    return prune.l1_unstructured(holder, "weight", amount=0.5)


def structured(holder: nn.Module) -> nn.Module:
    return prune.ln_structured(holder, "weight", amount=0.5, n=2, dim=0)


def old_weight_norm(holder: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and used
        return torch.nn.utils.weight_norm(holder)


WEIGHT_TOOLS = {
    "l1": l1,
    "structured": structured,
    "old weight norm": old_weight_norm,
    "old spectral norm": torch.nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("path", ["stages.1.0.conv1", "stages.1.0.se.fc0", "stem.conv1", "head"])
@pytest.mark.parametrize("tool", WEIGHT_TOOLS.values(), ids=list(WEIGHT_TOOLS))
def test_what_computes_a_weight_from_others_runs_in_every_call(tool, path):
    """The weight follows from parameters of the tool's own; a change of those has to reach the output."""
    module = shell()
    x = images(module.config)
    tool(module.get_submodule(path))
    holder = module.get_submodule(path)
    assert "weight" not in holder._parameters
    fresh = [p for name, p in holder.named_parameters() if "weight" in name]
    for _ in range(2):
        logits = module(x)
        params = {name: p for name, p in module.named_parameters() if not name.startswith(f"{path}.")}
        params.update(
            {f"{path}.{name}": getattr(holder, name) for name in ("weight", "bias", "gain") if hasattr(holder, name)}
        )
        assert torch.equal(logits, model.apply(module.config, params, x))
        with torch.no_grad():
            for p in fresh:
                p.add_(0.1 * torch.randn(p.shape, generator=generator()))
        assert not torch.equal(module(x), logits)
    module.zero_grad()
    module(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which Dynamo hides
@pytest.mark.parametrize(
    "form", ["eager", pytest.param("blocks", marks=pytest.mark.slow), pytest.param("whole", marks=pytest.mark.slow)]
)
def test_masks_hold_through_training_and_become_permanent(form):
    module = shell().double()
    convolutions = [m for m in module.modules() if "gain" in m._parameters]
    prune.global_unstructured([(m, "weight") for m in convolutions], prune.L1Unstructured, amount=0.5)
    x = images(module.config).double()
    run = torch.compile(module, backend="eager") if form == "whole" else module
    if form == "blocks":
        module.compile_blocks(backend="eager")
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(x).square().mean().backward()
        assert all((m.weight_orig.grad[m.weight_mask == 0] == 0).all() for m in convolutions)  # type: ignore[index,operator,union-attr]
        optimizer.step()
    module.eval()
    logits = run(x)
    for m in convolutions:
        prune.remove(m, "weight")
    assert torch.equal(run(x), logits)
    assert sum((m.weight == 0).sum().item() for m in convolutions) >= 0.49 * sum(m.weight.numel() for m in convolutions)  # type: ignore[operator,misc]
    expected = model.apply(module.config, dict(module.named_parameters()), x)
    assert relative(module(x), expected) <= (1e-14 if form == "blocks" else 0)  # float64: they have another tanh GELU
    assert relative(module.for_inference()(x), expected) < 1e-5


def test_a_model_that_is_still_pruned_or_parametrized_is_neither_saved_nor_folded(tmp_path):
    for tool in (l1, parametrizations.weight_norm):
        module = shell()
        tool(module.get_submodule("stages.1.0.conv0"))
        with pytest.raises(CheckpointError, match="remove"):
            module.save_pretrained(tmp_path / "m")
        with pytest.raises(ConfigError, match="remove"):
            module.for_inference()


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
    ids=["hook", "pre-hook", "backward", "backward-pre", "forward"],
)
@pytest.mark.parametrize("path", ["stages.1.0.conv0", "stages.1.0.se", "stages.1", "stages", "stem"])
def test_hooks_that_no_call_reaches_are_told_of(register, path):
    module = shell()
    x = images(module.config)
    expected = module(x)
    handle = register(module.get_submodule(path))
    with pytest.warns(UserWarning, match="never called.*as_modules"):
        assert torch.equal(module(x), expected)
    if handle is not None:
        handle.remove()
        module(x)


def test_a_trace_follows_a_weight_that_is_computed_or_is_refused():
    for tool in (l1, torch.nn.utils.spectral_norm):
        module = shell()
        tool(module.get_submodule("stages.1.0.conv1"))
        with pytest.raises(ConfigError, match=r"torch\.fx cannot trace.*prune\.remove"):
            fx.symbolic_trace(module)
    for tool, path in ((parametrizations.weight_norm, "stages.1.0.conv1"), (l1, "stem.conv1")):
        module = shell()
        tool(module.get_submodule(path))
        traced = fx.symbolic_trace(module)
        x = images(module.config)
        before = module(x)
        assert torch.equal(traced(x), before)
        with torch.no_grad():
            for name, p in module.get_submodule(path).named_parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator()) if "weight" in name else 0)
        assert torch.equal(traced(x), module(x))
        assert not torch.equal(traced(x), before)


def test_hooks_on_blocks_are_called():
    module = shell()
    seen = []
    for path in ("stem.conv0", "stages.1.0", "pool", "head"):
        module.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    module(images(module.config))
    assert seen == [(2, 2, 16, 16), (2, 24, 4, 4), (2, 64), (2, 5)]
