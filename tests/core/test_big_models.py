"""accelerate's loading of models larger than a device: parameters on `meta`, offloaded, and split between devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import nfzoo
from nfzoo import NFNet
from tests.support.helpers import images, random_params

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> NFNet:
    made = nfzoo.create("nfnet-test")
    made.load_state_dict(random_params(made.config))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("big") / "model")


def twin(model: NFNet) -> NFNet:
    made = nfzoo.create("nfnet-test")
    made.load_state_dict(model.state_dict())
    return made.eval().requires_grad_(False)


def empty() -> NFNet:
    with init_empty_weights():
        return nfzoo.create("nfnet-test").eval()


def split(model: NFNet, size: int = 300_000) -> dict[str, int | str | torch.device]:
    """Some blocks on the CPU and the others on the disk, none of them torn apart."""
    blocks = list(model._no_split_modules)
    return infer_auto_device_map(model, max_memory={"cpu": size, "disk": 10**9}, no_split_module_classes=blocks)


def assert_as_before(changed: torch.nn.Module, model: NFNet) -> None:
    x = images(model.config)
    for method in ("forward", "embed"):
        assert torch.equal(getattr(changed, method)(x), getattr(model, method)(x))
    maps: list[Tensor] = changed.features(x)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(maps, model.features(x), strict=True))


def test_blocks_stay_whole(model):
    places = split(empty())
    assert set(places.values()) == {"cpu", "disk"}
    assert {path.split(".")[0] for path in places} == {"stem", "stages", "final_conv", "pool", "head"}
    assert all(len(path.split(".")) <= (3 if path.startswith("stages") else 2) for path in places)


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("places", [{"": "cpu"}, "auto", "split"], ids=["one device", "auto", "disk"])
def test_saved_weights_load_into_an_empty_model(model, folder, tmp_path, places, whole):
    made = empty()
    assert {p.device.type for p in made.parameters()} == {"meta"}
    loaded = load_checkpoint_and_dispatch(
        made,
        str(folder if whole else folder / "model.safetensors"),
        device_map=split(made) if places == "split" else places,
        no_split_module_classes=list(NFNet._no_split_modules),
        offload_folder=str(tmp_path),
    )
    assert_as_before(loaded, model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "offload",
    [
        lambda made, folder: cpu_offload(made, CPU),
        lambda made, folder: cpu_offload(made, CPU, preload_module_classes=["BlockModule"]),
        lambda made, folder: disk_offload(made, folder, CPU),
    ],
    ids=["cpu", "cpu by blocks", "disk"],
)
def test_offloaded_parameters_come_for_each_block(model, tmp_path, offload, compiled):
    made = offload(twin(model), str(tmp_path))
    assert {p.device.type for p in made.parameters()} == {"meta"}
    expected = twin(model)
    if compiled:  # both, since compiled blocks round the activation differently
        made.compile_blocks(backend="eager")
        expected.compile_blocks(backend="eager")
    for _ in range(2):
        assert_as_before(made, expected)
    assert {p.device.type for p in made.parameters()} == {"meta"}


def test_a_model_is_dispatched(model, tmp_path):
    assert_as_before(dispatch_model(twin(model), split(model), main_device=CPU, offload_dir=str(tmp_path)), model)


def test_a_file_without_the_metadata_of_other_libraries_still_loads(model, folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    assert_as_before(nfzoo.from_pretrained(tmp_path), model)
