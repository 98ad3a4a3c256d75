"""nfzoo's folders in transformers: logits, pixels, labels, fine-tuning, and the way back."""

from __future__ import annotations

import builtins
import copy
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from benchmarks.peer import declare_torchvision

declare_torchvision()

from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import nfzoo  # noqa: E402
import nfzoo.integrations.transformers as integration  # noqa: E402
from nfzoo import CheckpointError, ConfigError, DataError, NFNet, Preprocessing  # noqa: E402
from nfzoo.checkpoint.description import CODE_FILE, PROCESSOR_FILE  # noqa: E402
from nfzoo.checkpoint.model_folder import MULTI_LABEL, Description  # noqa: E402
from nfzoo.integrations.transformers import NFZooConfig, NFZooForImageClassification, NFZooImageProcessor  # noqa: E402
from tests.support.helpers import FAMILIES, SMALL, assert_same, random_params  # noqa: E402
from tests.support.hub_server import HubServer  # noqa: E402
from tests.support.loops import each  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("cat", "dög", "a <b>", "d", "e")
TOLERANCE = 1e-5
"""Of the largest logit: the same operations, on weights at another address, which moves the last bits of a product."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(autouse=True)
def no_questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks on the terminal whether it may run the code of a folder, which is never needed here."""
    asked: list[str] = []

    def ask(text: str = "") -> str:
        asked.append(text)
        return "n"

    monkeypatch.setattr(builtins, "input", ask)
    yield
    assert asked == []


def made(base: str = "nfnet", **about: Any) -> NFNet:
    config = about.pop("config", SMALL[base])
    preprocessing = about.pop("preprocessing", Preprocessing(train_size=24, test_size=32, margin=4))
    about = {"labels": LABELS if config.num_classes == 5 else None, **about}
    description = Description(config, preprocessing.for_channels(config.in_channels), **about)
    return NFNet.from_params(description, random_params(config)).eval()


@pytest.fixture(scope="module")
def model() -> NFNet:
    return made()


@pytest.fixture(scope="module")
def folder(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("transformers") / "model")


def inputs(model: NFNet, n: int = 2, size: int = 40) -> torch.Tensor:
    return torch.randn(n, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def assert_loads(source: Path, model: NFNet, **options: Any) -> Any:
    loaded, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **options)
    assert {key: list(value) for key, value in info.items() if value} == {}
    with torch.no_grad():
        assert_close(loaded(inputs(model)).logits, model(inputs(model)))
    return loaded


# ---------------------------------------------------------------- logits and names


VARIETY: dict[str, Callable[[], NFNet]] = {
    **{name: lambda name=name: made(name) for name in (*FAMILIES, "nfnet-timm-eca", "nf-resnet-timm")},
    "folded": lambda: made().for_inference(),
    "grey": lambda: made(config=SMALL["nfnet"].replace(in_channels=1)),
    "five channels": lambda: made(config=SMALL["nfnet"].replace(in_channels=5)),
    "no labels": lambda: made(labels=None),
    "one class": lambda: made(config=SMALL["nfnet"].replace(num_classes=1)),
    "several labels": lambda: made(problem_type=MULTI_LABEL, thresholds=(0.1, 0.2, 0.3, 0.4, 0.5)),
    "temperature": lambda: made(temperature=1.5, provenance={"data": "mine"}, name="mine"),
    "dilated": lambda: made(config=SMALL["nfnet"].replace(output_stride=8)),
}


