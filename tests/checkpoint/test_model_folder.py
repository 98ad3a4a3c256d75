"""Checkpoints: read back bit for bit, written whole or not at all, and never a raw error for a bad one."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import os
import random
import shutil
import stat
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nfzoo
from nfzoo import CheckpointError, ConfigError, NFNet, NfzooError, Preprocessing
from nfzoo.checkpoint import weight_files
from nfzoo.checkpoint.description import CODE_FILE, DERIVED_KEYS, PROCESSOR_FILE
from nfzoo.checkpoint.model_folder import MULTI_LABEL, Description, load_checkpoint, save_checkpoint
from nfzoo.nn import load
from tests.support.helpers import SMALL, assert_same, images, random_params

CFG = SMALL["nfnet"].replace(depths=(1, 1, 1, 1))
LABELS = ("cat", "dog", "äöü 🐈", "", "e")
DESCRIPTION = Description(
    CFG,
    Preprocessing(train_size=24, test_size=32),
    "nfnet-test",
    LABELS,
    {"source": "a test", "list": [1, {"a": None}]},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", DESCRIPTION, random_params(CFG))


@pytest.mark.parametrize("length", range(0, 64, 8))
def test_the_header_of_a_file_changes_no_bit_of_a_logit(folder: Path, length: int) -> None:
    """A matrix product's last bits depend on addresses, so parameters must not lie where the file has them."""
    model = load(folder)
    strip_metadata(folder, {"note": "x" * length})
    moved = load(folder)
    assert all(p.data_ptr() % 64 == 0 for p in moved.parameters())
    x = images(CFG, 2)
    assert torch.equal(moved(x), model(x))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, change) -> None:
    """Rewrite config.json, and take the copy out of the weights' metadata, so that config.json alone counts."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result = change(fields)
    text = json.dumps(fields if result is None else result)
    (folder / "config.json").write_text(text, encoding="utf-8")
    strip_metadata(folder)


def strip_metadata(folder: Path, metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    params = random_params(CFG, dtype=torch.float64)
    params = {k: v.to(dtype) for k, v in params.items()}
    params["head.bias"][:3] = torch.tensor([math.inf, -0.0, 6e-8])
    folder = save_checkpoint(tmp_path / "m", DESCRIPTION, params)
    description, read = load_checkpoint(folder)
    assert description == DESCRIPTION
    assert_same(read, params)
    description, read = load_checkpoint(folder / "model.safetensors")
    assert description == DESCRIPTION
    assert_same(read, params)


@pytest.mark.parametrize("name", SMALL)
def test_the_module_comes_back(tmp_path, name):
    module = NFNet(SMALL[name], labels=list("abcde"))
    module.load_state_dict(random_params(module.config))
    assert module.save_pretrained(tmp_path / "m") == tmp_path / "m"
    loaded = load(tmp_path / "m")
    assert not loaded.training
    assert loaded.description == module.description
    assert_same(loaded.state_dict(), module.state_dict())
    assert torch.equal(loaded(images(module.config)), module.eval()(images(module.config)))
    loaded.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "m")


def test_load_casts_on_request_only(folder):
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_mixed_dtypes_are_kept(tmp_path):
    params = random_params(CFG)
    params["head.weight"] = params["head.weight"].double()
    assert_same(load_checkpoint(save_checkpoint(tmp_path / "m", DESCRIPTION, params))[1], params)


def test_strided_tensors_are_saved(tmp_path):
    params = random_params(CFG)
    expected = dict(params)
    params["stem.conv1.weight"] = params["stem.conv1.weight"].to(memory_format=torch.channels_last)
    wide = torch.stack([params["head.weight"]] * 2, dim=2)
    params["head.weight"] = wide[..., 0].requires_grad_()
    assert_same(load_checkpoint(save_checkpoint(tmp_path / "m", DESCRIPTION, params))[1], expected)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    previous = os.umask(umask)
    try:
        folder = save_checkpoint(tmp_path / "m", DESCRIPTION, random_params(CFG))
        save_checkpoint(folder, DESCRIPTION, random_params(CFG))  # and when they are replaced
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


FILES = ["config.json", "model.safetensors", "nfzoo_transformers.py", "preprocessor_config.json"]


def test_a_checkpoint_is_four_files(folder):
    assert sorted(content(folder)) == FILES
    assert os.listdir(folder.parent) == ["model"]
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert fields["library_name"] == "nfzoo"
    assert "äöü" in (folder / "config.json").read_text(encoding="utf-8")


def test_labels_that_are_no_text_come_back(tmp_path):
    """JSON can hold half of a surrogate pair, UTF-8 cannot."""
    labels = ("\udcff", "a\x1b\x00\n", "\ud800é", "\u2028\x85\x7f", '"\\udcff')
    description = DESCRIPTION._replace(labels=labels, provenance={"\udcff": ["\udcff"]})
    folder = save_checkpoint(tmp_path / "m", description, random_params(CFG))
    for path in (folder, folder / "model.safetensors"):
        assert load_checkpoint(path)[0] == description
    assert "é" in (folder / "config.json").read_text(encoding="utf-8")


def test_overwriting_keeps_what_is_not_ours(folder):
    (folder / "README.md").write_text("mine")
    other = random_params(CFG, seed=7)
    save_checkpoint(folder, DESCRIPTION._replace(labels=None), other)
    description, read = load_checkpoint(folder)
    assert_same(read, other)
    assert description.labels is None
    assert sorted(content(folder)) == ["README.md", *FILES]
    assert os.listdir(folder.parent) == ["model"]


def test_parents_are_made(tmp_path):
    folder = save_checkpoint(tmp_path / "a" / "b" / "c", DESCRIPTION, random_params(CFG))
    assert_same(load_checkpoint(folder)[1], random_params(CFG))


# ---------------------------------------------------------------- writing that fails


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["save_file", "os.replace", "os.fsync", "os.chmod"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, target, exists):
    folder = tmp_path / "model"
    if exists:
        save_checkpoint(folder, DESCRIPTION, random_params(CFG))
    before = content(tmp_path)
    owner: Any = weight_files if target == "save_file" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, target.removeprefix("os."), fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(folder, DESCRIPTION, random_params(CFG, seed=1))
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == (["model"] if exists else [])


def test_an_interrupt_leaves_no_litter(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_files, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "m", DESCRIPTION, random_params(CFG))
    assert os.listdir(tmp_path) == []


def test_an_interruption_between_the_two_files_is_noticed(folder, monkeypatch):
    """The weights were replaced and config.json was not: the pair is refused, the new weights still load alone."""
    replace = os.replace

    def second_fails(source, target):
        if Path(target).name == "config.json":
            fail()
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    new = DESCRIPTION._replace(config=CFG.replace(alpha=0.5))
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(folder, new, random_params(CFG, seed=1))
    with pytest.raises(CheckpointError, match="describe different models"):
        load_checkpoint(folder)
    description, params = load_checkpoint(folder / "model.safetensors")
    assert description == new
    assert_same(params, random_params(CFG, seed=1))


def test_saving_onto_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(path, DESCRIPTION, random_params(CFG))
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshaped"])
def test_saving_what_does_not_fit_is_refused(tmp_path, change):
    params = random_params(CFG)
    if change == "missing":
        del params["head.bias"]
    elif change == "unexpected":
        params["head.scale"] = torch.ones(1)
    else:
        params["head.bias"] = torch.ones(6)
    with pytest.raises(
        CheckpointError, match=f"the model do not fit.*{'another shape' if change == 'misshaped' else change}"
    ):
        save_checkpoint(tmp_path / "m", DESCRIPTION, params)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- damaged weights


def damage_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("head.bias"), r"1 missing, such as 'head\.bias'"),
        (lambda t: t.clear(), "missing"),
        (lambda t: t.update(extra=torch.ones(1)), "1 unexpected, such as 'extra'"),
        (lambda t: t.update({"head.bias": torch.ones(6)}), r"1 of another shape.*\(6,\) instead of \(5,\)"),
        (lambda t: t.update({"head.bias": torch.tensor(1.0)}), "of another shape"),
        (lambda t: t.update({"head.bias": torch.ones(5, dtype=torch.int64)}), "int64, not floating point"),
        (lambda t: t.update({"head.bias": torch.ones(5, dtype=torch.bool)}), "bool, not floating point"),
    ],
)
def test_wrong_tensors(folder, change, match):
    damage_tensors(folder, change)
    with pytest.raises(CheckpointError, match=match):
        load(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.1, 0.5, -1])
def test_a_truncated_file(folder, keep):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    for path in (folder, weights):
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
            load(path)


@pytest.mark.parametrize(
    "data", [b"hello" * 100, b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"\xff" * 64, bytes(64)]
)
def test_not_a_safetensors_file(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
            load(path)


def test_flipped_header_bytes_never_escape(folder):
    """Every error is ours, whatever byte of the header is wrong."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    rng = random.Random(0)
    end = 8 + int.from_bytes(data[:8], "little")
    name = data.index(b"nfnet-test")  # which says nothing about the weights
    outcomes = set()
    for at in [*(rng.randrange(end) for _ in range(300)), name]:
        broken = bytearray(data)
        broken[at] ^= 1 << rng.randrange(7)
        weights.write_bytes(bytes(broken))
        for path in (folder, weights):
            try:
                load(path)
                outcomes.add("loaded")
            except NfzooError:
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_a_flipped_bit_of_a_tensor_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in (start, (start + len(data)) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[at] ^= 1
        weights.write_bytes(bytes(broken))
        for path in (folder, weights):
            with pytest.raises(CheckpointError, match="is damaged: tensors and description have the CRC-32"):
                load(path)


def test_the_checksum_is_zlibs_of_tensors_and_description(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["crc32"] == f"{zlib.crc32(data[start:] + metadata['nfzoo'].encode()):08x}"


def test_weights_without_a_checksum_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder)
    assert caplog.messages == []
    strip_metadata(folder)
    load(folder)
    assert caplog.messages == [
        f"{folder}/model.safetensors: there is no checksum, so a damaged weight would not be noticed; save_pretrained "
        "writes one"
    ]
    caplog.clear()
    load(folder, hashed=True)
    assert caplog.messages == []


@pytest.mark.parametrize("stated", ["", "1234", "zzzzzzzz", "0x123456", "\x1b[2J"])
def test_a_checksum_that_is_none_is_refused(folder: Path, stated: str) -> None:
    strip_metadata(folder, {"crc32": stated})
    with pytest.raises(CheckpointError, match="which is none"):
        load(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '"x"', "1", '{"a": 1}', "[" * 100_000, "1" * 5000])
