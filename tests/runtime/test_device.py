"""Backends: what a training loop may count on from any device, and what torch's own devices do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nfzoo import model
from nfzoo.errors import ConfigError
from nfzoo.runtime import device as devices
from nfzoo.runtime.device import AUTOCAST, TpuBackend, XlaBackend, backend, check_processes, precision, usable_device
from nfzoo.step import cross_entropy
from tests.support.helpers import FAMILIES, SMALL, assert_same, images, random_params

LABELS = torch.tensor([0, 3])


def test_each_device_has_its_backend() -> None:
    assert type(backend("cpu")) is devices.Backend
    assert type(backend(torch.device("cuda", 1))) is devices.Backend
    assert type(backend("mps")) is devices.Backend
    assert type(backend("xla")) is XlaBackend
    assert backend("cuda:1").device == torch.device("cuda", 1)
    assert backend("cpu") == backend(torch.device("cpu"))


def test_a_tpu_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "tpu", raising=False)
    monkeypatch.setitem(sys.modules, "torch_tpu", None)
    for door in (backend, usable_device):
        with pytest.raises(ConfigError, match=r"the device 'tpu' cannot be used here: pip install 'nfzoo\[tpu\]'"):
            door("tpu")
    with pytest.raises(ConfigError, match=r"nfzoo\[tpu\]"):
        TpuBackend(torch.device("cpu")).start()


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", ""])
def test_words_that_name_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the device '{name}' cannot be used here: [^\n]+$"):
        backend(name)


def test_xla_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ConfigError, match=r"the device 'xla' cannot be used here: pip install 'nfzoo\[xla\]'"):
        usable_device("xla")


def test_images_are_laid_out_as_the_device_likes_them() -> None:
    x = torch.rand(2, 3, 4, 5)
    laid = backend("cpu").images(x, torch.float64)
    assert laid.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid, x.double())
    assert backend("cpu").images(laid) is laid
    assert backend("meta").images(x).is_contiguous()


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name: str) -> None:
    cfg = SMALL[name]
    params, x = random_params(cfg), images(cfg)
    with backend("cpu").autocast(torch.bfloat16):
        low = model.apply(cfg, params, x)
    with backend("cpu").autocast(None):
        full = model.apply(cfg, params, x)
    assert low.dtype == torch.bfloat16
    assert torch.equal(full, model.apply(cfg, params, x))


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16} == AUTOCAST
    assert precision() == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    assert precision() == "bf16"
    assert precision("no") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="mixed_precision must be one of no, bf16, fp16, not 'fp8'"):
        precision()
    with pytest.raises(ConfigError, match=r"not torch\.float64"):
        backend("cpu").autocast(torch.float64)
    with pytest.raises(ConfigError, match="'fp16'; take 'bf16'"):
        backend("xla").autocast(torch.float16)


def test_checkpointing_changes_no_gradient() -> None:
    cfg = SMALL["nfnet"]
    found, kept = [], []
    for checkpointed in (False, True):
        leaves = {name: p.requires_grad_() for name, p in random_params(cfg).items()}
        shapes: list[torch.Size] = []

        def note(t: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = images(cfg)
            for block in model.plan(cfg):
                local = model.block_params(block, leaves)

                def run(x: Tensor, block=block, local=local) -> Tensor:
                    return block.fn(local, x, block.beta, None)

                out = backend("cpu").checkpoint(run, out) if checkpointed else run(out)
        kept.append(len(shapes))
        cross_entropy(out, LABELS).backward()
        found.append({name: p.grad for name, p in leaves.items() if p.grad is not None})
    assert_same(*found)
    assert found[0].keys() == random_params(cfg).keys()
    assert kept[1] < kept[0] / 5


def test_the_rest_does_nothing_on_the_cpu() -> None:
    chosen, tensors = backend("cpu"), {"a": torch.ones(2, requires_grad=True), "b": torch.arange(3)}
    chosen.start()
    chosen.step_mark()
    chosen.synchronize()
    gradients = [torch.tensor([1.0, 2.0])]
    chosen.all_reduce_mean(gradients)
    assert gradients[0].tolist() == [1.0, 2.0]
    saved = chosen.to_cpu(tensors)
    assert_same(saved, tensors)
    assert not saved["a"].requires_grad
    assert chosen.scalar(0.5) == 0.5


def test_the_processes_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ConfigError, match="2 processes were launched"):
        check_processes(1)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, "0"),
        ({"PJRT_DEVICE": "TPU"}, "1"),
        ({"PJRT_DEVICE": ""}, "0"),
        ({"USE_TORCH_XLA": "1"}, "1"),
        ({"PJRT_DEVICE": "CPU", "USE_TORCH_XLA": "0"}, "0"),
    ],
)
def test_accelerate_takes_xla_where_it_is_asked_to(
    given: dict[str, str], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PJRT_DEVICE", "USE_TORCH_XLA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    devices.choose_xla()
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    assert os.environ.pop("USE_TORCH_XLA") == taken


@pytest.mark.parametrize(("asked", "told"), [("no", "no"), ("bf16", "no")])
def test_accelerate_learns_nothing_of_bf16(asked: str, told: str, tmp_path: Path) -> None:
    """In a process of its own: Accelerate keeps its first configuration. Its bf16 makes parameters bf16 on a TPU."""
    code = (
        "import sys; from nfzoo.runtime.device import accelerator; assert 'accelerate' not in sys.modules; "
        f"print(accelerator({asked!r}).mixed_precision)"
    )
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == told
