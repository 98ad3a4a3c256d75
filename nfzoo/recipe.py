"""What a training run is, as data: its options, from the command line and from YAML recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from .data import HELD_OUT, Augment
from .errors import ConfigError, NfzooError

MOST_SEED = 1 << 63
MOST_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: AGC, weight decay, Nesterov momentum, a warm-up and a cosine, a moving average of the weights.

    Attributes:
        lr: peak learning rate; by default 0.1 for batches of 64 to 256, in proportion to the batch outside, and a tenth
            of that from pretrained weights.
        momentum: of SGD.
        nesterov: whether momentum is Nesterov's.
        weight_decay: added to the gradients of kernels and linears.
        clip: AGC threshold; null trains without. The papers' 0.01 is for batches of 1024 and more.
        warmup_epochs: epochs of linear warm-up.
        min_lr: learning rate at the end of the cosine.
        label_smoothing: of the cross-entropy.
        ema_decay: of the moving average, which is what is saved; null keeps none and saves the live weights.
    """

    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 2e-5
    clip: float | None = 0.1
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    label_smoothing: float = 0.1
    ema_decay: float | None = 0.9999

    def __post_init__(self) -> None:
        for name in ("weight_decay", "warmup_epochs", "min_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must not be negative, is {getattr(self, name)!r}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"optim.{name} must be in [0, 1), not {value!r}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optim.{name} must be positive, not {value!r}; null is the default or none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a zoo name, a Hub repository, a checkpoint folder or a weight file.
        data: "digits", the embedded handwritten digits; or a folder with one subfolder of images per class, or with
            such folders in train/ and val/.
        output: the folder to write: the model, metrics.jsonl, curves.png and train.yaml.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        seed: of everything random.
        pretrained: start from the public weights of a zoo name; by default if there are any. False: from random ones.
        train_size: side of the training images in pixels; by default the model's.
        test_size: side of the held-out images in pixels; by default the model's.
        drop_rate: dropout rate; by default the model's.
        stochastic_depth: stochastic depth rate; by default the model's.
        validation_fraction: part of each class that is held out where the data have no such part.
        augment: random crops and flips; by default gentle ones for the digits and the papers' for folders.
        skip_broken: leave images out that cannot be read, and name them, instead of stopping. Reads all once before.
        workers: loader processes per training process; by default as many as there are processors, up to 8.
        mixed_precision: "no", "bf16" or "fp16"; by default as Accelerate is configured.
        overwrite: write into an output folder that holds a model already.
        optim: the optimizer.
    """

    model: str
    data: str
    output: str
    epochs: int = 15
    batch_size: int = 32
    seed: int = 0
    pretrained: bool | None = None
    train_size: int | None = None
    test_size: int | None = None
    drop_rate: float | None = None
    stochastic_depth: float | None = None
    validation_fraction: float = HELD_OUT
    augment: Augment | None = None
    skip_broken: bool = False
    workers: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    overwrite: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "train_size", "test_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        for name in ("model", "data", "output"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} must not be empty")
        if not 0 <= self.seed < MOST_SEED:
            raise ConfigError(f"seed must not be negative, and below 2**63; is {self.seed!r}")
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"workers must not be negative, and at most {MOST_WORKERS}; is {self.workers!r}")
        if not isinstance(self.optim, OptimConfig):
            raise ConfigError(f"optim must be a mapping of options such as lr, not {self.optim!r}")

    def to_yaml(self) -> str:
        """The run as a recipe that `parse` reads."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)


def default_lr(batch_size: int, pretrained: bool) -> float:
    """The peak learning rate where none is given: see `OptimConfig`."""
    lr = max(0.1 * min(batch_size / 64, 1.0), 0.1 * batch_size / 256)
    return lr / 10 if pretrained else lr


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="nfzoo train",
        description="Train or fine-tune a model of the zoo.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action="config", help="YAML file of options; options after it override it.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(argv: list[str] | None = None) -> TrainConfig:
    """A configuration from command-line arguments. A `ConfigError` for anything that does not fit."""
    parser = _parser()
    try:
        namespace = parser.parse_args(argv)
        if not isinstance(namespace.get("optim"), Namespace):
            raise ConfigError(f"optim must be a mapping of options such as lr, not {namespace.get('optim')!r}")
        fields = dict(parser.instantiate(namespace))
    except NfzooError:
        raise
    except Exception as error:  # jsonargparse raises many kinds; all mean that the arguments do not fit
        raise ConfigError(" ".join(str(error).split())) from error
    fields.pop("recipe", None)
    return TrainConfig(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