def test_junk_in_the_metadata(folder, text):
    strip_metadata(folder, {"nfzoo": text})
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match="metadata"):
            load(path)


# ---------------------------------------------------------------- missing and mixed files


def test_missing_files(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file or a folder"):
        load(tmp_path / "missing")
    os.remove(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(folder)
    os.remove(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(folder)


def test_folders_in_the_place_of_files(folder):
    os.rename(folder / "model.safetensors", folder / "kept")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        load(folder)
    (folder / "model.safetensors").rmdir()
    os.rename(folder / "kept", folder / "model.safetensors")
    os.remove(folder / "config.json")
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_a_mixed_pair_is_refused(folder, tmp_path):
    other = DESCRIPTION._replace(config=CFG.replace(activation="relu"))  # the same tensors, another function
    twin = save_checkpoint(tmp_path / "twin", other, random_params(CFG))
    shutil.copy(twin / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match="describe different models"):
        load(folder)
    assert load(folder / "model.safetensors").config == CFG


def test_the_weight_file_alone(folder, tmp_path):
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "model.safetensors", alone)
    assert load_checkpoint(alone)[0] == DESCRIPTION
    strip_metadata(folder)
    assert load_checkpoint(folder)[0] == DESCRIPTION  # config.json is enough
    assert load_checkpoint(folder / "model.safetensors")[0] == DESCRIPTION  # and is found beside the file
    os.remove(folder / "config.json")
    with pytest.raises(CheckpointError, match="has no model description in its metadata"):
        load(folder / "model.safetensors")


# ---------------------------------------------------------------- config.json


def more_classes(fields: dict[str, Any]) -> None:
    fields["architecture"]["num_classes"] = 6
    fields["labels"] = None
    for key in ("id2label", "label2id"):
        del fields[key]


FOREIGN = {
    "_commit_hash": None,
    "_name_or_path": "org/model",
    "transformers_version": "5.3.0",
    "torch_dtype": "float32",
    "dtype": "float32",
    "_future": [1.5, {"x": True}],
}
OLD = {
    "architectures": ["NFNet"],
    "auto_map": {"AutoModel": "modeling.NFNet"},
    "id2label": {"0": "a", "1": "ü"},
}
"""What is kept while a model is loaded, and replaced by nfzoo's own in the files that it writes."""


def as_written_by_earlier_versions(folder: Path, **other: Any) -> None:
    """Leave nfzoo's own fields in `config.json`, and no other file but the weights."""
    fields = json.loads((folder / "config.json").read_text())
    fields = {k: v for k, v in fields.items() if k not in DERIVED_KEYS}
    (folder / "config.json").write_text(json.dumps({**other, **fields}))
    for name in (CODE_FILE, PROCESSOR_FILE):
        (folder / name).unlink()


def test_what_other_tools_write_into_the_configuration_is_kept(folder, tmp_path, caplog):
    as_written_by_earlier_versions(folder, **FOREIGN, **OLD)
    module = load(folder)
    assert module.description.foreign == {**FOREIGN, **OLD}
    for twin in (module, module.for_inference(), copy.deepcopy(module), NFNet.from_pretrained(folder)):
        caplog.clear()
        saved = twin.save_pretrained(tmp_path / "again")
        assert "'architectures', 'auto_map', 'id2label' of another tool are not kept" in caplog.text
        written = json.loads((saved / "config.json").read_text())
        assert {key: written[key] for key in FOREIGN} == FOREIGN
        assert load(saved / "model.safetensors").description.foreign == FOREIGN  # the file alone
        assert load(saved).description == twin.description._replace(foreign=FOREIGN)
    half = NFNet.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load(half).description.foreign == {
        k: v for k, v in FOREIGN.items() if "dtype" not in k
    }  # of the old weights
    module.reset_classifier(3)
    assert module.description.foreign == {k: v for k, v in {**FOREIGN, **OLD}.items() if k != "id2label"}
    module.reset_classifier(4, labels=list("abcd"))
    assert module.description.to_dict()["labels"] == list("abcd")


def test_a_temperature_stays_with_its_classifier(folder: Path, tmp_path: Path) -> None:
    module = load(folder)
    assert module.temperature is None
    assert "temperature" not in json.loads((folder / "config.json").read_text())  # as earlier versions read it
    module.temperature = 1.5
    for twin in (module, module.for_inference(), copy.deepcopy(module)):
        saved = twin.save_pretrained(tmp_path / "again")
        assert json.loads((saved / "config.json").read_text())["temperature"] == 1.5
        assert load(saved).temperature == load(saved / "model.safetensors").temperature == 1.5
        assert NFNet.from_pretrained(saved).temperature == 1.5
    assert load(saved, num_classes=3).temperature is None
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="describe different models"):
        load(folder)
    module.head = torch.nn.Linear(module.head.weight.shape[1], 2)  # type: ignore[arg-type, union-attr, index]
    assert module.temperature is None
    module.temperature = -1.0
    with pytest.raises(ConfigError, match=r"must be None or a number from 0\.001 to 1000, not -1\.0"):
        module.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_problem_type_and_its_thresholds_are_saved(folder: Path, tmp_path: Path) -> None:
    module = load(folder)
    assert (module.problem_type, module.thresholds, module.multi_label) == (None, None, False)
    module.problem_type, module.thresholds = MULTI_LABEL, (0.0, 0.25, 0.5, 0.75, 1.0)
    for twin in (module, module.for_inference(), copy.deepcopy(module)):
        saved = twin.save_pretrained(tmp_path / "again")
        written = json.loads((saved / "config.json").read_text())
        assert (written["problem_type"], written["thresholds"]) == (MULTI_LABEL, [0.0, 0.25, 0.5, 0.75, 1.0])
        for again in (load(saved), load(saved / "model.safetensors"), NFNet.from_pretrained(saved)):
            assert again.description == twin.description
            assert again.multi_label
    other = load(saved, num_classes=3)  # a new classifier for the same problem
    assert (other.problem_type, other.thresholds) == (MULTI_LABEL, None)
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="describe different models"):
        load(folder)
    for change, message in (
        ({"thresholds": (0.5,)}, "'thresholds' must be a list of 5 numbers"),
        ({"thresholds": (0.5,) * 4 + (1.5,)}, "'thresholds' must be numbers from 0 to 1, not 1.5"),
        ({"problem_type": None}, "'thresholds' are of a model of the problem type"),
        ({"problem_type": "regression"}, "'problem_type' must be"),
        ({"temperature": 2.0}, "'temperature' is of a softmax"),
    ):
        twin = copy.deepcopy(module)
        for name, value in change.items():
            setattr(twin, name, value)
        with pytest.raises(ConfigError, match=message):
            twin.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_another_problem_type_is_kept_and_means_nothing(folder: Path, tmp_path: Path) -> None:
    for other in (None, "single_label_classification"):
        edit(folder, lambda f, other=other: f.update(problem_type=other))
        module = load(folder)
        assert (module.problem_type, module.foreign) == (None, {"problem_type": other})
        saved = module.save_pretrained(tmp_path / "again")
        assert json.loads((saved / "config.json").read_text())["problem_type"] == other
        module.problem_type = MULTI_LABEL
        assert module.description.to_dict()["problem_type"] == MULTI_LABEL


