"""Exported programs, run again by torch-xla and by jax, compute what the model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nfzoo import NFNet, model
from nfzoo.errors import ConfigError
from nfzoo.export.stablehlo import Program, export_stablehlo, lower
from nfzoo.nn import load
from nfzoo.runtime.device import backend
from nfzoo.step import init_state, train_step
from tests.support.helpers import SMALL, assert_same, generator, images, random_params, relative

LOGITS = 1e-5  # of logits around 1: float32, summed in another order
PARAMETER = 1e-4  # relative, after one step, for the same reason
BATCH, SIZE, RATE = 4, 32, 0.2  # the rate is alpha too, so that taking one for the other would not show in one step
LABELS = torch.tensor([0, 1, 3, 4])
CFG = SMALL["nfnet"].replace(drop_rate=0.3, stochastic_depth=0.5)
RunProgram = Callable[[Path, Mapping[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stablehlo") / "out"
    net = NFNet(CFG, labels=list("abcde"))
    net.load_state_dict(random_params(CFG))
    files = export_stablehlo(net, folder, size=SIZE, batch=BATCH, training=True)
    assert sorted(folder.iterdir()) == files
    return folder


def by_torch_xla(program: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch_xla  # pyright: ignore[reportMissingImports]

    names = json.loads(program.with_suffix(".json").read_text())
    tensors = [inputs[entry["name"]].detach().contiguous() for entry in names["inputs"]]
    for tensor, entry in zip(tensors, names["inputs"], strict=True):
        assert list(tensor.shape) == entry["shape"], entry["name"]
        assert str(tensor.dtype) == f"torch.{entry['dtype']}", entry["name"]
    backend("xla").start()
    results = torch_xla._XLAC._run_stablehlo(program.read_bytes(), tensors)
    return {entry["name"]: result.cpu() for entry, result in zip(names["outputs"], results, strict=True)}


def by_jax(program: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given, made = program.with_name("given.npz"), program.with_name("made.npz")
    np.savez(given, **{name: t.numpy() for name, t in inputs.items()})  # type: ignore[arg-type]
    command = [sys.executable, Path(__file__).with_name("run_in_jax.py"), program, given, made]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    with np.load(made) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


RUNNERS = pytest.mark.parametrize("run", [by_torch_xla, by_jax])


def params_as_inputs(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"params/{name}": p for name, p in params.items()}


@RUNNERS
def test_the_forward_pass(exported: Path, run: RunProgram) -> None:
    net, x = load(exported), images(CFG, BATCH, SIZE)
    logits = run(exported / "forward.mlirbc", {**params_as_inputs(net.state_dict()), "images": x})["logits"]
    assert (logits - model.apply(CFG, net.state_dict(), x)).abs().max() < LOGITS
    others, y = random_params(CFG, seed=5), images(CFG, BATCH, SIZE, seed=6)
    logits = run(exported / "forward.mlirbc", {**params_as_inputs(others), "images": y})["logits"]
    assert (logits - model.apply(CFG, others, y)).abs().max() < LOGITS


@RUNNERS
def test_the_training_step(exported: Path, run: RunProgram) -> None:
    """Two steps, the second on what the first gave, so that momentum, average and counter matter."""
    state = init_state(random_params(CFG))
    given = params_as_inputs(state.params) | {"step": state.step}
    given |= {f"momentum/{name}": m for name, m in state.sgd.momentum.items()}
    given |= {f"ema/{name}": a for name, a in (state.ema or {}).items()}
    for i in range(2):
        x, noise = images(CFG, BATCH, SIZE, seed=i), model.sample_noise(CFG, BATCH, generator=generator(i))
        state, seen = train_step(CFG, state, (x, LABELS), noise, RATE)
        given |= {"images": x, "labels": LABELS, "lr": torch.tensor(RATE)}
        given |= {f"noise/{name}": mask for name, mask in noise.items()}
        made = run(exported / "train_step.mlirbc", given)
        assert abs(made["loss"] - seen.loss) < LOGITS
        assert (made["logits"] - seen.logits).abs().max() < LOGITS
        assert made["step"] == i + 1
        assert state.ema is not None
        for kind, tensors in (("params", state.params), ("momentum", state.sgd.momentum), ("ema", state.ema)):
            for name, value in tensors.items():
                assert relative(made[f"{kind}/{name}"], value) < PARAMETER, (kind, name)
        given |= made


def test_the_files(exported: Path) -> None:
    net = load(exported)
    assert_same(net.state_dict(), random_params(CFG))
    assert net.labels == tuple("abcde")
    for name in ("forward", "train_step"):
        text = (exported / f"{name}.mlir").read_text()
        names = json.loads((exported / f"{name}.json").read_text())
        assert text.startswith("module @")
        arguments = text.split("@main(")[1].split(") -> ")[0]
        assert arguments.count("%arg") == len(names["inputs"])
        wide = [line for line in text.splitlines() if "f64" in line.split("main(")[0]]
        # torch-xla compares with numbers in float64: the gradient of a clamp does. Nothing else may.
        assert all(any(word in line for word in ("constant", "convert", "compare")) for line in wide)
    forward = json.loads((exported / "forward.json").read_text())
    wanted = {"images", *(f"params/{name}" for name in net.state_dict())}
    assert {entry["name"] for entry in forward["inputs"]} == wanted
    assert forward["outputs"] == [{"name": "logits", "shape": [BATCH, 5], "dtype": "float32"}]


def test_other_models(tmp_path: Path, device: torch.device) -> None:
    """A folded model, at its own size; a step without noise and without an average is a program too."""
    net = NFNet(SMALL["nf-resnet"])
    net.load_state_dict(random_params(net.config))
    folded = net.for_inference()
    export_stablehlo(folded, tmp_path / "out", size=None, batch=1, training=False)
    x = images(net.config, 1, net.preprocessing.test_size)
    given = {**params_as_inputs(folded.state_dict()), "images": x}
    logits = by_torch_xla(tmp_path / "out" / "forward.mlirbc", given)["logits"]
    assert (logits - net.eval()(x).detach()).abs().max() < LOGITS
    with pytest.raises(ConfigError, match="folded"):
        export_stablehlo(folded, tmp_path / "no", size=32, batch=1, training=True)
    with pytest.raises(ConfigError, match="batch"):
        export_stablehlo(net, tmp_path / "no", size=32, batch=0, training=False)
    assert not (tmp_path / "no").exists()


def test_programs_that_cannot_be_lowered(device: torch.device) -> None:
    outside = torch.ones(3).to(device)
    with pytest.raises(RuntimeError, match="none of its inputs"):
        lower(Program(lambda given: {"y": given["x"] + outside}, {"x": torch.ones(3)}))
    with pytest.raises(RuntimeError, match="to the CPU"):
        lower(Program(lambda given: {"y": given["x"] * float(given["x"].sum())}, {"x": torch.ones(3)}))
