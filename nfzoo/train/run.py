"""Train and fine-tune with Accelerate: `accelerate launch -m nfzoo.train --model … --data … --output …`.

Exit status: 0 when the model is trained, 2 for bad input, 1 when training or the disk gave out, 143 after SIGTERM and
130 after Ctrl-C, when the run has saved where it was.

The module is long because all that a run refuses before it begins is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nfzoo.analysis.figures import read_metrics
from nfzoo.checkpoint.atomic import replaced_folder, scratch_folder
from nfzoo.checkpoint.lock import locked
from nfzoo.checkpoint.model_folder import CONFIG_FILE, Description, describe, read_description
from nfzoo.checkpoint.run_state import Saved, latest_state, newest_options
from nfzoo.config import Preprocessing
from nfzoo.data.labels import class_counts
from nfzoo.data.loader import share_of_batch
from nfzoo.data.source import MEMORY, Split, open_split
from nfzoo.errors import CheckpointError, ConfigError, DataError, LostError, NfzooError, TrainingError, shown
from nfzoo.model import is_untrained
from nfzoo.nn import NFNet, assemble, create
from nfzoo.runtime import device, program
from nfzoo.runtime.cpu import keep_freed_memory
from nfzoo.runtime.distributed import elastic_launcher, gather
from nfzoo.runtime.output import guarded
from nfzoo.train.config import TrainConfig
from nfzoo.train.config.defaults import chosen
from nfzoo.train.config.recipes import parse_command
from nfzoo.train.distillation import check_taught, open_teacher
from nfzoo.train.learner import copied, fit_head, head_for, problem_type
from nfzoo.train.memory import divided
from nfzoo.train.python.callbacks import check_callbacks
from nfzoo.train.run_folder import LOGS, METRICS_FILE, STATES, best_state, clear, resume_command
from nfzoo.train.trainer import InitialState, Result, Trainer, loss_weights, split_identity
from nfzoo.variants import VARIANTS

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")

__all__ = ["Result", "TrainConfig", "TrainingError", "main", "train"]

# Options that a resumed run may change without becoming another run.
CHANGEABLE = frozenset(
    [
        "output",
        "data",  # compared by content, as labels and names of classes are
        "labels",
        "validation_labels",
        "class_names",
        "teacher",  # compared by content
        "epochs",  # at least those begun
        "require_hash",
        "allow_pickle",
        "accumulation",
        "workers",
        "worker_timeout",
        "compile",
        "cuda_graph",
        "activation_checkpointing",
        "sharding",
        "patience",
        "resume",
        "resume_from",
        "save_steps",
        "keep_checkpoints",
        "async_save",
        "tracker",
        "overwrite",
        "augmented_sheet",
        "max_broken",
        "nonfinite",
    ]
)


def train(config: TrainConfig, *, callbacks: Sequence[object] = ()) -> Result:
    """Run a training to its end; save the model, and a checkpoint to resume from, after each epoch.

    Nothing is written before the first checkpoint.

    Args:
        callbacks: `nfzoo.Callback` objects, which look at the run and may end it.

    Raises:
        NfzooError: for bad input; see `nfzoo.errors`.
        TrainingError: if a gradient stops being finite, the disk fills up, or another process is lost.
        Stopped: after SIGTERM or Ctrl-C; the run has saved where it was.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"train takes a TrainConfig(model=…, data=…, output=…), not {shown(config)}")
    with prepared(config, callbacks=callbacks) as trainer:
        return trainer.fit()


