"""timm's folders and weight files: read strictly, written so that timm loads them, with timm's own logits as oracle.

What timm computes on these weights is stored in tests/reference; that timm itself loads what is written was checked by
hand with timm 1.0.31, see the commit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nfzoo import ConversionError, model
from nfzoo.checkpoint.model_folder import Description
from nfzoo.checkpoint.state_dicts import StateDict
from nfzoo.config import ModelConfig, Preprocessing
from nfzoo.conversion import timm
from nfzoo.conversion.timm import ARCHITECTURES, read_timm, recognize, timm_shapes, to_timm, write_timm
from nfzoo.conversion.timm_config import apply_arguments, read_preprocessing, timm_config
from nfzoo.data.labels import imagenet
from nfzoo.variants import VARIANTS
from tests.core.test_reference import timm_state
from tests.support.helpers import (
    TIMM,
    assert_same,
    random_params,
    reference_array,
    reference_input,
    reference_params,
    relative,
    timm_golden,
)

LOGITS = 1e-5  # float32 in two programs; timm's own rounding against float64 is 1e-6

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# The pretrained_cfg of timm 1.0.31 for public weights, as its push_to_hf_hub writes them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dm_nfnet_f0": {
        "tag": "dm_in1k",
        "custom_load": False,
        "input_size": [3, 192, 192],
        "test_input_size": [3, 256, 256],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "squash",
        **IMAGENET,
        "num_classes": 1000,
        "pool_size": [6, 6],
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
    },
    "eca_nfnet_l0": {
        "tag": "ra2_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        **IMAGENET,
    },
    "nf_resnet50": {
        "tag": "ra2_in1k",
        "input_size": [3, 256, 256],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.94,
        "crop_mode": "center",
        **IMAGENET,
    },
    "nf_regnet_b1": {
        "tag": "ra2_in1k",
        "input_size": [3, 256, 256],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        **IMAGENET,
    },
    "nf_seresnet26": {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, **IMAGENET},
}


def timm_folder(folder: Path, arch: str, state: Mapping[str, Tensor], cfg: Mapping[str, Any], **more: Any) -> Path:
    """A folder as timm's push_to_hf_hub leaves it."""
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "model.safetensors")
    fields = {"architecture": arch, "num_classes": len(state["head.fc.bias"]), "pretrained_cfg": dict(cfg), **more}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def small(arch: str = "nf_regnet_b0", **changes: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The lightest architecture, with a few classes."""
    cfg = VARIANTS[ARCHITECTURES[arch]].config.replace(**{"num_classes": 3, **changes})
    return cfg, dict(small_state(cfg))


@functools.cache
def small_state(cfg: ModelConfig) -> dict[str, Tensor]:
    return to_timm(cfg, random_params(cfg))


PLAIN = {"input_size": [3, 192, 192], "test_input_size": [3, 256, 256], "crop_pct": 0.9, **IMAGENET}


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("arch", ["eca_nfnet_l0", "nf_seresnet26", "nf_regnet_b1"])
def test_timms_logits(arch, tmp_path):
    cfg = VARIANTS[ARCHITECTURES[arch]].config.replace(num_classes=10)
    description, params = read_timm(timm_folder(tmp_path / "m", arch, timm_state(cfg), PUBLISHED.get(arch, PLAIN)))
    assert description.config == cfg
    with torch.no_grad():
        logits = model.apply(description.config, params, reference_input(64, 64))
    assert relative(logits, reference_array("timm_golden")[f"{arch}:64x64"]) < LOGITS


def test_deepminds_weights_run_under_deepminds_rules(tmp_path):
    """The dm_ files hold DeepMind's arrays: read from one, F0 gives the logits of the Haiku code."""
    row = VARIANTS["nfnet-f0"]
    state = to_timm(row.config, reference_params("nfnet_F0"))
    folder = timm_folder(tmp_path / "m", "dm_nfnet_f0", state, PUBLISHED["dm_nfnet_f0"])
    description, params = read_timm(folder)
    assert description.config == row.config
    assert description.preprocessing == row.preprocessing
    assert description.labels == imagenet()
    assert_same(params, reference_params("nfnet_F0"))
    with torch.no_grad():
        logits = model.apply(description.config, params, reference_input(75, 53))
    assert relative(logits, reference_array("nfnet_F0_75x53_1000")["logits"]) < LOGITS


# ---------------------------------------------------------------- what a folder says


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_published_configurations_are_the_zoos_rows(arch):
    row = VARIANTS[ARCHITECTURES[arch]]
    found = read_preprocessing(arch, row.preprocessing, PUBLISHED[arch], row.config, Path("config.json"))
    assert found == row.preprocessing


def test_everything_that_a_folder_says(tmp_path):
    cfg, state = small(in_channels=1, drop_rate=0.1, stochastic_depth=0.2)
    pretrained = {
        "tag": "mine",
        "input_size": [1, 96, 96],
        "test_input_size": [1, 128, 128],
        "crop_pct": 0.8,
        "test_crop_pct": 0.95,
        "mean": [0.3],
        "std": [0.2],
    }
    arguments = {"in_chans": 1, "drop_rate": 0.1, "drop_path_rate": 0.2, "num_classes": 3, "global_pool": "avg"}
    labels = {"2": "c", "0": "a", "1": "b"}
    folder = timm_folder(
        tmp_path / "m", "nf_regnet_b0", state, pretrained, model_args=arguments, label_names=labels, global_pool="avg"
    )
    description, params = read_timm(folder, model="timm-nf-regnet-b0")
    assert description.config == cfg
    assert description.preprocessing == Preprocessing(
        train_size=96, test_size=128, resize="shortest-edge", crop=0.95, mean=(0.3,), std=(0.2,)
    )
    assert description.labels == ("a", "b", "c")
    assert description.name == "timm-nf-regnet-b0"
    assert description.provenance == {
        "format": "timm",
        "architecture": "nf_regnet_b0",
        "tag": "mine",
        "source": "model.safetensors",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    assert_same(to_timm(cfg, params), state)


def test_weights_that_were_trained_on_from_deepminds(tmp_path):
    """timm keeps the tag, so the sizes decide."""
    row = VARIANTS["nfnet-f0"]
    published = PUBLISHED["dm_nfnet_f0"]

    def read(**changes: Any) -> Preprocessing:
        return read_preprocessing(
            "dm_nfnet_f0", row.preprocessing, {**published, **changes}, row.config, tmp_path / "config.json"
        )

    assert read(crop_mode="center") == row.preprocessing
    smaller = read(input_size=[3, 128, 128], test_input_size=[3, 160, 160], crop_pct=0.8)
    assert smaller == dataclasses.replace(row.preprocessing, train_size=128, test_size=160, margin=40)
    other = read(mean=[0.5] * 3, crop_mode="center", crop_pct=0.95)
    assert (other.resize, other.crop, other.mean) == ("shortest-edge", 0.95, (0.5, 0.5, 0.5))
    assert read(tag="mine", crop_pct=0.8).margin == 64


def test_a_stride_of_timms_is_not_taken_for_deepminds(tmp_path):
    cfg = VARIANTS["nfnet-f0"].config.replace(num_classes=3)
    fields = {"architecture": "dm_nfnet_f0", "model_args": {"output_stride": 16}}
    with pytest.raises(ConversionError, match="at output_stride 16 timm computes other maps"):
        apply_arguments(cfg, fields, tmp_path)


def test_the_form_before_pretrained_cfg(tmp_path):
    folder = timm_folder(tmp_path / "m", "nf_regnet_b0", small()[1], {})
    (folder / "config.json").write_text(json.dumps({"architecture": "nf_regnet_b0", "num_classes": 3, **PLAIN}))
    assert read_timm(folder)[0].preprocessing == VARIANTS["timm-nf-regnet-b0"].preprocessing


def test_a_folder_that_timm_writes_of_a_model_of_nfzoo(tmp_path):
    """As timm 1.0.31's `save_for_hf` writes it of `create_model("nfzoo_nfnet_test", num_classes=4, in_chans=1)`."""
    row = VARIANTS["nfnet-test"]
    config = row.config.replace(num_classes=4, in_channels=1)
    params = random_params(config)
    cfg = {
        "input_size": [1, 32, 32],
        "test_input_size": [1, 48, 48],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.75,
        "crop_mode": "squash",
        "mean": [0.4],
        "std": [0.3],
        "num_classes": 4,
        "pool_size": [1, 1],
        "first_conv": "stem.conv0",
        "classifier": "head",
        "custom_load": False,
    }
    fields = {
        "architecture": "nfzoo_nfnet_test",
        "num_classes": 4,
        "num_features": 256,
        "label_names": list("abcd"),
        "model_args": {"num_classes": 4, "in_chans": 1, "output_stride": 16},
        "pretrained_cfg": cfg,
    }
    save_file(params, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    description, read = read_timm(tmp_path)
    assert_same(read, params)
    assert description.config == config.replace(output_stride=16)
    expected = Preprocessing(train_size=32, test_size=48, margin=16, mean=(0.4,), std=(0.3,))
    assert description.preprocessing == expected
    assert (description.name, description.labels) == ("nfnet-test", tuple("abcd"))
    with pytest.raises(ConversionError, match="says 'nfnet-test', not 'nfnet-f0'"):
        read_timm(tmp_path, model="nfnet-f0")
    for key, value, match in (
        ("num_classes", 5, "num_classes"),
        ("model_args", {"act_layer": "relu"}, "act_layer"),
        ("architecture", "nfzoo_nfnet_f0", "is no nfnet-f0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**fields, key: value}))
        with pytest.raises(ConversionError, match=match):
            read_timm(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bilinear": ({"interpolation": "bilinear"}, {}, "interpolation 'bilinear'"),
    "squash": ({"crop_mode": "squash"}, {}, "crop_mode 'squash' is not supported for nf_regnet_b0"),
    "border": ({"crop_mode": "border"}, {}, "crop_mode 'border'"),
    "oblong": ({"test_input_size": [3, 256, 224]}, {}, "test_input_size must be"),
    "no size": ({"input_size": None}, {}, "lacks input_size"),
    "crop": ({"crop_pct": 1.5}, {}, "crop_pct"),
    "tiny crop": ({"crop_pct": 5e-324}, {}, "crop_pct"),
    "small crop": ({"crop_pct": 0.01}, {}, "crop must be from 0.0"),
    "large": ({"input_size": [3, 10**400, 10**400]}, {}, "sides of images must be from 1 to 4096"),
    "mean": ({"mean": [0.5]}, {}, "mean|std"),
    "both": ({"mean": [0.5], "std": [0.5]}, {}, "1 numbers for images of 3 channels"),
    "offset": ({"label_offset": 1}, {}, "label_offset"),
    "cfg": ({}, {"pretrained_cfg": []}, "must be a JSON object"),
    "pooling": ({}, {"global_pool": "catavgmax"}, "average pooling"),
    "pooling argument": ({}, {"model_args": {"global_pool": "max"}}, "average pooling"),
    "activation": ({}, {"model_args": {"act_layer": "relu"}}, "nfzoo lacks: act_layer"),
    "stride": ({}, {"model_args": {"output_stride": 4}}, "output_stride must be 8, 16 or 32, not 4"),
    "arguments": ({}, {"model_args": [1]}, "must be a JSON object"),
    "drop rate": ({}, {"model_args": {"drop_rate": 2}}, "drop_rate"),
    "classes": ({}, {"num_classes": 4}, "num_classes 4, the weights have 3"),
    "channels": ({}, {"model_args": {"in_chans": 1}}, "in_chans 1, the weights have 3"),
    "labels": ({}, {"label_names": ["a", "b"]}, "2 label_names for 3 classes"),
    "gap": ({}, {"label_names": {"0": "a", "1": "b", "3": "d"}}, "every class from 0 on"),
    "label type": ({}, {"label_names": "abc"}, "every class"),
    "architecture": ({}, {"architecture": "resnet50"}, "'resnet50' is no NF-network"),
    "near": ({}, {"architecture": "nf_regnet_b9"}, "did you mean"),
    "other": ({}, {"architecture": "nf_regnet_b1"}, "is no nf_regnet_b1: .*lacks"),
    "nfzoo": ({}, {"architecture": {"family": "nfnet"}}, "is not timm's"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return timm_folder(tmp_path_factory.mktemp("timm") / "m", "nf_regnet_b0", small()[1], PLAIN)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_arithmetic_is_refused(case, folder, tmp_path):
    cfg, fields, match = REFUSED[case]
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    written["pretrained_cfg"] |= cfg
    (tmp_path / "config.json").write_text(json.dumps(written | fields))
    with pytest.raises(ConversionError, match=match):
        read_timm(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_a_broken_configuration(content, folder, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_timm(tmp_path)


# ---------------------------------------------------------------- weight files


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_recognised(arch):
    cfg = VARIANTS[ARCHITECTURES[arch]].config
    assert recognize(timm_shapes(cfg)) == arch
    assert recognize(timm_shapes(cfg.replace(num_classes=1, in_channels=4))) == arch
    assert TIMM[arch] == ARCHITECTURES[arch]
    digest = timm_golden()["architectures"][arch]["state_sha256"]
    shapes = timm_shapes(cfg.replace(num_classes=10))
    lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("m.safetensors", None),
        ("m.safetensors", "nf_regnet_b0.mine_in1k"),
        ("m.bin", "nf_regnet_b0"),
        ("m.pth", "timm-nf-regnet-b0"),
        ("folder", None),
    ],
)
def test_a_weight_file_alone(stated, name, tmp_path):
    cfg, state = small()
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        torch.save(state, path / "pytorch_model.bin")
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    description, params = read_timm(path, model=stated, allow_pickle=True)
    assert description.config == cfg
    assert description.preprocessing == VARIANTS["timm-nf-regnet-b0"].preprocessing
    assert description.labels is None
    assert_same(to_timm(cfg, params), state)


def test_greyscale_weights_alone(tmp_path):
    cfg, state = small(in_channels=1)
    save_file(state, tmp_path / "m.safetensors")
    description, _ = read_timm(tmp_path / "m.safetensors")
    assert description.config == cfg
    assert description.preprocessing.mean == (0.5,)


def test_half_precision_stays(tmp_path):
    cfg, state = small()
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "m.safetensors")
    _, params = read_timm(tmp_path / "m.safetensors")
    assert {value.dtype for value in params.values()} == {torch.float16}
    assert params.keys() == model.specs(cfg).keys()


class Run:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, ("touch executed",)


def test_hostile_and_broken_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, state = small()
    path = tmp_path / "m.bin"
    for write, match in (
        (lambda: torch.save({**state, "x": Run()}, path), "cannot be read as weights alone"),
        (lambda: path.write_bytes(pickle.dumps(Run())), "cannot be read as weights alone"),
        (lambda: path.write_bytes(b""), "cannot be read as weights alone"),
        (lambda: path.write_bytes(b"PK\3\4"), "cannot be read as weights alone"),
        (lambda: torch.save([1], path), "no state dict of an NF-network"),
        (lambda: torch.save({}, path), "no state dict of an NF-network"),
    ):
        write()
        with pytest.raises(ConversionError, match=r"is a pickle of torch's, .*--allow-pickle"):
            read_timm(path)
        with pytest.raises(ConversionError, match=match):
            read_timm(path, allow_pickle=True)
    assert not (tmp_path / "executed").exists()
    for name, content, match in (
        ("m.safetensors", b"", "damaged"),
        ("m.safetensors", b"\xff" * 64, "damaged"),
        ("m.ckpt", b"", "no folder, no .safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=match):
            read_timm(tmp_path / name)
    for missing in (tmp_path / "none", tmp_path / "none.bin"):
        with pytest.raises(ConversionError, match="there is no"):
            read_timm(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="there is no model"):
        read_timm(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("head.fc.weight"), "lacks head.fc.weight"),
        (lambda s: s.pop("stages.0.0.conv1.gain"), "--model"),
        (lambda s: s.update({"stages.0.0.conv1.gain": torch.ones(3)}), "--model"),
        (lambda s: s.update({"extra": torch.ones(1)}), "--model"),
    ],
)
def test_weights_that_are_not_recognised(change, match, tmp_path):
    _, state = small()
    change(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ConversionError, match=match):
        read_timm(tmp_path / "m.safetensors")
    with pytest.raises(ConversionError, match=r"lacks|has shape|has 1 tensors"):
        read_timm(tmp_path / "m.safetensors", model="nf_regnet_b0")


def test_the_model_that_is_asked_for_must_be_it(folder):
    with pytest.raises(ConversionError, match="says 'nf_regnet_b0', not 'nfnet_l0'"):
        read_timm(folder, model="nfnet-l0")
    with pytest.raises(ConversionError, match="did you mean 'nf_regnet_b0'"):
        read_timm(folder, model="nf_regnet_0")


def test_tensors_are_read_one_by_one(folder, monkeypatch):
    """Each is asked for once, so that a network of gigabytes is not in memory twice."""
    asked: list[str] = []
    original = StateDict.__getitem__
    monkeypatch.setattr(StateDict, "__getitem__", lambda self, key: (asked.append(key), original(self, key))[1])
    read_timm(folder)
    assert sorted(asked) == sorted(timm_shapes(small()[0]))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(("arch", "stride"), [("nf_regnet_b0", 32), ("nf_ecaresnet26", 16)])
def test_there_and_back(arch, stride, tmp_path):
    cfg, state = small(arch)
    cfg = cfg.replace(output_stride=stride)
    preprocessing = VARIANTS[ARCHITECTURES[arch]].preprocessing
    description = Description(cfg, preprocessing, ARCHITECTURES[arch], ("a\udcff\x1b", "ä", "c"), {"tag": "mine"})
    written = write_timm(tmp_path / "a", description, timm.from_timm(cfg, state))
    found, params = read_timm(written)
    assert_same(to_timm(cfg, params), state)
    assert found._replace(provenance=None) == description._replace(provenance=None)
    assert found.provenance is not None
    assert found.provenance["tag"] == "mine"
    write_timm(tmp_path / "b", found, params)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize("margin", [0, 1, 8, 31, 32, 40])
@pytest.mark.parametrize("size", [32, 97, 256, 320, 576])
def test_a_margin_survives(size, margin):
    """As `crop_pct`, from which timm computes the side before the crop with a floor."""
    preprocessing = Preprocessing(train_size=size, test_size=size, margin=margin)
    cfg = VARIANTS["nfnet-f0"].config
    written = timm_config("dm_nfnet_f0", Description(cfg, preprocessing))["pretrained_cfg"]
    assert int(size / written["crop_pct"]) == size + margin
    written = json.loads(json.dumps(written))
    assert read_preprocessing("dm_nfnet_f0", preprocessing, written, cfg, Path("config.json")) == preprocessing


def test_what_is_written(tmp_path):
    cfg, _ = small(in_channels=1)
    preprocessing = dataclasses.replace(VARIANTS["timm-nf-regnet-b0"].preprocessing, mean=(0.5,), std=(0.5,))
    folder = write_timm(tmp_path / "m", Description(cfg, preprocessing), random_params(cfg))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architecture"] == "nf_regnet_b0"
    assert fields["num_features"] == 960
    assert fields["model_args"] == {"in_chans": 1}
    assert fields["pretrained_cfg"]["test_input_size"] == [1, 256, 256]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", "crc32"}
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == timm_shapes(cfg)  # noqa: SIM118


@pytest.mark.parametrize(
    "changed",
    [
        VARIANTS["nfnet-f7"].config,
        VARIANTS["nfnet-f0-plus"].config,
        VARIANTS["nf-resnet-50"].config,
        VARIANTS["nfnet-f0"].config.replace(alpha=0.3),
        VARIANTS["nfnet-f0"].config.replace(output_stride=16),
        VARIANTS["timm-nf-regnet-b0"].config.replace(activation="relu"),
    ],
)
def test_networks_that_timm_lacks(changed, tmp_path):
    with pytest.raises(ConversionError, match="timm has no network of this configuration"):
        write_timm(tmp_path / "m", Description(changed, VARIANTS["nfnet-f0"].preprocessing), {})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was(folder, tmp_path, monkeypatch):
    cfg, state = small()
    params = timm.from_timm(cfg, state)
    description = Description(cfg, VARIANTS["timm-nf-regnet-b0"].preprocessing)
    write_timm(tmp_path / "m", description, params)
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("nfzoo.checkpoint.weight_files.save_file", fail)
        for target in ("m", "new"):
            with pytest.raises(OSError, match="No space"):
                write_timm(tmp_path / target, description, params)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        write_timm(tmp_path / "file", description, params)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    write_timm(tmp_path / "m", description, {key: value + 1 for key, value in params.items()})
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert torch.equal(read_timm(tmp_path / "m")[1]["head.bias"], params["head.bias"] + 1)
