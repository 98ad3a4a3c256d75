"""Weights in the files of other trainers: read whatever they wrap around a state dict, or refused by name."""

from __future__ import annotations

import argparse
import functools
import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import nfzoo
from nfzoo.checkpoint import state_dicts
from nfzoo.conversion import convert as conversion
from nfzoo.errors import ConversionError

convert = functools.partial(conversion.convert, allow_pickle=True)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(nfzoo.create("nfnet-test", num_classes=5, generator=torch.Generator().manual_seed(0)).state_dict())


def under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
OPTIONS = argparse.Namespace(lr=0.1, model="nfnet")

# The program -> suffix, and what it saves of these weights.
TRAINERS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "torch.save": (".pt", lambda w: w),
    "named_parameters": (".pth", lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()}),
    "an odd suffix": (".weights", lambda w: w),
    "timm": (".pth.tar", lambda w: {"epoch": 3, "arch": "x", "state_dict": w, "optimizer": OPTIMIZER, "args": OPTIONS}),
    "DDP": (".pth", lambda w: under("module.", w)),
    "torch.compile": (".pth", lambda w: under("_orig_mod.", w)),
    "DDP of a compiled model": (".bin", lambda w: under("module._orig_mod.", w)),
    "compiled blocks": (".pth", lambda w: {k.replace("stages.1.0.", "stages.1.0._orig_mod."): v for k, v in w.items()}),
    "Lightning": (
        ".ckpt",
        lambda w: {
            "state_dict": OrderedDict(under("model.", w)),
            "pytorch-lightning_version": "2.4.0",
            "callbacks": {},
            "optimizer_states": [OPTIMIZER],
            "hyper_parameters": {"lr": 0.1},
        },
    ),
    "torchvision": (".pth", lambda w: {"model": w, "optimizer": OPTIMIZER, "epoch": 1, "args": OPTIONS}),
    "fastai": (".pth", lambda w: {"model": w, "opt": OPTIMIZER}),
    "a metric of numpy's": (".pth", lambda w: {"model": w, "best": np.float64(0.5), "epoch": np.int64(3)}),
}


@pytest.mark.parametrize("program", TRAINERS)
def test_files_that_are_read(weights: dict[str, Tensor], tmp_path: Path, program: str) -> None:
    suffix, wrap = TRAINERS[program]
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(weights), path)
    convert(path, tmp_path / "model")
    loaded = nfzoo.from_pretrained(tmp_path / "model")
    assert (loaded.name, loaded.config.num_classes) == ("nfnet-test", 5)
    assert loaded.provenance is not None
    assert loaded.provenance["format"] == "state dict"
    state = loaded.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(weights: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "model")
    assert {value.dtype for value in nfzoo.from_pretrained(tmp_path / "model").parameters()} == {dtype}