@each("variety", VARIETY)
def test_logits_names_and_the_way_back(tmp_path_factory: pytest.TempPathFactory, variety: str) -> None:
    tmp_path, model = tmp_path_factory.mktemp("variety"), VARIETY[variety]()
    loaded = assert_loads(model.save_pretrained(tmp_path / "m"), model)
    assert not loaded.training
    names = model.labels or [f"LABEL_{i}" for i in range(model.config.num_classes)]
    assert [loaded.config.id2label[i] for i in range(len(names))] == list(names)
    assert loaded.config.label2id == {name: i for i, name in enumerate(names)}
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", PROCESSOR_FILE, CODE_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes(), name
    back = nfzoo.from_pretrained(tmp_path / "again")
    assert_same(back.state_dict(), model.state_dict())
    assert back.description == model.description
    assert loaded.description() == model.description
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_configuration(folder: Path, tmp_path: Path, model: NFNet) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is NFZooConfig
    assert (config.num_labels, config.problem_type) == (5, "single_label_classification")
    assert config.description() == model.description
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
    assert NFZooConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert config != AutoConfig.from_pretrained(folder, num_labels=3)
    assert NFZooConfig.from_description(model.description).description() == model.description
    config.save_pretrained(tmp_path / "c")
    assert AutoConfig.from_pretrained(tmp_path / "c").description() == model.description
    assert "LABEL_" not in repr(config)
    changed = AutoConfig.from_pretrained(folder, num_labels=3)
    assert (changed.num_labels, changed.description().labels, changed.description().config.num_classes) == (3, None, 3)
    named = AutoConfig.from_pretrained(folder, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1}, num_labels=2)
    assert named.description().labels == ("x", "y")
    with pytest.raises(ConfigError, match="num_labels is 3, and id2label has 2 names"):
        AutoConfig.from_pretrained(folder, id2label={0: "x", 1: "y"}, num_labels=3)
    small = NFZooConfig(name="nfnet-test", num_labels=4)
    assert small.description().config == nfzoo.variant("nfnet-test").config.replace(num_classes=4)
    assert NFZooConfig(name="nfnet-test", id2label={0: "x", 1: "y"}).description().labels == ("x", "y")
    with pytest.raises(ConfigError, match=r"name='nfnet-f0'"):
        NFZooConfig()
    with pytest.raises(CheckpointError, match="unknown keys tempreature"):
        NFZooConfig(**config.to_dict(), tempreature=1.0)


def test_fields_that_contradict_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", PROCESSOR_FILE, "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    fields = json.loads((folder / "config.json").read_text())
    fields["id2label"]["1"] = "cow"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="'id2label' has 'cow' for class 1, and 'labels' 'dög'"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    processor = json.loads((folder / PROCESSOR_FILE).read_text())
    for change, message in (
        ({"crop_size": {"height": 24, "width": 24}}, "'crop_size' is .*24.*, and 'preprocessing' makes it .*32"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "'image_mean'"),
        ({"do_flip": True}, "has no 'do_flip'"),
        ({"preprocessing": {"train_size": 32}}, "needs test_size"),
    ):
        (tmp_path / PROCESSOR_FILE).write_text(json.dumps({**processor, **change}))
        with pytest.raises(ConfigError, match=message):
            AutoImageProcessor.from_pretrained(tmp_path)
    other = NFZooImageProcessor(Preprocessing(train_size=24, test_size=48))
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="describe different preprocessings"):
        AutoImageProcessor.from_pretrained(tmp_path)


# ---------------------------------------------------------------- pixels


def pictures(folder: Path) -> dict[str, Path]:
    """Write images of other kinds than plain RGB; return their paths."""
    rng = np.random.default_rng(0)
    rgb, rgba = rng.integers(0, 256, (50, 70, 3), np.uint8), rng.integers(0, 256, (44, 61, 4), np.uint8)
    deep = rng.integers(0, 65536, (50, 40), np.uint16)
    images = {
        "rgb.png": Image.fromarray(rgb),
        "grey.png": Image.fromarray(rgb[:, :, 0]),
        "rgba.png": Image.fromarray(rgba),
        "16-bit.png": Image.fromarray(deep),
        "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
        "long.jpg": Image.fromarray(rng.integers(0, 256, (12, 300, 3), np.uint8)),
    }
    for name, image in images.items():
        image.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(folder / "rotated.jpg", exif=exif)
    return {name: folder / name for name in (*images, "rotated.jpg")}


@each(
    ("channels", "preprocessing"),
    [
        (3, Preprocessing(train_size=24, test_size=32, margin=4)),
        (3, Preprocessing(train_size=24, test_size=30, resize="shortest-edge", crop=0.9, mean=(0.5,) * 3)),
        (1, Preprocessing(train_size=24, test_size=32).for_channels(1)),
    ],
)
def test_pixels_are_those_of_nfzoo_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, channels: int, preprocessing: Preprocessing
) -> None:
    paths = pictures(tmp_path)
    model = made(config=SMALL["nfnet"].replace(in_channels=channels), preprocessing=preprocessing)
    processor = AutoImageProcessor.from_pretrained(model.save_pretrained(tmp_path_factory.mktemp("m") / "m"))
    for path in paths.values():
        expected = model.preprocess(path)[None]
        with Image.open(path) as image:
            for source in (path, str(path), image, io.BytesIO(path.read_bytes()), [image]):
                got = processor(source, return_tensors="pt")["pixel_values"]
                assert got.dtype == torch.float32
                assert torch.equal(got, expected), path.name
    many = processor(list(paths.values()), return_tensors="np").pixel_values
    assert np.array_equal(many, torch.stack([model.preprocess(path) for path in paths.values()]).numpy())


