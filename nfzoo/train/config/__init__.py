"""A training run as data: its options, with those of the command line and of YAML recipes."""

from nfzoo.train.config.train_config import (
    STARTING,
    DistillationConfig,
    OptimConfig,
    TrainConfig,
    default_augment,
    default_lr,
)

__all__ = ["STARTING", "DistillationConfig", "OptimConfig", "TrainConfig", "default_augment", "default_lr"]
