"""oneDNN's convolutions of inference: the same numbers, taken only where nothing else is asked of a tensor."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nfzoo import ConfigError, NFNet, bulk, predict
from nfzoo.models import onednn
from tests.support.helpers import SMALL, assert_same, images, random_params, relative
from tests.support.loops import each
from tests.support.pictures import write_images

EXACT = 1e-6  # the same operations on float32, sums in another order
FOLDED = 1e-5
BFLOAT16 = 3e-2  # eight bits, in a few dozen layers

# Not by nfzoo's own judgement: where torch has oneDNN and the operator has gone, this has to fail.
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def lean(name: str = "nfnet") -> NFNet:
    made = NFNet(SMALL[name])
    made.load_state_dict(random_params(made.config))
    return made.eval().for_inference()


def plainly(model: NFNet, x: torch.Tensor) -> torch.Tensor:
    """The folded model by torch's own convolutions, which gradients ask for."""
    with torch.enable_grad():
        wanted = x.clone().requires_grad_()
        assert not onednn.supports(wanted)
        return model(wanted).detach()


@each("name", SMALL)
@each("output_stride", [8, 32])
def test_it_is_the_folded_model(name, output_stride):
    made = NFNet(SMALL[name].replace(output_stride=output_stride))
    made.load_state_dict(random_params(made.config))
    x = images(made.config, 2, 45, 37)
    folded = made.eval().for_inference()
    expected = plainly(folded, x)
    with torch.no_grad():
        assert onednn.supports(x)
        assert relative(folded(x), expected) < EXACT
        packed = copy.deepcopy(folded).prepack()
        for _ in range(2):
            assert relative(packed(x), expected) < EXACT
        assert relative(packed(x), made(x)) < FOLDED
        for ours, theirs in zip(packed.features(x), folded.features(x), strict=True):
            assert relative(ours, theirs) < EXACT
        assert relative(packed.embed(x), folded.embed(x)) < EXACT
        # Another size and layout of image than the one that the weights were laid out for.
        y = images(made.config, 1, 64, 40).to(memory_format=torch.channels_last)
        assert relative(packed(y), plainly(folded, y)) < EXACT


