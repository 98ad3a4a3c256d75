"""Every way computes what the model computes, in its own precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nfzoo.benchmark.contenders import CONTENDERS, Contender, chosen
from nfzoo.benchmark.images import Data, random_images
from nfzoo.benchmark.measure import Result, compare
from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet, create
from tests.support.helpers import random_params
from tests.support.loops import each

# Of the logits. Float32 sums in another order; bf16 has 8 bits, which some 20 layers round; int8 has 256 steps.
DISTANCE = {"float32": 1e-5, "bf16": 0.05, "int8": 0.3}


@pytest.fixture(scope="module")
def model() -> NFNet:
    model = create("nfnet-test", num_classes=5)
    model.load_state_dict(random_params(model.config))
    return model


def check(model: NFNet, contenders: Sequence[Contender], *, batch: int = 2) -> list[Result]:
    data = random_images(model, 5)
    calibration = torch.cat([data.images, data.images.flip(0)])
    before = {name: p.clone() for name, p in model.named_parameters()}
    results = compare(model, contenders, Data(data.images, None, calibration, "x"), batch=batch, rounds=1)
    for contender, result in zip(contenders, results, strict=True):
        where = (contender.format, contender.precision)
        assert (result.format, result.precision) == where
        assert result.status == "measured", (*where, result.reason)
        assert result.distance is not None
        assert result.megabytes is not None
        assert result.distance <= DISTANCE[contender.precision], where
        assert (result.distance > 1e-4) == (contender.precision != "float32"), where  # else it computed in float32
        assert result.megabytes > 0.15
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    return results


def test_in_torch(model: NFNet) -> None:
    results = check(model, chosen(["eager", "folded", "prepacked", "optimized"], None))
    assert len(results) == 8
    mb = {(r.format, r.precision): r.megabytes or 0 for r in results}
    assert mb["folded", "bf16"] == mb["folded", "float32"] / 2


@pytest.mark.slow
def test_exported(model: NFNet) -> None:
    results = check(model, chosen(["torch", "onnx"], None), batch=1)
    assert all((r.load_seconds is None) == (r.format == "eager") for r in results)


@pytest.mark.long
def test_compiled(model: NFNet) -> None:
    check(model, chosen(["compiled", "aoti"], None))


@each(
    ("formats", "precisions", "found"),
    [
        (None, None, len(CONTENDERS)),
        (["eager"], None, 2),
        (["onnx"], None, 3),  # and the reference
        (["onnx"], ["int8"], 2),
        (None, ["bf16"], 1 + sum(c.precision == "bf16" for c in CONTENDERS)),
    ],
)
def test_choice(formats: list[str] | None, precisions: list[str] | None, found: int) -> None:
    contenders = chosen(formats, precisions)
    assert len(contenders) == len(set(contenders)) == found
    assert contenders[0] == CONTENDERS[0]
    assert (contenders[0].format, contenders[0].precision) == ("eager", "float32")


def test_choices_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="no format 'tensorrt'; there are eager, folded"):
        chosen(["tensorrt"], None)
    with pytest.raises(ConfigError, match="no precision 'int4'; there are float32, bf16, int8"):
        chosen(None, ["int4"])
    with pytest.raises(ConfigError, match="eager cannot compute in int8"):
        chosen(["eager"], ["int8"])


def test_what_is_missing_is_in_an_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for contender in CONTENDERS:
        assert (contender.extra is None) == (not contender.needs)
        for extra in contender.extra.split(",") if contender.extra else ():
            assert f"\n{extra} = [" in text
