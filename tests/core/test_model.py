"""One plan, many readings: laws between init, apply, embed, features, noise and costs."""

from __future__ import annotations

import math

import pytest
import torch

from nfzoo import ModelConfig, model
from nfzoo.models.layers import ResidualBlock
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL, assert_same, generator, images, random_params, relative
from tests.support.loops import each

FLOAT64 = 1e-12  # the same sums in another order, in float64
FLOAT32 = 1e-5  # a few dozen layers in float32, in another order
FIVE_SIGMA = 5.0  # one draw in two million lies farther out, and the seeds are fixed
# Of a standard normal variable truncated at a = 2: 1 - 2 a density(a) / P(|z| < a).
TRUNCATED_VARIANCE = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))

WITHOUT_SQUEEZE = ("nfnet-plain", "nfnet-timm-plain", "nf-resnet", "nf-resnet-timm")
small = pytest.mark.parametrize("name", SMALL)


# ---------------------------------------------------------------- init


@small
def test_init_has_the_shapes_of_the_specs(name):
    cfg = SMALL[name]
    params = model.init(cfg, generator=generator())
    assert {k: tuple(v.shape) for k, v in params.items()} == {k: s for k, (s, _) in model.specs(cfg).items()}
    assert sum(p.numel() for p in params.values()) == model.parameter_count(cfg)
    assert all(p.is_contiguous() for p in params.values())


def test_init_is_determined_by_its_generator():
    cfg = SMALL["nfnet"]
    assert_same(model.init(cfg, generator=generator(3)), model.init(cfg, generator=generator(3)))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    other = model.init(cfg, generator=generator(4))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    same = model.init(cfg, generator=generator(3))
    assert not torch.equal(same["stem.conv0.weight"], other["stem.conv0.weight"])


def test_init_takes_a_dtype():
    params = model.init(SMALL["nf-regnet"], generator=generator(), dtype=torch.bfloat16)
    assert {p.dtype for p in params.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["nfnet-f0", "nf-resnet-50", "nf-regnet-b0", "nfnet-l0", "timm-nf-regnet-b0"])
def test_init_draws_the_stated_distributions(name):
    cfg = VARIANTS[name].config
    # Only the kernels that are cheap and large enough for statistics.
    deepmind = cfg.rules == "deepmind"
    for block in model.plan(cfg)[:8]:
        for key, spec in block.specs.items():
            value = spec.init(spec.shape, generator=generator(), device=None, dtype=torch.float64)
            if spec.kind == "weight" and value.numel() > 1000:
                fan_in = math.prod(spec.shape[1:])
                # Haiku truncates linears at two standard deviations.
                var = (TRUNCATED_VARIANCE if ".fc" in key and deepmind else 1) / fan_in
                error = var * (2 / value.numel()) ** 0.5
                assert value.var().item() == pytest.approx(var, abs=FIVE_SIGMA * error), key
            elif spec.kind == "gain":
                assert (value == (0 if key == "conv2.gain" and not deepmind else 1)).all(), key
            elif spec.kind in ("bias", "skip_gain"):
                assert (value == 0).all(), key


def test_classifiers_start_as_the_papers_say():
    for name, std in {"nfnet-f0": 0.01, "nf-resnet-50": 0.01, "nf-regnet-b0": 0.0, "timm-nf-regnet-b0": 0.01}.items():
        spec = model.plan(VARIANTS[name].config)[-1].specs["weight"]
        value = spec.init(spec.shape, generator=generator(), device=None, dtype=None)
        assert value.std().item() == pytest.approx(std, rel=0.02)


@small
def test_a_fresh_network_is_its_shortcuts(name):
    """Skip gains (or last gains) of 0: the residual branches, attention included, contribute exactly nothing."""
    cfg = SMALL[name]
    params, x = model.init(cfg, generator=generator()), images(cfg)
    for block in model.plan(cfg):
        if block.branches is not None:
            local = model.block_params(block, params)
            shortcut, _ = block.branches(local, x, block.beta)
            assert torch.equal(model.run_block(block, params, x), shortcut)
        x = model.run_block(block, params, x)