@contextlib.contextmanager
def prepared(
    config: TrainConfig,
    *,
    opened: Callable[[], Split] | None = None,
    model: NFNet | None = None,
    callbacks: Sequence[object] = (),
    make: Callable[..., Trainer] = Trainer,
) -> Iterator[Trainer]:
    """Check a run's options and data, and yield its trainer, with the run folder locked against other runs.

    Args:
        opened: opens the data of a Python program, in the place of `config.data`.
        model: the model that a run begins with, in the place of `config.model`. It stays as it is.
        callbacks: see `train`.
        make: makes the trainer.

    Raises:
        LostError: if an error in the block was caused by another process that ended.
    """
    check_callbacks(callbacks)
    config = config.with_class_weights()
    output = Path(config.output)
    with locked(output) if program.is_first_process() else contextlib.nullcontext():
        saved = _open_saved(config)
        _check_writable(output, config.data)
        torch.manual_seed(config.seed)  # draws the classifier of a fine-tuned model
        # Whatever the seed of the run, the same images are held out: runs compare, and `evaluate` finds them again.
        fraction = config.validation_fraction
        split = opened() if opened else open_split(config.data, validation_fraction=fraction, labels=config.label_files)
        if len(split.train.classes) < 2 and not config.multi_label:
            raise DataError(f"{config.data!r} has one class alone; there is nothing to tell apart")
        loss_weights(config, split, class_counts(split.train))  # raises for those that do not fit
        accelerator = device.accelerator(config.mixed_precision, log_with=_tracker(config), project_dir=output / LOGS)
        device.check_processes(accelerator.num_processes)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        earlier = None if saved is None else saved.facts["config"]
        config, choices = chosen(config, len(split.train), accelerator.num_processes, earlier)
        _check_shares(config, split, accelerator)
        data = split_identity(split)
        if any(other != data["digest"] for other in gather([data["digest"]])):
            raise DataError(f"the processes have different images or labels in {config.data!r}; give all the same data")
        start = _resumed(config, data, saved) if saved else _fresh(config, data, model)
        size = start.model.preprocessing.train_size
        how = {"processes": accelerator.num_processes, "device": accelerator.device}
        config, line = divided(config, start.model.config, size, **how)
        choices += () if line is None else (line,)
        start = start._replace(teacher=open_teacher(config, start.model, data["classes"], saved))
        accelerator.wait_for_everyone()  # all have looked for checkpoints before any is removed
        if accelerator.is_main_process:
            back = saved.step if saved is not None and config.resume_from == "best" else None
            clear(output, states=saved is None, after=back)  # with --overwrite: checkpoints of the earlier run
        trainer = make(config, split, accelerator, start._replace(callbacks=callbacks, choices=choices))
        accelerator.wait_for_everyone()
        try:
            yield trainer
        except RuntimeError as error:
            if isinstance(error, NfzooError) or not _lost(error, accelerator):
                raise
            reason = str(error).splitlines()[0]
            raise LostError(
                f"process {accelerator.process_index} lost the others at step {trainer.step + 1} ({reason}); "
                f"{trainer.saver.last_checkpoint()}"
            ) from error
        finally:
            trainer.saver.writer.join()  # before the folder is free for other runs


def _lost(error: RuntimeError, accelerator: Accelerator) -> bool:
    """Return whether an error was caused by another process that ended."""
    text = str(error)
    return accelerator.num_processes > 1 and (
        isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection", "peer"))
    )


def _open_saved(config: TrainConfig) -> Saved | None:
    """Return the checkpoint to go on from: the newest if that is asked for, or else one of this launcher's.

    Raises:
        ConfigError: where the folder holds a model or a run that nobody said to overwrite or to resume.
        CheckpointError: where no checkpoint is intact.
    """
    output = Path(config.output)
    launcher = elastic_launcher()  # which may have started all processes anew
    saved = latest_state(output / STATES) if config.resume or launcher is not None else None
    started_anew = saved is not None and launcher is not None and saved.facts.get("launcher") == launcher
    if saved is not None and config.resume_from == "best" and not started_anew:
        return best_state(output)
    if saved is not None and (config.resume or started_anew):
        return saved
    if config.resume and not config.overwrite and any((output / STATES).glob("step_*")):
        raise CheckpointError(
            f"no checkpoint in {str(output / STATES)!r} is intact; choose another output, or begin anew "
            "with --overwrite true (from Python, overwrite=True)"
        )
    if not config.overwrite:
        if (output / CONFIG_FILE).exists() and not _unfinished(output):
            raise ConfigError(
                f"{config.output!r} holds a model already; choose another output, or replace it with "
                "--overwrite true (from Python, overwrite=True)"
            )
        if any((output / STATES).glob("step_*")):  # one that cannot be read here may be another nfzoo's
            raise ConfigError(
                f"{config.output!r} holds an unfinished run; to go on with it: {resume_command(config)}; to replace "
                "it, pass --overwrite true (from Python, resume=True and overwrite=True)"
            )
    return None


def _unfinished(output: Path) -> bool:
    """Return whether a run has checkpoints, and the figures of fewer epochs than it was to have."""
    options = newest_options(output / STATES)
    try:
        done = read_metrics(output / METRICS_FILE)[-1]["epoch"]
        return options is not None and done < options["epochs"]
    except (OSError, NfzooError, LookupError, TypeError, ValueError):
        return False