def sets(thresholds: object, **others: object) -> Any:
    return lambda f: f.update(problem_type=MULTI_LABEL, thresholds=thresholds, **others)


BAD_CONFIGS = {
    "thresholds": (sets(0.5), "'thresholds' must be a list of 5 numbers"),
    "thresholds of others": (sets([0.5] * 4), "'thresholds' must be a list of 5 numbers"),
    "thresholds as text": (sets(["0.5"] * 5), "'thresholds' must be numbers from 0 to 1, not '0.5'"),
    "thresholds as truth": (sets([True] * 5), "'thresholds' must be numbers"),
    "no threshold": (sets([float("nan")] * 5), "'thresholds' must be numbers"),
    "a great threshold": (sets([10**400] * 5), "'thresholds' must be numbers"),
    "single thresholds": (lambda f: f.update(thresholds=[0.5] * 5), "'thresholds' are of a model of the problem type"),
    "temperature of sets": (sets(None, temperature=2.0), "'temperature' is of a softmax"),
    "list": (lambda f: [f], "must hold a JSON object"),
    "empty list": (lambda f: [], "must hold a JSON object"),
    "other library": (lambda f: f.update(library_name="timm"), "not an nfzoo configuration"),
    "no library": (lambda f: f.pop("library_name") and None, "not an nfzoo configuration"),
    "no architecture": (lambda f: f.pop("architecture") and None, "not an nfzoo configuration"),
    "no preprocessing": (lambda f: f.pop("preprocessing") and None, "lacks preprocessing"),
    "no format": (lambda f: f.pop("format") and None, "format None"),
    "newer format": (lambda f: f.update(format=2), "format 2.*upgrade nfzoo"),
    "format as text": (lambda f: f.update(format="1"), "format '1'"),
    "unknown key": (lambda f: f.update(extra=1), "unknown keys extra; known: architecture, format"),
    "misspelt key": (lambda f: f.update(lables=f.pop("labels")), "unknown keys lables; did you mean 'labels'"),
    "misspelt optional key": (lambda f: f.update(provenanse={}), "unknown keys provenanse; did you mean 'provenance'"),
    "a meaning of its own": (lambda f: f.update(quantization_config={}), "unknown keys quantization_config"),
    "unknown field": (lambda f: f["architecture"].update(dropout=0.1), "no field 'dropout'"),
    "unknown size": (lambda f: f["preprocessing"].update(size=1), "no field 'size'"),
    "missing field": (lambda f: f["architecture"].pop("depths") and None, "needs depths"),
    "family": (lambda f: f["architecture"].update(family="resnet"), "family 'resnet'"),
    "architecture list": (lambda f: f.update(architecture=[1]), "'architecture' must be a JSON object"),
    "preprocessing text": (lambda f: f.update(preprocessing="x"), "'preprocessing' must be a JSON object"),
    "too few labels": (lambda f: f.update(labels=["a"]), "1 labels for 5 classes"),
    "no labels": (lambda f: f.update(labels=[]), "0 labels for 5 classes"),
    "labels of numbers": (lambda f: f.update(labels=[1, 2, 3, 4, 5]), "list of strings"),
    "labels as text": (lambda f: f.update(labels="abcde"), "list of strings"),
    "labels as object": (lambda f: f.update(labels={"0": "a"}), "list of strings"),
    "name": (lambda f: f.update(name=["a"]), "'name' must be a string"),
    "provenance": (lambda f: f.update(provenance="a test"), "'provenance' must be a JSON object"),
    "temperature": (lambda f: f.update(temperature="1"), "'temperature' must be a number from 0.001 to 1000, not '1'"),
    "temperature 0": (lambda f: f.update(temperature=0), "'temperature' must be a number"),
    "hot": (lambda f: f.update(temperature=10**400), "'temperature' must be a number"),
    "temperature as truth": (lambda f: f.update(temperature=True), "'temperature' must be a number"),
    "not a number": (lambda f: f.update(temperature=float("nan")), "'temperature' must be a number"),
    "classes": (more_classes, "another shape"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_a_checkpoint_error_that_names_the_file(folder, case):
    change, match = BAD_CONFIGS[case]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b"1" * 5000, b"{'a': 1}", b"NaN", b"\x00" * 10]
)
def test_a_config_that_is_no_json(folder, data):
    (folder / "config.json").write_bytes(data)
    strip_metadata(folder)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2.5,
    -0.0,
    1e308,
    10**30,
    math.nan,
    math.inf,
    "",
    "1",
    "nfnet",
    "se",
    [],
    {},
]
JUNK += [
    [[]],
    [None],
    ["a"],
    [1, 2, 3, 4],
    [1e9] * 4,
    [10**9] * 4,
    {"a": {"b": []}},
    {"family": "nf_resnet"},
    "\0",
    "x" * 999,
]


