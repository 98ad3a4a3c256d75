"""Compilation block by block: a graph for each distinct block, whatever the depth, and never eager instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch._dynamo import exc as dynamo_errors
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from nfzoo import AGCSGD, NFNet, model, param_groups
from nfzoo.config import ModelConfig
from nfzoo.models.weight_standardization import standardize_weight
from nfzoo.runtime import compile as compiling
from nfzoo.variants import VARIANTS
from tests.support.helpers import FAMILIES, SMALL, assert_same, generator, images, random_params, relative
from tests.support.processes import in_processes

# Dynamo looks at the gradient of each input. Torch hides the warning that this gives for an activation, but not where
# warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

COMPILED = 1e-4  # inductor's own order of sums and its tanh, through a few dozen layers in float32
EXACT = 1e-6  # the same operations on float32, perhaps in another order
EXACT64 = 1e-12  # the same functions on float64; of the tanh GELU graphs have another form

SHALLOW = SMALL["nfnet"].replace(depths=(1, 1, 1, 1))
SHORT = "nfnet-f1 of two blocks a stage"
DEPTHS = (
    SHORT,
    *(pytest.param(f"nfnet-f{n}", marks=pytest.mark.long) for n in (1, 3)),
    pytest.param("nfnet-f6", marks=pytest.mark.slow),
)
SHAPES = 4 + 2 * 4 - 1 + 3  # stem; per stage a transition and the rest, the last two stages' rest being equal; the end
GRAPHS = SHAPES + 1  # that rest is met at two resolutions


def narrow(name: str) -> ModelConfig:
    """The depths of a variant at a few thousand parameters."""
    depths = (2, 2, 2, 2) if name == SHORT else VARIANTS[name].config.depths
    return VARIANTS["nfnet-f1"].config.replace(
        depths=depths,
        widths=(8, 16, 24, 24),
        group_width=4,
        stem_width=16,
        num_classes=5,
        drop_rate=0.2,
        stochastic_depth=0.1,
    )


def shell(cfg: ModelConfig, seed: int = 0) -> NFNet:
    made = NFNet(cfg)
    made.load_state_dict(random_params(cfg, seed))
    return made


class Counting:
    """A backend that counts the forward and backward graphs it makes and how often they run."""

    def __init__(self) -> None:
        self.forward = self.backward = self.forward_runs = self.backward_runs = 0

        def counted(name: str) -> Callable[..., Any]:
            def compiler(graph: Any, example: Any) -> Any:
                setattr(self, name, getattr(self, name) + 1)

                def run(*args: Any) -> Any:
                    setattr(self, f"{name}_runs", getattr(self, f"{name}_runs") + 1)
                    return graph(*args)

                return make_boxed_func(run)

            return compiler

        self.backend = aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward"))


class CountingEager:
    """Count graphs and runs of a backend that compiles nothing: enough for what concerns no gradient."""

    def __init__(self) -> None:
        self.forward = self.forward_runs = 0

    def backend(self, graph: Any, example: Any) -> Any:
        self.forward += 1

        def run(*args: Any) -> Any:
            self.forward_runs += 1
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def no_graph_break() -> bool:
    return not counters["graph_break"] and not counters["unimplemented"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_inference_has_one_graph_a_distinct_block_at_any_depth(name):
    cfg, count = narrow(name), Counting()
    module = shell(cfg).eval()
    x = images(cfg, height=64)
    expected = module(x)
    module.compile_blocks(backend=count.backend)
    with torch.no_grad():
        for _ in range(2):
            assert relative(module(x), expected) < EXACT
    assert count.forward == counters["stats"]["unique_graphs"] == GRAPHS
    assert count.forward_runs == 2 * len(module.plan)
    assert no_graph_break()


@pytest.fixture
def counting_apart(monkeypatch):
    """A counting backend that has weights standardised apart, as inductor has."""
    count = Counting()
    monkeypatch.setattr(compiling, "STANDARDIZED_APART", {count.backend})
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_training_has_one_more_pair_of_graphs_for_all_weights_at_any_depth(name, counting_apart):
    cfg, count = narrow(name), counting_apart
    module, reference = shell(cfg).double(), shell(cfg).double()
    module.compile_blocks(backend=count.backend)
    for step in range(2):
        for m in (module, reference):
            m.zero_grad()
            m(images(cfg, height=64, seed=step).double(), {}).square().mean().backward()
        assert count.forward == GRAPHS + 2
        assert count.backward == GRAPHS
    weights = sum(key.endswith("gain") and "skip" not in key for key in module.state_dict())
    assert count.forward_runs == 2 * (len(module.plan) + 2 * weights)
    assert count.backward_runs == 2 * len(module.plan)
    assert no_graph_break()
    for (key, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= EXACT64 * max(1e-2, float(q.grad.norm())), key


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in FAMILIES else pytest.mark.long) for n in SMALL]
)
def test_weights_standardised_apart_under_every_set_of_rules(name, counting_apart):
    cfg = SMALL[name]
    plain, fast = shell(cfg).double(), shell(cfg).double().compile_blocks(backend=counting_apart.backend)
    x = images(cfg, batch=2).double()
    for frozen in (False, True):
        for m in (plain, fast):
            for i, p in enumerate(m.parameters()):
                p.grad = None
                p.requires_grad_(not (frozen and i % 3 == 0))
            m(x, {}).square().mean().backward()
        for (key, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            if p.grad is not None and q.grad is not None:
                assert (p.grad - q.grad).norm() <= EXACT64 * max(1e-2, float(q.grad.norm())), key
    before = counting_apart.forward_runs
    with torch.no_grad():
        assert relative(fast.eval()(x), plain.eval()(x)) < EXACT64
    assert counting_apart.forward_runs == before + len(fast.plan)  # inference has them in the blocks' graphs


@pytest.mark.slow
def test_dynamic_shapes_are_those_of_images_not_of_weights(counting_apart):
    cfg = SMALL["nf-resnet-timm"].replace(depths=(1, 1, 1, 1))
    module = shell(cfg).compile_blocks(backend=counting_apart.backend, dynamic=True)
    graphs = []
    for batch in (2, 3, 4):
        module(images(cfg, batch=batch), {}).sum().backward()
        graphs.append(counting_apart.forward)
    assert graphs[0] == graphs[1] == graphs[2]


def test_a_mode_that_watches_operators_keeps_nobody_from_compiling_later():
    kernels = compiling.compiled_rows(compiling.compile_options(backend="eager"))
    weight, gain = torch.randn(4, 3, 3, 3, generator=generator()), torch.ones(4)
    expected = standardize_weight(weight, gain)
    with FlopCounterMode(display=False):
        assert torch.equal(standardize_weight(weight, gain, kernels=kernels), expected)
    assert counters["stats"]["unique_graphs"] == 0
    assert torch.equal(standardize_weight(weight, gain, kernels=kernels), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_training_has_one_graph_a_distinct_block_at_any_depth(name):
    cfg, count = narrow(name), Counting()
    module, reference = shell(cfg), shell(cfg)
    module.compile_blocks(backend=count.backend)
    optimizers = [AGCSGD(param_groups(m), lr=0.1) for m in (module, reference)]
    noise = module.sample_noise(2, generator=generator())
    for step in range(3):
        for m, optimizer in zip((module, reference), optimizers, strict=True):
            optimizer.zero_grad()
            m(images(cfg, height=64, seed=step), noise).square().mean().backward()
            optimizer.step()
        assert count.forward == count.backward == GRAPHS  # all after the first step
    assert count.forward_runs == count.backward_runs == 3 * len(module.plan)
    assert no_graph_break()
    for (key, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert relative(p, q) < EXACT, key


@pytest.mark.long
@pytest.mark.parametrize("name", [*SMALL, "nfnet-f1"])
def test_inductor_computes_the_same(name):
    cfg = SMALL[name] if name in SMALL else narrow(name)
    cfg = cfg.replace(drop_rate=0.2, stochastic_depth=0.1)
    plain, fast = shell(cfg), shell(cfg).compile_blocks()
    x, noise = images(cfg), plain.sample_noise(2, generator=generator())
    outputs = []
    for m in (plain, fast):
        y = m(x, noise)
        y.square().mean().backward()
        with torch.no_grad():
            outputs.append((y.detach(), m.eval()(x)))
    for a, b in zip(*outputs, strict=True):
        assert relative(b, a) < COMPILED
    for (key, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= COMPILED * max(1e-2, float(q.grad.norm())), key


@pytest.mark.slow
def test_inductor_on_a_small_model():
    cfg = SHALLOW
    module, x = shell(cfg).eval(), images(cfg)
    with torch.no_grad():
        expected = module(x)
        assert relative(module.compile_blocks()(x), expected) < COMPILED
        assert module.features(x)[0].shape[1] == 8


@pytest.mark.slow
def test_training_with_inductor_standardises_all_weights_in_one_pair_of_graphs():
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg), torch.randn(2, 3, 16, 16, generator=generator())
    grads = []
    for compiled in (False, True):
        leaves = {
            k: v.clone().requires_grad_() for k, v in params.items() if k.startswith(("stem.conv0", "stem.conv1"))
        }
        y = x
        for block in model.plan(cfg)[:2]:
            fn = compiling.compiled(block, compiling.compile_options()) if compiled else block.fn
            y = fn(model.block_params(block, leaves), y, block.beta, None)
        grads.append(torch.autograd.grad(y.square().mean(), list(leaves.values())))
    assert counters["stats"]["unique_graphs"] == 2 + 2  # two blocks; forward and backward of their weights
    assert no_graph_break()
    for a, b in zip(*grads, strict=True):
        assert relative(b, a) < COMPILED


INDUCTOR = [pytest.param(floor, "inductor", marks=pytest.mark.slow) for floor in (True, False)]


@pytest.mark.parametrize(("floor", "backend"), [(True, "aot_eager"), (False, "aot_eager"), *INDUCTOR])
def test_compiled_standardisation_is_one_graph_a_pass_for_all_kernels(floor, backend):
    kernels = compiling.compiled_rows(compiling.compile_options(backend=backend))
    for shape in ((16, 3, 3, 3), (8, 8, 1, 1), (33, 17, 3, 3), (9, 1, 3, 3)):
        weight = (
            torch.randn(shape, generator=generator())
            * torch.tensor([1.0, 1e-3]).repeat(shape[0])[: shape[0], None, None, None]
        )
        gain, g = torch.randn(shape[0], generator=generator(1)), torch.randn(shape, generator=generator(2))
        results = []
        for chosen in (None, kernels):
            leaves = [t.clone().requires_grad_() for t in (weight, gain)]
            out = standardize_weight(*leaves, floor=floor, scale=1.7, kernels=chosen)
            results.append((out, *torch.autograd.grad(out, leaves, g)))
        for a, b in zip(*results, strict=True):
            assert relative(b, a) < EXACT
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_weights_can_be_differentiated_twice():
    kernels = compiling.compiled_rows(compiling.compile_options(backend="aot_eager"))
    leaves = [t.requires_grad_() for t in (torch.randn(4, 3, 3, 3, generator=generator()), torch.ones(4))]
    seconds = []
    for chosen in (None, kernels):
        out = standardize_weight(*leaves, kernels=chosen).square().square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        seconds.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves))
    for a, b in zip(*seconds, strict=True):
        assert relative(b, a) < EXACT


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(f"nfnet-f{n}", marks=pytest.mark.long) for n in (1, 3)),
        pytest.param("nfnet-f6", marks=pytest.mark.slow),
    ],
)
def test_graphs_of_the_real_widths(name):
    cfg, count = VARIANTS[name].config, Counting()
    with torch.no_grad():
        NFNet(cfg).eval().compile_blocks(backend=count.backend)(torch.randn(1, 3, 64, 64))
    assert count.forward == GRAPHS
    assert no_graph_break()


def test_switching_off_and_on_again():
    cfg, count = SHALLOW, CountingEager()
    module, x = shell(cfg).eval(), images(cfg)
    expected = module(x)
    module.compile_blocks(backend=count.backend)
    module(x)
    runs = count.forward_runs
    assert runs == len(module.plan)
    assert torch.equal(module.compile_blocks(enabled=False)(x), expected)
    assert count.forward_runs == runs


@pytest.mark.slow
def test_keys_copies_and_files():
    cfg, count = SHALLOW, CountingEager()
    module, x = shell(cfg).eval(), images(cfg)
    keys = list(module.state_dict())
    module.compile_blocks(backend=count.backend)
    expected = module(x)
    assert list(module.state_dict()) == keys
    assert list(module.buffers()) == []
    twin = copy.deepcopy(module)
    graphs = count.forward
    assert torch.equal(twin(x), expected)
    assert count.forward == graphs  # a copy shares its original's graphs
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert torch.equal(module(x), expected)
    file = io.BytesIO()
    torch.save(shell(cfg).compile_blocks(backend="eager"), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(loaded.state_dict(), module.state_dict())
    assert relative(loaded.eval()(x), expected) < EXACT
    assert pickle.loads(pickle.dumps(loaded)).stem.conv0.fn is loaded.stem.conv0.fn


def test_another_classifier_stays_compiled():
    count = CountingEager()
    module = shell(SMALL["nfnet"]).eval().compile_blocks(backend=count.backend).checkpoint_blocks()
    module.reset_classifier(7)
    assert module(images(module.config)).shape == (2, 7)
    assert count.forward_runs == len(module.plan)
    assert module.head.checkpointed


@pytest.mark.slow
def test_a_pass_in_inference_mode_leaves_training_possible():
    cfg, count = SMALL["nfnet"], Counting()
    module = shell(cfg).compile_blocks(backend=count.backend)
    with torch.inference_mode():
        module(images(cfg))
    module(images(cfg)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.slow
def test_past_the_limit_it_raises_and_does_not_run_eager():
    module = shell(cfg := SHALLOW).eval().compile_blocks(backend="eager")
    module(images(cfg))
    assert torch._dynamo.config.recompile_limit >= compiling.RECOMPILE_LIMIT
    with torch._dynamo.config.patch(recompile_limit=2):
        module(images(cfg, height=64))
        with pytest.raises(dynamo_errors.FailOnRecompileLimitHit):
            module(images(cfg, height=96))


def test_a_break_in_a_block_raises():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = model.plan(SMALL["nfnet"])[0]
            self.block = plain._replace(fn=breaks)
            self.fn: Any = self.block.fn

        def forward(self, x: Tensor) -> Tensor:
            return self.fn({}, x, 1.0, None)

    broken = Broken()
    compiling.compile_blocks(broken, compiling.compile_options(backend="eager"))
    with pytest.raises(dynamo_errors.Unsupported):
        broken(torch.ones(1))


def breaks(params, x, beta, keep):
    torch._dynamo.graph_break()
    return x


def test_a_module_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no blocks"):
        compiling.compile_blocks(nn.Linear(1, 1), compiling.compile_options())


@pytest.mark.slow
def test_inside_a_compiled_model_and_an_export_the_blocks_are_part_of_the_graph():
    cfg = SMALL["nfnet"]
    module, x = shell(cfg).eval(), images(cfg)
    expected = module(x)
    module.compile_blocks(backend="eager")
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert relative(whole(x), expected) < EXACT
    assert counters["stats"]["unique_graphs"] == 1
    exported = torch.export.export(module, (x,))
    assert relative(exported.module()(x), expected) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    cfg, count = SHALLOW, Counting()
    plain, fast = shell(cfg), shell(cfg).compile_blocks(backend=count.backend)
    outputs = []
    for m in (plain, fast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = m(images(cfg))
        assert y.dtype == dtype
        y.float().square().mean().backward()
        outputs.append(y.detach().float())
    assert relative(outputs[1], outputs[0]) < (EXACT if dtype == torch.float32 else 1e-2)  # bfloat16 has 8 bits
    assert count.forward_runs == count.backward_runs == len(fast.plan)


@pytest.mark.slow
def test_the_pure_form_is_the_module():
    cfg, count = narrow("nfnet-f1"), Counting()
    params, x = random_params(cfg), images(cfg, height=64)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    noise = model.sample_noise(cfg, 2, generator=generator())
    options, y = compiling.compile_options(count.backend), x
    for block in model.plan(cfg):
        fn = compiling.compiled(block, options)
        y = fn(model.block_params(block, leaves), y, block.beta, noise.get(block.name))
    loss = y.square().mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert count.forward == GRAPHS
    module = shell(cfg).compile_blocks(backend=count.backend)
    module(x, noise).square().mean().backward()
    found = dict(zip(leaves, grads, strict=True))
    for name, p in module.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, found[name])


@pytest.mark.slow
def test_double_precision_keeps_beta():
    cfg = SMALL["nfnet"]
    module = shell(cfg).double().eval()
    x = images(cfg).double()
    expected = module(x)
    assert relative(module.compile_blocks(backend="aot_eager")(x), expected) < 1e-12


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_checkpointing_changes_memory_not_gradients(compiled):
    cfg, count = SMALL["nfnet"].replace(drop_rate=0.2, stochastic_depth=0.2), Counting()
    plain, saving = shell(cfg), shell(cfg).checkpoint_blocks()
    if compiled:
        saving.compile_blocks(backend=count.backend)
    noise, kept = plain.sample_noise(2, generator=generator()), []
    for m in (plain, saving):
        sizes = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            if not isinstance(t, nn.Parameter):
                sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = m(images(cfg), noise)
        kept.append(sum(sizes))
        y.square().mean().backward()
    assert kept[1] < 0.5 * kept[0]
    for (key, p), q in zip(saving.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-5, msg=key)
    if compiled:
        assert count.forward_runs == 2 * len(saving.plan)
        assert count.backward_runs == len(saving.plan)
    with torch.no_grad():
        saving(images(cfg))
    saving.checkpoint_blocks(enabled=False)
    assert not any(getattr(m, "checkpointed", False) for m in saving.modules())


# ---------------------------------------------------------------- two processes


def _ddp_rank(rank: int, folder: str, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    cfg, count = narrow("nfnet-f1"), Counting()
    module = shell(cfg).compile_blocks(backend=count.backend).checkpoint_blocks(enabled=checkpointing)
    # Buckets smaller than a block: left to itself, Dynamo would cut the blocks' graphs at their borders.
    wrapped = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=1e-3)
    whole = images(cfg, batch=4, height=64)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(whole[2 * rank : 2 * rank + 2], {}).square().mean().backward()
    passes = 2 if checkpointing else 1
    assert count.forward == count.backward == GRAPHS, (count.forward, count.backward)
    assert count.forward_runs == 2 * passes * len(module.plan)
    if rank == 0:
        torch.save({k: p.grad for k, p in module.named_parameters()}, f"{folder}/grads.pt")
    del wrapped, module  # before the group: the reducer can hang if it goes after it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_two_processes_under_ddp(tmp_path: Path, checkpointing):
    in_processes(_ddp_rank, (str(tmp_path), checkpointing), 2, tmp_path, 300)
    cfg = narrow("nfnet-f1")
    single = shell(cfg)
    single(images(cfg, batch=4, height=64), {}).square().mean().backward()
    grads = torch.load(tmp_path / "grads.pt")
    for key, p in single.named_parameters():
        assert p.grad is not None
        assert (grads[key] - p.grad).norm() <= 1e-4 * max(1e-3, float(p.grad.norm())), key
