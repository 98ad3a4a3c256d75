"""Data parallel on XLA, in a process of its own, as SPMD cannot be turned off again.

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 python -m tests.xla.data_parallel

Each device gets a part of the batch; the compiler adds the reductions. Prints as JSON the losses, what the
parameters became, and how the images were split.
"""

import json
import sys

import numpy as np
import torch
import torch_xla  # pyright: ignore[reportMissingImports]
import torch_xla.distributed.spmd as spmd  # pyright: ignore[reportMissingImports]
import torch_xla.runtime as xr  # pyright: ignore[reportMissingImports]
from torch.utils._pytree import tree_map

from nfzoo import model
from nfzoo.runtime.device import backend
from nfzoo.step import StepConfig, init_state, train_step
from tests.support.helpers import SMALL, generator, images, random_params

CFG = SMALL["nf-regnet"].replace(drop_rate=0.3, stochastic_depth=0.5)
BATCH, STEPS, RATE = 8, 3, 0.3
STEP = StepConfig(clip=0.02, ema_decay=0.9)
LABELS = torch.arange(BATCH) % 5


def batch(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return images(CFG, BATCH, seed=step), model.sample_noise(CFG, BATCH, generator=generator(step))


def main() -> int:
    xr.use_spmd()
    chosen = backend("xla")
    chosen.start()
    devices = xr.global_runtime_device_count()
    mesh = spmd.Mesh(np.arange(devices), (devices,), ("data",))

    def shared(t: torch.Tensor) -> torch.Tensor:
        """The tensor on the devices, its first dimension split among them."""
        placed = t.to(chosen.device)
        spmd.mark_sharding(placed, mesh, ("data", *[None] * (t.ndim - 1)))
        return placed

    state = tree_map(lambda t: t.to(chosen.device), init_state(random_params(CFG), STEP))
    losses, spec = [], ""
    for i in range(STEPS):
        x, noise = batch(i)
        inputs = (shared(x), shared(LABELS)), tree_map(shared, noise)
        chosen.step_mark()
        spec = torch_xla._XLAC._get_xla_sharding_spec(inputs[0][0])
        state, seen = train_step(CFG, state, *inputs, chosen.scalar(RATE), config=STEP)
        chosen.step_mark()
        losses.append(seen.loss.item())
    report = {
        "devices": devices,
        "losses": losses,
        "params": {name: p.tolist() for name, p in chosen.to_cpu(state.params).items()},
        "sharding": spec,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