def test_arrays_and_tensors(folder: Path, model: NFNet) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    array = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), np.uint8)
    expected = torch.stack([model.preprocess(one) for one in array])
    first = torch.from_numpy(array).permute(0, 3, 1, 2)
    for images in (array, list(array), first, list(first), first.numpy(), [[array[0]], [array[1]]]):
        assert torch.equal(processor(images, return_tensors="pt").pixel_values, expected)
    assert [p.shape for p in processor(array).pixel_values] == [(3, 32, 32)] * 2
    assert torch.equal(
        processor(array[0, :, :, 0], return_tensors="pt").pixel_values[0], model.preprocess(array[0, :, :, 0])
    )
    narrow = array[0, :3]
    with pytest.raises(DataError, match="channels first or last; pass input_data_format"):
        processor(narrow)
    got = processor(narrow, return_tensors="pt", input_data_format="channels_last").pixel_values
    assert torch.equal(got[0], model.preprocess(narrow))
    assert processor(array, return_tensors="pt", size=24).pixel_values.shape == (2, 3, 24, 24)
    for images, message in (
        (array / 255.0, "must be uint8"),
        (torch.rand(3, 8, 8, dtype=torch.bfloat16), "must be uint8.*not torch.bfloat16"),
        ([], "there are no images"),
        ("missing.jpg", "missing.jpg does not exist"),
        ("https://host/a.jpg", "is an address"),
        (7, "not a int"),
        (array[None], "must be"),
    ):
        with pytest.raises(DataError, match=message):
            processor(images)
    with pytest.raises(TypeError, match="do_resize"):
        processor(array, do_resize=False)
    with pytest.raises(ConfigError, match="return_tensors must be"):
        processor(array, return_tensors="tf")


def test_the_processor_as_an_object(folder: Path, tmp_path: Path, model: NFNet) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    (saved,) = processor.save_pretrained(tmp_path / "p")
    assert Path(saved).read_bytes() == (folder / PROCESSOR_FILE).read_bytes()
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "p")
    for twin in (loaded, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(twin(image).pixel_values[0], model.preprocess(image))
        assert (twin.crop_size, twin.image_mean) == ({"height": 32, "width": 32}, [0.485, 0.456, 0.406])
    assert NFZooImageProcessor(**json.loads(processor.to_json_string())).to_dict() == processor.to_dict()
    with pytest.raises(ConfigError, match="'size' of an image processor of nfzoo follows from 'preprocessing'"):
        processor.size = {"height": 3, "width": 3}
    with pytest.raises(ConfigError, match="'size' is"):
        AutoImageProcessor.from_pretrained(folder, size={"height": 3, "width": 3})
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = processor.nothing
    with pytest.raises(ConfigError, match="needs 'preprocessing'"):
        NFZooImageProcessor()


def test_pipeline(folder: Path, tmp_path: Path, model: NFNet) -> None:
    paths = pictures(tmp_path)
    classify: Any = pipeline("image-classification", model=str(folder))
    for name in ("rgb.png", "grey.png", "cmyk.jpg", "rotated.jpg"):
        for source in (str(paths[name]), Image.open(paths[name])):
            expected = model.predict(paths[name], topk=3)
            got = classify(source, top_k=3)
            assert [one["label"] for one in got] == [label for label, _ in expected]
            assert [one["score"] for one in got] == pytest.approx([p for _, p in expected], rel=1e-4)
    batch = classify([str(paths["rgb.png"]), str(paths["grey.png"])], batch_size=2)
    assert [len(one) for one in batch] == [5, 5]
    pixels = np.asarray(Image.open(paths["rgba.png"]))  # read as transformers reads a file, it would lose its alpha
    assert classify(pixels, top_k=1)[0]["label"] == model.predict(paths["rgba.png"], topk=1)[0][0]


# ---------------------------------------------------------------- backbone


def test_backbone(folder: Path, tmp_path: Path, model: NFNet) -> None:
    x, expected = inputs(model), model.features(inputs(model))
    for options, wanted in (
        ({}, [4]),
        ({"out_indices": [0, 2]}, [0, 2]),
        ({"out_indices": (1, -1)}, [1, 4]),
        ({"out_features": ["stem", "stage3"]}, [0, 3]),
    ):
        backbone, info = AutoBackbone.from_pretrained(folder, output_loading_info=True, **options)
        assert {key: list(value) for key, value in info.items() if value} == {}
        result = backbone(x, output_hidden_states=True)
        assert len(result.feature_maps) == len(wanted) == len(backbone.channels)
        for got, i in zip(result.feature_maps, wanted, strict=True):
            assert_close(got, expected[i])
        assert [map_.shape[1] for map_ in result.feature_maps] == backbone.channels
        assert len(result.hidden_states) == 5
        assert backbone(x).hidden_states is None
        assert isinstance(backbone(x, return_dict=False), tuple)
    torch.stack([map_.sum() for map_ in backbone.train()(x).feature_maps]).sum().backward()
    unused = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert unused == {name for name, p in backbone.named_parameters() if not p.requires_grad or "stages.3" in name}
    backbone.save_pretrained(tmp_path / "b")
    assert AutoBackbone.from_pretrained(tmp_path / "b").out_features == ["stem", "stage3"]
    again = AutoBackbone.from_pretrained(tmp_path / "b", out_indices=[0])
    assert_close(again(x).feature_maps[0], expected[0])
    assert nfzoo.from_pretrained(tmp_path / "b").config.num_classes == 0
    with pytest.raises(ConfigError, match="no classifier: pass num_labels"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "b", num_labels=3)(x).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="stage9"):
        AutoBackbone.from_pretrained(folder, out_features=["stage9"])
    nested = AutoConfig.from_pretrained(folder, out_features=["stage2", "stage4"])
    assert NFZooConfig(**json.loads(nested.to_json_string())).out_indices == [2, 4]
    random = AutoBackbone.from_config(nested)
    assert len(random(x).feature_maps) == 2


