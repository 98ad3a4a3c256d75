"""What `config.json` says for transformers and the Hub, and that it cannot say another thing than nfzoo's own fields.

tests/integrations loads such folders by transformers itself.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import nfzoo
from nfzoo import CheckpointError, NFNet, Preprocessing
from nfzoo.checkpoint.description import CODE, CODE_FILE, DERIVED_KEYS, PROCESSOR_FILE, processor_fields
from nfzoo.checkpoint.model_folder import MULTI_LABEL, texts
from nfzoo.hub.publish import bundle
from nfzoo.nn import load
from tests.support.loops import each


def saved(folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    path = nfzoo.create("nfnet-test", **options).save_pretrained(folder)
    return path, json.loads((path / "config.json").read_text())


def test_the_fields_of_transformers(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", labels=["cat", "dög"])
    assert fields["model_type"] == "nfzoo"
    assert fields["architectures"] == ["NFZooForImageClassification"]
    assert fields["id2label"] == {"0": "cat", "1": "dög"}
    assert fields["label2id"] == {"cat": 0, "dög": 1}
    assert "problem_type" not in fields
    assert load(path).description.foreign is None
    _, fields = saved(tmp_path / "plain", num_classes=3)
    assert fields.keys() & {"id2label", "label2id", "num_labels"} == set()
    _, fields = saved(tmp_path / "headless", num_classes=0)
    assert fields["architectures"] == ["NFZooBackbone"]
    model = load(path)
    model.problem_type = MULTI_LABEL
    fields = json.loads((model.save_pretrained(tmp_path / "sets") / "config.json").read_text())
    assert fields["problem_type"] == MULTI_LABEL


def test_auto_map_names_what_the_file_imports(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", num_classes=3)
    code = (path / CODE_FILE).read_text()
    (imports,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom))
    named = {alias.name for alias in imports.names}
    processor = json.loads((path / PROCESSOR_FILE).read_text())
    (listed,) = processor["auto_map"].values()
    for reference in (*fields["auto_map"].values(), listed[0]):
        module, _, name = reference.partition(".")
        assert f"{module}.py" == CODE_FILE
        assert name in named
    assert processor["image_processor_type"] in named
    assert {*fields["architectures"]} <= named


def test_the_file_says_that_nfzoo_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nfzoo.integrations", None)
    with pytest.raises(ImportError, match=r"^this model needs the package nfzoo.*`pip install \.` in a clone of it$"):
        exec(CODE, {})


def test_the_metadata_of_the_weights_are_those_of_earlier_versions(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", labels=["cat", "dog"])
    with safe_open(path / "model.safetensors", framework="pt") as file:
        own = json.loads(file.metadata()["nfzoo"])
    assert own == {key: value for key, value in fields.items() if key not in DERIVED_KEYS}


@each(
    ("change", "message"),
    [
        (lambda f: f["id2label"].update({"1": "cow"}), "'id2label' has 'cow' for class 1, and 'labels' 'dog'"),
        (lambda f: f["id2label"].pop("1"), "'id2label' has None for class 1"),
        (lambda f: f["id2label"].update({"2": "cow"}), "'id2label' has 3 entries for 2 classes"),
        (lambda f: f.update(id2label=["cat", "dog"]), "'id2label' has None for class 0"),
        (lambda f: f["label2id"].update(cat=1), "'label2id' is not the inverse of 'labels'"),
        (lambda f: f.update(num_labels=3), "'num_labels' is 3 for 2 classes"),
        (lambda f: f.update(labels=None), "'id2label' has 'cat' for class 0, and a model without labels 'LABEL_0'"),
    ],
)
def test_other_names_than_the_labels_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path, fields = saved(tmp_path / "m", labels=["cat", "dog"])
    change(fields)
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path / "config.json") in str(caught.value)


def test_names_that_say_nothing_agree_with_no_labels(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", num_classes=2)
    fields |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_labels": 2}
    (path / "config.json").write_text(json.dumps(fields))
    assert load(path).labels is None


def test_two_classes_of_one_name_are_loaded(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", labels=["crane", "dog", "crane"])
    assert fields["label2id"] == {"crane": 2, "dog": 1}
    assert load(path).labels == ("crane", "dog", "crane")


def test_the_preprocessing_in_the_keys_of_transformers() -> None:
    # The sizes by hand: 224 + 32; 224 / 0.875.
    fields = processor_fields(Preprocessing(train_size=192, test_size=224))
    assert fields["size"] == {"height": 256, "width": 256}
    assert fields["crop_size"] == {"height": 224, "width": 224}
    assert fields["image_mean"] == [0.485, 0.456, 0.406]
    assert fields["do_convert_rgb"] is True
    fields = processor_fields(Preprocessing(train_size=192, test_size=224, resize="shortest-edge", crop=0.875))
    assert (fields["size"], fields["crop_size"]) == ({"shortest_edge": 256}, {"height": 224, "width": 224})
    fields = processor_fields(Preprocessing(train_size=192, test_size=224).for_channels(1))
    assert (fields["image_mean"], fields["do_convert_rgb"], fields["do_convert_grayscale"]) == ([0.5], False, True)


def test_a_folder_of_an_earlier_version_is_published_as_a_new_one(tmp_path: Path) -> None:
    path, fields = saved(tmp_path / "m", labels=["cat", "dog"])
    whole = bundle(path, "org/m").files
    (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in DERIVED_KEYS}))
    for name in (CODE_FILE, PROCESSOR_FILE):
        (path / name).unlink()
    assert NFNet.from_pretrained(path).labels == ("cat", "dog")
    old = bundle(path, "org/m").files
    # Names of another tool, which earlier versions kept beside a model without labels, would be refused.
    plain, fields = saved(tmp_path / "plain", num_classes=2)
    fields = {k: v for k, v in fields.items() if k not in DERIVED_KEYS} | {"id2label": {"0": "a", "1": "b"}}
    (plain / "config.json").write_text(json.dumps(fields))
    assert "id2label" not in json.loads(bytes(bundle(plain, "org/m").files["config.json"]))
    for name, text in texts(load(path).description).items():
        assert old[name] == whole[name] == text.encode()
