"""Under torch's transforms: torch.func, torch.compile, autocast, half precision."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import nfzoo
from nfzoo import NFNet, model
from nfzoo.step import StepConfig, cross_entropy, init_state, train_step
from tests.support.helpers import FAMILIES, SMALL, generator, images, random_params, relative

FLOAT64 = 1e-9
FLOAT32 = 1e-5  # per-example and batched kernels sum in another order
COMPILED = 1e-4  # inductor fuses and reorders float32 sums; gradients pass through a hundred of them
DIFFERENCES = 1e-6  # central differences in float64 with a step of 1e-5
BFLOAT16 = 0.1  # eight bits of mantissa, through a dozen layers
small = pytest.mark.parametrize("name", SMALL)
family = pytest.mark.parametrize("name", FAMILIES)
# The first jvp of a process makes torch script its own decompositions, which it has deprecated.
torch_scripts_itself = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated:DeprecationWarning")
LABELS = torch.tensor([0, 4, 2])


def loss_of(cfg):
    return lambda p, x, y, noise=None: cross_entropy(model.apply(cfg, p, x, noise), y)


@small
def test_the_batch_gradient_is_the_mean_of_per_example_gradients(name):
    cfg = SMALL[name].replace(stochastic_depth=0.5, drop_rate=0.5)
    params, x = random_params(cfg, dtype=torch.float64), images(cfg, 3).double()
    noise = model.sample_noise(cfg, 3, generator=generator(), dtype=torch.float64)
    noise["stages.3.0"] = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    loss = loss_of(cfg)
    whole = grad(loss)(params, x, LABELS, noise)

    def one(p, image, label, masks):
        return loss(p, image[None], label[None], {k: v[None] for k, v in masks.items()})

    each = vmap(grad(one), in_dims=(None, 0, 0, 0))(params, x, LABELS, noise)
    for key, value in whole.items():
        assert each[key].shape == (3, *value.shape)
        torch.testing.assert_close(each[key].mean(0), value, rtol=FLOAT64, atol=FLOAT64)
    dropped = each["stages.3.0.conv1.weight"][1]
    assert dropped.abs().max() == 0  # the second example's gradient alone stops at its dropped branch
    assert each["stages.3.0.conv1.weight"][0].abs().max() > 0


@family
def test_func_grad_is_autograd(name):
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg, 3)
    got = grad(loss_of(cfg))(params, x, LABELS)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss_of(cfg)(leaves, x, LABELS).backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative(got[key], leaf.grad) < FLOAT32, key


@torch_scripts_itself
@small
def test_jvp_is_the_finite_difference_and_the_transpose_of_vjp(name):
    cfg = SMALL[name]
    if cfg.activation == "relu":  # a kink within the step would spoil the difference; the arithmetic is the same
        cfg = cfg.replace(activation="silu")
    params, x = random_params(cfg, dtype=torch.float64), images(cfg).double()
    tangents = random_params(cfg, seed=9, dtype=torch.float64)

    def f(p):
        return model.apply(cfg, p, x)

    forward = jvp(f, (params,), (tangents,))[1]
    step = 1e-5
    ahead, behind = (f({k: v + s * tangents[k] for k, v in params.items()}) for s in (step, -step))
    assert relative((ahead - behind) / (2 * step), forward) < DIFFERENCES
    out, backward, *_ = vjp(f, params)
    cotangent = torch.randn(out.shape, generator=generator(), dtype=torch.float64)
    (pulled,) = backward(cotangent)
    left, right = (forward * cotangent).sum(), sum((pulled[k] * tangents[k]).sum() for k in params)
    torch.testing.assert_close(left, right, rtol=FLOAT64, atol=0)


def test_jacobian_of_the_input():
    cfg = SMALL["nf-resnet"].replace(activation="silu")
    params, x = random_params(cfg, dtype=torch.float64), images(cfg, 1, 8).double()
    jacobian = jacrev(lambda image: model.apply(cfg, params, image[None])[0])(x[0])
    assert jacobian.shape == (5, 3, 8, 8)
    nudge = torch.zeros_like(x)
    nudge[0, 1, 3, 4] = 1e-5
    difference = (model.apply(cfg, params, x + nudge) - model.apply(cfg, params, x - nudge)) / 2e-5
    assert relative(difference[0], jacobian[:, 1, 3, 4]) < DIFFERENCES


@family
def test_vmap_over_parameters_is_an_ensemble(name):
    cfg = SMALL[name]
    members = [random_params(cfg, seed) for seed in range(3)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in members[0]}
    x = images(cfg)
    together = vmap(lambda p: model.apply(cfg, p, x))(stacked)
    for member, logits in zip(members, together, strict=True):
        assert relative(logits, model.apply(cfg, member, x)) < FLOAT32


@small
def test_functional_call_on_the_shell_is_apply(name):
    cfg = SMALL[name]
    module, params, x = NFNet(cfg).eval(), random_params(cfg), images(cfg)
    assert torch.equal(functional_call(module, params, x), model.apply(cfg, params, x))


def test_gradients_of_gradients():
    """Gradient penalties differentiate twice."""
    cfg = SMALL["nfnet"]
    params, x = random_params(cfg, dtype=torch.float64), images(cfg, 1, 8).double().requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in params.items()}
    (inner,) = torch.autograd.grad(model.apply(cfg, leaves, x).sum(), x, create_graph=True)
    inner.square().sum().backward()
    assert leaves["stem.conv0.weight"].grad is not None
    assert leaves["stem.conv0.weight"].grad.isfinite().all()
    assert leaves["stem.conv0.weight"].grad.norm() > 0


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILE = {
    "nfnet": SMALL["nfnet"].replace(depths=(1, 1, 1, 1), stochastic_depth=0.5, drop_rate=0.5),
    "nf-resnet-timm-eca": SMALL["nf-resnet-timm-eca"].replace(depths=(1, 1, 1, 1), stochastic_depth=0.5),
}


BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("nfnet", "aot_eager", marks=pytest.mark.slow),
        pytest.param("nfnet", "inductor", marks=pytest.mark.long),
        pytest.param("nf-resnet-timm-eca", "inductor", marks=pytest.mark.long),
    ],
)
def test_compiled_apply_and_its_gradient(name, backend):
    cfg = COMPILE[name]
    params, x = random_params(cfg), images(cfg, 3)
    noise = model.sample_noise(cfg, 3, generator=generator())
    compiled = torch.compile(lambda p, image, masks: model.apply(cfg, p, image, masks), fullgraph=True, backend=backend)
    leaves = [{k: v.clone().requires_grad_() for k, v in params.items()} for _ in range(2)]
    eager, fast = model.apply(cfg, leaves[0], x, noise), compiled(leaves[1], x, noise)
    assert relative(fast, eager) < COMPILED
    cross_entropy(eager, LABELS).backward()
    cross_entropy(fast, LABELS).backward()
    for key in params:
        expected, got = (side[key].grad for side in leaves)
        assert expected is not None
        assert got is not None
        assert relative(got, expected) < COMPILED, key


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.long),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_compiled_shell(backend):
    module = NFNet(COMPILE["nfnet"])
    module.load_state_dict(random_params(module.config))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = images(module.config, 3)
    module.eval()
    assert relative(compiled(x), module(x)) < COMPILED
    module.train()
    compiled(x).sum().backward()  # draws its own noise
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert isinstance(compiled, torch.nn.Module)
    assert compiled.state_dict().keys() == {f"_orig_mod.{k}" for k in module.state_dict()}


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_training_step_does_not_recompile():
    """`lr` and `step` are tensors: three steps, one graph."""
    cfg = COMPILE["nfnet"]
    graphs = 0

    def count(module, _):
        nonlocal graphs
        graphs += 1
        return module

    config = StepConfig(clip=0.02)
    compiled = torch.compile(
        lambda s, b, n, lr: train_step(cfg, s, b, n, lr, config=config), fullgraph=True, backend=count
    )
    x, params = images(cfg, 3), random_params(cfg)
    fast, eager = init_state(params, config), init_state(params, config)
    for step in range(3):
        noise, lr = model.sample_noise(cfg, 3, generator=generator(step)), torch.tensor(0.1 / (step + 1))
        fast, a = compiled(fast, (x, LABELS), noise, lr)
        eager, b = train_step(cfg, eager, (x, LABELS), noise, lr, config=config)
        torch.testing.assert_close(a.loss, b.loss, rtol=COMPILED, atol=0)
    assert graphs == 1
    for key in params:
        assert relative(fast.params[key], eager.params[key]) < COMPILED, key


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in SMALL),
        *(pytest.param(name, "inductor", marks=pytest.mark.long) for name in (*SMALL, "nfnet-test")),
    ],
)
def test_every_small_model_compiles(name, backend):
    cfg = nfzoo.variant(name).config if name == "nfnet-test" else SMALL[name]
    params, x = random_params(cfg), images(cfg)
    compiled = torch.compile(lambda p, image: model.apply(cfg, p, image), fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative(compiled(params, x), model.apply(cfg, params, x)) < COMPILED


# ---------------------------------------------------------------- half precision


@small
def test_autocast(name):
    cfg = SMALL[name].replace(stochastic_depth=0.5, drop_rate=0.5)
    module = NFNet(cfg)
    module.load_state_dict(random_params(cfg))
    x, noise = images(cfg, 3), module.sample_noise(3, generator=generator())
    exact = module(x, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module(x, noise)
        loss = cross_entropy(logits, LABELS)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert 0 < relative(logits.float(), exact) < BFLOAT16
    loss.backward()
    for key, p in module.named_parameters():
        assert p.dtype == torch.float32, key
        assert p.grad is not None, key
        assert p.grad.dtype == torch.float32, key
        assert p.grad.isfinite().all(), key


@family
def test_autocast_keeps_the_residual_stream_narrow(name):
    """Float32 masks and skip gains do not widen the activations that autocast narrowed."""
    cfg = SMALL[name].replace(stochastic_depth=0.5)
    params, x = random_params(cfg), images(cfg)
    noise = model.sample_noise(cfg, 2, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for block in model.plan(cfg):
            x = model.run_block(block, params, x, noise)
            assert x.dtype == torch.bfloat16, block.name


@small
def test_whole_model_bfloat16(name):
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg)
    half = {k: v.bfloat16() for k, v in params.items()}
    logits = model.apply(cfg, half, x.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert 0 < relative(logits.float(), model.apply(cfg, params, x)) < BFLOAT16