# ---------------------------------------------------------------- options of loading


def test_a_new_classifier_is_drawn_as_nfzoo_draws_it(folder: Path, model: NFNet, caplog: Any) -> None:
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    torch.manual_seed(3)
    options = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    loaded = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, **options
    )
    torch.manual_seed(3)
    expected = nfzoo.from_pretrained(folder, num_classes=3)
    assert_same(loaded.state_dict(), expected.state_dict())
    assert loaded.description().labels == ("x", "y", "z")


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, model: NFNet) -> None:
    shutil.copytree(folder, tmp_path / "m")
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    first = next(iter(weights))
    for changed, message in (
        ({key: value for key, value in weights.items() if key != first}, f"1 missing, such as '{first}'"),
        ({**weights, "other.weight": torch.zeros(2)}, "1 unknown, such as 'other.weight'"),
        ({**weights, first: torch.zeros(2)}, f"1 of another shape, such as '{first}'"),
        ({**weights, "head.bias": torch.zeros(2)}, "1 of another shape, such as 'head.bias'"),
        ({key: value for key, value in weights.items() if "head" not in key}, "2 missing, such as 'head.bias'"),
    ):
        save_file(changed, tmp_path / "m" / "model.safetensors", {"format": "pt"})
        for auto in (AutoModelForImageClassification, AutoBackbone)[: 1 if "head" in message else 2]:
            with pytest.raises(CheckpointError, match=message):
                auto.from_pretrained(tmp_path / "m", ignore_mismatched_sizes=True)


def test_a_folder_that_nfzoo_refuses_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    made(labels=tuple("vwxyz")).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "m")
    for load in (AutoModelForImageClassification.from_pretrained, nfzoo.from_pretrained):
        with pytest.raises(CheckpointError, match="describe different models"):
            load(tmp_path / "m")


def test_random_weights_are_those_of_nfzoo() -> None:
    torch.manual_seed(3)
    drawn = AutoModelForImageClassification.from_config(NFZooConfig(name="nfnet-test", num_labels=4))
    torch.manual_seed(3)
    assert_same(drawn.state_dict(), nfzoo.create("nfnet-test", num_classes=4).state_dict())
    assert AutoModelForImageClassification.from_config(drawn.config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_dtypes_and_devices(folder: Path, tmp_path: Path, model: NFNet) -> None:
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    expected = nfzoo.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same(half.state_dict(), expected.state_dict())
    assert torch.equal(half(inputs(model)).logits, expected(inputs(model).bfloat16()))
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    again.float().save_pretrained(tmp_path / "float")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "float").dtype == torch.float32
    assert_loads(folder, model, device_map="cpu")
    assert_loads(folder, model, device_map={"": "cpu"})
    assert AutoModelForImageClassification.from_pretrained(folder).half().dtype == torch.float16


