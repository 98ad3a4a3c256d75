"""`NFNet.optimize`: what is chosen computes what the model does, and nothing else is used where it would not."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfzoo import ConfigError, NFNet
from nfzoo.runtime import execution
from nfzoo.runtime.execution import Candidate
from tests.support.helpers import SMALL, images, random_params, relative

FOLDED = 1e-5
SIZE = 40


def trained(name: str = "nfnet") -> NFNet:
    made = NFNet(SMALL[name])
    made.load_state_dict(random_params(made.config))
    return made.eval()


class Counted:
    """A stand-in for another library: a program of one shape, whose calls are counted."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.calls, self.wrong = 0, wrong

    def candidate(self, form: str = "openvino") -> Candidate:
        return Candidate(form, True, self._make)

    def _make(self, model: Any, x: Tensor) -> Any:
        own = copy.copy(model)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            pooled = own.embed(x)
            return pooled, own.head(pooled) + self.wrong

        return run


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_SECONDS", 0.0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(execution, "candidates", lambda *_, **__: [counted.candidate()])
    return counted


@pytest.fixture
def model(library: Counted) -> NFNet:
    made = trained().for_inference().optimize(batch=2, size=SIZE)
    library.calls = 0
    return made


def test_it_computes_what_the_model_computes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nfzoo")
    for name in ("nfnet", "nf-regnet"):
        made = trained(name)
        lean = made.for_inference()
        fast = lean.optimize(batch=2, size=SIZE)
        assert lean.execution is None
        chosen = fast.execution
        assert chosen is not None
        assert (chosen.shape, chosen.dtype) == ((2, made.config.in_channels, SIZE, SIZE), torch.float32)
        assert chosen.milliseconds.keys() == {"folded", "folded, channels last", "prepacked"}
        assert all(0 < ms < math.inf for ms in chosen.milliseconds.values())
        assert min(chosen.milliseconds, key=chosen.milliseconds.__getitem__).startswith(chosen.form)
        assert max(chosen.distances.values()) < FOLDED
        assert f"{chosen.form} for 2x" in caplog.text
        with torch.inference_mode():
            for batch, size in ((2, SIZE), (3, 33)):
                x = images(made.config, batch, size, size)
                assert relative(fast(x), made(x)) < FOLDED
                assert relative(fast.embed(x), made.embed(x)) < FOLDED
        again = pickle.loads(pickle.dumps(fast))
        assert again.execution == chosen


def test_it_computes_in_another_precision() -> None:
    made = trained()
    fast = made.for_inference().optimize(size=SIZE, dtype="bf16")
    assert fast.execution is not None
    assert fast.execution.dtype == next(fast.parameters()).dtype == torch.bfloat16
    x = images(made.config, 1, SIZE, SIZE)
    with torch.inference_mode():
        assert relative(fast(x.bfloat16()).float(), made(x)) < execution.TOLERANCES[torch.bfloat16]


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained()
    with pytest.raises(ConfigError, match=r"call for_inference\(\) first"):
        made.optimize()
    lean = made.for_inference()
    for options, message in (
        ({"backend": "tensorrt"}, "no backend 'tensorrt'; there are torch, openvino, any"),
        ({"batch": 0}, "batch must be a positive integer, not 0"),
        ({"size": 1.5}, "size must be a positive integer, not 1.5"),
        ({"dtype": "int8"}, "the dtype is float32, bf16 or a torch.dtype of floating point, not 'int8'"),
        ({"size": SIZE, "tolerance": -1.0}, "folded: its logits differ by .*; prepacked: its logits differ"),
    ):
        with pytest.raises(ConfigError, match=message):
            lean.optimize(**options)  # type: ignore[arg-type]
    monkeypatch.setattr(execution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the backend 'openvino' needs openvino: pip install 'nfzoo\[openvino\]'"):
        lean.optimize(backend="openvino")
    assert [c.form for c in execution.candidates("any", compile=False, dtype=torch.float32)].count("openvino") == 0


def test_what_fails_or_is_inexact_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, x: Tensor) -> Any:
        raise RuntimeError("no compiler\nhere")

    found = [
        Counted(wrong=1.0).candidate("wrong"),
        Counted(wrong=math.nan).candidate("nan"),
        Candidate("broken", True, broken),
        Counted().candidate("right"),
    ]
    monkeypatch.setattr(execution, "candidates", lambda *_, **__: found)
    chosen = trained().for_inference().optimize(size=SIZE).execution
    assert chosen is not None
    assert chosen.form == "right"
    assert chosen.left_out["broken"] == "RuntimeError: no compiler here"
    assert "its logits differ by" in chosen.left_out["wrong"]
    assert "not finite" in chosen.left_out["nan"]
    assert "without broken: RuntimeError: no compiler here" in str(chosen)


