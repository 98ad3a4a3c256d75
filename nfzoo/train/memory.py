"""Estimate the memory that a training step takes, and divide a batch into parts that fit.

Autograd tells what it keeps for the backward pass: the network runs on the meta device, where nothing is computed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nfzoo.config import ModelConfig
from nfzoo.errors import ConfigError
from nfzoo.model import apply, specs
from nfzoo.optim.fine_tuning import tuned_names
from nfzoo.runtime.device import AUTOCAST, precision
from nfzoo.runtime.distributed import gather
from nfzoo.torch_internals import storage_number
from nfzoo.train.config import TrainConfig, default_augment
from nfzoo.types import Params

USABLE = 0.7
"""Share of the free memory that a step may take, as estimates were 0.74 to 1.09 of what was measured.

Source: benchmarks/results/training-memory.md.
"""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def kept_bytes(cfg: ModelConfig, size: int, tune: str = "all") -> int:
    """Return how many bytes of each image a forward pass in float32 keeps for the backward pass.

    Args:
        size: side of the images in pixels.
        tune: what is trained; see `nfzoo.optim.fine_tuning.freeze_`.
    """
    shapes = {name: shape for name, (shape, _) in specs(cfg).items()}
    tuned = tuned_names(shapes, tune)
    params = {name: torch.empty(shape, device="meta", requires_grad=name in tuned) for name, shape in shapes.items()}
    one, two = (_kept(cfg, params, images, size) for images in (1, 2))
    return two - one  # what is kept of the weights is in both


def _kept(cfg: ModelConfig, params: Params, images: int, size: int) -> int:
    kept: dict[int, tuple[int, Tensor]] = {}  # a tensor is kept alive, as another may take its number

    def keep(tensor: Tensor) -> Tensor:
        kept[storage_number(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        apply(cfg, params, torch.empty(images, cfg.in_channels, size, size, device="meta"))
    return sum(count for count, _ in kept.values())


def step_bytes(cfg: ModelConfig, config: TrainConfig, size: int) -> tuple[int, int]:
    """Return about how many bytes a training step takes for each image, and besides.

    An image takes what is kept of it for the backward pass, and half of that in bfloat16 and float16. Besides, each
    trained parameter has a gradient, a standardised copy, and what optimizer and moving average keep.
    """
    each = kept_bytes(cfg, size, config.tune)
    if AUTOCAST[precision(config.mixed_precision)] is not None:
        each //= 2
    shapes = {name: shape for name, (shape, _) in specs(cfg).items()}
    trained = 4 * sum(torch.Size(shapes[name]).numel() for name in tuned_names(shapes, config.tune))
    copies = 3 + (config.optim.ema_decay is not None) + (config.optim.name != "sgd")
    return each, copies * trained


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free for a process of this machine; `None` where that is not known.

    On a CPU it is what the system and the process's control group leave, divided among the processes of the machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def divided(
    config: TrainConfig, cfg: ModelConfig, size: int, *, processes: int, device: torch.device
) -> tuple[TrainConfig, str | None]:
    """Return a run with a number of accumulated parts, and a line about it if there is more than one.

    It is the smallest number that divides each process's share of the batch, and with which a part fits into
    `USABLE` of the memory that is free where least is. All processes call this.

    Args:
        config: the run, with a batch size. If it gives `accumulation`, that stays.
        size: side of the training images in pixels.
    """
    if config.accumulation is not None:
        return config, None
    share, parts, line = config.batch_size // processes, 1, None
    known = [free for free in gather([free_bytes(device)]) if free is not None]
    counted = known and not config.activation_checkpointing and config.sharding == "none"
    if counted and share * processes == config.batch_size:
        unit = 2 if (config.augment or default_augment(config.data)).mixes and share % 2 == 0 else 1
        numbers = [n for n in range(1, share + 1) if share % n == 0 and (share // n) % unit == 0]
        try:
            each, fixed = step_bytes(cfg, config, size)
        except ValueError as error:  # for more stages than there are
            raise ConfigError(str(error)) from error
        room = USABLE * min(known) - fixed
        parts = next((n for n in numbers if share // n * each <= room), numbers[-1])
        if parts > 1:
            line = (
                f"accumulation {parts}, as {share:,} images at once need about "
                f"{(share * each + fixed) / 2**30:.1f} GiB a process, and {min(known) / 2**30:.1f} GiB are free"
            )
    return dataclasses.replace(config, accumulation=parts), line