def test_outputs(folder: Path, model: NFNet) -> None:
    loaded, x = AutoModelForImageClassification.from_pretrained(folder), inputs(model)
    result = loaded(x, output_hidden_states=True)
    assert_close(result.logits, model(x))
    for got, expected in zip(result.hidden_states, model.features(x), strict=True):
        assert_close(got, expected)
    (logits,) = loaded(x, return_dict=False)
    assert torch.equal(logits, loaded(x).logits)
    assert loaded(x).hidden_states is None
    with pytest.raises(TypeError, match="output_attentions"):
        loaded(x, output_attentions=True)
    with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\)"):
        loaded(x[0])
    with pytest.raises(ValueError, match="normalised floating-point"):
        loaded((255 * x).byte())


def test_losses(folder: Path, tmp_path: Path, model: NFNet) -> None:
    loaded, x = AutoModelForImageClassification.from_pretrained(folder), inputs(model)
    logits, labels = model(x), torch.tensor([1, 4])
    assert loaded(x, labels=labels).loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    sets = made(problem_type=MULTI_LABEL)
    loaded = AutoModelForImageClassification.from_pretrained(sets.save_pretrained(tmp_path / "sets"))
    assert loaded.config.problem_type == MULTI_LABEL
    target = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, target).item()
    assert loaded(x, labels=target).loss.item() == pytest.approx(expected, rel=1e-5)
    regression = AutoModelForImageClassification.from_pretrained(folder, problem_type="regression")
    target = torch.rand(2, 5)
    assert regression(x, labels=target).loss.item() == pytest.approx(F.mse_loss(logits, target).item(), rel=1e-5)
    regression.save_pretrained(tmp_path / "regression")
    assert AutoConfig.from_pretrained(tmp_path / "regression").problem_type == "regression"
    assert nfzoo.from_pretrained(tmp_path / "regression").problem_type is None


# ---------------------------------------------------------------- training


def test_trainer(folder: Path, tmp_path: Path, model: NFNet) -> None:
    model.temperature, model.provenance = 2.0, {"data": "mine"}
    try:
        path = model.save_pretrained(tmp_path / "m")
    finally:
        model.temperature = model.provenance = None
    loaded = AutoModelForImageClassification.from_pretrained(path)
    assert loaded.description().temperature == 2.0
    before = copy.deepcopy(loaded.state_dict())
    data: Any = [{"pixel_values": x, "labels": i % 5} for i, x in enumerate(inputs(model, 8, 32))]
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "save_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
    }
    processor = AutoImageProcessor.from_pretrained(path)
    trainer = Trainer(loaded, TrainingArguments(max_steps=2, **options), train_dataset=data, processing_class=processor)
    trainer.train()
    assert all(not torch.equal(before[key], value) for key, value in loaded.state_dict().items() if "head" in key)
    assert loaded.description().temperature is loaded.description().provenance is None
    trainer.save_model(str(tmp_path / "saved"))
    loaded.eval()
    for source in (tmp_path / "saved", tmp_path / "out" / "checkpoint-2"):
        assert_same(nfzoo.from_pretrained(source).state_dict(), loaded.state_dict())
        assert_same(AutoModelForImageClassification.from_pretrained(source).state_dict(), loaded.state_dict())
        assert AutoImageProcessor.from_pretrained(source).to_dict() == processor.to_dict()
    # Two steps at once, and one after the other, are the same.
    fresh = AutoModelForImageClassification.from_pretrained(path)
    resumed = Trainer(fresh, TrainingArguments(max_steps=2, **options), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same(fresh.state_dict(), loaded.state_dict())


def test_gradients_are_those_of_nfzoo(folder: Path, model: NFNet) -> None:
    x, labels = inputs(model), torch.tensor([1, 4])
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), labels).backward()
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    for checkpointed in (False, True):
        if checkpointed:
            loaded.activation_checkpointing_enable(every_n_layers=2)
            assert loaded.is_activation_checkpointing
        loaded.zero_grad()
        loaded(x, labels=labels).loss.backward()
        for name, p in twin.named_parameters():
            torch.testing.assert_close(loaded.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)
    assert nfzoo.clip_grad_agc_(loaded, clip=1e-3) == nfzoo.clip_grad_agc_(twin, clip=1e-3) > 0
    for name, p in twin.named_parameters():  # the classifier's weight is not clipped
        torch.testing.assert_close(loaded.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)
    loaded.activation_checkpointing_disable()
    assert not loaded.is_activation_checkpointing