def test_a_program_computes_its_own_shape_alone(model: NFNet, library: Counted) -> None:
    x = images(model.config, 2, SIZE, SIZE)
    with torch.inference_mode():
        whole, pooled = model(x), model.embed(x)
        assert library.calls == 2
        assert relative(model(x[:1]), whole[:1]) < FOLDED
        assert relative(model.embed(x[:1]), pooled[:1]) < FOLDED
        model.features(x)
        assert library.calls == 2
    assert model(x.clone().requires_grad_()).requires_grad  # gradients of images
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.fx.symbolic_trace(model)(x)
    torch.export.export(model, (x,))
    assert library.calls == 2


def test_a_program_is_not_used_once_the_model_is_another(
    model: NFNet, library: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    x, seen = images(model.config, 2, SIZE, SIZE), []
    with torch.no_grad():
        before = model(x)
        hook = model.get_submodule("stem.conv0").register_forward_hook(lambda *_: seen.append(1))
        model(x)
        assert seen == [1]
        hook.remove()
        model(x)
        assert library.calls == 2
        model.get_parameter("head.bias").add_(1.0)
        for _ in range(2):
            assert relative(model(x), before + 1.0) < FOLDED
        assert [r.message for r in caplog.records if "weights have changed" in r.message] == [
            "the weights have changed since optimize(), so the blocks compute: call optimize() again"
        ]
        model.double()
        model(x.double())
        model.float()
        model.head = nn.Identity()
        assert torch.equal(model(x), model.embed(x))
    assert library.calls == 2


def test_copies_compute_block_by_block(model: NFNet, library: Counted, caplog: pytest.LogCaptureFixture) -> None:
    x = images(model.config, 2, SIZE, SIZE)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.execution is None
            assert relative(copied(x), expected) < FOLDED
    assert library.calls == 1
    assert caplog.text.count("a copy of the model computes block by block, without openvino: call optimize()") == 2
    assert model.execution is not None


def test_many_images_are_worth_a_folded_form() -> None:
    made, cpu = trained(), torch.device("cpu")
    assert execution.for_many(made, execution.MANY - 1, cpu) is made
    assert execution.for_many(made, 10**6, torch.device("cuda")) is made
    lean = execution.for_many(made, execution.MANY, cpu)
    x = images(made.config, 2, SIZE, SIZE)
    with torch.no_grad():
        assert lean.config.folded
        assert relative(lean(x), made(x)) < FOLDED
    assert execution.for_many(lean, execution.MANY, cpu) is lean
    hook = made.get_submodule("stem.conv0").register_forward_hook(lambda *_: None)
    assert execution.for_many(made, execution.MANY, cpu) is made
    hook.remove()
    made.head = nn.Sequential(nn.Linear(made.num_features, 3))
    assert execution.for_many(made, execution.MANY, cpu) is made


@pytest.mark.slow
def test_what_is_compiled_is_measured_as_well() -> None:
    made = trained()
    fast = made.for_inference().optimize(size=SIZE, compile=True)
    assert fast.execution is not None
    assert fast.execution.milliseconds.keys() >= {"compiled", "frozen"}, fast.execution.left_out
    x = images(made.config, 1, SIZE, SIZE)
    with torch.inference_mode():
        assert relative(fast(x), made(x)) < FOLDED