@each("activation", [None, "gelu_tanh", "gelu", "relu", "silu"])
@each("geometry", [{}, {"stride": 2}, {"dilation": 2, "groups": 2}, {"same": False, "stride": 2}])
def test_one_convolution(activation, geometry):
    g = torch.Generator().manual_seed(0)
    groups = geometry.get("groups", 1)
    x, weight = torch.randn(2, 4, 9, 8, generator=g), torch.randn(6, 4 // groups, 3, 3, generator=g)
    bias = torch.randn(6, generator=g)
    expected = onednn.conv2d(x.clone().requires_grad_(), weight, bias, activation=activation, **geometry)
    assert expected.grad_fn is not None
    with torch.no_grad():
        for form in (weight, onednn.PackedWeight(weight)):
            for value in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
                assert relative(onednn.conv2d(value, form, bias, activation=activation, **geometry), expected) < EXACT
        none = onednn.conv2d(x[:0], onednn.PackedWeight(weight), bias, activation=activation, **geometry)
        assert none.shape == (0, *expected.shape[1:])


def test_changed_weights_are_laid_out_again():
    model, x = lean().prepack(), images(SMALL["nfnet"])
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            p.mul_(1.01)
        assert relative(model(x), plainly(model, x)) < EXACT
        model.load_state_dict(lean().state_dict())
        assert relative(model(x), plainly(model, x)) < EXACT
        model.to(torch.bfloat16).to(torch.float32)
        assert relative(model(x), plainly(model, x)) < EXACT
        model.load_state_dict({k: v.clone() for k, v in lean().state_dict().items()}, assign=True)
        assert relative(model(x), plainly(model, x)) < EXACT


def test_threads_share_a_model():
    model = lean().prepack()
    sizes = [images(model.config, batch, 32 + 8 * batch) for batch in (1, 2, 3)]
    expected = [plainly(model, x) for x in sizes]

    def compute(i: int) -> float:
        with torch.no_grad():
            return relative(model(sizes[i % 3]), expected[i % 3])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert max(pool.map(compute, range(60))) < EXACT


def test_bfloat16():
    model = lean()
    x = images(model.config)
    with torch.no_grad():
        expected = model(x)
        assert relative(model.prepack().to(torch.bfloat16)(x.bfloat16()).float(), expected) < BFLOAT16


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_where_more_is_asked_torchs_own_convolution_computes():
    model = lean().prepack()
    x = images(model.config)
    expected = plainly(model, x)
    wanted = x.clone().requires_grad_()
    model(wanted).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    p = model.get_parameter("stages.1.0.conv1.weight").requires_grad_()
    assert torch.autograd.grad(model(x).sum(), p)[0].abs().sum() > 0
    p.requires_grad_(False)
    assert relative(model(x), expected) < EXACT
    with torch.no_grad():
        assert relative(torch.func.vmap(lambda image: model(image[None])[0])(x), expected) < EXACT
        assert torch.func.jvp(model, (x,), (x,))[1].shape == expected.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert {value.dtype for value in (model(x), model.features(x)[0])} == {torch.bfloat16}
            assert relative(model(x).float(), expected) < BFLOAT16
        assert relative(model.double()(x.double()), expected.double()) < FOLDED
    with torch.inference_mode():
        assert relative(lean().prepack()(x), expected) < EXACT
    program = torch.export.export(lean().prepack(), (x,))
    assert "mkldnn" not in str(program.graph)
    assert relative(program.module()(x), expected) < EXACT


def test_who_counts_or_records_operators_sees_torchs_own():
    model = lean().prepack()
    x = images(model.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 1e5
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (2, 5)


def test_weights_made_in_inference_mode_are_laid_out_too():
    with torch.inference_mode():
        model = lean().prepack()
        x = images(model.config)
        first = model(x)
        block: Any = model.get_submodule("stem.conv0")
        assert block.fn._weights["weight"]._cache is not None
        assert torch.equal(model(x), first)
    assert relative(first, lean()(x)) < EXACT


def test_other_types_of_numbers_are_refused_by_torch():
    model = lean().prepack()
    x = images(model.config)
    with torch.no_grad():
        model(x)
        with pytest.raises(RuntimeError, match="should be the same"):
            model(x.bfloat16())


@pytest.mark.slow
def test_predict_takes_what_the_model_is_made_for_and_bulk_leaves_it_alone(tmp_path):
    model = lean().prepack()
    before: dict[str, Any] = {name: m.fn for name, m in model.named_modules() if hasattr(m, "fn")}
    x = images(model.config, 3)
    found = predict.classify(model, list(x), topk=1)
    assert all(fn._weights or name in ("pool", "head") for name, fn in before.items())
    again = predict.classify(model.prepack(enabled=False), list(x), topk=1)
    assert [row[0][0] for row in found] == [row[0][0] for row in again]
    model.compile_blocks(backend="eager")
    before = {name: m.fn for name, m in model.named_modules() if hasattr(m, "fn")}
    write_images(tmp_path / "photos", {"bee": 6})
    bulk.predict_all(model, str(tmp_path / "photos"), tmp_path / "out", batch_size=4, workers=0)
    assert {name: m.fn for name, m in model.named_modules() if hasattr(m, "fn")} == before


def test_keys_copies_and_switching_off():
    model = lean()
    x, keys = images(model.config), list(model.state_dict())
    packed = model.prepack()
    assert packed is model
    with torch.no_grad():
        expected = packed(x)
        assert list(packed.state_dict()) == keys
        twin, again = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
        for other in (twin, again):
            assert isinstance(other.get_submodule("stem.conv0").fn, onednn.PackedBlock)
            assert torch.equal(other(x), expected)
            assert_same(other.state_dict(), packed.state_dict())
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(packed(x), expected)
        assert relative(packed.compile_blocks(backend="eager")(x), expected) < EXACT
        assert not isinstance(packed.prepack(enabled=False).get_submodule("stem.conv0").fn, onednn.PackedBlock)


def test_a_model_to_be_trained_is_refused():
    with pytest.raises(ConfigError, match="for_inference"):
        NFNet(SMALL["nfnet"]).prepack()


def test_the_tanh_gelu_of_large_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_WIDE", True)  # elsewhere it is as exact, and no faster
    calls = []
    operator = onednn.torch_internals.onednn_convolution
    monkeypatch.setattr(
        onednn.torch_internals, "onednn_convolution", lambda *a, **k: calls.append(1) or operator(*a, **k)
    )
    for dtype, exact in ((torch.float32, EXACT), (torch.bfloat16, 1e-2)):
        if dtype not in onednn._DTYPES:  # on processors without bfloat16
            continue
        x = 3 * torch.randn(2, 48, 33, 33).to(dtype).contiguous(memory_format=torch.channels_last)
        expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
        calls.clear()
        with torch.inference_mode():
            found = onednn.activate(x, "gelu_tanh")
            assert len(calls) == 1
            assert found.dtype == dtype
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert relative(found.double(), expected) < exact
            for other in (x[:, :47], x.contiguous(), x[:1, :16], x.double()):
                onednn.activate(other, "gelu_tanh")
            onednn.activate(x, "silu")
            monkeypatch.setattr(onednn, "_WIDE", False)
            onednn.activate(x, "gelu_tanh")
            monkeypatch.setattr(onednn, "_WIDE", True)
        assert onednn.activate(x.clone().requires_grad_(), "gelu_tanh").requires_grad
        assert len(calls) == 1
