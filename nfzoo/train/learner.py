"""What a training run trains: a model on the devices of all its processes, and how one step changes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfzoo.checkpoint.run_state import Saved
from nfzoo.nn import NFNet
from nfzoo.optim.agc_sgd import AGCSGD, has_fused
from nfzoo.optim.clipping import agc_
from nfzoo.optim.sam import ascent_rows, restore_, sam_ascent_
from nfzoo.optim.sgd import ema_
from nfzoo.runtime.device import AUTOCAST, backend, precision
from nfzoo.runtime.distributed import (
    copy_,
    full_tensor,
    full_tensors,
    gradients,
    optimizer_tensors,
    restore_optimizer,
    shard,
)
from nfzoo.step import cross_entropy
from nfzoo.train.config import TrainConfig
from nfzoo.train.optimizers import make_optimizer
from nfzoo.types import Params

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up


class Trainee:
    """A model with its optimizer and its average. A step is one `backward` for each part of a batch, then `update`.

    The device's backend has to be started before.

    Attributes:
        model: what the forward pass of training goes through: the network itself, or what DDP wraps it in.
        live: the network's parameters by name, sharded under FSDP2.
        average: their moving average, if the recipe has one.
        optimizer: as Accelerate wraps it; `inner` is the recipe's own.
    """

    def __init__(self, config: TrainConfig, model: NFNet, accelerator: Accelerator, *, peak_lr: float) -> None:
        self.optim, self.accelerator = config.optim, accelerator
        self.backend = backend(accelerator.device)
        self.dtype = AUTOCAST[precision(config.mixed_precision)]
        self.sharded = config.sharding == "fsdp2"
        if config.tune == "head":
            for name, p in model.named_parameters():
                p.requires_grad_(name.startswith("head."))
        if config.activation_checkpointing:
            model.checkpoint_blocks()
        model = model.to(accelerator.device)
        if self.sharded:
            self.model: Any = shard(model, accelerator.device)
        if config.compile:
            model.compile_blocks()
        self.bare = model
        self.live: Params = dict(model.named_parameters())
        self.names = {p: name for name, p in self.live.items()}
        self.trainable = [p for p in self.live.values() if p.requires_grad]
        one_kernel = config.compile and has_fused(accelerator.device)
        self.inner = make_optimizer(config.optim, model, peak_lr, compiled=one_kernel)
        if isinstance(self.inner, AGCSGD):  # before the first step, which a lazy device would else compile for itself
            for p in self.trainable:
                self.inner.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if self.sharded:
            self.optimizer: Any = self.inner
        else:
            self.model, self.optimizer = accelerator.prepare(model, self.inner)
        self.average: Params | None = None
        if config.optim.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @property
    def clipped(self) -> Tensor | None:
        """The share of units that AGC clipped in the last update; `None` from an optimizer that does not count them."""
        fraction = self.inner.clipped_fraction if isinstance(self.inner, AGCSGD) else None
        return None if fraction is None else full_tensor(fraction)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision, for a forward pass."""
        return self.backend.autocast(self.dtype)

    def set_learning_rate(self, lr: float) -> None:
        value = self.backend.scalar(lr) if isinstance(self.inner, AGCSGD) else lr
        for group in self.inner.param_groups:
            group["lr"] = value

    # ------------------------------------------------------------ one step

    def backward(
        self, images: Tensor, targets: Tensor, noise: Mapping[str, Tensor] | None, *, parts: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one of a batch's `parts`, with SAM that at the end of its ascent; its loss and logits.

        Processes average their gradients during the `last` part alone.
        """
        before = self._ascend(images, targets, noise) if self.optim.sam_rho is not None else None
        with nullcontext() if last else self._unsynced():
            with self.autocast():
                logits = self.model(images, noise or {})
            loss = cross_entropy(logits, targets, self.optim.label_smoothing)
            self.accelerator.backward(loss / parts)
        if before is not None:
            restore_(self.trainable, before)
        return loss, logits

    def update(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Change the weights by the gradient, which is kept, to be looked at; if it is not finite, nothing changes.

        Returns:
            The gradient's norm before any clipping, and whether it is finite, both on the device; the latter `None`
            under a loss scaler, which judges by itself.
        """
        self.backend.all_reduce_mean(gradients(self.trainable))
        norm = self._clip_norm()
        finite = None if self.accelerator.scaler is not None else norm.isfinite()
        # AGCSGD keeps its hands off by itself, so that the host need not wait between the gradient and the update.
        gated = isinstance(self.inner, AGCSGD)
        if gated or finite is None or bool(finite):
            self._update(step, finite if gated else None)
        return norm, finite

    def _update(self, step: int, gate: Tensor | None) -> None:
        if isinstance(self.inner, AGCSGD):
            self.inner.gate = gate
        elif self.optim.clip is not None:
            heads = [p for name, p in self.live.items() if name == "head.weight"]
            agc_(self.trainable, clip=self.optim.clip, exclude=heads)
        self.optimizer.step()
        if self.average is not None and self.optim.ema_decay is not None:
            ema_(self.average, self.live, self.backend.scalar(step), decay=self.optim.ema_decay, gate=gate)

    def _ascend(self, images: Tensor, targets: Tensor, noise: Mapping[str, Tensor] | None) -> list[Tensor]:
        """Move the weights up the loss of this process's first images; the weights as they were."""
        rows = ascent_rows(len(images), self.optim.sam_fraction)
        masks = {name: mask[:rows] for name, mask in noise.items()} if noise else {}
        with self.autocast():
            logits = self.bare(images[:rows], masks)
        loss = cross_entropy(logits, targets[:rows], self.optim.label_smoothing)
        grads = torch.autograd.grad(loss, self.trainable)
        assert self.optim.sam_rho is not None
        return sam_ascent_(self.trainable, grads, rho=self.optim.sam_rho)

    def _unsynced(self) -> Any:
        return _NoReduction(self.model) if self.sharded else self.accelerator.no_sync(self.model)

    def _clip_norm(self) -> Tensor:
        """The gradient's norm, which is clipped if the recipe says so."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients(self.trainable))
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.optim.clip_norm, norm)
        return full_tensor(norm)

    # ------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds: `model`, `optimizer` and `average`, whole; all processes call this together."""
        found = {"model": full_tensors(self.live), "optimizer": optimizer_tensors(self.inner, self.names)}
        if self.average is not None:
            found["average"] = full_tensors(self.average)
        return found

    def restore(self, saved: Saved) -> None:
        """The inverse of `tensors`."""
        for name, value in saved.tensors("model").items():
            copy_(self.live[name], value)
        restore_optimizer(self.inner, self.names, saved.tensors("optimizer"))
        if self.average is not None:
            for name, value in saved.tensors("average").items():
                copy_(self.average[name], value)


class _NoReduction:
    """FSDP2's form of DDP's `no_sync`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)
