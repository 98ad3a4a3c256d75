"""Classification of tensors and of files."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.nn import NFNet, create
from nfzoo.predict import classify, embedding_columns, image_files, label_columns, predict, weights_hash
from tests.evaluate.test_accuracy import LABELS, make_model

PROBABILITY = 1e-5  # other batches sum in another order


@pytest.fixture(scope="module")
def model() -> NFNet:
    model = create("nfnet-test", num_classes=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():  # else all images get almost the same logits
            p.mul_(100 if name == "head.weight" else 1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "c.PNG"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def random_images(n: int) -> list[torch.Tensor]:
    return list(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def test_classify_is_softmax_sorted(model: NFNet) -> None:
    images = random_images(5)
    with torch.no_grad():
        expected = model.eval()(torch.stack(images)).softmax(1)
    for row, found in zip(expected, classify(model, images, topk=9), strict=True):
        assert [label for label, _ in found] == [f"class {i}" for i in row.argsort(descending=True).tolist()]
        np.testing.assert_allclose([p for _, p in found], row.sort(descending=True).values, atol=PROBABILITY)
        assert abs(sum(p for _, p in found) - 1) < PROBABILITY


def test_a_temperature_divides_the_logits(model: NFNet) -> None:
    images = random_images(3)
    with torch.no_grad():
        expected = (model.eval()(torch.stack(images)) / 2.5).softmax(1).max(1).values
    model.temperature = 2.5
    found = [row[0][1] for row in classify(model, images)]
    model.temperature = None
    np.testing.assert_allclose(found, expected, atol=PROBABILITY)
    assert max(abs(expected - torch.tensor([row[0][1] for row in classify(model, images)]))) > 0.01


def test_sets_are_the_labels_that_reach_their_thresholds(model: NFNet, folder: Path, tmp_path: Path) -> None:
    images = random_images(6)
    with torch.no_grad():
        probabilities = model.eval()(torch.stack(images)).sigmoid()
    twin = copy.deepcopy(model)
    twin.problem_type = MULTI_LABEL
    limits = probabilities.median(0).values + 1e-3
    for thresholds in (None, tuple(limits.tolist()), (0.0,) * 4, (1.0,) * 4):
        twin.thresholds = thresholds
        reached = torch.tensor(thresholds or [0.5] * 4)
        found = classify(twin, images, batch_size=4)
        for row, answer in zip(probabilities, found, strict=True):
            order = [i for i in row.argsort(descending=True).tolist() if row[i] >= reached[i]]
            assert [label for label, _ in answer] == [f"class {i}" for i in order]
            np.testing.assert_allclose([p for _, p in answer], row[order], atol=PROBABILITY)
        assert classify(twin, images, topk=1) == [answer[:1] for answer in classify(twin, images)]
    assert classify(twin, images) == [[]] * 6  # of thresholds of 1
    assert twin.predict(folder / "a.jpg") == []
    (answer,) = predict(twin, [folder / "a.jpg"], sheet=tmp_path / "sheet.png", explain="occlusion")
    assert answer.top == []
    assert (tmp_path / "sheet.png").exists()
    twin.thresholds = None
    lean, own = (dict(each.predict(folder / "a.jpg")) for each in (twin.for_inference(), twin))
    assert lean == pytest.approx(own, abs=1e-4)


def test_classify_does_not_depend_on_batches_or_mode(model: NFNet) -> None:
    images = random_images(5)
    one = classify(model.eval(), images, batch_size=1, topk=2)
    many = classify(model.train(), images, batch_size=3, topk=2)  # training mode would draw dropout
    assert model.training
    assert [[label for label, _ in row] for row in one] == [[label for label, _ in row] for row in many]
    np.testing.assert_allclose([p for r in one for _, p in r], [p for r in many for _, p in r], atol=PROBABILITY)
    assert classify(model, []) == []


def test_labels_are_the_models() -> None:
    named = create("nfnet-test", labels=["cat", "dog"])
    assert {label for label, _ in classify(named, random_images(1))[0]} == {"cat", "dog"}


def test_half_precision(model: NFNet) -> None:
    half = create("nfnet-test", num_classes=4, dtype=torch.bfloat16)
    assert abs(sum(p for _, p in classify(half, random_images(1))[0]) - 1) < PROBABILITY


def test_bad_requests(model: NFNet, folder: Path) -> None:
    wrong: list[dict[str, Any]] = [{"topk": 0}, {"batch_size": 0}, {"topk": True}]
    for options in wrong:
        name = next(iter(options))
        with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
            classify(model, random_images(1), **options)
        with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
            predict(model, [folder / "b.png"], **options)
    broken = create("nfnet-test", num_classes=2)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        classify(broken, random_images(1))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_predict_prepares_and_keeps_the_order(model: NFNet, folder: Path, batch_size: int) -> None:
    paths = [folder / "c.PNG", folder / "a.jpg", folder / "b.png"]
    found = predict(model, paths, topk=3, batch_size=batch_size)
    assert [p.path for p in found] == paths
    for prediction in found:
        (alone,) = classify(model, [model.preprocess(prediction.path)], topk=3)
        assert [label for label, _ in prediction.top] == [label for label, _ in alone]
        np.testing.assert_allclose([p for _, p in prediction.top], [p for _, p in alone], atol=PROBABILITY)
    assert len({tuple(p for _, p in prediction.top) for prediction in found}) == 3


def test_the_sheet(model: NFNet, folder: Path) -> None:
    output = folder / "new" / "sheet.png"
    Image.new("RGB", (50, 50), (255, 0, 0)).save(folder / "red.png")
    predict(model, [folder / "red.png"] * 5, sheet=output, batch_size=2, topk=2)
    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
        assert (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum() == 5 * 256 * 256
    assert [p.name for p in output.parent.iterdir()] == ["sheet.png"]


def test_nothing_is_written_for_bad_images(model: NFNet, folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"broken\.png"):
        predict(model, [folder / "a.jpg", folder / "broken.png"], sheet=folder / "sheet.png")
    assert not (folder / "sheet.png").exists()
    with pytest.raises(DataError, match=r"must end in \.png"):
        predict(model, [folder / "a.jpg"], sheet=folder / "sheet.jpg")
    before = (folder / "b.png").read_bytes()
    with pytest.raises(DataError, match="would overwrite"):
        predict(model, [folder / "a.jpg", folder / "b.png"], sheet=folder / "x" / ".." / "b.png")
    assert (folder / "b.png").read_bytes() == before
    with pytest.raises(DataError, match="at least one"):
        predict(model, [])


def test_a_greyscale_model(folder: Path) -> None:
    grey = create("nfnet-test", num_classes=2, in_channels=1)
    (prediction,) = predict(grey, [folder / "b.png"], sheet=folder / "sheet.png")
    assert len(prediction.top) == 2


@pytest.mark.parametrize("device", ["nonsense", "meta", "cpu:x"])
def test_devices_that_are_not_there(model: NFNet, folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"the device '{device}' cannot be used here: [^\n]+$"):
        predict(model, [folder / "b.png"], device=device)


def test_image_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    (folder / "deeper.png").mkdir()
    assert [p.name for p in image_files([folder])] == ["a.jpg", "b.png", "c.PNG"]
    assert image_files([folder / "notes.txt", folder / "b.png"]) == [folder / "notes.txt", folder / "b.png"]
    assert [p.name for p in image_files([folder], without=folder / "deeper.png" / ".." / "b.png")] == ["a.jpg", "c.PNG"]
    with pytest.raises(DataError, match="absent does not exist"):
        image_files([folder, folder / "absent"])
    with pytest.raises(DataError, match="holds no images, nor do the folders in it"):
        image_files([folder / "deeper.png"])
    classes = tmp_path_factory.mktemp("classes")
    for name in ("dog", "cat"):
        shutil.copytree(folder, classes / name)
    (classes / "deep" / "er").mkdir(parents=True)
    assert [str(p.relative_to(classes)) for p in image_files([classes])] == [
        f"{name}/{file}" for name in ("cat", "dog") for file in ("a.jpg", "b.png", "c.PNG")
    ]


def test_a_model_predicts_files_folders_lists_and_images(model: NFNet, folder: Path) -> None:
    """All the same as `nfzoo.predict.predict` of the files, one after the other."""
    files = image_files([folder])
    expected = [p.top for p in predict(model, files, topk=2, batch_size=2)]
    assert list(model.predict(folder, topk=2, batch_size=2)) == files
    with Image.open(files[0]) as image:
        results = {
            "folder": list(model.predict(str(folder), topk=2, batch_size=2).values()),
            "files": model.predict(files, topk=2, batch_size=2),
            "tuple": [*model.predict((files[0], str(files[1])), topk=2, batch_size=2), expected[2]],
            "one by one": [model.predict(file, topk=2) for file in files],
            "images": [model.predict(image, topk=2), *expected[1:]],
            "array": [model.predict(np.asarray(image.convert("RGB")), topk=2), *expected[1:]],
        }
    for name, found in results.items():
        for top, wanted in zip(found, expected, strict=True):
            assert [label for label, _ in top] == [label for label, _ in wanted], name
            assert [p for _, p in top] == pytest.approx([p for _, p in wanted], abs=1e-5), name
    assert model.predict([]) == []
    with pytest.raises(DataError, match="does not exist"):
        model.predict(folder / "absent.png")
    with pytest.raises(ConfigError, match="topk"):
        model.predict(folder, topk=0)


# -- for very many images


def test_the_hash_follows_all_that_the_results_depend_on(tmp_path: Path) -> None:
    model = make_model()
    first = weights_hash(model)
    again = NFNet.from_pretrained(model.save_pretrained(tmp_path / "model"))
    again.name, again.provenance = "another", {"data": "another"}
    assert weights_hash(again) == first
    with torch.no_grad():
        p = next(iter(again.parameters()))
        p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0))
    assert weights_hash(again) != first
    assert weights_hash(make_model(labels=LABELS[::-1])) != first
    assert weights_hash(make_model(labels=None)) != first
    assert weights_hash(model.for_inference()) != first
    other = make_model()
    other.preprocessing = dataclasses.replace(other.preprocessing, test_size=64)
    assert weights_hash(other) != first


def test_top_labels_come_in_the_order_of_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    found = label_columns(logits, 2, ("x", "y", "z"))
    assert found["classes"].tolist() == [[1, 2], [0, 2]]
    assert found["labels"] == [["y", "z"], ["x", "z"]]
    assert torch.equal(torch.from_numpy(found["probabilities"]), logits.softmax(1).sort(descending=True).values[:, :2])


def test_half_precision_is_not_overflown() -> None:
    assert embedding_columns(torch.tensor([[65504.0]]), "float16")["embeddings"].tolist() == [[65504.0]]
    with pytest.raises(ConfigError, match="7e\\+04 do not fit into float16; take --dtype float32"):
        embedding_columns(torch.tensor([[7e4]]), "float16")
