"""Describe a training run as data: its options, from the command line and from YAML recipes.

The module is long because each option is documented and checked where it is declared.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from nfzoo.config import MAX_SIDE, is_int
from nfzoo.data.digits import DIGITS
from nfzoo.data.label_files import LabelFiles, label_files
from nfzoo.data.source import HELD_OUT
from nfzoo.data.workers import PATIENCE
from nfzoo.errors import ConfigError, shown
from nfzoo.files import read_text
from nfzoo.optim.fine_tuning import TUNE
from nfzoo.step import StepConfig
from nfzoo.train.config import strict_yaml
from nfzoo.transforms.mixing import GENTLE, Augment

MAX_SEED = 1 << 63
MAX_WORKERS = 256
STARTING = ("resume", "resume_from", "overwrite", "allow_pickle")
"""Options that concern one start of a run, and are no part of a recipe."""
CHOSEN = ("epochs", "batch_size", "accumulation")
"""Options that are chosen by the data and the memory where they are not given, and that are `None` until then."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(StepConfig):
    """The optimizer: clipping, weight decay, momentum, a warm-up and a cosine, a moving average of the weights.

    The fields of a step and their defaults are `StepConfig`'s. Two defaults are others, for batches below 1024.

    Attributes:
        name: "sgd", the papers'; "adamw"; another of torch's, such as torch.optim.NAdam; or, on the command line with
            --allow-import, the import path of any.
        options: further arguments of an optimizer other than "sgd", such as {betas: [0.9, 0.95]}.
        lr: peak learning rate; by default of SGD 0.1 for batches of 64 to 256, in proportion to the batch outside, of
            others 0.001; and a tenth of that from pretrained weights.
        layer_decay: factor of the rate from each residual block to the one below it, as timm and BEiT have it, such as
            0.75; the classifier has the full rate, the last block this factor of it. null gives all the same.
        head_lr_scale: factor of the classifier's rate, such as 10 for one that was drawn anew.
        momentum: of SGD.
        nesterov: whether momentum is Nesterov's.
        weight_decay: of kernels and linears; SGD adds it to their gradients.
        clip: AGC threshold; null trains without. The papers' 0.01 is for batches of 1024 and more.
        agc_eps: floor of the norm of a unit's weights in AGC.
        clip_head_bias: whether AGC clips the classifier's bias too, as in DeepMind's code; its weight is never clipped.
        clip_norm: largest norm of the whole gradient, the classic alternative to AGC; null clips none.
        sam_rho: radius of sharpness-aware minimisation; null trains without. The papers' F6 has 0.05.
        sam_fraction: part of each process's batch that finds SAM's ascent.
        warmup_epochs: epochs of linear warm-up.
        min_lr: learning rate at the end of the cosine.
        label_smoothing: of the cross-entropy.
        ema_decay: of the moving average, which is what is saved; null keeps none and saves the live weights.
    """

    name: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    layer_decay: float | None = None
    head_lr_scale: float = 1.0
    clip: float | None = 0.1
    clip_norm: float | None = None
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    ema_decay: float | None = 0.9999

    @property
    def is_foreign(self) -> bool:
        """Whether the optimizer is neither nfzoo's nor torch's, so that making it imports a module by name."""
        return self.name not in ("sgd", "adamw") and re.fullmatch(r"torch\.optim\.\w+", self.name) is None

    def __post_init__(self) -> None:
        _check_fields(self, "optim.")
        for name in ("weight_decay", "warmup_epochs", "min_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must not be negative, is {getattr(self, name)!r}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"optim.{name} must be in [0, 1), not {value!r}")
        for name in ("lr", "head_lr_scale", "clip", "agc_eps", "clip_norm", "sam_rho"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optim.{name} must be positive, not {value!r}; null is the default or none")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay must be in (0, 1], not {self.layer_decay!r}; null gives none")
        if not 0 < self.sam_fraction <= 1:
            raise ConfigError(f"optim.sam_fraction must be in (0, 1], not {self.sam_fraction!r}")
        if self.options and self.name == "sgd":
            raise ConfigError(f"optim.options {self.options!r} are for other optimizers; sgd has options of its own")
        for name in ("momentum", "nesterov"):
            if self.name != "sgd" and getattr(self, name) != getattr(StepConfig, name):
                raise ConfigError(
                    f"optim.{name} {getattr(self, name)!r} is of sgd, not of {self.name!r}; give it in optim.options"
                )
        if not isinstance(self.options, dict) or set(self.options) & {"params", "lr", "weight_decay"}:
            raise ConfigError(f"optim.options must be a mapping without lr and weight_decay, not {self.options!r}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How much a teacher counts, and what it sees: `(1 - alpha) cross-entropy + alpha T^2 KL(teacher || student)`.

    Attributes:
        alpha: part of the teacher in the loss, 0 to 1. Class weights and label smoothing act on the rest of it alone.
        temperature: divisor T of the logits of both before their softmax.
        size: side in pixels to which the student's images are resized for the teacher; by default the size that the
            teacher was trained at.

    Source: arXiv 1503.02531; the defaults are those of arXiv 1910.10699.
    """

    alpha: float = 0.9
    temperature: float = 4.0
    size: int | None = None

    def __post_init__(self) -> None:
        _check_fields(self, "distillation.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"distillation.alpha must be in [0, 1], not {self.alpha!r}")
        if not self.temperature > 0:
            raise ConfigError(f"distillation.temperature must be positive, not {self.temperature!r}")
        if self.size is not None and not 1 <= self.size <= MAX_SIDE:
            raise ConfigError(f"distillation.size must be from 1 to {MAX_SIDE} pixels, not {self.size!r}")


_HINTS = {
    "data": "; name a folder with one subfolder per class, or tar or parquet files; give a data set of a Python "
    "program to nfzoo.fit(model, data_set, output=…)",
    "model": "; give a model of a Python program to nfzoo.fit(model, data, output=…), or save it with "
    "save_pretrained(FOLDER) and give the folder",
    "teacher": "; save a model with save_pretrained(FOLDER), and give the folder",
}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    tuple: "a list of whole numbers",
}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has the type of a field; whole numbers are numbers, and true is none."""
    kind_of = get_origin(kind) or kind
    if kind_of is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind_of is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind_of is int and isinstance(value, bool):
        return False
    return isinstance(value, kind_of)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    kind = get_origin(kind) or kind
    return "null" if kind is type(None) else _WORDS.get(kind, f"an {kind.__name__}")


def _group(kind: Any, options: dict[str, Any], name: str) -> Any:
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"{name} {options!r}: {str(error).rpartition('() ')[2]}") from error


def _check_fields(config: Any, prefix: str) -> None:
    """Raise a `ConfigError` for a null where a value has to be, and for a number that is not finite."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, os.PathLike):
            object.__setattr__(config, f.name, value := os.fspath(value))
        kinds = get_args(hints[f.name]) if get_origin(hints[f.name]) in (UnionType, Union) else (hints[f.name],)
        groups = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if groups and isinstance(value, dict):
            object.__setattr__(config, f.name, value := _group(groups[0], value, f.name))
        if value is not None and not any(_fits(value, kind) for kind in kinds):
            words = " or ".join(map(_in_words, kinds))
            raise ConfigError(f"{prefix}{f.name} must be {words}, not {shown(value)}{_HINTS.get(f.name, '')}")
        if value is None and type(None) not in get_args(hints[f.name]) and prefix + f.name not in CHOSEN:
            raise ConfigError(f"{prefix}{f.name} must have a value, not null; leave it out for the default")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{f.name} must be a finite number, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a zoo name, a Hub repository, a checkpoint folder or a weight file.
        data: "digits", the embedded handwritten digits; a folder with one subfolder of images per class, or of tar
            shards, or of parquet files, or with such folders in train/ and val/; a folder of MNIST's kind of files
            (IDX); "fashion-mnist", where Debian's package put it; or hub:ORG/NAME, a Hub data set.
        task: "single-label", where each image is of one class; or "multi-label", where labels is a table that gives
            each image a set of them, perhaps empty: in a cell as cat|dog, or in parquet as a list; in a row for each
            label; or in columns of 0 and 1, as in labels.csv?labels=cat,dog. The loss is the binary cross-entropy.
        labels: a CSV, TSV or parquet file with the columns path, from the folder of the data on, and label, and with a
            column split if it has parts; others by name, as in labels.csv?path=file&label=breed. By default the folders
            of the data are the classes.
        validation_labels: another such file, of the images that are held out.
        class_names: a text file with the name of a class in each line; by default the labels, sorted.
        output: the folder to write: the model, metrics.jsonl, curves.png, train.yaml, and checkpoints/ to resume from.
        epochs: passes over the training images; by default 15, or as many as take 100 steps.
        batch_size: images per step, over all processes; by default the largest of 32, 16 and 8 with which 15
            epochs have 100 steps, or 8.
        accumulation: parts in which each process works its share of a batch off, to save memory; by default as few as
            fit into the memory that is free.
        seed: of everything random.
        pretrained: start from the public weights of a zoo name; by default if there are any. False: from random ones.
        require_hash: refuse a downloaded model if the server states no hash to check it against.
        allow_pickle: also read weights in a pickle of torch's (.bin, .pt, .pth), if you trust who made it.
        tune: "all" weights; "head", the classifier's alone; or "stages:N", those of the last N stages, of the final
            convolution and of the classifier. No step changes a bit of the others.
        teacher: a trained model whose answers the model learns besides the labels: a zoo name, a Hub repository, a
            checkpoint folder or a weight file. Its labels have to be those of the data, in any order. It sees the very
            images that the model sees, cropped, varied and mixed alike.
        in_channels: 1 shows the model grey images, 3 coloured ones; by default what it was made for. The first kernels
            of trained weights are adapted. Grey images cost less time.
        train_size: side of the training images in pixels; by default the model's.
        progressive_sizes: smaller sizes to begin with, such as 128,160; train_size comes last. Of k sizes in all, epoch
            e of E, counted from 0, has number floor(k e / E). Augmentation and dropout stay the same. With other epochs
            a resumed run divides anew, and goes back to no smaller size.
        test_size: side of the held-out images in pixels; by default the model's.
        drop_rate: dropout rate; by default the model's.
        stochastic_depth: stochastic depth rate; by default the model's.
        validation_fraction: part of each class that is held out where the data have no such part.
        class_weights: "none"; "balanced", images / (classes x images of the class), by which each class's term of the
            loss is multiplied; a mapping of classes to weights such as {cat: 2.5}, or a YAML or JSON file of one, where
            the others have weight 1. With multi-label the weights are of the positive terms, and "balanced" is images
            without the label / images with it.
        sampler: "shuffle" takes each image once an epoch; "balanced" takes as many images from each class, in an epoch
            as long, so that images of rare classes come again, with other crops; not with multi-label.
        augment: random crops and flips, RandAugment, MixUp and CutMix; by default gentle crops for the digits, and
            the papers' crops and flips for others. Naming any of its options starts from the papers' crops and flips.
        augmented_sheet: a PNG file to draw the first augmented batch into.
        max_broken: images that may turn out unreadable. Each is named; in training the next one takes its place.
        workers: loader processes per training process; by default as many as there are processors, up to 8.
        worker_timeout: seconds that a loader process may take for a batch before another takes its place.
        mixed_precision: "no", "bf16" or "fp16"; by default as Accelerate is configured.
        compile: compile the model block by block, which takes a minute once and makes steps faster.
        cuda_graph: launch each step on a GPU as one CUDA graph, without the cost of launching kernel by kernel; by
            default where one process trains with sgd, without fp16 and sharding.
        activation_checkpointing: forget each block's activations and compute them again in the backward pass.
        sharding: "none" gives every process all parameters; "fsdp2" shards them over the processes.
        keep_best: "accuracy", "loss" or "f1" (macro F1) on the held-out images, with multi-label "map" (mean average
            precision), "loss" or "f1": the folder keeps the model of the epoch that is best by it, and its checkpoint
            beside the newest. The weights that are judged are those that are saved: their moving average, or with
            optim.ema_decay null the live ones. By default the last epoch is kept.
        patience: epochs without a better one after which the run ends; needs keep_best. null trains all epochs.
        nonfinite: what to do when a gradient is not finite: "stop", or "skip" the step and count it.
        resume: go on from the newest checkpoint in the output folder; from the start if there is none.
        resume_from: the checkpoint that resume takes: "last", the newest; or "best", that of keep_best, and later ones
            are removed.
        save_steps: steps between checkpoints; by default one at the end of each epoch alone.
        keep_checkpoints: checkpoints to keep, the newest ones, beside that of keep_best.
        async_save: write checkpoints while training goes on, from a copy of weights and optimizer in the host's memory.
        tracker: a tracker of Accelerate's. "tensorboard", "wandb", "trackio" and "mlflow" also get pictures: the first
            augmented batch, and of up to 50 classes each epoch's confusion matrix.
        overwrite: write into an output folder that holds a model already.
        optim: the optimizer.
        distillation: how a teacher counts; null without one.
    """

    model: str
    data: str
    output: str
    task: Literal["single-label", "multi-label"] = "single-label"
    labels: str | None = None
    validation_labels: str | None = None
    class_names: str | None = None
    epochs: int = None  # type: ignore[assignment]  # a number as soon as the data are known, see `CHOSEN`
    batch_size: int = None  # type: ignore[assignment]
    accumulation: int = None  # type: ignore[assignment]
    seed: int = 0
    pretrained: bool | None = None
    require_hash: bool = False
    allow_pickle: bool = False
    tune: str = "all"
    teacher: str | None = None
    in_channels: int | None = None
    train_size: int | None = None
    progressive_sizes: tuple[int, ...] | None = None
    test_size: int | None = None
    drop_rate: float | None = None
    stochastic_depth: float | None = None
    validation_fraction: float = HELD_OUT
    class_weights: dict[str, float] | str = "none"
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    augment: Augment | None = None
    augmented_sheet: str | None = None
    max_broken: int = 0
    workers: int | None = None
    worker_timeout: float = PATIENCE
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    compile: bool = False
    cuda_graph: bool | None = None
    activation_checkpointing: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    keep_best: Literal["accuracy", "loss", "f1", "map"] | None = None
    patience: int | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    resume: bool = False
    resume_from: Literal["last", "best"] = "last"
    save_steps: int | None = None
    keep_checkpoints: int = 2
    async_save: bool = True
    tracker: str | None = None
    overwrite: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.progressive_sizes, list):
            object.__setattr__(self, "progressive_sizes", tuple(self.progressive_sizes))
        _check_fields(self, "")
        for name in ("epochs", "batch_size", "accumulation", "train_size", "test_size", "patience", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        if self.in_channels not in (None, 1, 3):
            raise ConfigError(f"in_channels must be 1, grey, or 3, coloured; not {self.in_channels!r}")
        if (sizes := self.progressive_sizes) is not None:
            if not sizes or not all(is_int(size, 1) for size in sizes) or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"progressive_sizes must be rising numbers of pixels, not {list(sizes)!r}")
            if self.epochs is not None and self.epochs <= len(sizes):
                raise ConfigError(
                    f"{self.epochs} epochs are too few for {len(sizes) + 1} sizes, {len(sizes)} of them in "
                    "progressive_sizes; train for more, or leave sizes out"
                )
        if self.patience is not None and self.keep_best is None:
            raise ConfigError(
                f"patience {self.patience} needs a metric to wait for; pass keep_best accuracy, loss or f1"
            )
        other = "accuracy" if self.multi_label else "map"
        if self.keep_best == other:
            raise ConfigError(f"keep_best {other} is no metric of task {self.task}; take {self.metric}, loss or f1")
        if self.multi_label and self.teacher is not None:
            raise ConfigError(
                f"the teacher {self.teacher!r} tells how likely one of the classes is, and with task multi-label an "
                "image has several; leave it out"
            )
        if self.multi_label and self.sampler == "balanced":
            raise ConfigError(
                "sampler 'balanced' takes images by their one class, and with task multi-label an image has several; "
                "take class_weights balanced"
            )
        if self.resume_from != "last" and not (self.resume and self.keep_best):
            raise ConfigError(f"resume_from {self.resume_from!r} needs resume true, and the keep_best of the run")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"keep_checkpoints must be at least 1, not {self.keep_checkpoints!r}")
        if self.max_broken < 0:
            raise ConfigError(f"max_broken must not be negative, is {self.max_broken!r}")
        for name in ("model", "data", "output", "teacher"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ConfigError(f"{name} must not be empty")
        if self.teacher is None and self.distillation is not None:
            raise ConfigError("the options of distillation need a teacher; name one, or leave them out")
        if self.teacher is not None and self.distillation is None:
            object.__setattr__(self, "distillation", DistillationConfig())
        if TUNE.fullmatch(self.tune) is None:
            raise ConfigError(f"tune must be all, head or stages:N, such as stages:1, not {self.tune!r}")
        _ = self.label_files  # raises for one of them without labels
        if self.class_weights == self.sampler == "balanced":
            raise ConfigError(
                "class_weights 'balanced' and sampler 'balanced' make up for the same twice; leave one of them out"
            )
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"seed must not be negative, and below 2**63; is {self.seed!r}")
        if self.workers is not None and not 0 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"workers must not be negative, and at most {MAX_WORKERS}; is {self.workers!r}")
        if self.worker_timeout < 1:
            raise ConfigError(f"worker_timeout must be at least a second, not {self.worker_timeout!r}")
        if not isinstance(self.optim, OptimConfig):
            raise ConfigError(f"optim must be a mapping of options such as lr, not {self.optim!r}")
        if self.sharding != "none" and self.optim.sam_rho is not None:
            raise ConfigError(f"SAM ascends in each process by itself, which sharding {self.sharding!r} does not allow")
        if self.mixed_precision == "fp16" and self.optim.sam_rho is not None:
            raise ConfigError("SAM does not go with mixed_precision 'fp16'; take 'bf16'")
        if self.sharding != "none" and self.mixed_precision == "fp16":
            raise ConfigError(f"sharding {self.sharding!r} does not go with mixed_precision 'fp16'; take 'bf16'")

    @property
    def label_files(self) -> LabelFiles | None:
        """The files of labels; `None` where the data tell the classes themselves."""
        return label_files(self.labels, self.validation_labels, self.class_names, multi_label=self.multi_label)

    @property
    def multi_label(self) -> bool:
        """Return whether an image has a set of labels."""
        return self.task == "multi-label"

    @property
    def metric(self) -> str:
        """The first metric on the held-out images, "accuracy" or "map"."""
        return "map" if self.multi_label else "accuracy"

    def with_class_weights(self) -> TrainConfig:
        """Return the run with class weights that do not depend on a file.

        Raises:
            ConfigError: for a file that cannot be read or holds no mapping of classes to numbers.
        """
        content: Any = self.class_weights
        if content in ("none", "balanced"):
            return self
        where = "class_weights"
        if isinstance(content, str):
            where = f"the class weights {content!r}"
            try:
                content = strict_yaml.load(read_text(content, strict_yaml.MOST_TEXT))
            except FileNotFoundError as error:
                raise ConfigError(f"{where} do not exist; give a file, none, balanced, or a mapping") from error
            except (OSError, ValueError) as error:
                raise ConfigError(f"{where} cannot be read: {error}") from error
        if not isinstance(content, dict) or not content:
            raise ConfigError(f"{where} must be a mapping of classes to weights such as {{cat: 2.5}}, not {content!r}")
        for name, value in content.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{where} must be numbers from 0 on; that of {name!r} is {value!r}")
        return dataclasses.replace(self, class_weights={str(k): float(v) for k, v in content.items()})

    def to_yaml(self) -> str:
        """Return the run as a recipe that `parse` reads, without what concerns one start alone."""
        options = {name: value for name, value in self.to_dict().items() if name not in STARTING}
        return yaml.safe_dump(options, sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all options, ready for JSON and YAML."""
        return _plain(dataclasses.asdict(self))


def default_lr(batch_size: int, pretrained: bool, name: str = "sgd") -> float:
    """Return the peak learning rate where none is given: see `OptimConfig`."""
    lr = max(0.1 * min(batch_size / 64, 1.0), 0.1 * batch_size / 256) if name == "sgd" else 1e-3
    return lr / 10 if pretrained else lr


def default_augment(data: str) -> Augment:
    """Return the augmentation where none is given: see `TrainConfig`."""
    return GENTLE if data == DIGITS else Augment()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
