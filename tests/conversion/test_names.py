"""Foreign weights: there and back bit for bit, and strict about what does not fit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from nfzoo import ConversionError, NfzooError, model
from nfzoo.conversion.haiku import from_haiku, haiku_names, to_haiku
from nfzoo.conversion.timm import from_timm, timm_names, to_timm
from nfzoo.variants import VARIANTS
from tests.support.helpers import (
    REFERENCE_MODELS,
    SMALL,
    TIMM,
    assert_same,
    random_params,
    reference_tree,
    timm_golden,
)
from tests.support.loops import each

DEEPMIND = [name for name, cfg in SMALL.items() if cfg.rules == "deepmind"]


# ---------------------------------------------------------------- Haiku


@each("name", DEEPMIND)
def test_haiku_and_back(name):
    cfg = SMALL[name]
    params = random_params(cfg)
    tree = to_haiku(cfg, params)
    assert_same(from_haiku(cfg, tree), params)
    assert sum(a.size for leaves in tree.values() for a in leaves.values()) == model.parameter_count(cfg)
    assert all(a.flags["C_CONTIGUOUS"] and a.dtype == np.float32 for leaves in tree.values() for a in leaves.values())


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_deepminds_trees_and_back(name):
    cfg, tree = REFERENCE_MODELS[name], reference_tree(name)
    back = to_haiku(cfg, from_haiku(cfg, tree))
    assert {m: set(leaves) for m, leaves in back.items()} == {m: set(leaves) for m, leaves in tree.items()}
    for module, leaves in tree.items():
        for key, array in leaves.items():
            assert back[module][key].shape == array.shape
            assert back[module][key].dtype == array.dtype
            assert np.array_equal(back[module][key], array), (module, key)


@each("name", VARIANTS)
def test_every_parameter_has_its_own_foreign_name(name):
    cfg = VARIANTS[name].config
    for names in [timm_names(cfg)] + ([haiku_names(cfg)] if cfg.rules == "deepmind" else []):
        assert names.keys() == model.specs(cfg).keys()
        assert len(set(names.values())) == len(names)


def test_arrays_are_copied():
    cfg = SMALL["nfnet"]
    tree = to_haiku(cfg, random_params(cfg))
    params = from_haiku(cfg, tree)
    params["head.bias"].zero_()
    params["stages.0.0.skip_gain"].zero_()
    assert_same(from_haiku(cfg, tree), random_params(cfg))
    params = random_params(cfg)
    for leaves in to_haiku(cfg, params).values():
        for array in leaves.values():
            array[...] = 0
    assert_same(params, random_params(cfg))


def test_timms_rules_have_no_haiku_form():
    cfg = SMALL["nf-regnet-timm"]
    for call in (lambda: haiku_names(cfg), lambda: from_haiku(cfg, {}), lambda: to_haiku(cfg, random_params(cfg))):
        with pytest.raises(ConversionError, match="'timm' rules"):
            call()


HAIKU_KERNEL = "NFNet/~/nf_block/~/conv0"
BROKEN_TREES = {
    "missing array": (lambda t: t[HAIKU_KERNEL].pop("w"), "lacks NFNet/~/nf_block/~/conv0:w"),
    "missing module": (lambda t: t.pop(HAIKU_KERNEL), "lacks NFNet/~/nf_block/~/conv0:"),
    "empty": (lambda t: t.clear(), "lacks"),
    "unexpected array": (lambda t: t[HAIKU_KERNEL].update(scale=np.ones(1, np.float32)), "conv0.scale"),
    "unexpected module": (lambda t: t.update(extra={"w": np.ones(1, np.float32)}), "extra.w"),
    "transposed": (lambda t: t[HAIKU_KERNEL].update(w=t[HAIKU_KERNEL]["w"].T), "has shape"),
    "wrong rank": (lambda t: t[HAIKU_KERNEL].update(w=t[HAIKU_KERNEL]["w"][0, 0]), "has shape"),
    "scalar gain": (lambda t: t[HAIKU_KERNEL].update(gain=np.float32(1)), "has shape"),
    "integers": (lambda t: t[HAIKU_KERNEL].update(w=t[HAIKU_KERNEL]["w"].astype(np.int64)), "int64"),
    "booleans": (lambda t: t[HAIKU_KERNEL].update(gain=np.ones(8, bool)), "bool"),
    "objects": (lambda t: t[HAIKU_KERNEL].update(w=t[HAIKU_KERNEL]["w"].astype(object)), "object"),
    "strings": (lambda t: t[HAIKU_KERNEL].update(gain=np.array(["a"] * 8)), "U1"),
    "none": (lambda t: t[HAIKU_KERNEL].update(gain=None), "object"),
    "complex": (lambda t: t[HAIKU_KERNEL].update(gain=np.ones(8, np.complex64)), "complex64"),
}


@pytest.mark.parametrize("case", BROKEN_TREES)
def test_a_tree_that_does_not_fit_is_a_conversion_error(case):
    cfg = SMALL["nfnet"]
    tree = to_haiku(cfg, random_params(cfg))
    break_it, match = BROKEN_TREES[case]
    break_it(tree)
    with pytest.raises(ConversionError, match=match):
        from_haiku(cfg, tree)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.dtype(">f4")])
def test_other_floats_are_read(dtype):
    cfg = SMALL["nfnet"]
    tree = to_haiku(cfg, random_params(cfg))
    other = {m: {k: a.astype(dtype) for k, a in leaves.items()} for m, leaves in tree.items()}
    params = from_haiku(cfg, other)
    expected = torch.from_numpy(tree["NFNet/~/linear"]["b"].astype(dtype).astype(np.float32))
    assert torch.equal(params["head.bias"].float(), expected)


def test_a_tree_of_another_model_is_a_conversion_error():
    tree = to_haiku(SMALL["nf-resnet"], random_params(SMALL["nf-resnet"]))
    with pytest.raises(ConversionError):
        from_haiku(SMALL["nf-resnet-se"], tree)
    with pytest.raises(ConversionError, match="shape"):
        from_haiku(SMALL["nf-resnet"].replace(num_classes=6), tree)


# ---------------------------------------------------------------- timm


@each("name", SMALL)
def test_timm_and_back(name):
    cfg = SMALL[name]
    params = random_params(cfg)
    state = to_timm(cfg, params)
    assert_same(from_timm(cfg, state), params)
    assert sum(v.numel() for v in state.values()) == model.parameter_count(cfg)
    back = to_timm(cfg, from_timm(cfg, state))
    assert_same(back, state)
    state["head.fc.bias"].zero_()
    assert_same(params, random_params(cfg))  # copies


def timm_shapes(cfg) -> dict[str, tuple[int, ...]]:
    # Expanded zeros: shapes of hundreds of millions of parameters without the memory.
    params = {key: torch.zeros(()).expand(shape) for key, (shape, _) in model.specs(cfg).items()}
    meta = {key: value.to("meta") for key, value in params.items()}
    return {key: tuple(value.shape) for key, value in to_timm(cfg, meta).items()}


@each("arch", TIMM)
def test_timms_state_dict(arch):
    """Keys and shapes, by the digest that make_timm_golden.py took of timm's own state dict."""
    cfg = VARIANTS[TIMM[arch]].config.replace(num_classes=10)
    shapes = timm_shapes(cfg)
    listed = timm_golden()["state_shapes"].get(arch)
    if listed is not None:  # a readable difference comes before the digest's
        assert shapes == {key: tuple(shape) for key, shape in listed.items()}
    lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == timm_golden()["architectures"][arch]["state_sha256"]