def mutate(node: Any, rng: random.Random) -> Any:
    """One random change somewhere in a JSON value."""
    if isinstance(node, dict) and node and rng.random() < 0.85:
        key = rng.choice(list(node))
        action = rng.random()
        if action < 0.1:
            del node[key]
        elif action < 0.2:
            node[rng.choice(["extra", "", "alpha", "format", key.upper()])] = copy.deepcopy(rng.choice(JUNK))
        else:
            node[key] = mutate(node[key], rng)
        return node
    if isinstance(node, list) and node and rng.random() < 0.6:
        index = rng.randrange(len(node))
        if rng.random() < 0.3:
            node.insert(index, copy.deepcopy(rng.choice(JUNK)))
        else:
            node[index] = mutate(node[index], rng)
        return node
    return copy.deepcopy(rng.choice(JUNK))


def test_fuzzed_configs_load_or_are_refused(folder):
    strip_metadata(folder)
    original = (folder / "config.json").read_text(encoding="utf-8")
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(600):
        fields = json.loads(original)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            fields = mutate(fields, rng)
        text = json.dumps(fields)
        (folder / "config.json").write_text(text, encoding="utf-8")
        try:
            module = load(folder)
            assert module(torch.zeros(1, module.config.in_channels, 8, 8)).shape == (1, 5), text
            repr(module)
            outcomes["loaded"] += 1
        except NfzooError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {text}") from error
    assert outcomes["loaded"] > 20
    assert outcomes["refused"] > 200


