"""StableHLO: a model's forward pass, and its whole training step, as programs that any XLA compiles (torch-xla, jax).

A program takes and gives tensors by name, in the order that the file beside it lists: `params/KEY` with the keys of
`model.safetensors`, `images`, `logits`; a training step also `momentum/KEY`, `ema/KEY`, `noise/BLOCK`, `step`,
`labels`, `lr` and `loss`. Weights are arguments, so that one program serves all weights and a step can follow a step.
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
    """A function of named tensors, and tensors to trace it with, whose shapes it keeps."""

    fn: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    inputs: dict[str, Tensor]


class Lowered(NamedTuple):
    """A program as MLIR; `names` holds name, shape and dtype of its `inputs` and `outputs`, in order."""

    text: str
    bytecode: bytes
    names: dict[str, list[dict[str, Any]]]


def export_stablehlo(model: NFNet, folder: Path, *, size: int | None, batch: int, training: bool) -> list[Path]:
    """Write `forward` and, if asked, `train_step`, each as `.mlir`, `.mlirbc` and `.json`, beside the model's files.

    Args:
        model: its weights become `model.safetensors`, its preprocessing and labels `config.json`.
        folder: where to; files of these names are replaced together, or not at all.
        size: pixels of an image's side; by default those of the model's evaluation, and of its training for the step.
        batch: images at once. Shapes are part of a program.
        training: also write the step: loss, gradient, AGC, Nesterov SGD and moving average with the papers' settings.

    Returns:
        The files.

    Raises:
        ConfigError: for a size or batch out of range, a folded model's training step, or no torch-xla.
    """
    for name, value in (("batch", batch), ("size", size)):
        if value is not None and not is_int(value, 1, MAX_SIZE):
            raise ConfigError(f"{name} must be a positive integer up to {MAX_SIZE}, not {value!r}")
    if training:
        model._check_trainable()
    params = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    sizes = model.preprocessing
    programs = {FORWARD: forward_program(model.config, params, batch=batch, size=size or sizes.test_size)}
    if training:
        programs[TRAIN_STEP] = step_program(model.config, params, batch=batch, size=size or sizes.train_size)
    lowered = {name: lower(program) for name, program in programs.items()}
    with replaced_folder(folder) as scratch:
        model.save_pretrained(scratch)
        for name, made in lowered.items():
            (scratch / f"{name}{TEXT}").write_text(made.text, encoding="utf-8")
            (scratch / f"{name}{BYTECODE}").write_bytes(made.bytecode)
            facts = made.names | ({"config": dataclasses.asdict(StepConfig())} if name == TRAIN_STEP else {})
            (scratch / f"{name}{NAMES}").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        written = sorted(path.name for path in scratch.iterdir())
    return [Path(folder) / name for name in written]


def forward_program(cfg: ModelConfig, params: Params, *, batch: int, size: int) -> Program:
    """Return the program `params/KEY`, `images` -> `logits`."""

    def fn(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": apply(cfg, _under(inputs, "params/"), inputs["images"])}

    return Program(fn, {**_named("params/", params), "images": torch.zeros(batch, cfg.in_channels, size, size)})


def step_program(
    cfg: ModelConfig, params: Params, *, batch: int, size: int, config: StepConfig | None = None
) -> Program:
    """Return the program of `train_step`: the state, `images`, `labels`, `lr`, masks -> the state, `loss`, `logits`.

    The state is `params/KEY`, `momentum/KEY`, `ema/KEY` (unless the configuration keeps no average) and `step`.
    """
    config = config or StepConfig()

    def fn(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        average = _under(inputs, "ema/") or None
        state = TrainState(_under(inputs, "params/"), SGDState(_under(inputs, "momentum/")), average, inputs["step"])
        batch = inputs["images"], inputs["labels"]
        state, seen = train_step(cfg, state, batch, _under(inputs, "noise/") or None, inputs["lr"], config=config)
        return {**_state(state), "loss": seen.loss, "logits": seen.logits}

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
        ConfigError: without torch-xla.
        RuntimeError: if the program is not wholly one of XLA's, or reads a tensor that is none of its inputs.
    """
    chosen = backend("xla")
    chosen.start()
    import torch_xla  # pyright: ignore[reportMissingImports]
    import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
    import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]

    # What arrives without a dimension is taken for a constant; see also `XlaBackend.scalar`.
    placed = {
        name: t.reshape(1).to(chosen.device).reshape(()) if t.ndim == 0 else t.to(chosen.device)
        for name, t in program.inputs.items()
    }
    chosen.synchronize()
    name_of = {torch_xla._XLAC._xla_get_tensor_id(t): name for name, t in placed.items()}
    metrics.clear_counters()
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)  # or they would be further arguments
    try:
        outputs = program.fn(placed)
        ids, values = torch_xla._XLAC._get_tensors_xla_device_data_node([*outputs.values()])
        text = xm.get_stablehlo([*outputs.values()])
        bytecode = xm.get_stablehlo_bytecode([*outputs.values()])
    finally:
        torch_xla._XLAC._set_xla_all_numbers_special_scalars(False)
        torch_xla._XLAC._clear_pending_irs(str(chosen.device))
    outside = [name for name in metrics.counter_names() if name.startswith("aten::")]
    if outside:
        raise RuntimeError(f"torch-xla leaves {', '.join(outside)} to the CPU, which a program cannot do")
    for known, value in zip(ids, values, strict=True):
        if known not in name_of:
            raise RuntimeError(f"the program reads a tensor {tuple(value.shape)} that is none of its inputs")
    inputs = {name_of[known]: placed[name_of[known]] for known in ids}
    return Lowered(text, bytecode, {"inputs": _signature(inputs), "outputs": _signature(outputs)})


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in tensors.items()}


def _under(inputs: Mapping[str, Tensor], prefix: str) -> Params:
    return {name.removeprefix(prefix): t for name, t in inputs.items() if name.startswith(prefix)}


def _state(state: TrainState) -> dict[str, Tensor]:
    average = {} if state.ema is None else _named("ema/", state.ema)
    return {**_named("params/", state.params), **_named("momentum/", state.sgd.momentum), **average, "step": state.step}


def _signature(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, **_describe(t)} for name, t in tensors.items()]


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