TIMM_KERNEL = "stages.0.0.conv1.weight"
BROKEN_STATES = {
    "missing": (lambda s: s.pop(TIMM_KERNEL), "lacks stages.0.0.conv1.weight"),
    "empty": (lambda s: s.clear(), "lacks"),
    "unexpected": (lambda s: s.update({"stages.0.0.bn.weight": torch.ones(1)}), "stages.0.0.bn.weight"),
    "prefixed": (lambda s: s.update({f"module.{TIMM_KERNEL}": s.pop(TIMM_KERNEL)}), "module.stages"),
    "misshaped": (lambda s: s.update({TIMM_KERNEL: s[TIMM_KERNEL][..., 0]}), "has shape"),
    "flat gain": (lambda s: s.update({"final_conv.gain": s["final_conv.gain"].flatten()}), "has shape"),
    "integers": (lambda s: s.update({TIMM_KERNEL: s[TIMM_KERNEL].long()}), "int64"),
}


@pytest.mark.parametrize("case", BROKEN_STATES)
def test_a_state_that_does_not_fit_is_a_conversion_error(case):
    cfg = SMALL["nfnet-timm-eca"]
    state = to_timm(cfg, random_params(cfg))
    break_it, match = BROKEN_STATES[case]
    break_it(state)
    with pytest.raises(ConversionError, match=match):
        from_timm(cfg, state)


def test_conversion_errors_are_nfzoo_errors():
    assert issubclass(ConversionError, NfzooError)
    assert issubclass(ConversionError, ValueError)
