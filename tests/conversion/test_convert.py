"""`nfzoo convert`: every route in and out is exact, whole or absent, and says what is wrong."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from nfzoo import ConversionError, NfzooError, UnknownModelError
from nfzoo import model as functional
from nfzoo.checkpoint.model_folder import Description, load_checkpoint, save_checkpoint
from nfzoo.cli.main import main
from nfzoo.config import ModelConfig
from nfzoo.conversion import download as fetching
from nfzoo.conversion import verify
from nfzoo.conversion.convert import convert, read
from nfzoo.conversion.download import fetch, published_url
from nfzoo.conversion.haiku import canonical, haiku_shapes, recognize, to_haiku
from nfzoo.conversion.pickle_writer import write_haiku
from nfzoo.data.labels import imagenet
from nfzoo.model import specs
from nfzoo.types import Params
from nfzoo.variants import VARIANTS
from tests.reference.refweights import weights
from tests.support.helpers import DEEPMIND_COUNTS, FAMILIES, SMALL, assert_same, plus_shapes, random_params

DEEPMIND = {name: row for name, row in VARIANTS.items() if row.config.rules == "deepmind"}
ONE_OF_EACH = ("nfnet-test", "nf-resnet-50", "nf-regnet-b0")
RATIO = 2.2  # peak memory over the size of the file


def model(name: str, folder: Path, **changes: Any) -> tuple[ModelConfig, Params]:
    """A checkpoint of random weights in `folder`."""
    config = VARIANTS[name].config.replace(**changes)
    params = random_params(config)
    save_checkpoint(folder, Description(config, VARIANTS[name].preprocessing, name), params)
    return config, params


def haiku_file(path: Path, name: str = "nfnet-test", protocol: int = 4, **changes: Any) -> tuple[ModelConfig, Params]:
    config = VARIANTS[name].config.replace(**changes)
    params = random_params(config)
    path.write_bytes(pickle.dumps(to_haiku(config, params), protocol))
    return config, params


def zeros(name: str, **changes: Any) -> tuple[ModelConfig, Params]:
    """Parameters of a model that take no memory."""
    config = VARIANTS[name].config.replace(**changes)
    return config, {k: torch.zeros(()).expand(shape) for k, (shape, _) in specs(config).items()}


def same_tree(a: Any, b: Any) -> None:
    assert {m: sorted(d) for m, d in a.items()} == {m: sorted(d) for m, d in b.items()}
    for module, leaves in a.items():
        for key, array in leaves.items():
            other = b[module][key]
            assert (array.shape, array.dtype) == (other.shape, other.dtype)
            assert array.tobytes() == other.tobytes()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_from_haiku_and_back(name: str, tmp_path: Path) -> None:
    config, params = haiku_file(tmp_path / "in", name, num_classes=7)
    convert(tmp_path / "in", tmp_path / "model")
    description, read = load_checkpoint(tmp_path / "model")
    assert (description.name, description.config) == (name, config)
    assert description.preprocessing == VARIANTS[name].preprocessing
    assert_same(read, params)
    convert(tmp_path / "model", tmp_path / "out.npz", to="haiku")
    with open(tmp_path / "in", "rb") as a, open(tmp_path / "out.npz", "rb") as b:
        same_tree(pickle.load(a), pickle.load(b))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_to_haiku_and_back(name: str, tmp_path: Path) -> None:
    _, params = model(name, tmp_path / "model", num_classes=3)
    convert(tmp_path / "model" / "model.safetensors", tmp_path / "out.npz", to="haiku")
    convert(tmp_path / "out.npz", tmp_path / "back")
    assert_same(load_checkpoint(tmp_path / "back")[1], params)


def test_what_haiku_does_not_keep_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg, params = model("nfnet-test", tmp_path / "plain")
    row = VARIANTS["nfnet-test"].preprocessing
    convert(tmp_path / "plain", tmp_path / "a.npz", to="haiku")
    assert not caplog.messages
    labels = tuple(f"label {i}" for i in range(cfg.num_classes))
    for number, (changes, lost) in enumerate(
        (({"labels": labels}, "labels"), ({"preprocessing": dataclasses.replace(row, test_size=16)}, "preprocessing"))
    ):
        described = Description(cfg, row, "nfnet-test")._replace(**changes)
        save_checkpoint(tmp_path / lost, described, params)
        caplog.clear()
        convert(tmp_path / lost, tmp_path / f"{number}.npz", to="haiku")
        assert f"does not keep the {lost} of" in caplog.text


def test_bytes_behind_a_pickle_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    haiku_file(tmp_path / "F.npz")
    with open(tmp_path / "F.npz", "ab") as file:
        file.write(b"junk")
    convert(tmp_path / "F.npz", tmp_path / "model")
    assert "4 bytes follow the end of the pickle" in caplog.text


def test_a_temperature_is_not_lost_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, params = zeros("nfnet-test")
    description = Description(config, VARIANTS["nfnet-test"].preprocessing, "nfnet-test", temperature=1.25)
    save_checkpoint(tmp_path / "model", description, params)
    convert(tmp_path / "model", tmp_path / "out.npz", to="haiku")
    (said,) = caplog.messages
    assert "divide its logits by 1.25 before the softmax" in said


def test_what_is_written_needs_no_numpy_2(tmp_path: Path) -> None:
    """numpy 2 has moved the functions that its pickles name; the old names work in all."""
    _, params = model("nfnet-test", tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out.npz", to="haiku")
    data = (tmp_path / "out.npz").read_bytes()
    assert b"numpy._core" not in data
    assert data[:2] == b"\x80\x03"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = pickle.loads(data)
    same_tree(tree, to_haiku(VARIANTS["nfnet-test"].config, params))
    assert all(a.flags.writeable for leaves in tree.values() for a in leaves.values())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol: int, tmp_path: Path) -> None:
    _, params = haiku_file(tmp_path / "F0_haiku.npz", protocol=protocol)
    weights = convert(tmp_path / "F0_haiku.npz", tmp_path / "model")
    assert weights.form == f"pickle, protocol {protocol}"
    assert_same(load_checkpoint(tmp_path / "model")[1], params)


FLAT: dict[str, Callable[[str, str], Any]] = {
    "slashes": lambda m, n: f"{m}/{n}",
    "colons": lambda m, n: f"{m}:{n}",
    "dots, as flatten_haiku_tree": lambda m, n: m.replace("/~/", ".").replace("/", ".") + "." + n,
    "keystr": lambda m, n: f"['{m}']['{n}']",
    "pairs": lambda m, n: (m, n),
}


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize("save", ["pickle", "savez", "savez_compressed"])
def test_flattened(form: str, save: str, tmp_path: Path) -> None:
    config = VARIANTS["nfnet-test"].config
    params = random_params(config)
    flat = {FLAT[form](m, n): a for m, leaves in to_haiku(config, params).items() for n, a in leaves.items()}
    path = tmp_path / "flat.npz"
    if save == "pickle":
        path.write_bytes(pickle.dumps(flat))
    else:
        getattr(np, save)(path, **{canonical(*k) if isinstance(k, tuple) else k: a for k, a in flat.items()})
    assert convert(path, tmp_path / "model").form == ("pickle, protocol 4" if save == "pickle" else "npz")
    assert_same(load_checkpoint(tmp_path / "model")[1], params)


@pytest.mark.parametrize(("dtype", "becomes"), [("f2", "f4"), ("f4", "f4"), (">f4", "f4"), ("f8", "f8")])
def test_precision_is_never_lost(dtype: str, becomes: str, tmp_path: Path) -> None:
    """One float64 array makes the model float64; a model of two types would not run."""
    config = VARIANTS["nfnet-test"].config
    tree = to_haiku(config, random_params(config))
    tree["NFNet/~/linear"]["w"] = tree["NFNet/~/linear"]["w"].astype(dtype) / 3
    (tmp_path / "in").write_bytes(pickle.dumps(tree))
    params = convert(tmp_path / "in", tmp_path / "model").params
    wanted = torch.from_numpy(np.zeros(0, becomes)).dtype
    assert {v.dtype for v in params.values()} == {wanted}
    np.testing.assert_array_equal(params["head.weight"].numpy(), tree["NFNet/~/linear"]["w"].T)
    np.testing.assert_array_equal(params["head.bias"].numpy(), tree["NFNet/~/linear"]["b"])


def test_bfloat16_is_written_as_float32(tmp_path: Path) -> None:
    config = VARIANTS["nfnet-test"].config
    params = {k: v.bfloat16() for k, v in random_params(config).items()}
    save_checkpoint(tmp_path / "model", Description(config, VARIANTS["nfnet-test"].preprocessing), params)
    convert(tmp_path / "model", tmp_path / "out.npz", to="haiku")
    back = convert(tmp_path / "out.npz", tmp_path / "back").params
    assert_same(back, {k: v.float() for k, v in params.items()})


def test_by_way_of_timm(tmp_path: Path) -> None:
    """DeepMind's file, to timm's layout, and back to DeepMind's."""
    config, params = zeros("nfnet-f0", num_classes=2)
    for key in ("head.bias", "stages.2.3.skip_gain", "stages.2.3.conv1.weight", "final_conv.gain"):
        params[key] = torch.randn(params[key].shape)
    write_haiku(tmp_path / "in", config, params)
    convert(tmp_path / "in", tmp_path / "timm", to="timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["architecture"] == "dm_nfnet_f0"
    assert convert(tmp_path / "timm", tmp_path / "out.npz", to="haiku").form == "timm"
    with open(tmp_path / "in", "rb") as a, open(tmp_path / "out.npz", "rb") as b:
        same_tree(pickle.load(a), pickle.load(b))


def test_a_weight_file_of_timms_alone(tmp_path: Path) -> None:
    _, params = model("nf-resnet-50", tmp_path / "model", num_classes=2)
    with pytest.raises(ConversionError):
        convert(tmp_path / "model", tmp_path / "timm", to="timm")  # timm's NF-ResNet follows other rules
    folder = tmp_path / "timm"
    config = VARIANTS["timm-nf-resnet-50"].config.replace(num_classes=2)
    params = random_params(config)
    save_checkpoint(tmp_path / "own", Description(config, VARIANTS["timm-nf-resnet-50"].preprocessing), params)
    convert(tmp_path / "own", folder, to="timm")
    (folder / "config.json").unlink()
    weights = convert(folder / "model.safetensors", tmp_path / "back", model="timm-nf-resnet-50")
    assert_same(weights.params, params)


# ---------------------------------------------------------------- which model


@pytest.mark.parametrize("name", DEEPMIND)
def test_every_variant_is_recognised(name: str) -> None:
    config = DEEPMIND[name].config.replace(num_classes=37, in_channels=5)
    row, found = recognize(haiku_shapes(config))
    assert (row.name, found) == (name, config)


def test_deepminds_plus_tree_is_recognised() -> None:
    shapes = plus_shapes()
    flat = {canonical(m, name): tuple(shape) for m, arrays in shapes.items() for name, shape in arrays.items()}
    counts = DEEPMIND_COUNTS["nfnet-f0-plus"]
    assert (len(flat), sum(map(math.prod, flat.values()))) == (counts["arrays"], counts["parameters"])
    assert [shapes[f"NFNet/~/stem_conv{i}"]["w"] for i in range(4)] == counts["stem"]
    assert haiku_shapes(VARIANTS["nfnet-f0-plus"].config) == flat
    row, config = recognize(flat)
    assert (row.name, config) == ("nfnet-f0-plus", VARIANTS["nfnet-f0-plus"].config)


@pytest.mark.slow
def test_deepminds_plus_file_there_and_back(tmp_path: Path) -> None:
    tree = weights(plus_shapes())
    (tmp_path / "F0+_haiku.npz").write_bytes(pickle.dumps(tree))
    assert convert(tmp_path / "F0+_haiku.npz", tmp_path / "model").description.name == "nfnet-f0-plus"
    convert(tmp_path / "model", tmp_path / "back.npz", to="haiku")
    same_tree(pickle.loads((tmp_path / "back.npz").read_bytes()), tree)


def test_no_two_variants_are_alike() -> None:
    shapes = {
        name: tuple(sorted(haiku_shapes(row.config.replace(num_classes=9)).items())) for name, row in DEEPMIND.items()
    }
    assert len(set(shapes.values())) == len(DEEPMIND)


def test_other_channels(tmp_path: Path) -> None:
    haiku_file(tmp_path / "in", num_classes=4, in_channels=1)
    found = convert(tmp_path / "in", tmp_path / "model").description
    assert (found.config.num_classes, found.config.in_channels) == (4, 1)
    assert len(found.preprocessing.mean) == 1


def test_two_that_fit_need_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = VARIANTS["nfnet-test"]
    twin = row._replace(name="twin", config=row.config.replace(activation="relu"))
    monkeypatch.setitem(VARIANTS, "twin", twin)
    haiku_file(tmp_path / "in")
    with pytest.raises(ConversionError, match="fits nfnet-test, twin alike: say which with --model"):
        convert(tmp_path / "in", tmp_path / "model")
    found = convert(tmp_path / "in", tmp_path / "model", model="twin").description
    assert (found.name, found.config.activation) == ("twin", "relu")


def test_the_nearest_are_told() -> None:
    config = VARIANTS["nfnet-f1"].config.replace(depths=(2, 4, 12, 7))
    with pytest.raises(
        ConversionError, match=r"The nearest: nfnet-f1 differs in 17 arrays, such as NFNet\.nf_block_24"
    ):
        recognize(haiku_shapes(config))


def test_a_name_overrides(tmp_path: Path) -> None:
    haiku_file(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "model", model="nfnet-test").description.name == "nfnet-test"
    for name, error, told in (
        *(
            (wrong, ConversionError, f"is of nfnet-test, not of {wrong}")
            for wrong in ("nfnet-f0", "nf-resnet-50", "nfnet-l0")
        ),
        ("nfnet-tset", UnknownModelError, "did you mean 'nfnet-test'"),
    ):
        with pytest.raises(error, match=told):
            convert(tmp_path / "in", tmp_path / "other", model=name)
    assert not (tmp_path / "other").exists()


def test_deepminds_own_files_have_labels(tmp_path: Path) -> None:
    write_haiku(tmp_path / "F0_haiku.npz", *zeros("nfnet-f0"))
    assert read(tmp_path / "F0_haiku.npz").description.labels == imagenet()
    write_haiku(tmp_path / "F0_haiku.npz", *zeros("nfnet-test", num_classes=1000))
    assert read(tmp_path / "F0_haiku.npz").description.labels is None


# ---------------------------------------------------------------- the target


def test_provenance(tmp_path: Path) -> None:
    haiku_file(tmp_path / "mine.npz")
    convert(tmp_path / "mine.npz", tmp_path / "model")
    data = (tmp_path / "mine.npz").read_bytes()
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert provenance == {
        "format": "haiku (pickle, protocol 4)",
        "source": "mine.npz",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }


@pytest.mark.parametrize("to", ["nfzoo", "haiku", pytest.param("timm", marks=pytest.mark.slow)])
def test_nothing_is_overwritten_unless_asked(to: Any, tmp_path: Path) -> None:
    write_haiku(tmp_path / "in", *zeros("nfnet-f0" if to == "timm" else "nfnet-test"))
    target = tmp_path / "target"
    convert(tmp_path / "in", target, to=to)
    before = {p: p.stat() for p in tmp_path.rglob("*")}
    with pytest.raises(ConversionError, match="--overwrite replaces it"):
        convert(tmp_path / "in", target, to=to)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == {p: s.st_mtime_ns for p, s in before.items()}
    convert(tmp_path / "in", target, to=to, overwrite=True)
    written = target if to == "haiku" else target / "model.safetensors"
    assert written.stat().st_ino != before[written].st_ino


def test_a_target_of_the_wrong_kind(tmp_path: Path) -> None:
    haiku_file(tmp_path / "in")
    with pytest.raises(ConversionError, match="is a file; --to nfzoo writes a folder"):
        convert(tmp_path / "in", tmp_path / "in", overwrite=True)
    with pytest.raises(ConversionError, match="is a folder; --to haiku writes a file"):
        convert(tmp_path / "in", tmp_path, to="haiku", overwrite=True)


@pytest.mark.parametrize("to", ["nfzoo", "haiku"])
def test_whole_or_absent(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no more while the file is written."""
    haiku_file(tmp_path / "in")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nfzoo.conversion.pickle_writer._write_array", full)
    monkeypatch.setattr("nfzoo.checkpoint.weight_files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "in", tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_file_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    haiku_file(tmp_path / "in")
    data = (tmp_path / "in").read_bytes()
    (tmp_path / "in").write_bytes(data[:-1000])
    with pytest.raises(ConversionError, match="cut off"):
        convert(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("model", {}, "is a model of nfzoo's already"),
        ("model", {"to": "haiku", "model": "nfnet-test"}, "says itself what model it is"),
        ("absent.npz", {}, "does not exist"),
        ("absent", {}, "is no folder, no file"),
        ("empty", {}, "is a folder without a model"),
        ("dm:F7", {}, "dm:F0, dm:F1, dm:F2, dm:F3, dm:F4, dm:F5, dm:F6"),
        ("timm-model", {"to": "haiku"}, "a model under 'timm' rules has no Haiku form"),
    ],
)
def test_sources_that_are_refused(
    source: str, options: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model("nfnet-test", tmp_path / "model")
    config = VARIANTS["nf-regnet-b0"].config.replace(rules="timm")
    save_checkpoint(
        tmp_path / "timm-model", Description(config, VARIANTS["nf-regnet-b0"].preprocessing), random_params(config)
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(NfzooError, match=told):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, params = haiku_file(tmp_path / "in.npz")
    assert main(["convert", str(tmp_path / "in.npz"), str(tmp_path / "model")]) == 0
    out, err = capsys.readouterr()
    assert out == f"wrote {tmp_path / 'model'}: nfnet-test, 10 classes, 0.2 M parameters, read as pickle, protocol 4\n"
    assert err == ""  # no bar: it is no terminal
    assert main(["convert", str(tmp_path / "in.npz"), str(tmp_path / "model")]) == 2
    assert re.fullmatch(
        r"nfzoo convert: error: \S+model\.safetensors is there already; --overwrite replaces it\n",
        capsys.readouterr().err,
    )
    assert (
        main(["convert", "--overwrite", "--model", "nfnet-test", str(tmp_path / "in.npz"), str(tmp_path / "model")])
        == 0
    )
    assert main(["convert", "--to", "haiku", str(tmp_path / "model"), str(tmp_path / "out.npz")]) == 0
    assert "read as nfzoo" in capsys.readouterr().out
    same_tree(pickle.loads((tmp_path / "out.npz").read_bytes()), to_haiku(VARIANTS["nfnet-test"].config, params))


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.npz").write_bytes(b"cposix\nsystem\n(X\x04\x00\x00\x00exittR.")
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02cposix\nsys\x1b[31mtem\n(X\x04\x00\x00\x00exittR.")
    for name, told in (
        ("evil.npz", "neither a pickle of protocol 2 to 5 nor"),
        ("evil.pkl", r"global posix\.sys\S+tem is refused"),
    ):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "model")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(rf"nfzoo convert: error: [^\n]*{told}[^\n]*\n", err)
        assert "\x1b" not in err
    assert not (tmp_path / "model").exists()


def test_the_bar_is_for_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    haiku_file(tmp_path / "in.npz")
    convert(tmp_path / "in.npz", tmp_path / "model", progress=True)
    assert re.search(r"nfnet-test: 100%.*772k/772k", capsys.readouterr().err)


# ---------------------------------------------------------------- beside Haiku
# The comparison itself needs jax and is run by hand: see reference/README.md.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_that_are_compared(name: str) -> None:
    config = SMALL[name]
    params = random_params(config)
    x = torch.randn((2, 3, 40, 33), generator=torch.Generator().manual_seed(0))
    images = x.permute(0, 2, 3, 1).numpy()
    found = verify.nfzoo_stages(config, params, images)
    assert list(found) == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "pool", "logits"]
    with torch.no_grad():
        _, *stages = functional.features(config, params, x)
        assert np.array_equal(found["logits"], functional.apply(config, params, x).numpy())
        assert np.array_equal(found["pool"], functional.embed(config, params, x).numpy())
    for i, stage in enumerate(stages):
        assert np.array_equal(found[f"stage {i + 1}"], stage.permute(0, 2, 3, 1).numpy())


def test_without_jax_the_packages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "haiku", None)
    haiku_file(tmp_path / "in")
    assert verify.main([str(tmp_path / "in")]) == 2
    assert re.search("needs jax and dm-haiku, .*: pip install jax dm-haiku\n", capsys.readouterr().err)


# ---------------------------------------------------------------- memory

MEASURE = """
import sys
from nfzoo.conversion.convert import convert, read

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

base = status("VmRSS")
convert(sys.argv[1], sys.argv[2])
print(base, status("VmHWM"))  # not ru_maxrss, which begins at what the parent process had
"""


def peak(source: Path, target: Path) -> tuple[int, int]:
    """Bytes resident after the imports, and at most, of a process that converts."""
    command = [sys.executable, "-c", MEASURE, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    base, most = map(int, done.stdout.split())
    return base, most


def test_memory(tmp_path: Path) -> None:
    """Of F0: what conversion adds to an interpreter that has imported torch, itself as large as F0's file."""
    write_haiku(tmp_path / "F0.npz", *zeros("nfnet-f0"))
    base, most = peak(tmp_path / "F0.npz", tmp_path / "model")
    assert (most - base) / (
        tmp_path / "F0.npz"
    ).stat().st_size < RATIO - 1  # leaves the interpreter as much as the file


@pytest.mark.parametrize("protocol", [pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.slow)])
def test_memory_of_the_largest(protocol: int, tmp_path: Path) -> None:
    """Of F6: all the process takes. Protocol 2 writes bytes as text, by which the file is larger."""
    path = tmp_path / "F6.npz"
    config, params = zeros("nfnet-f6")
    if protocol == 3:
        write_haiku(path, config, params)
    else:
        with path.open("wb") as file:
            pickle.dump(to_haiku(config, params), file, protocol)
    most = peak(path, tmp_path / "model")[1]
    assert most / path.stat().st_size < RATIO


# ---------------------------------------------------------------- DeepMind's server


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` under `/models/`, with one fault per request as long as there are any."""

    content: bytes = b""
    faults: list[str]
    ranges: list[str | None]
    etag = '"v1"'
    md5: bytes | None = None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        lengthless = self.faults[:1] == ["endless"]
        self.send_response(200)
        self.describe(None if lengthless else len(self.content))

    def describe(self, length: int | None) -> None:
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.etag)
        if self.md5 is not None:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(self.md5).decode()}")
        self.end_headers()

    def do_GET(self) -> None:
        data, wanted = self.content, self.headers.get("Range")
        self.ranges.append(wanted)
        fault = self.faults.pop(0) if self.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if self.path != "/models/F0_haiku.npz":
            self.send_error(404)
            return
        start = 0
        if wanted and self.headers.get("If-Range") == self.etag and fault != "whole":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            shift = 1 if fault == "shifted" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.describe(len(body))
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    haiku_file(tmp_path / "original", "nf-regnet-b0", num_classes=3)

    class Own(Server):
        content = (tmp_path / "original").read_bytes()
        faults: list[str] = []  # noqa: RUF012
        ranges: list[str | None] = []  # noqa: RUF012
        md5 = hashlib.md5(content).digest()

    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as running:
        monkeypatch.setenv("NFZOO_DM_URL", f"http://127.0.0.1:{running.server_port}/models/")
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield Own
        finally:
            running.shutdown()
            thread.join()


def kept(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_the_published_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NFZOO_DM_URL", raising=False)
    assert published_url("dm:F1") == "https://storage.googleapis.com/dm-nfnets/F1_haiku.npz"
    assert published_url("dm:f6") == "https://storage.googleapis.com/dm-nfnets/F6_haiku.npz"
    for name in ("dm:F7", "dm:", "dm:F1/../x", "dm:F", "dm:nfnet-f1"):
        with pytest.raises(ConversionError, match="names no published file"):
            published_url(name)


def test_fetched_and_converted(server: type[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "dm:f0", str(tmp_path / "model")]) == 0
    assert "nf-regnet-b0, 3 classes" in capsys.readouterr().out
    found = load_checkpoint(tmp_path / "model")[0].provenance
    assert found is not None
    assert found["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert found["url"] == "https://storage.googleapis.com/dm-nfnets/F0_haiku.npz"  # a mirror is nobody's business
    assert kept(tmp_path) == ["F0_haiku.npz"]
    assert len(server.ranges) == 1
    fetch("dm:F0")
    assert len(server.ranges) == 1  # the second call touches no network


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["503", "500", "429"], [None, None, None, None]),
        (["cut"], [None, "bytes={half}-"]),
        (["cut", "503"], [None, "bytes={half}-", "bytes={half}-"]),
        (["cut", "shifted"], [None, "bytes={half}-", None]),
        (["cut", "whole"], [None, "bytes={half}-"]),
        (["corrupt"], [None, None]),
        (["cut", "corrupt"], [None, "bytes={half}-", None]),
    ],
)
def test_faults_are_survived(faults: list[str], ranges: list[str | None], server: type[Server], tmp_path: Path) -> None:
    server.faults.extend(faults)
    assert fetch("dm:F0").read_bytes() == server.content
    half = len(server.content) // 2
    assert server.ranges == [r and r.format(half=half) for r in ranges]
    assert kept(tmp_path) == ["F0_haiku.npz"]


def test_another_content_after_a_cut(server: type[Server], tmp_path: Path) -> None:
    """The two halves of different files are not put together."""
    server.faults.extend(["cut"] + ["503"] * 4)
    with pytest.raises(ConversionError, match=r"attempt 5 of 5\): HTTP Error 503"):
        fetch("dm:F0")
    server.content, server.etag = server.content[::-1], '"v2"'
    server.md5 = hashlib.md5(server.content).digest()
    assert fetch("dm:F0").read_bytes() == server.content


@pytest.mark.parametrize(
    ("faults", "told", "requests"),
    [
        (["404"], "HTTP Error 404", 1),
        (["403"], "HTTP Error 403", 1),
        (["503"] * 9, r"attempt 5 of 5\): HTTP Error 503", 5),
        (["endless"], "without its length", 0),
        (["corrupt"] * 9, r"attempt 5 of 5\): what came has the MD5", 5),
    ],
)
def test_faults_that_are_told(
    faults: list[str],
    told: str,
    requests: int,
    server: type[Server],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.faults.extend(faults)
    assert main(["convert", "dm:F0", str(tmp_path / "model")]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert len(server.ranges) == requests
    assert not (tmp_path / "model").exists()
    assert "F0_haiku.npz" not in kept(tmp_path)


def test_a_file_without_a_hash_is_named_or_refused(
    server: type[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    md5, server.md5 = server.md5, None
    assert main(["convert", "dm:F0", str(tmp_path / "model"), "--require-hash"]) == 2
    assert "without its MD5" in capsys.readouterr().err
    server.faults.append("corrupt")
    assert fetch("dm:F0").read_bytes() != server.content
    (said,) = caplog.messages
    assert said.startswith("of F0_haiku.npz nothing but the length was checked")
    # What is in the cache is checked anew.
    for server.md5, told in ((None, "without its MD5"), (md5, "could not be checked (what came has the MD5")):
        with pytest.raises(ConversionError, match=re.escape(told)):
            fetch("dm:F0", require_hash=True)
    fetch("dm:F0").unlink()
    assert fetch("dm:F0", require_hash=True).read_bytes() == server.content
    assert fetch("dm:F0", require_hash=True).read_bytes() == server.content
    assert len(caplog.messages) == 1


def test_a_download_goes_on_in_the_next_process(server: type[Server], tmp_path: Path) -> None:
    server.faults.extend(["cut"] + ["503"] * 4)
    with pytest.raises(ConversionError, match="resumes the download"):
        fetch("dm:F0")
    assert [name.endswith(".partial") for name in kept(tmp_path)] == [True]
    server.ranges.clear()
    assert fetch("dm:F0").read_bytes() == server.content
    assert server.ranges == [f"bytes={len(server.content) // 2}-"]
    assert kept(tmp_path) == ["F0_haiku.npz"]


def test_several_at_once_fetch_once(server: type[Server], tmp_path: Path) -> None:
    script = "import sys; from nfzoo.conversion.download import fetch; print(fetch('dm:F0'))"
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(server.ranges) == 1
    assert Path(paths.pop()).read_bytes() == server.content
    assert not paths
    assert kept(tmp_path) == ["F0_haiku.npz"]


def test_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: type[Server]) -> None:
    monkeypatch.setenv("NFZOO_DM_URL", "http://127.0.0.1:9")
    with pytest.raises(ConversionError, match=r"attempt 1 of 5.*refused"):
        fetch("dm:F0")
    monkeypatch.setenv("NFZOO_DM_URL", "http://someone:secret@localhost:9")
    with pytest.raises(ConversionError, match="localhost") as refused:
        fetch("dm:F0")
    assert "secret" not in str(refused.value)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConversionError, match="HF_HUB_OFFLINE") as refused:
            fetch("dm:F0")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("NFZOO_DM_URL", "nonsense")
    with pytest.raises(ConversionError, match="NFZOO_DM_URL"):
        fetch("dm:F0")


def test_offline(monkeypatch: pytest.MonkeyPatch, server: type[Server]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConversionError, match="HF_HUB_OFFLINE"):
        fetch("dm:F0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = fetch("dm:F0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("dm:F0") == path


def test_a_model_without_classifier_has_no_haiku_form() -> None:
    cfg = VARIANTS["nfnet-test"].config.replace(num_classes=0)
    with pytest.raises(ConversionError, match="without classifier"):
        to_haiku(cfg, functional.init(cfg))
