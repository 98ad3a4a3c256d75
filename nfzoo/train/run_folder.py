"""Write the folder of a training run: checkpoints, the model with its provenance, figures and curves, the recipe."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from nfzoo.analysis.figures import training_curves
from nfzoo.checkpoint.atomic import replaced_folder, sweep
from nfzoo.checkpoint.background import BackgroundWriter
from nfzoo.checkpoint.model_folder import CONFIG_FILE, Description, read_description, save_checkpoint
from nfzoo.checkpoint.run_state import STATE_FILE, STEP_FOLDER, Saved, open_state, remove_later, save_state, step_folder
from nfzoo.data.source import HUB, MEMORY, has_held_out, split_options
from nfzoo.errors import CheckpointError, NfzooError, TrainingError
from nfzoo.files import read_json
from nfzoo.runtime.device import backend
from nfzoo.runtime.distributed import gather, local_tensor, with_local
from nfzoo.train.config import TrainConfig
from nfzoo.train.metrics import THRESHOLDS, best_rule

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")

STATES = "checkpoints"
LOGS = "logs"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
RUN_FILE = "train.yaml"


class Saver:
    """Save a run's checkpoints and model while training goes on, from a copy in the CPU's memory.

    The main process writes; where parameters are sharded, each process writes what it holds. All processes call
    `save_state`, `save_model` and `finish` together. Where one could not write, `finish` raises in all of them, and so
    does the next `save_state`.

    Args:
        config: the run.
        accelerator: its processes.
        resumed: the checkpoint from which the run goes on, or `None`.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, resumed: Path | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.backend = backend(accelerator.device)
        self.writer = BackgroundWriter()
        # A group of its own, as its messages are not those of the training, which goes on meanwhile.
        self._group: Any = dist.new_group(backend="gloo") if config.sharding == "fsdp2" else None
        self._copies: dict[str, dict[str, Tensor]] = {}  # in the CPU's memory, which the next checkpoint uses again
        self._last: dict[str, dict[str, Tensor]] = {}  # tensors of the last checkpoint
        self._folders = [] if resumed is None else [resumed]  # the last may be still to come
        self._best = best_rule(config)
        self._kept: int | None = None  # the epoch whose model the folder holds, if this process wrote it

    def save_state(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Save a checkpoint to resume from; the arguments are those of `run_state.save_state`, on any device.

        That of the best epoch in the `rows` of `facts` stays beside the newest, if the run keeps it.
        """
        best = None if self._best is None else self._best.row(facts["rows"])
        also = [] if best is None else [best["step"]]
        self.finish()  # what is being written is in the memory that the next lines write to
        root, keep, group = Path(self.config.output) / STATES, self.config.keep_checkpoints, self._group
        self._folders.append(root / step_folder(step))
        if self.accelerator.is_main_process or group is not None:
            on_cpu = self._last = {kind: self._on_cpu(kind, content) for kind, content in tensors.items()}
            self.writer.submit(lambda: save_state(root, step, on_cpu, facts, keep=keep, also=also, group=group))
        self._wait_if_asked()

    def _on_cpu(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what this process holds, in the CPU's memory; without `async_save` these may be the live tensors."""
        held = {name: local_tensor(t) for name, t in tensors.items()}
        if self.config.async_save:
            held = self._copies[kind] = self.backend.copy_to_cpu(held, self._copies.get(kind, {}))
        else:
            held = self.backend.to_cpu(held)
        if self._group is None:
            return held
        from torch.distributed.device_mesh import DeviceMesh

        mesh = DeviceMesh.from_group(self._group, "cpu")
        return {name: with_local(t, held[name], mesh) for name, t in tensors.items()}

    def save_model(self, description: Description, rows: Sequence[Mapping[str, Any]], *, pretrained: bool) -> None:
        """Save the figures, and the model with the weights of the last checkpoint.

        If the run keeps its best epoch, the model is that of its checkpoint. The other arguments are those of
        `write_run`.
        """
        if self.accelerator.is_main_process:
            rows, folder, kind = list(rows), self._folders[-1], "average" if "average" in self._last else "model"
            params, last = self._last[kind], rows[-1]
            best = last if self._best is None else self._best.row(rows)
            assert best is not None

            def write() -> None:
                full: Mapping[str, Tensor] | None
                if best is last:
                    full = (
                        params if self._group is None else Saved(folder, read_json(folder / STATE_FILE)).tensors(kind)
                    )
                else:
                    full = None if self._kept == best["epoch"] else self._of_best(step_folder(best["step"]), kind)
                write_run(self.config, description, full, rows, of=best, pretrained=pretrained)
                self._kept = best["epoch"]

            self.writer.submit(write)
        self._wait_if_asked()

    def _of_best(self, name: str, kind: str) -> dict[str, Tensor] | None:
        """Read the weights of the best epoch; where its checkpoint is damaged, return `None` with a warning."""
        output = self.config.output
        try:
            return open_state(Path(output) / STATES / name).tensors(kind)
        except CheckpointError as error:
            logger.warning("%s; %s keeps the model that it holds", error, output)
            return None

    def _wait_if_asked(self) -> None:
        if not self.config.async_save:
            self.finish()

    def failed(self) -> bool:
        """Return whether this process failed to write, without waiting for what it is writing."""
        return self.writer.failed()

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            TrainingError: in all processes, if one could not write.
        """
        failure: list[str] = []
        try:
            self.writer.result()
        except (OSError, NfzooError) as error:  # the second of a checkpoint that is read to make the model
            failure = [str(error)]
        failure = gather(failure)
        if failure:
            raise TrainingError(f"could not save to {self.config.output!r}: {failure[0]}; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        """Return a sentence that names the last checkpoint, once all that is being written has been."""
        self.writer.join()
        folder = next((folder for folder in reversed(self._folders) if folder.is_dir()), None)
        if folder is None:
            return "nothing was saved"
        return f"{folder} holds the last checkpoint; to go on from it: {resume_command(self.config)}"


def resume_command(config: TrainConfig) -> str:
    """Return the command that goes on with a run; for options of a launcher, which nobody notes, it has an ellipsis."""
    if config.data.startswith(MEMORY):
        return "call nfzoo.fit again with resume=True"
    launched = [
        ("accelerate launch … -m nfzoo.train", "ACCELERATE_MIXED_PRECISION"),
        ("torchrun … -m nfzoo.train", "TORCHELASTIC_RUN_ID"),
        ("… -m nfzoo.train", "RANK"),
    ]
    program = next((words for words, variable in launched if variable in os.environ), "nfzoo train")
    foreign = " --allow-import" if config.optim.is_foreign else ""
    return f"{program} --output {shlex.quote(config.output)} --resume true{foreign}"


def write_run(
    config: TrainConfig,
    description: Description,
    params: Mapping[str, Tensor] | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    of: Mapping[str, Any],
    pretrained: bool,
) -> None:
    """Write the run's output folder as it is after an epoch; an `OSError` where the disk does not take it.

    Args:
        params: on the CPU, the moving average if the recipe has one; `None` leaves the model that is there.
        rows: figures of all epochs so far, the last of which is this one's.
        of: figures of the epoch that `params` are of.
        pretrained: whether the run began with somebody's weights.
    """
    output = Path(config.output)
    if params is not None:
        provenance = _provenance(config, of, pretrained=pretrained)
        fitted = None if of.get(THRESHOLDS) is None else tuple(of[THRESHOLDS])
        save_checkpoint(output, description._replace(provenance=provenance, thresholds=fitted), params)
    with replaced_folder(output) as scratch:
        # JSON has no NaN.
        lines = [{k: None if v != v else v for k, v in row.items() if k != THRESHOLDS} for row in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (scratch / METRICS_FILE).write_text(text, encoding="utf-8")
        (scratch / RUN_FILE).write_text(config.to_yaml(), encoding="utf-8")
        try:
            training_curves(scratch / METRICS_FILE, scratch / CURVES_FILE)
        except ModuleNotFoundError:
            logger.info("no %s: the plots need matplotlib (pip install 'nfzoo[plots]')", CURVES_FILE)


def _provenance(config: TrainConfig, row: Mapping[str, Any], *, pretrained: bool) -> dict[str, Any]:
    """Return the origin of the weights of an epoch: its number, its accuracy, and by which metric it was chosen."""
    averaged, best = config.optim.ema_decay is not None, best_rule(config)
    value = row[f"ema_{config.metric}"] if averaged else row[config.metric]
    provenance = {
        "trained_from": public_model(config.model) if pretrained else "random weights",
        "data": public_data(config.data),
        "epochs": row["epoch"],
        "weights": "ema" if averaged else "live",
        config.metric: value if value == value else None,  # JSON has no NaN
    }
    if config.teacher is not None:
        provenance["teacher"] = public_model(config.teacher)
    if best is not None:
        value = best.value(row)
        provenance |= {"best_by": best.metric, best.metric: value if value == value else None, "step": row["step"]}
    if not has_held_out(config.data, labels=config.label_files):
        provenance["validation_fraction"] = config.validation_fraction
    return provenance


def best_state(output: Path) -> Saved:
    """Return the checkpoint of the epoch whose model a run's folder holds, as its best one.

    Raises:
        CheckpointError: where the folder has no record of a best epoch, or its checkpoint is damaged.
    """
    step = (read_description(output / CONFIG_FILE).provenance or {}).get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{output} has no record of a best epoch; pass --resume-from last")
    return open_state(output / STATES / step_folder(step))


def clear(output: Path, *, states: bool, after: int | None = None) -> None:
    """Remove what killed runs left of their last write; with `states` all checkpoints, or those after a step.

    One process calls this, which has locked the folder.
    """
    if states:
        shutil.rmtree(output / STATES, ignore_errors=True)
    if after is not None:
        remove_later(output / STATES, after)
    for parent in (output.parent, output):
        sweep(parent, re.escape(output.name))
    sweep(output / STATES, STEP_FOLDER.pattern)
    with contextlib.suppress(OSError):
        (output / STATES).rmdir()  # if it is empty


def public_data(source: str) -> str:
    """Return the name of data for others: the last part of a path, also of a pattern or a path with options."""
    if source.startswith((HUB, MEMORY)):
        return source
    path, options = split_options(source)
    name = Path(path).resolve().name if Path(path).exists() else PurePath(path).name
    return name + source[len(path) :] if options else name


def public_model(source: str) -> str:
    """Return the name of a model for others: the last part of a path, and the names of zoo and Hub as they are."""
    if Path(source).exists():
        return Path(source).resolve().name
    return PurePath(source).name if source.startswith((".", "/", "~")) or source.count("/") > 1 else source
