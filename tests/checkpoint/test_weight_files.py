"""Safetensors files that other libraries accept, the same for equal tensors; folders of shards that they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nfzoo
from nfzoo import CheckpointError, NFNet
from nfzoo.checkpoint import weight_files
from nfzoo.checkpoint.weight_files import open_tensors, save_tensors
from nfzoo.hub.publish import bundle
from tests.support.helpers import SMALL, assert_same, images, random_params

INDEX = "model.safetensors.index.json"


def test_equal_tensors_are_equal_files_of_the_format_that_other_libraries_ask_for(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(1, dtype=torch.bfloat16)}
    text = json.dumps({"ü": '\x01\x7f"\\/ \n\u2028😀'}, ensure_ascii=False)
    files = set()
    for i in range(16):
        save_tensors(tmp_path / f"{i}.safetensors", tensors, {"nfzoo": text, "z": "", "a\tb": "\x1f"})
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert len(metadata.pop("crc32")) == 8
        assert metadata == {"format": "pt", "nfzoo": text, "z": "", "a\tb": "\x1f"}
        for key, value in tensors.items():
            assert torch.equal(file.get_tensor(key), value)


@pytest.fixture
def model() -> NFNet:
    made = NFNet(SMALL["nfnet"], labels=list("abcde"))
    made.load_state_dict(random_params(made.config))
    return made.eval()


@pytest.fixture
def folder(model: NFNet, tmp_path: Path) -> Path:
    """The model in shards, as transformers and huggingface_hub write them."""
    folder = model.save_pretrained(tmp_path / "m")
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=30_000)
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("described", [True, False])
def test_shards_load_as_one_file_does(model, folder, described):
    if described:
        text = json.dumps(model.description.to_dict())
        save_torch_state_dict(model.state_dict(), folder, max_shard_size=30_000, metadata={"nfzoo": text})
    loaded = nfzoo.from_pretrained(folder)
    assert loaded.description == model.description
    assert_same(loaded.state_dict(), model.state_dict())
    x = images(model.config)
    assert torch.equal(loaded(x), model(x))
    assert nfzoo.from_pretrained(folder, num_classes=7)(x).shape == (2, 7)
    with init_empty_weights():
        empty = NFNet(SMALL["nfnet"])
    assert torch.equal(load_checkpoint_and_dispatch(empty.eval(), str(folder), device_map={"": "cpu"})(x), model(x))


def test_a_model_that_is_saved_over_shards_counts(model, folder):
    other = NFNet.from_params(model.description, random_params(model.config, seed=1))
    other.save_pretrained(folder)
    assert_same(nfzoo.from_pretrained(folder).state_dict(), other.state_dict())


def test_shards_are_published(model, folder):
    files = bundle(folder, "org/name").files
    assert {name for name in files if "safetensors" in name} == {path.name for path in folder.glob("*safetensors*")}


def change(key: str, value: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / INDEX).read_text())
        fields["weight_map"][key] = value
        (folder / INDEX).write_text(json.dumps(fields))

    return edit


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(content)


def twice(folder: Path) -> None:
    content = (folder / INDEX).read_text()
    (folder / INDEX).write_text(content.replace('"head.bias":', '"head.bias": "a.safetensors", "head.bias":'))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def lost_tensor(folder: Path) -> None:
    tensors = load_file(first_shard(folder))
    tensors.pop(min(tensors))
    save_file(tensors, first_shard(folder), metadata={"format": "pt"})


def additional(key: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        save_file({**load_file(first_shard(folder)), key: torch.zeros(1)}, first_shard(folder))

    return edit


def of_another_model(folder: Path) -> None:
    description = NFNet(SMALL["nfnet-plain"]).description.to_dict()
    save_file(load_file(first_shard(folder)), first_shard(folder), metadata={"nfzoo": json.dumps(description)})


def test_more_tensors_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MOST_TENSORS", 3)
    path = tmp_path / "w.safetensors"
    save_tensors(path, {str(i): torch.zeros(1) for i in range(3)})
    with open_tensors(path) as weights:
        assert len(weights.shapes) == 3
    save_tensors(path, {str(i): torch.zeros(1) for i in range(4)})
    with pytest.raises(CheckpointError, match="holds 4 tensors; no model has more"), open_tensors(path):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: first_shard(folder).unlink(), "there is no file .*model-00001-of"),
        (lambda folder: first_shard(folder).write_bytes(b"junk"), "damaged or not a safetensors file"),
        (lambda folder: (folder / INDEX).unlink(), "there is no model.safetensors in .*nor model.safetensors.index"),
        (lost_tensor, "lacks .*which model.safetensors.index.json has in it"),
        (additional("head.bias"), "holds 'head.bias', which .* has in model-0000[2-9]-of"),
        (additional("more"), "holds 'more', which .* has in no file"),
        (twice, "has 'head.bias' twice"),
        (change("head.bias", "../model.safetensors"), r"'\.\./model.safetensors', which is no name"),
        (change("head.bias", "/etc/x.safetensors"), "is no name of a .safetensors file beside"),
        (change("head.bias", "sub/x.safetensors"), "is no name"),
        (change("head.bias", ".."), "is no name"),
        (change("head.bias", "pytorch_model.bin"), "is no name"),
        (change("head.bias", 3), "is no name"),
        (change("more", "model-00002-of-00003.safetensors"), "lacks 'more'|there is no file"),
        (text("{"), "is no index of shards"),
        (text("[]"), "needs a 'weight_map'"),
        (text('{"weight_map": {}}'), "needs a 'weight_map'"),
        (text("[" * 100_000), "is no index"),
        (of_another_model, "describe different models"),
    ],
)
def test_shards_that_are_not_what_the_index_says(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        nfzoo.from_pretrained(folder)