def test_noise_in_training_alone(tmp_path: Path) -> None:
    model = made(config=SMALL["nfnet"].replace(drop_rate=0.5, stochastic_depth=0.5))
    loaded, x = AutoModelForImageClassification.from_pretrained(model.save_pretrained(tmp_path / "m")), inputs(model)
    assert torch.equal(loaded(x).logits, loaded(x).logits)
    loaded.train()
    assert not torch.equal(loaded(x).logits, loaded(x).logits)
    for options in ({}, {"output_hidden_states": True}):
        torch.manual_seed(0)
        logits = loaded(x, **options).logits
        torch.manual_seed(0)
        assert_close(logits, copy.deepcopy(model).train()(x))


def test_a_folded_model_is_not_trained(tmp_path: Path) -> None:
    path = made().for_inference().save_pretrained(tmp_path / "m")
    loaded = AutoModelForImageClassification.from_pretrained(path)
    with pytest.raises(ConfigError, match="folded for inference"):
        loaded.train()
    assert not loaded.training
    with torch.no_grad():
        assert_close(
            AutoBackbone.from_pretrained(path)(inputs(made())).feature_maps[0], made().features(inputs(made()))[-1]
        )


# ---------------------------------------------------------------- as an object


def test_copies_compilation_and_replaced_modules(folder: Path, tmp_path: Path, model: NFNet) -> None:
    loaded, x = AutoModelForImageClassification.from_pretrained(folder), inputs(model)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(twin(x).logits, loaded(x).logits)
        with torch.no_grad():
            twin.get_parameter("head.bias").add_(1)
        assert_close(twin(x).logits, model(x) + 1)
        assert not torch.equal(twin(x).logits, loaded(x).logits)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x).logits, model(x))
    loaded.load_state_dict(model.state_dict())
    features = loaded.head.in_features
    loaded.head = torch.nn.Linear(features, 3)
    assert loaded(x).logits.shape == (2, 3)
    assert (loaded.config.num_labels, loaded.description().labels) == (3, None)
    loaded.save_pretrained(tmp_path / "m")
    assert_same(nfzoo.from_pretrained(tmp_path / "m").state_dict(), loaded.state_dict())
    loaded.head = torch.nn.Sequential(torch.nn.Linear(features, 3))
    with pytest.raises(ConfigError, match="neither saved nor folded"):
        loaded.save_pretrained(tmp_path / "m")


def test_options_of_saving(folder: Path, tmp_path: Path, model: NFNet) -> None:
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    for options in ({"variant": "fp16"}, {"distributed_checkpoint": True}):
        with pytest.raises(ConfigError, match="leave out variant"):
            loaded.save_pretrained(tmp_path / "m", **options)
    loaded.save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()
    other = {key: value + 1 for key, value in model.state_dict().items()}
    loaded.save_pretrained(tmp_path / "m", state_dict=other)
    assert_same(nfzoo.from_pretrained(tmp_path / "m").state_dict(), other)
    with pytest.raises(CheckpointError, match="do not fit"):
        loaded.save_pretrained(tmp_path / "n", state_dict={})
    with pytest.raises(ConfigError, match="offload"):
        loaded.activation_checkpointing_enable(offload=True)
    with pytest.raises(ConfigError, match="accelerate launch"):
        loaded._replicate_for_data_parallel()  # what torch.nn.DataParallel calls, with several GPUs


def test_a_second_import_changes_nothing(folder: Path) -> None:
    before = AutoBackbone.from_pretrained.__func__
    integration.register()
    assert AutoBackbone.from_pretrained.__func__ is before
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is NFZooForImageClassification


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    labels = [str(i) for i in range(10)]
    nfzoo.create("nfnet-test", labels=labels).save_pretrained(tmp_path / "runs" / "digits")
    shutil.copy(pictures(tmp_path)["rotated.jpg"], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), {})
    assert len(blocks) == 4
    assert "('digit 0', 'digit 1'" in capsys.readouterr().out


