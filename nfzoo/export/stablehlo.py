"""Write a model's forward pass and its training step as StableHLO, which any XLA compiles (torch-xla, jax).

A program's inputs and outputs have names, which the JSON file beside it lists in order. They are `params/KEY` with the
keys of `model.safetensors`, `images` and `logits`; a training step also has `momentum/KEY`, `ema/KEY`, `noise/BLOCK`,
`step`, `labels`, `lr` and `loss`. Weights are arguments: one program serves all weights, and a step can follow a step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.config import MAX_SIZE, ModelConfig, is_int
from nfzoo.errors import ConfigError
from nfzoo.model import apply, sample_noise
from nfzoo.optim.sgd import SGDState
from nfzoo.runtime.device import backend
from nfzoo.step import StepConfig, TrainState, init_state, train_step
from nfzoo.types import Params

if TYPE_CHECKING:
    from nfzoo.nn import NFNet

FORWARD, TRAIN_STEP = "forward", "train_step"
TEXT, BYTECODE, NAMES = ".mlir", ".mlirbc", ".json"


class Program(NamedTuple):
    """Hold a function of named tensors, and the tensors to trace it with, whose shapes it keeps."""

    fn: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    inputs: dict[str, Tensor]


class Lowered(NamedTuple):
    """Hold a program as MLIR; `names` lists name, shape and dtype of its `inputs` and `outputs`, in order."""

    text: str
    bytecode: bytes
    names: dict[str, list[dict[str, Any]]]


def export_stablehlo(model: NFNet, folder: Path, *, size: int | None, batch: int, training: bool) -> list[Path]:
    """Write `forward` and, if asked, `train_step`, each as `.mlir`, `.mlirbc` and `.json`, beside the model's files.

    Args:
        model: its weights become `model.safetensors`, its preprocessing and labels `config.json`.
        folder: the output folder; files of these names are replaced together or not at all.
        size: side of the images in pixels; by default the model's evaluation size, and its training size for the step.
        batch: number of images, which is fixed in the program.
        training: also write the step: loss, gradient, AGC, Nesterov SGD and moving average with the papers' settings.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: if size or batch is out of range, a folded or a multi-label model is to train, or torch-xla is
            missing.
    """
    for name, value in (("batch", batch), ("size", size)):
        if value is not None and not is_int(value, 1, MAX_SIZE):
            raise ConfigError(f"{name} must be a positive integer up to {MAX_SIZE}, not {value!r}")
    if training:
        model._check_trainable()
        if model.multi_label:
            raise ConfigError("the exported training step is of one class an image, and the model is multi-label")
    params = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    sizes = model.preprocessing
    programs = {FORWARD: forward_program(model.config, params, batch=batch, size=size or sizes.test_size)}
    if training:
        programs[TRAIN_STEP] = step_program(model.config, params, batch=batch, size=size or sizes.train_size)
    lowered = {name: lower(program) for name, program in programs.items()}
    with replaced_folder(folder) as scratch:
        model.save_pretrained(scratch)
        for name, program in lowered.items():
            (scratch / f"{name}{TEXT}").write_text(program.text, encoding="utf-8")
            (scratch / f"{name}{BYTECODE}").write_bytes(program.bytecode)
            signature = program.names | ({"config": dataclasses.asdict(StepConfig())} if name == TRAIN_STEP else {})
            (scratch / f"{name}{NAMES}").write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")
        written = sorted(path.name for path in scratch.iterdir())
    return [Path(folder) / name for name in written]


def forward_program(cfg: ModelConfig, params: Params, *, batch: int, size: int) -> Program:
    """Return the program `params/KEY`, `images` -> `logits`."""

    def fn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": apply(cfg, _under(tensors, "params/"), tensors["images"])}

    return Program(fn, {**_named("params/", params), "images": torch.zeros(batch, cfg.in_channels, size, size)})


def step_program(
    cfg: ModelConfig, params: Params, *, batch: int, size: int, config: StepConfig | None = None
) -> Program:
    """Return the program of `train_step`: state, `images`, `labels`, `lr`, `noise/BLOCK` -> state, `loss`, `logits`.

    `noise/BLOCK` are the masks of `sample_noise`. The state is `params/KEY`, `momentum/KEY`, `ema/KEY` (unless the
    configuration keeps no average) and `step`.
    """
    config = config or StepConfig()

    def fn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        average = _under(tensors, "ema/") or None
        state = TrainState(_under(tensors, "params/"), SGDState(_under(tensors, "momentum/")), average, tensors["step"])
        batch = tensors["images"], tensors["labels"]
        state, metrics = train_step(cfg, state, batch, _under(tensors, "noise/") or None, tensors["lr"], config=config)
        return {**_state(state), "loss": metrics.loss, "logits": metrics.logits}

    return Program(
        fn,
        {
            **_state(init_state(params, config)),
            "images": torch.zeros(batch, cfg.in_channels, size, size),
            "labels": torch.zeros(batch, dtype=torch.int64),
            "lr": torch.zeros(()),
            **_named("noise/", sample_noise(cfg, batch)),
        },
    )


def lower(program: Program) -> Lowered:
    """Trace a program with torch-xla and write it as StableHLO, its numbers as constants.

    Raises:
        ConfigError: if torch-xla is missing.
        RuntimeError: if an operator runs outside XLA, or the program reads a tensor that is not among its inputs.
    """
    xla = backend("xla")
    xla.start()
    import torch_xla  # pyright: ignore[reportMissingImports]
    import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
    import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]

    # torch-xla takes a tensor that arrives without a dimension for a constant; see `XlaBackend.scalar`.
    device_inputs = {
        name: t.reshape(1).to(xla.device).reshape(()) if t.ndim == 0 else t.to(xla.device)
        for name, t in program.inputs.items()
    }
    xla.synchronize()
    name_of = {torch_xla._XLAC._xla_get_tensor_id(t): name for name, t in device_inputs.items()}
    metrics.clear_counters()
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)  # or they would be further arguments
    try:
        outputs = program.fn(device_inputs)
        ids, values = torch_xla._XLAC._get_tensors_xla_device_data_node([*outputs.values()])
        text = xm.get_stablehlo([*outputs.values()])
        bytecode = xm.get_stablehlo_bytecode([*outputs.values()])
    finally:
        torch_xla._XLAC._set_xla_all_numbers_special_scalars(False)
        torch_xla._XLAC._clear_pending_irs(str(xla.device))
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
    if fallbacks:
        raise RuntimeError(f"torch-xla leaves {', '.join(fallbacks)} to the CPU, which a program cannot do")
    for known, value in zip(ids, values, strict=True):
        if known not in name_of:
            raise RuntimeError(f"the program reads a tensor {tuple(value.shape)} that is none of its inputs")
    inputs = {name_of[known]: device_inputs[name_of[known]] for known in ids}
    return Lowered(text, bytecode, {"inputs": _signature(inputs), "outputs": _signature(outputs)})


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in tensors.items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Params:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _state(state: TrainState) -> dict[str, Tensor]:
    average = {} if state.ema is None else _named("ema/", state.ema)
    return {**_named("params/", state.params), **_named("momentum/", state.sgd.momentum), **average, "step": state.step}


def _signature(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, **_describe(t)} for name, t in tensors.items()]


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