@small
def test_branches_start_as_open_as_skip_init_says(name):
    """Gains are drawn by no generator, so that all else starts at the same values."""
    cfg = SMALL[name]
    shut, opened = (model.init(cfg.replace(skip_init=value), generator=generator()) for value in (0.0, 0.25))
    closing = "skip_gain" if cfg.rule.skip_gain else "conv2.gain"
    for key, value in opened.items():
        expected = torch.full_like(value, 0.25) if key.startswith("stages.") and key.endswith(closing) else shut[key]
        assert torch.equal(value, expected), key
    block = next(b for b in model.plan(cfg) if isinstance(b.fn, ResidualBlock))
    assert isinstance(block.fn, ResidualBlock)
    x = torch.randn(2, block.fn.geometry.inputs, 8, 8, generator=generator())
    local = model.block_params(block, opened)
    shortcut, residual = block.fn.branches(local, x, block.beta)
    factor = cfg.alpha * (0.25 if cfg.rule.skip_gain else 1.0)  # under timm's rules the residual has the gain in it
    torch.testing.assert_close(model.run_block(block, opened, x), shortcut + factor * residual)


# ---------------------------------------------------------------- beta


def beta_schedule(depths: tuple[int, ...], alpha: float) -> list[float]:
    """Section 4 of arXiv 2101.08692 in its own words: expected std before each block, reset at transitions."""
    betas = []
    expected_var = 1.0
    for depth in depths:
        for b in range(depth):
            betas.append(1 / math.sqrt(expected_var))
            expected_var = (1.0 if b == 0 else expected_var) + alpha * alpha
    return betas


@each("name", VARIANTS)
def test_beta(name):
    cfg = VARIANTS[name].config
    betas = [b.beta for b in model.plan(cfg) if b.branches is not None]
    assert betas == pytest.approx(beta_schedule(cfg.depths, cfg.alpha), rel=FLOAT64)
    assert all(b.beta == 1 for b in model.plan(cfg) if b.branches is None)


def test_beta_depends_on_alpha():
    cfg = SMALL["nfnet"].replace(alpha=1.0, depths=(3, 1, 1, 1))
    betas = [b.beta for b in model.plan(cfg) if b.branches is not None]
    assert betas == pytest.approx([1, 2**-0.5, 3**-0.5, 4**-0.5, 2**-0.5, 2**-0.5])


def test_blocks_of_one_shape_share_their_function():
    plan = model.plan(VARIANTS["nfnet-f6"].config)
    assert len({b.fn for b in plan}) <= 16  # 84 blocks, and a compiled graph for each distinct function
    assert len([b for b in plan if b.branches]) == 84


# ---------------------------------------------------------------- the forward pass


@small
def test_apply_is_head_after_embed(name):
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg)
    pooled = model.embed(cfg, params, x)
    logits = torch.nn.functional.linear(pooled, params["head.weight"], params["head.bias"])
    assert torch.equal(model.apply(cfg, params, x), logits)


@small
def test_examples_of_a_batch_do_not_meet(name):
    cfg = SMALL[name]
    params, x = random_params(cfg, dtype=torch.float64), images(cfg, 4, 37, 29).double()
    one_by_one = torch.cat([model.apply(cfg, params, x[i : i + 1]) for i in range(4)])
    assert relative(model.apply(cfg, params, x), one_by_one) < FLOAT64


@each("name", SMALL)
@each("size", [(1, 1), (2, 1), (7, 33), (32, 32)])
def test_any_image_size_works(name, size):
    cfg = SMALL[name]
    logits = model.apply(cfg, random_params(cfg), images(cfg, 2, *size))
    assert logits.shape == (2, cfg.num_classes)
    assert logits.isfinite().all()


@small
def test_float32_is_close_to_float64(name):
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg)
    exact = model.apply(cfg, {k: v.double() for k, v in params.items()}, x.double())
    assert exact.dtype == torch.float64
    assert relative(model.apply(cfg, params, x), exact) < FLOAT32


@small
def test_apply_changes_nothing(name):
    cfg = SMALL[name].replace(stochastic_depth=0.3, drop_rate=0.3)
    params, x, noise = random_params(cfg), images(cfg), model.sample_noise(cfg, 2, generator=generator())
    before = {k: v.clone() for k, v in params.items()}, x.clone(), {k: v.clone() for k, v in noise.items()}
    state = torch.get_rng_state()
    first, second = (model.apply(cfg, params, x, noise) for _ in range(2))
    assert torch.equal(first, second)
    assert_same(params, before[0])
    assert torch.equal(x, before[1])
    assert_same(noise, before[2])
    assert torch.equal(torch.get_rng_state(), state)