# ---------------------------------------------------------------- other processes


HEAD = "from benchmarks.peer import declare_torchvision\ndeclare_torchvision()\n"


def run(code: str, tmp_path: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **variables}
    for name in ("HF_MODULES_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE"):
        if name not in variables:
            environment.pop(name, None)
    command = [sys.executable, "-c", HEAD + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)


LOAD = """
import json, sys
import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

source, kwargs = sys.argv[1], {"trust_remote_code": True}
assert not any(name.startswith("nfzoo") for name in sys.modules)
processor = AutoImageProcessor.from_pretrained(source, **kwargs)
model = AutoModelForImageClassification.from_pretrained(source, **kwargs)
config = AutoConfig.from_pretrained(source, **kwargs)
pixels = processor(sys.argv[2], return_tensors="pt")
with torch.no_grad():
    logits = model(**pixels).logits
classify = pipeline("image-classification", model=source, **kwargs)
model.save_pretrained("again")
print(json.dumps([logits[0].tolist(), pixels.pixel_values[0].tolist(), list(config.id2label.values()),
                  classify(sys.argv[2], top_k=1)[0]["label"]]))
"""


def test_a_process_that_does_not_import_nfzoo(folder: Path, tmp_path: Path, model: NFNet) -> None:
    path = pictures(tmp_path)["rotated.jpg"]
    done = run(LOAD, tmp_path, folder, path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    logits, pixels, names, top = json.loads(done.stdout.splitlines()[-1])
    assert torch.equal(torch.tensor(pixels), model.preprocess(path))
    with torch.no_grad():
        assert_close(torch.tensor(logits), model(model.preprocess(path)[None])[0])
    assert (tuple(names), top) == (LABELS, model.predict(path, topk=1)[0][0])
    written = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert written == sorted(p.name for p in folder.iterdir())
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


BLOCKED = """
import importlib.abc, sys


class Nowhere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{name}":
            raise ModuleNotFoundError("No module named '{name}'", name="{name}")


sys.meta_path.insert(0, Nowhere())
"""


def test_a_process_without_nfzoo(folder: Path, tmp_path: Path) -> None:
    code = BLOCKED.format(name="nfzoo") + "from transformers import AutoConfig\n"
    code += "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = run(code, tmp_path, folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: this model needs the package nfzoo, in this or a newer version: `pip install .` in a clone of it"
    )


def test_without_transformers_or_with_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = BLOCKED.format(name="transformers") + "import nfzoo.integrations.transformers"
    done = run(code, tmp_path)
    assert done.stderr.splitlines()[-1].endswith("needs transformers 5.4 or newer: pip install 'nfzoo[transformers]'")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    monkeypatch.delitem(sys.modules, "nfzoo.integrations.transformers")
    with pytest.raises(ImportError, match=r"and 4\.57\.6 is installed: pip install --upgrade"):
        importlib.import_module("nfzoo.integrations.transformers")


PUSH = """
import sys
import nfzoo.integrations.transformers
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
model.push_to_hub("org/pushed")
AutoImageProcessor.from_pretrained(sys.argv[1]).push_to_hub("org/pushed")
model.save_pretrained("named", push_to_hub=True, repo_id="org/saved")
"""


def test_the_hub(folder: Path, tmp_path: Path, model: NFNet) -> None:
    path = pictures(tmp_path)["rgb.png"]
    with HubServer() as hub:
        card = b"---\nlicense: mit\n---\n"  # the server wants a license, of which transformers' own cards have none
        for name in ("org/pushed", "org/saved"):
            hub.add(name, {"README.md": card})
        about = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1"}
        done = run(PUSH, tmp_path, folder, **about)
        assert done.returncode == 0, done.stderr
        for name in ("org/pushed", "org/saved"):
            tree = hub.repos[name].commits[hub.repos[name].branches["main"]]
            for file in folder.iterdir():
                assert tree[file.name] == file.read_bytes(), file.name
        done = run(LOAD, tmp_path, "org/pushed", path, **about)
        assert done.returncode == 0, done.stderr
        logits, *_ = json.loads(done.stdout.splitlines()[-1])
        with torch.no_grad():
            assert_close(torch.tensor(logits), model(model.preprocess(path)[None])[0])
        assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
