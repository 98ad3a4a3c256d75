"""The inference form: the same function in plain convolutions, saved and loaded as any model, never trained."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import nfzoo
from nfzoo import (
    CheckpointError,
    ConfigError,
    ConversionError,
    NFNet,
    Preprocessing,
    from_pretrained,
    model,
    param_groups,
)
from nfzoo.analysis.signal_propagation import signal_metrics
from nfzoo.checkpoint.model_folder import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint
from nfzoo.config import config_from_dict
from nfzoo.conversion.convert import convert
from nfzoo.model import fold
from nfzoo.types import Params
from tests.support.helpers import (
    FAMILIES,
    SMALL,
    assert_same,
    generator,
    images,
    random_params,
    reference_input,
    reference_params,
    relative,
)
from tests.support.loops import each

FLOAT32 = 1e-5  # the weights are rounded once more or less, and the sums come in another order; seen: 1e-6
FLOAT64 = 1e-13  # nothing but the order of products
BFLOAT16 = 3e-2  # eight bits, in a few dozen layers
small = pytest.mark.parametrize("name", SMALL)
family = pytest.mark.parametrize("name", FAMILIES)


def trained(name: str = "nfnet", **changes) -> NFNet:
    made = NFNet(SMALL[name].replace(**changes), preprocessing=Preprocessing(train_size=24, test_size=32))
    made.load_state_dict(random_params(made.config))
    return made.eval()


@each("name", SMALL)
@each("output_stride", [8, 16, 32])
def test_folded_equals_unfolded(name, output_stride):
    cfg = SMALL[name].replace(output_stride=output_stride)
    params, x = random_params(cfg), images(cfg, 2, 45, 37)
    folded = fold(cfg, params)
    assert relative(model.apply(*folded, x), model.apply(cfg, params, x)) < FLOAT32
    assert relative(model.embed(*folded, x), model.embed(cfg, params, x)) < FLOAT32
    for ours, theirs in zip(model.features(*folded, x), model.features(cfg, params, x), strict=True):
        assert relative(ours, theirs) < FLOAT32


@small
def test_in_float64_the_two_are_one_function(name):
    cfg = SMALL[name]
    params, x = random_params(cfg, dtype=torch.float64), images(cfg).double()
    assert relative(model.apply(*fold(cfg, params), x), model.apply(cfg, params, x)) < FLOAT64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nfnet_F0", "nf_resnet_ResNet50", "nf_regnet_B0"])
def test_folded_equals_unfolded_on_the_reference_weights(name):
    params, x = reference_params(name), reference_input(64, 64)
    cfg = {"nfnet_F0": "nfnet-f0", "nf_resnet_ResNet50": "nf-resnet-50", "nf_regnet_B0": "nf-regnet-b0"}[name]
    cfg = nfzoo.variant(cfg).config
    assert relative(model.apply(*fold(cfg, params), x), model.apply(cfg, params, x)) < FLOAT32


@small
def test_a_silent_branch_stays_silent(name):
    """Fresh models have skip gains, or last gains, of 0."""
    cfg = SMALL[name]
    params, x = model.init(cfg, generator=generator()), images(cfg)
    params |= {k: random_params(cfg)[k] for k in params if k.startswith("head.")}
    assert relative(model.apply(*fold(cfg, params), x), model.apply(cfg, params, x)) < FLOAT32


@small
def test_parameters_are_the_folded_plans(name):
    cfg, params = SMALL[name], random_params(SMALL[name])
    folded_cfg, folded = fold(cfg, params)
    wanted = model.specs(folded_cfg)
    assert {k: tuple(v.shape) for k, v in folded.items()} == {k: shape for k, (shape, _) in wanted.items()}
    assert not any(k.endswith(("gain", "skip_gain")) for k in folded)
    gone = {k for k, (_, kind) in model.specs(cfg).items() if kind in ("gain", "skip_gain")}
    scales = {k for k in folded if k.endswith(".scale")}
    assert folded.keys() == (params.keys() - gone) | scales
    removed = sum(params[k].numel() for k in gone) - len(scales)
    assert model.parameter_count(folded_cfg) == model.parameter_count(cfg) - removed


@small
def test_costs_but_for_parameters_stay(name):
    cfg = SMALL[name]
    before, after = (model.costs(c, 40, 56) for c in (cfg, cfg.replace(folded=True)))
    assert [(c.name, c.output, c.macs) for c in before] == [(c.name, c.output, c.macs) for c in after]


@pytest.mark.parametrize("name", ["nfnet-f6", "nf-resnet-288", "nf-regnet-b8"])
def test_distinct_blocks_do_not_grow_with_depth(name):
    cfg = nfzoo.variant(name).config
    deep, shallow = (
        {b.fn for b in model.plan(c.replace(folded=True))} for c in (cfg, cfg.replace(depths=(3, 3, 3, 3)))
    )
    assert deep == shallow
    assert {b.beta for b in model.plan(cfg.replace(folded=True))} == {1.0}


def test_gradients_pass_through_folding():
    """A function of the trained parameters, folding has their gradients."""
    cfg, x = SMALL["nfnet"], images(SMALL["nfnet"])
    params = {k: v.requires_grad_() for k, v in random_params(cfg).items()}
    direct = torch.autograd.grad(model.apply(cfg, params, x).square().sum(), list(params.values()))
    through = torch.autograd.grad(model.apply(*fold(cfg, params), x).square().sum(), list(params.values()))
    for key, ours, theirs in zip(params, through, direct, strict=True):
        assert relative(ours, theirs) < 10 * FLOAT32, key  # two roundings more, and a backward pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folding_keeps_dtype_layout_and_its_input(dtype):
    cfg = SMALL["nf-regnet"]
    params = random_params(cfg, dtype=dtype)
    params = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in params.items()}
    before = {k: v.clone() for k, v in params.items()}
    _, folded = fold(cfg, params)
    assert {v.dtype for v in folded.values()} == {dtype}
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in folded.values() if v.ndim == 4)
    for value in folded.values():
        value.zero_()
    assert_same(params, before)  # no memory in common


def test_on_the_meta_device_folding_gives_shapes():
    cfg = SMALL["nfnet"]
    folded_cfg, folded = fold(cfg, model.init(cfg, device="meta"))
    assert all(v.is_meta for v in folded.values())
    assert_same_shapes(folded, model.init(folded_cfg, device="meta"))


def assert_same_shapes(a: Params, b: Params) -> None:
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_folding_refuses_what_it_cannot_fold():
    cfg, params = SMALL["nfnet"], random_params(SMALL["nfnet"])
    with pytest.raises(ConfigError, match="folded already"):
        fold(*fold(cfg, params))
    with pytest.raises(ConfigError, match=r"'head\.bias' is missing"):
        fold(cfg, {k: v for k, v in params.items() if k != "head.bias"})
    with pytest.raises(ConfigError, match=r"'extra' is \(2,\) instead of absent"):
        fold(cfg, {**params, "extra": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"'head\.bias' is \(4,\) instead of \(5,\)"):
        fold(cfg, {**params, "head.bias": torch.zeros(4)})


def test_a_folded_configuration_says_so_and_others_are_written_as_before():
    cfg = SMALL["nfnet"]
    assert "folded" not in cfg.to_dict()
    folded = cfg.replace(folded=True)
    assert folded.to_dict() == {**cfg.to_dict(), "folded": True}
    assert config_from_dict(folded.to_dict()) == folded != cfg


def test_there_are_no_random_folded_weights():
    for make in (
        lambda: nfzoo.create("nfnet-test", folded=True),
        lambda: model.init(SMALL["nfnet"].replace(folded=True)),
    ):
        with pytest.raises(ConfigError, match="no random weights"):
            make()


# ---------------------------------------------------------------- the module


@small
def test_for_inference_is_the_folded_model(name):
    whole, x = trained(name), images(SMALL[name])
    lean = whole.for_inference()
    params = dict(lean.named_parameters())
    assert lean.config == whole.config.replace(folded=True)
    assert torch.equal(lean(x), model.apply(lean.config, params, x))
    assert torch.equal(lean.embed(x), model.embed(lean.config, params, x))
    for ours, theirs in zip(lean.features(x), model.features(lean.config, params, x), strict=True):
        assert torch.equal(ours, theirs)
    assert relative(lean(x), whole(x)) < FLOAT32


def test_for_inference_leaves_the_model_alone():
    whole = trained()
    whole.train()
    whole.labels, whole.name, whole.provenance = tuple("abcde"), "mine", {"made": "here"}
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    lean = whole.for_inference()
    assert lean.description == whole.description._replace(config=lean.config)
    assert not lean.training
    assert not any(p.requires_grad for p in lean.parameters())
    for p in lean.parameters():
        p.zero_()
    assert_same(whole.state_dict(), before)
    assert whole.training
    assert all(p.requires_grad for p in whole.parameters())
    assert lean.preprocess(torch.zeros(40, 40, 3).byte().numpy()).shape == (3, 32, 32)


def test_a_folded_model_cannot_be_trained():
    lean = trained(stochastic_depth=0.5).for_inference()
    x = images(lean.config)
    for attempt in (
        lean.train,
        lambda: lean(x, {}),
        lambda: lean.sample_noise(2),
        lambda: lean.reset_classifier(3),
        lambda: param_groups(lean),
    ):
        with pytest.raises(ConfigError, match=r"folded for inference.*trained model"):
            attempt()
    with pytest.raises(ConfigError, match="folded already"):
        lean.for_inference()
    for block in lean.plan:
        if block.name != "stem.pool":
            with pytest.raises(ConfigError, match="takes no noise"):
                model.apply(lean.config, dict(lean.named_parameters()), x, {block.name: torch.ones(2, 1, 1, 1)})
    with pytest.raises(ConfigError, match="measure the trained one"):
        signal_metrics(lean.config, dict(lean.named_parameters()), x)
    assert not lean.eval().training
    assert lean(x).shape == (2, 5)


def test_the_input_still_has_a_gradient():
    """For saliency maps and adversarial examples."""
    whole = trained()
    x = images(whole.config).requires_grad_()
    (direct,) = torch.autograd.grad(whole(x).square().sum(), x)
    (found,) = torch.autograd.grad(whole.for_inference()(x).square().sum(), x)
    assert relative(found, direct) < FLOAT32


@family
def test_copies_and_pickles_stay_folded(name):
    lean = trained(name).for_inference()
    x = images(lean.config)
    for twin in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert torch.equal(twin(x), lean(x))
        assert not any(p.requires_grad for p in twin.parameters())
        with pytest.raises(ConfigError, match="folded for inference"):
            twin.train()


@family
def test_bfloat16_and_channels_last(name):
    whole, x = trained(name), images(SMALL[name])
    expected = whole(x)
    last = whole.for_inference().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert relative(last(x.to(memory_format=torch.channels_last)), expected) < FLOAT32
    half = whole.for_inference().bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), expected) < BFLOAT16


@family
def test_whole_graph_compilation_and_export(name):
    lean = trained(name, depths=(1, 1, 1, 1)).for_inference()
    x = images(lean.config, 2, 32)
    expected = lean(x)
    torch._dynamo.reset()
    compiled = torch.compile(lean, fullgraph=True, backend="eager")
    assert relative(compiled(x), expected) < FLOAT32
    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(lean, (x,), dynamic_shapes=(sizes,))
    assert relative(program.module()(images(lean.config, 5, 32)), lean(images(lean.config, 5, 32))) < FLOAT32
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("rsqrt" in call or "gain" in call for call in calls)  # no standardisation is left


def test_compiled_block_by_block_equal_blocks_share_a_graph():
    lean = trained("nf-resnet").for_inference()
    x = images(lean.config)
    expected = lean(x)
    assert relative(lean.compile_blocks(backend="eager")(x), expected) < FLOAT32


# ---------------------------------------------------------------- on disk


@small
def test_saved_and_loaded_it_is_the_same_model(name, tmp_path):
    lean = trained(name).for_inference()
    lean.labels = tuple("abcde")
    lean.save_pretrained(tmp_path / "lean")
    x = images(lean.config)
    for source in (tmp_path / "lean", tmp_path / "lean" / WEIGHTS_FILE):
        again = from_pretrained(source)
        assert again.description == lean.description
        assert_same(again.state_dict(), lean.state_dict())
        assert relative(again(x), lean(x)) < FLOAT32  # a file's memory is aligned otherwise, which changes sums
        assert not any(p.requires_grad for p in again.parameters())
        with pytest.raises(ConfigError, match="folded for inference"):
            again.train()
    assert from_pretrained(tmp_path / "lean", dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_another_classifier_is_refused_before_anything_is_said(tmp_path, caplog):
    trained().for_inference().save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, num_classes=5).config.folded
    with pytest.raises(ConfigError, match="no other classifier"):
        from_pretrained(tmp_path, num_classes=3)
    assert not caplog.records


def test_trained_and_folded_weights_are_not_taken_for_each_other(tmp_path):
    whole = trained()
    whole.save_pretrained(tmp_path / "whole")
    whole.for_inference().save_pretrained(tmp_path / "lean")
    weights = load_file(tmp_path / "lean" / WEIGHTS_FILE)
    fields = json.loads((tmp_path / "lean" / CONFIG_FILE).read_text())
    assert fields["architecture"]["folded"] is True

    del fields["architecture"]["folded"]  # by hand
    (tmp_path / "lean" / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="describe different models"):
        load_checkpoint(tmp_path / "lean")
    save_file(weights, tmp_path / "lean" / WEIGHTS_FILE)  # without its metadata
    with pytest.raises(CheckpointError, match=r"missing, such as 'stem\.conv0\.gain'.*unexpected.*scale"):
        load_checkpoint(tmp_path / "lean")

    (tmp_path / "whole" / WEIGHTS_FILE).unlink()
    save_file(whole.state_dict(), tmp_path / "whole" / WEIGHTS_FILE)
    fields["architecture"]["folded"] = True
    (tmp_path / "whole" / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"missing, such as 'stages.*scale'.*unexpected"):
        load_checkpoint(tmp_path / "whole")
    fields["architecture"]["folded"] = "yes"
    (tmp_path / "whole" / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="folded must be true or false"):
        load_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "shape", "missing"])
def test_a_damaged_folded_checkpoint_is_refused(damage, tmp_path):
    lean = trained().for_inference()
    path = lean.save_pretrained(tmp_path / "lean") / WEIGHTS_FILE
    state = lean.state_dict()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "shape":
        key = next(k for k in state if k.endswith(".scale"))
        save_file({**state, key: torch.ones(2)}, path)
    else:
        save_file({k: v for k, v in state.items() if not k.endswith(".scale")}, path)
    with pytest.raises(CheckpointError, match=r"damaged|do not fit"):
        from_pretrained(tmp_path / "lean")


def test_saving_a_folded_model_whose_weights_were_exchanged_is_refused(tmp_path):
    lean = trained().for_inference()
    lean.config = lean.config.replace(folded=False)
    with pytest.raises(CheckpointError, match="do not fit"):
        lean.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["timm", "haiku"])
def test_other_code_has_no_folded_models(to, tmp_path):
    trained().for_inference().save_pretrained(tmp_path / "lean")
    with pytest.raises(ConversionError, match="convert the trained model"):
        convert(tmp_path / "lean", tmp_path / "other", to=to)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["nfnet", "nf-resnet", "nf-regnet"])
def test_compiled_blocks_pass_pairs_and_compute_the_same(name):
    cfg = SMALL[name]
    shell = NFNet(cfg).double()
    shell.load_state_dict(random_params(cfg, dtype=torch.float64))
    folded = shell.eval().for_inference()
    x = images(cfg, 2).double()
    with torch.no_grad():
        wanted = [folded(x), folded.embed(x), *folded.features(x)]
        folded.compile_blocks(backend="eager")
        given: list[type] = []
        folded.stages[0][0].register_forward_hook(lambda module, args, output: given.append(type(output)))  # type: ignore[index]
        made = [folded(x), folded.embed(x), *folded.features(x)]
        folded.compile_blocks(enabled=False)
        again = folded(x)
    assert given == [*[tuple] * 3, torch.Tensor]
    for ours, theirs in zip(made, wanted, strict=True):
        assert relative(ours, theirs) < 1e-14  # float64: compiled blocks have another form of the tanh GELU
    assert torch.equal(again, wanted[0])