def _check_writable(output: Path, data: str) -> None:
    """Raise a `ConfigError` if the output folder cannot be written or lies among the data."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{str(output)!r} is a file; the output must be a folder")
    if output.is_symlink() and not output.exists():
        raise ConfigError(f"the output {str(output)!r} is a link to nothing; remove it, or make the folder it names")
    existing = output.resolve()
    if Path(data).is_dir() and existing.is_relative_to(Path(data).resolve()):
        raise ConfigError(f"the output {str(output)!r} would lie in {data!r}, among the data; choose another output")
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{str(existing)!r} is a file")
        with (  # what a save does
            scratch_folder(existing, output.name) as scratch,
            replaced_folder(scratch / "model") as folder,
        ):
            (folder / CONFIG_FILE).write_text("{}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the output {str(output)!r} cannot be written: {error}") from error


def _check_shares(config: TrainConfig, split: Split, accelerator: Accelerator) -> None:
    """Raise a `ConfigError` where a batch does not divide among processes and their parts."""
    share = share_of_batch(config.batch_size, world=accelerator.num_processes, accumulation=config.accumulation or 1)
    if config.augment is not None and config.augment.mixes and share % 2:
        parts = config.batch_size // share
        raise ConfigError(
            f"images are mixed in pairs, and {parts} shares of batch_size {config.batch_size} are {share} images "
            f"each; make it a multiple of {2 * parts}"
        )
    if len(split.train) < config.batch_size:
        raise DataError(
            f"{len(split.train)} training images do not fill a batch of {config.batch_size}; pass a smaller one"
        )
    if config.sharding == "fsdp2" and not dist.is_initialized():
        raise ConfigError(
            "sharding 'fsdp2' needs processes to shard over: start nfzoo.train with torchrun or accelerate"
        )


def _tracker(config: TrainConfig) -> str | None:
    if config.tracker is None:
        return None
    device.choose_xla()
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    if config.tracker not in known:
        raise ConfigError(f"there is no tracker {config.tracker!r}; Accelerate knows {', '.join(known)}")
    if config.tracker not in [str(name) for name in get_available_trackers()]:
        extra = "nfzoo[track]" if config.tracker == "tensorboard" else config.tracker
        raise ConfigError(f"the tracker {config.tracker!r} is not installed: pip install '{extra}'")
    return config.tracker


# ---------------------------------------------------------------- what a run begins with


def _fresh(config: TrainConfig, data: dict[str, Any], given: NFNet | None = None) -> InitialState:
    from nfzoo import from_pretrained, list_models

    classes = tuple(data["classes"])
    in_zoo = config.model in VARIANTS and not Path(config.model).exists()
    if config.pretrained is False and not in_zoo:
        raise ConfigError(f"--pretrained false needs a zoo name, not {config.model!r}")
    if given is None and config.model.startswith(MEMORY):
        raise ConfigError(f"{config.model!r} was a model of a Python program; give it to nfzoo.fit again")
    if given is not None:
        if config.in_channels not in (None, given.config.in_channels):
            raise ConfigError(
                f"the model takes images of {given.config.in_channels} channels, not {config.in_channels}; give one "
                f"that was made with in_channels={config.in_channels}, or leave in_channels out"
            )
        model = copied(given, len(classes))
        pretrained = config.pretrained is True or not is_untrained(model.config, dict(model.named_parameters()))
    elif (
        not in_zoo or config.pretrained or (config.pretrained is None and config.model in list_models(pretrained=True))
    ):
        try:
            model = from_pretrained(
                config.model,
                num_classes=None if config.multi_label else len(classes),
                require_hash=config.require_hash,
                allow_pickle=config.allow_pickle,
            )
        except CheckpointError as error:
            hint = "; to start from random weights, pass --pretrained false" if in_zoo else ""
            raise CheckpointError(f"{error}{hint}") from error
        fit_head(model, config, len(classes))
        # A model of one's own that was saved as it was drawn is trained from random weights like any other.
        untrained = is_untrained(model.config, dict(model.named_parameters()))
        pretrained = config.pretrained is True or not untrained
        if config.in_channels is not None:
            weights = {name: p.detach() for name, p in model.named_parameters()}
            model = assemble(model.description, weights, in_channels=config.in_channels, source=config.model)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        channels: dict[str, Any] = {} if config.in_channels is None else {"in_channels": config.in_channels}
        model = create(config.model, num_classes=len(classes), generator=generator, **channels)
        pretrained = False
    changes = {n: getattr(config, n) for n in ("drop_rate", "stochastic_depth") if getattr(config, n) is not None}
    sizes = {n: getattr(config, n) for n in ("train_size", "test_size") if getattr(config, n) is not None}
    preprocessing = Preprocessing.from_dict({**model.preprocessing.to_dict(), **sizes})
    description = Description(
        model.config.replace(**changes), preprocessing, model.name, classes, problem_type=problem_type(config)
    )
    params = {n: p.detach() for n, p in model.named_parameters()}
    if pretrained and model.labels is not None:
        params |= head_for(classes, model.labels, params, config.model)
    return InitialState(NFNet.from_params(description, params), pretrained, data)


def _resumed(config: TrainConfig, data: dict[str, Any], saved: Saved) -> InitialState:
    """Return the model of a checkpoint, if it is one of this very run."""
    check_taught(config, saved)
    # Options newer than the checkpoint have their defaults.
    defaults = TrainConfig(model=config.model, data=config.data, output=config.output).to_dict()
    then, now = _innermost({**_flat(defaults), **_flat(saved.facts["config"])}), _flat(config.to_dict())
    changed = sorted(k for k in then.keys() | now.keys() if k not in CHANGEABLE and then.get(k) != now.get(k))
    begun = saved.facts["epoch"] + 1
    if config.epochs < begun:
        raise ConfigError(f"{saved.folder} is of epoch {begun}; pass --epochs {begun} or more")
    if then["epochs"] != now["epochs"]:
        logger.warning(
            "the run was to have %d epochs; the learning rate now falls until epoch %d", then["epochs"], now["epochs"]
        )
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{saved.folder} is of a run with {key} {json.dumps(then.get(key))}, not {json.dumps(now.get(key))}"
            f"{f' ({len(changed) - 1} more options differ)' if changed[1:] else ''}; resume with the same options, or "
            "choose another output"
        )
    before = saved.facts["data"]
    differs = [key for key, value in before.items() if data.get(key) != value]  # older runs have fewer
    if differs in (["sizes"], ["sizes", "times"]):
        raise DataError(
            f"{config.data!r} has files of the same names and other sizes than when the run that {saved.folder} is of "
            "began; resume with the same data, or start anew in another output"
        )
    if differs == ["times"]:
        if program.is_first_process():
            logger.warning(
                "the files of %s were written anew since the run began, with the same names and sizes", config.data
            )
    elif differs:
        raise DataError(
            f"{config.data!r} has {data['images']} training images of {len(data['classes'])} classes; the run "
            f"that {saved.folder} is of had {before['images']} of {len(before['classes'])}, or others by name; resume "
            "with the same data, or start anew in another output"
        )
    description = describe(saved.facts["description"], saved.folder)
    if (Path(config.output) / CONFIG_FILE).is_file() and program.is_first_process():
        temperature = read_description(Path(config.output) / CONFIG_FILE).temperature
        if temperature is not None:
            logger.warning(
                "the temperature %g in %s was fitted to other weights than those to come, and goes with them",
                *(temperature, config.output),
            )
    return InitialState(NFNet.from_params(description, saved.tensors("model")), saved.facts["pretrained"], data, saved)


def _innermost(flat: dict[str, Any]) -> dict[str, Any]:
    """Leave out options that stand for a mapping whose own options are there too, such as a default that is empty."""
    return {key: value for key, value in flat.items() if not any(other.startswith(f"{key}.") for other in flat)}


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---------------------------------------------------------------- the command line


@guarded()
def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, and return the exit status; see the module for its meaning."""
    try:
        config, options = parse_command(argv)
        with program.speaking(options):
            with prepared(config) as trainer:
                result = trainer.fit()
            if program.is_first_process():
                fields = {"output": str(result.folder), "epochs": trainer.epoch, **dataclasses.asdict(result)}
                del fields["folder"]
                program.write_result(options, fields)
        return 0
    except (NfzooError, OSError, KeyboardInterrupt) as error:
        return program.report("nfzoo train", error)
    finally:
        trainer = None  # its DDP wrapper must not outlive the process group
        program.leave_processes()