@small
def test_every_parameter_matters(name):
    cfg = SMALL[name]
    params, x = random_params(cfg, dtype=torch.float64), images(cfg).double()
    leaves = {k: v.requires_grad_() for k, v in params.items()}
    (model.apply(cfg, leaves, x) * images(cfg)[:, 0, 0, :5].double()).sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None, key
        assert leaf.grad.norm() > 1e-9, key


def test_a_missing_parameter_is_a_key_error():
    cfg = SMALL["nfnet"]
    params = random_params(cfg)
    del params["stages.0.0.conv1.gain"]
    with pytest.raises(KeyError, match=r"stages\.0\.0\.conv1\.gain"):
        model.apply(cfg, params, images(cfg))


def test_a_config_of_no_family_is_a_type_error():
    with pytest.raises(TypeError, match="ModelConfig"):
        model.plan(ModelConfig(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), activation="relu"))


# ---------------------------------------------------------------- features and output strides


@each("name", SMALL)
@each("output_stride", [8, 16, 32])
@each("size", [(64, 32), (61, 35)])
def test_feature_maps(name, output_stride, size):
    cfg = SMALL[name].replace(output_stride=output_stride)
    params, x = random_params(cfg), images(cfg, 1, *size)
    maps = model.features(cfg, params, x)
    strides = [min(s, output_stride) for s in (2, 4, 8, 16, 32)]
    assert [tuple(m.shape[-2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in strides]
    assert len({m.shape[1] for m in maps[1:]}) > 1
    state = x  # the last map is what the plan hands to the final convolution or the pool
    for block in model.plan(cfg):
        if block.name in ("final_conv", "pool"):
            break
        state = model.run_block(block, params, state)
    assert torch.equal(maps[-1], state)


@each("name", [name for name in WITHOUT_SQUEEZE if SMALL[name].rules == "deepmind"])
@each("output_stride", [8, 16])
@each("size", [(64, 64), (96, 32), (61, 53), (33, 47), (75, 50), (31, 1), (17, 18), (40, 36)])
def test_a_trous(name, output_stride, size):
    """What the strided network computes, the dense one computes on every other (fourth) pixel, border included."""
    cfg = SMALL[name].replace(depths=(1, 2, 2, 2))
    params, x = random_params(cfg, dtype=torch.float64), images(cfg, 1, *size).double()
    strided = model.features(cfg, params, x)
    dense = model.features(cfg.replace(output_stride=output_stride), params, x)
    for stride, a, b in zip((2, 4, 8, 16, 32), strided, dense, strict=True):
        step = max(1, stride // output_stride)
        assert relative(b[..., ::step, ::step], a) < FLOAT64
    assert dense[-1].shape[-1] >= strided[-1].shape[-1]


@pytest.mark.parametrize("name", ["nfnet", "nf-resnet-se", "nf-regnet"])
def test_parameters_serve_every_output_stride(name):
    cfg = SMALL[name]
    assert model.specs(cfg) == model.specs(cfg.replace(output_stride=8))


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("name", ["nfnet", "nfnet-timm-eca", "nf-resnet", "nf-regnet-timm"])
def test_noise_statistics(name):
    rate, drop, batch = 0.4, 0.25, 4096
    cfg = SMALL[name].replace(stochastic_depth=rate, drop_rate=drop)
    noise = model.sample_noise(cfg, batch, generator=generator())
    blocks = [b.name for b in model.plan(cfg) if b.branches is not None]
    assert list(noise) == [*blocks, "head"]
    deepmind = cfg.rules == "deepmind"
    for i, block in enumerate(blocks):
        mask = noise[block]
        p = rate * i / (len(blocks) if deepmind else len(blocks) - 1)
        assert mask.shape == (batch, 1, 1, 1)
        kept = 1.0 if deepmind else 1 / (1 - p)
        assert set(mask.unique().tolist()) <= {0.0, torch.tensor(kept).item()}
        fraction = (mask == 0).double().mean().item()
        assert fraction == pytest.approx(p, abs=FIVE_SIGMA * (p * (1 - p) / batch) ** 0.5)
    assert (noise[blocks[0]] == 1).all()  # the first block is never dropped
    head = noise["head"]
    features = model.specs(cfg)["head.weight"][0][1]
    assert head.shape == (batch, features)
    assert set(head.unique().tolist()) == {0.0, torch.tensor(1 / (1 - drop)).item()}
    error = (drop * (1 - drop) / head.numel()) ** 0.5
    assert (head == 0).double().mean().item() == pytest.approx(drop, abs=FIVE_SIGMA * error)


def test_noise_is_determined_by_its_generator():
    cfg = SMALL["nfnet"].replace(stochastic_depth=0.5, drop_rate=0.5)
    state = torch.get_rng_state()
    a, b, c = (model.sample_noise(cfg, 64, generator=generator(seed)) for seed in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(a["head"], c["head"])
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_one_example_is_drawn_by_itself():
    cfg = SMALL["nfnet"].replace(stochastic_depth=0.9)
    mask = model.sample_noise(cfg, 256, generator=generator())["stages.3.0"]
    assert 0 < mask.sum() < 256  # not one coin for the whole batch


def test_no_rates_no_noise():
    assert model.sample_noise(SMALL["nfnet"], 4) == {}
    only_head = SMALL["nfnet"].replace(drop_rate=0.1)
    assert list(model.sample_noise(only_head, 4)) == ["head"]


def test_noise_takes_a_dtype():
    cfg = SMALL["nf-regnet-timm"].replace(stochastic_depth=0.5, drop_rate=0.5)
    noise = model.sample_noise(cfg, 2, dtype=torch.bfloat16)
    assert {v.dtype for v in noise.values()} == {torch.bfloat16}


@small
def test_masks_of_one_are_evaluation(name):
    """Which also says that DeepMind's rules do not rescale in evaluation either."""
    cfg = SMALL[name].replace(stochastic_depth=0.5, drop_rate=0.5)
    params, x = random_params(cfg), images(cfg)
    ones = {k: torch.ones_like(v) for k, v in model.sample_noise(cfg, 2).items()}
    assert torch.equal(model.apply(cfg, params, x, ones), model.apply(cfg, params, x))


@small
def test_masks_of_zero_leave_the_shortcuts(name):
    cfg = SMALL[name].replace(stochastic_depth=0.5)
    params, x = random_params(cfg), images(cfg)
    for block in model.plan(cfg):
        if block.branches is not None:
            local = model.block_params(block, params)
            shortcut, _ = block.branches(local, x, block.beta)
            dropped = model.run_block(block, params, x, {block.name: torch.zeros(2, 1, 1, 1)})
            assert torch.equal(dropped, shortcut)
            if "shortcut.weight" not in block.specs:
                assert torch.equal(dropped, x)  # an identity shortcut: the block is not there
        x = model.run_block(block, params, x)


def test_masks_act_on_their_own_example():
    cfg = SMALL["nfnet"].replace(stochastic_depth=0.5, drop_rate=0.5)
    params, x = random_params(cfg), images(cfg, 3)
    noise = model.sample_noise(cfg, 3, generator=generator(5))
    together = model.apply(cfg, params, x, noise)
    alone = torch.cat(
        [model.apply(cfg, params, x[i : i + 1], {k: v[i : i + 1] for k, v in noise.items()}) for i in range(3)]
    )
    assert relative(together, alone) < FLOAT32
    assert relative(together, model.apply(cfg, params, x)) > 1e-3


def test_float32_masks_do_not_widen_bfloat16_activations():
    cfg = SMALL["nfnet"].replace(stochastic_depth=0.5, drop_rate=0.5)
    params, x = random_params(cfg, dtype=torch.bfloat16), images(cfg).bfloat16()
    noise = model.sample_noise(cfg, 2, dtype=torch.float32)
    assert model.apply(cfg, params, x, noise).dtype == torch.bfloat16


# ---------------------------------------------------------------- costs


@small
def test_costs_add_up(name):
    cfg = SMALL[name]
    table = model.costs(cfg, 64, 32)
    assert sum(row.parameters for row in table) == model.parameter_count(cfg)
    assert sum(row.macs for row in table) == model.mac_count(cfg, 64, 32)
    assert [row.name for row in table] == [b.name for b in model.plan(cfg)]
    assert table[-1].output == (cfg.num_classes,)
    assert table[-1].macs == math.prod(model.specs(cfg)["head.weight"][0])


def test_costs_of_the_stem_by_hand():
    cfg = SMALL["nf-resnet"]
    (stem, pool, *_) = model.costs(cfg, 33, 20)
    assert stem.output == (8, 17, 10)
    assert stem.macs == 17 * 10 * 8 * 3 * 7 * 7
    assert pool.output == (8, 9, 5)
    assert (pool.macs, pool.parameters) == (0, 0)