# ---------------------------------------------------------------- another number of classes


def test_another_number_of_classes_is_said_and_keeps_the_rest(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        loaded = load(folder, num_classes=3)
    (record,) = caplog.records
    assert "5 classes" in record.getMessage()
    assert "3" in record.getMessage()
    before, after = random_params(CFG), loaded.state_dict()
    assert after["head.weight"].shape[0] == after["head.bias"].shape[0] == 3
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith("head."))
    assert loaded.labels is None
    assert not any(m.training for m in loaded.modules())
    assert load(loaded.save_pretrained(folder.parent / "three")).config.num_classes == 3


def test_the_same_number_of_classes_says_nothing(folder, caplog):
    loaded = load(folder, num_classes=5)
    assert caplog.records == []
    assert loaded.labels == LABELS
    assert_same(loaded.state_dict(), random_params(CFG))


@pytest.mark.parametrize("bad", [-1, 2.5])
def test_a_bad_number_of_classes_is_a_config_error(folder, bad):
    with pytest.raises(ConfigError, match="num_classes"):
        load(folder, num_classes=bad)


def test_skip_head(folder):
    _, params = load_checkpoint(folder, skip_head=True)
    assert random_params(CFG).keys() - params.keys() == {"head.weight", "head.bias"}


def test_to_a_device(folder):
    loaded = nfzoo.from_pretrained(folder, device="cpu")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("key", ["labels", "preprocessing"])
def test_an_edited_description_is_noticed(tmp_path: Path, key: str) -> None:
    folder = nfzoo.create("nfnet-test", labels=list("abc")).save_pretrained(tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    fields[key] = ["c", "b", "a"] if key == "labels" else {**fields[key], "test_size": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    if key == "labels":
        with pytest.raises(CheckpointError, match="'id2label' has 'a' for class 0, and 'labels' 'c'; change both"):
            load_checkpoint(folder)
        as_written_by_earlier_versions(folder)
    with pytest.raises(CheckpointError, match="describe different models"):
        load_checkpoint(folder)
    assert load_checkpoint(folder / "model.safetensors")[0].labels == ("a", "b", "c")


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    model = nfzoo.create("nfnet-test")
    files = [model.save_pretrained(tmp_path / name) / "model.safetensors" for name in "abcd"]
    assert len({file.read_bytes() for file in files}) == 1