def test_files_of_before_the_zip_archives(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "old.model", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.model", tmp_path / "model").description.name == "nfnet-test"


def test_a_folder_of_accelerates(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_0"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(OPTIMIZER, folder / "optimizer.bin")
    assert convert(folder, tmp_path / "model").description.name == "nfnet-test"


def test_models_without_a_classifier_and_of_other_channels(tmp_path: Path) -> None:
    model = nfzoo.create("nfnet-test", num_classes=0, in_channels=1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    config = convert(tmp_path / "w.pt", tmp_path / "model").description.config
    assert (config.num_classes, config.in_channels) == (0, 1)


def test_the_moving_average_is_taken(
    weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    average = {key: value + 1 for key, value in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": average, "args": OPTIONS}, tmp_path / "timm.pth.tar")
    read = convert(tmp_path / "timm.pth.tar", tmp_path / "model")
    assert torch.equal(read.params["head.bias"], average["head.bias"])
    assert "'state_dict_ema', the average, is taken" in caplog.text
    caplog.clear()
    averaged = {**under("module.", average), "n_averaged": torch.tensor(3)}
    torch.save({"model": weights, "model_ema": averaged}, tmp_path / "torchvision.pth")
    read = convert(tmp_path / "torchvision.pth", tmp_path / "other")
    assert torch.equal(read.params["head.bias"], average["head.bias"])
    assert "1 tensors beside the model, such as 'n_averaged'" in caplog.text


@pytest.mark.parametrize(
    "other", [{"ema": {"decay": 0.9, "inner": {}}}, {"shadow_params": [1]}, {"x": {"EMACallback": {}}}]
)
def test_an_average_that_is_not_read_is_told(
    weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    torch.save({"model": weights, **other}, tmp_path / "w.pth")
    assert torch.equal(convert(tmp_path / "w.pth", tmp_path / "model").params["head.bias"], weights["head.bias"])
    assert "a moving average too" in caplog.text


def test_a_word_that_holds_ema_is_no_average(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": weights, "remapped_state": weights}, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match="holds the models 'state_dict', 'remapped_state'"):
        convert(tmp_path / "w.pth", tmp_path / "model")


def test_flipped_bits_are_noticed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"w\.pt cannot be read .* does not have the checksum"):
        convert(path, tmp_path / "model")


def test_two_models_of_accelerates(weights: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(weights, tmp_path / name)
    with pytest.raises(ConversionError, match=r"more than one model, such as model_1\.safetensors"):
        convert(tmp_path, tmp_path / "model")


def _two(weights: dict[str, Tensor]) -> Any:
    return {"state_dict": {**under("student.", weights), **under("teacher.", weights)}}


# What is wrong -> suffix, what is saved, and the message.
REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "two models": (".ckpt", _two, "holds 2 models, under 'student.', 'teacher.'"),
    "two forms of one": (".pth", lambda w: {**w, **under("_orig_mod.", w)}, "with and without a wrapper"),
    "two dictionaries": (".pth", lambda w: {"generator": w, "critic": w}, "holds the models 'generator', 'critic'"),
    "an optimizer alone": (".pth", lambda w: OPTIMIZER, "holds no state dict of an NF-network"),
    "a list": (".pth", lambda w: list(w.values()), "holds no state dict of an NF-network"),
    "a whole model": (".pt", lambda w: nfzoo.create("nfnet-test"), "it holds an object of nfzoo.nn.NFNet; save model"),
    "another network": (
        ".pth",
        lambda w: {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)},
        "no NF-network",
    ),
    "a tensor too few": (
        ".pth",
        lambda w: {k: v for k, v in w.items() if k != "stem.conv1.gain"},
        r"nearest is nfnet-test, .* 1 tensors, such as stem\.conv1\.gain: missing instead of \(8,\)",
    ),
    "a tensor too many": (".pth", lambda w: {**w, "extra": torch.zeros(1)}, r"extra: \(1,\) instead of none"),
    "integers": (".pth", lambda w: {k: v.to(torch.int8) for k, v in w.items()}, "is of type int8, none of float16"),
    "two types": (
        ".pth",
        lambda w: {**w, "head.bias": w["head.bias"].half()},
        "float16, and stem.conv0.weight of float32",
    ),
    "no numbers": (
        ".pth",
        lambda w: {**w, "head.bias": w["head.bias"] * torch.nan},
        "head.bias holds numbers that are",
    ),
    "eight bits": (".pth", lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}, "is of type float8_e4m3fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(weights: dict[str, Tensor], tmp_path: Path, case: str) -> None:
    suffix, wrap, message = REFUSED[case]
    torch.save(wrap(weights), tmp_path / f"weights{suffix}")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / f"weights{suffix}", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pickles_are_read_on_request_alone(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never under a torch that they corrupt (CVE-2026-24747)."""
    monkeypatch.setattr(torch, "load", None)
    for name in ("w.bin", "w.pt", "w.pth", "w.ckpt", "w.pth.tar", "weights"):
        torch.save(weights, tmp_path / name)
        with pytest.raises(ConversionError, match=f"{name} is a pickle .*convert it to safetensors.*--allow-pickle"):
            conversion.convert(tmp_path / name, tmp_path / "model")
    for version in ("2.9.0", "2.9.1+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(ConversionError, match=r"CVE-2026-24747.*: convert it to safetensors.* torch 2\.10 or"):
            convert(tmp_path / "w.pt", tmp_path / "model")


# What stands for no tensor that a layer computes in, or for more memory than the file has.
ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "expanded": (lambda: torch.zeros(1).expand(30_000, 30_000), "take 3,6.. bytes|take 3,600,.* bytes, over 2 times"),
    "meta": (lambda: torch.zeros(3, device="meta"), "on meta, no plain tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "of layout torch.sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "complex64|shape|differs"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", ODD)
def test_odd_tensors(weights: dict[str, Tensor], tmp_path: Path, case: str) -> None:
    make, message = ODD[case]
    torch.save({**weights, "head.bias": make()}, tmp_path / "w.pt")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "w.pt", tmp_path / "model")


def test_one_storage_for_many_tensors(weights: dict[str, Tensor], tmp_path: Path) -> None:
    largest = max(weights.values(), key=Tensor.numel)
    shared = {key: largest.view(-1)[: value.numel()].view(value.shape) for key, value in weights.items()}
    torch.save({**shared, **{f"more.{i}": largest for i in range(9)}}, tmp_path / "w.pt")
    with pytest.raises(ConversionError, match="bytes, over 2 times the file's; save contiguous copies"):
        convert(tmp_path / "w.pt", tmp_path / "model")


def _archive(
    weights: dict[str, Tensor], change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED
) -> bytes:
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save(weights, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(out, "w", kind) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def test_archives_that_ask_for_more_than_they_hold(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pickled(program: bytes) -> bytes:
        return _archive(weights, lambda name, data: program if name.endswith("data.pkl") else data)

    def text(value: bytes) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value

    path = tmp_path / "w.pt"
    monkeypatch.setattr(state_dicts, "MOST_READS", 9999)
    for content, message in (
        (_archive(weights, lambda _, data: data, zipfile.ZIP_DEFLATED), "is packed or encrypted"),
        (pickled(b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R."), "memory or time"),
        (pickled(b"\x80\x02c_codecs\nencode\n" + text(b"a" * 99999) + text(b"idna") + b"\x86R."), "memory or time"),
        (pickled(b"\x80\x02" + b"]" * (5 << 20) + b"."), "takes 5,242,883 bytes, more than 4,194,304"),
        (
            bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02" + b"]" * (5 << 20) + b".",
            "more than 9999 reads",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            convert(path, tmp_path / "model")


def test_a_dictionary_in_many_places_is_looked_at_once(weights: dict[str, Tensor], tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(4):
        inner = {str(i): inner for i in range(2000)}
    torch.save({"model": weights, "rest": inner}, tmp_path / "w.pt")
    assert convert(tmp_path / "w.pt", tmp_path / "model").description.name == "nfnet-test"


# File or folder with this file -> what it is called.
FOREIGN = {
    "model.keras": "a model of Keras",
    "model.h5": "an HDF5 file, as Keras writes",
    "model.onnx": "an ONNX program",
    "model.pt2": "a program of torch.export",
    "params.msgpack": "a file of Flax",
    "model.ckpt-1.index": "a checkpoint of TensorFlow",
    "saved/saved_model.pb": "a SavedModel of TensorFlow",
    "orbax/_CHECKPOINT_METADATA": "a checkpoint of Orbax",
    "sharded/__0_0.distcp": "a sharded checkpoint of torch; .* makes a file of it",
    "deepspeed/zero_to_fp32.py": "a checkpoint of DeepSpeed; its zero_to_fp32.py",
    "large/pytorch_model.bin.index.json": "a model in several pickled files",
}


@pytest.mark.parametrize("file", FOREIGN)
def test_files_of_other_programs_are_named(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"PK\x03\x04 whatever")
    with pytest.raises(ConversionError, match=FOREIGN[file]):
        convert(path if path.parent == tmp_path else path.parent, tmp_path / "model")


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its tracer
        traced = torch.jit.trace(torch.nn.Identity(), torch.zeros(1))
        torch.jit.save(traced, str(tmp_path / "model.pt"))
    with pytest.raises(ConversionError, match="it is a TorchScript program; save model"):
        convert(tmp_path / "model.pt", tmp_path / "model")
