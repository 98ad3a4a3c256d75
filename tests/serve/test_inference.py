"""The folded model of a server answers as the model itself, whatever shares a batch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.errors import CheckpointError, DataError
from nfzoo.nn import NFNet
from nfzoo.serve.inference import Inference, Question

PROBABILITY = 1e-4  # folding multiplies gains into weights, and other batches sum in another order
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def inference(model: NFNet) -> Inference:
    return Inference(model)


def test_labels_are_those_of_predict(model: NFNet, inference: Inference, photos: list[Path]) -> None:
    pixels = [inference.read(path.read_bytes()) for path in photos]
    together = inference.answer([Question(p, topk=3) for p in pixels])
    for path, p, found in zip(photos, pixels, together, strict=True):
        labels, probabilities = zip(*model.predict(path, topk=3), strict=True)
        for answer in (found, *inference.answer([Question(p, topk=3)])):
            assert [row["label"] for row in answer] == list(labels)
            np.testing.assert_allclose([row["probability"] for row in answer], probabilities, atol=PROBABILITY)
    assert len({tuple(row["label"] for row in found) for found in together}) > 1


def test_features_and_labels_share_a_batch(model: NFNet, inference: Inference, photos: list[Path]) -> None:
    pixels = [inference.read(path.read_bytes()) for path in photos]
    asked = [Question(p, embed=i % 2 == 0) for i, p in enumerate(pixels)]
    answers = inference.answer(asked)
    with torch.inference_mode():
        expected = model.embed(torch.stack([model.preprocess(path) for path in photos]))
    for i in (0, 2):
        np.testing.assert_allclose(answers[i], expected[i], rtol=RELATIVE, atol=RELATIVE)
    assert answers[1][0]["label"] == model.predict(photos[1])[0][0]


def test_temperature_and_thresholds(model: NFNet, photos: list[Path]) -> None:
    twin = copy.deepcopy(model)
    twin.temperature = 5.0
    pixels = [twin.preprocess(path) for path in photos]
    for path, found in zip(photos, Inference(twin).answer([Question(p) for p in pixels]), strict=True):
        expected = twin.predict(path)[0][1]
        assert abs(found[0]["probability"] - expected) < PROBABILITY < abs(expected - model.predict(path)[0][1])
    twin.temperature, twin.problem_type = None, MULTI_LABEL
    with torch.inference_mode():
        middle = model(torch.stack(pixels)).sigmoid().median(0).values
    twin.thresholds = tuple((middle + 1e-3).tolist())
    answers = Inference(twin).answer([Question(p) for p in pixels])
    sets = [[row["label"] for row in answer] for answer in answers]
    assert sets == [[label for label, _ in twin.predict(path)] for path in photos]
    assert len(set(map(tuple, sets))) > 1


def test_the_model_stays_as_it_is(model: NFNet, photos: list[Path]) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    answers = Inference(model).answer([Question(model.preprocess(photos[0]))])
    assert not model.config.folded
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lean = Inference(model.for_inference()).answer([Question(model.preprocess(photos[0]))])
    assert lean == answers


def test_outputs_that_are_not_finite(model: NFNet, inference: Inference, photos: list[Path]) -> None:
    good = inference.read(photos[0].read_bytes())
    answers = inference.answer([Question(good), Question(good * float("nan")), Question(good)])
    assert isinstance(answers[1], CheckpointError)
    assert answers[0] == answers[2]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        Inference(broken)


def test_files_that_are_no_images(inference: Inference, photos: list[Path]) -> None:
    for content, message in (
        (b"", "the image is empty"),
        (b"hello", "the image is no image of a known format"),
        (photos[1].read_bytes()[:300], "the image cannot be decoded"),
    ):
        with pytest.raises(DataError, match=message):
            inference.read(content)
