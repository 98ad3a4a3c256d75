"""The model of a training run on the devices of all its processes, with its optimizer and its averages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.checkpoint.run_state import Saved
from nfzoo.data.labels import match_classes
from nfzoo.errors import ConfigError, DataError
from nfzoo.model import specs
from nfzoo.nn import NFNet, assemble
from nfzoo.optim.agc_sgd import can_compile
from nfzoo.optim.fine_tuning import freeze_
from nfzoo.optim.sam import ascent_rows, restore_, sam_ascent_
from nfzoo.runtime.device import AUTOCAST, backend, precision
from nfzoo.runtime.distributed import (
    copy_,
    full_tensor,
    gradients,
    optimizer_tensors,
    restore_optimizer,
    shard,
)
from nfzoo.step import binary_cross_entropy, cross_entropy
from nfzoo.train.batches import Inputs
from nfzoo.train.config import TrainConfig
from nfzoo.train.distillation import Teacher, distillation_loss
from nfzoo.train.updaters import PapersUpdater, TorchUpdater, Updater, papers_optimizer, torch_optimizer
from nfzoo.types import Params

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")


class Learner:
    """A model, its optimizer and its averages, with the operations of `Trainer.train_step`.

    The device's backend has to be started before.

    Attributes:
        model: module of the training's forward pass: the network, or its DDP wrapper.
        live: the network's parameters by name, sharded under FSDP2.
        optimizer: the recipe's own; `updater` is what a step asks of it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: NFNet,
        accelerator: Accelerator,
        *,
        peak_lr: float,
        class_weights: Sequence[float] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.optim, self.distillation, self.accelerator = config.optim, config.distillation, accelerator
        self._multi_label = config.multi_label
        self._weights = None if class_weights is None else torch.tensor(class_weights).to(accelerator.device)
        self.backend = backend(accelerator.device)
        self.dtype = AUTOCAST[precision(config.mixed_precision)]
        self.sharded = config.sharding == "fsdp2"
        try:
            freeze_(model, config.tune)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.activation_checkpointing:
            model.checkpoint_blocks()
        model = model.to(accelerator.device, torch.float32)  # whatever they were saved in
        if self.backend.weights_last and not self.sharded:  # FSDP2 takes contiguous parameters alone
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.sharded:
            self.model: Any = shard(model, accelerator.device)
        if config.compile:
            model.compile_blocks()
        self.teacher = None if teacher is None else teacher.prepare(accelerator.device, compiled=config.compile)
        self.bare = model
        self.live: Params = dict(model.named_parameters())
        self.names = {p: name for name, p in self.live.items()}
        self.trainable = [p for p in self.live.values() if p.requires_grad]
        self._make_updater(config, model, peak_lr)

    def _make_updater(self, config: TrainConfig, model: NFNet, lr: float) -> None:
        device, optim = self.accelerator.device, config.optim
        papers = optim.name == "sgd"
        if papers:
            compiled = config.compile and can_compile(device)
            self.optimizer: torch.optim.Optimizer = papers_optimizer(optim, model, lr, compiled=compiled)
        else:
            self.optimizer = torch_optimizer(optim, model, lr)
        self.prepared: Any = self.optimizer
        if not self.sharded:
            self.model, self.prepared = self.accelerator.prepare(model, self.optimizer)
        if papers:
            self.updater: Updater = PapersUpdater(self.optimizer, self.prepared, self.live, device)  # type: ignore[arg-type]
        else:
            self.updater = TorchUpdater(self.optimizer, self.prepared, self.live, optim)

    @property
    def averages(self) -> Params | None:
        """Return the moving averages of the parameters, not copied; `None` if the recipe has none."""
        return self.updater.averages

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the run's mixed precision, for a forward pass."""
        return self.backend.autocast(self.dtype)

    # ------------------------------------------------------------ one step

    def answers(self, images: Tensor) -> Tensor | None:
        """Return the teacher's float32 logits `(n, classes)` for the model's input; `None` if there is no teacher."""
        return None if self.teacher is None else self.teacher.logits(images, self.autocast)

    @contextmanager
    def part(self, inputs: Inputs, answers: Tensor | None = None, *, last: bool) -> Iterator[None]:
        """Return the context of forward and backward pass of one part of a batch, with the teacher's answers.

        With SAM the weights stand at the end of its ascent. Processes average their gradients in the `last` part alone.
        """
        before = self._ascend(*inputs, answers) if self.optim.sam_rho is not None else None
        with nullcontext() if last else self._unsynced():
            yield
        if before is not None:
            restore_(self.trainable, before)

    def loss(self, logits: Tensor, targets: Tensor, answers: Tensor | None = None) -> Tensor:
        """Return the loss of logits `(n, classes)`: the cross-entropy with the recipe's smoothing and class weights.

        With multi-label it is the binary cross-entropy, with weights of the positive terms. With a teacher's `answers`
        it is `(1 - alpha) cross-entropy + alpha distillation_loss`.
        """
        if self._multi_label:
            return binary_cross_entropy(logits, targets, self.optim.label_smoothing, self._weights)
        loss = cross_entropy(logits, targets, self.optim.label_smoothing, self._weights)
        if answers is None or self.distillation is None:
            return loss
        alpha = self.distillation.alpha
        return (1 - alpha) * loss + alpha * distillation_loss(logits, answers, self.distillation.temperature)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the parameters' gradients, scaled under fp16."""
        self.accelerator.backward(loss)

    def clip(self) -> tuple[Tensor, Tensor | None]:
        """Clip the gradient by its global norm if the recipe has `clip_norm`. AGC is part of the update.

        Returns:
            The norm before, and whether it is finite, both on the device; the latter `None` under a loss scaler, which
            judges by itself.
        """
        self.backend.all_reduce_mean(gradients(self.trainable))
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.prepared)
        norm = torch.nn.utils.get_total_norm(gradients(self.trainable))
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.optim.clip_norm, norm)
        norm = full_tensor(norm)
        return norm, None if self.accelerator.scaler is not None else norm.isfinite()

    def _ascend(
        self, images: Tensor, targets: Tensor, noise: Mapping[str, Tensor], answers: Tensor | None
    ) -> list[Tensor]:
        """Move the weights to SAM's ascent, by the loss of this process's first images; return the original weights."""
        rows = ascent_rows(len(images), self.optim.sam_fraction)
        masks = {name: mask[:rows] for name, mask in noise.items()}
        with self.autocast():
            logits = self.bare(images[:rows], masks)
        loss = self.loss(logits, targets[:rows], None if answers is None else answers[:rows])
        grads = torch.autograd.grad(loss, self.trainable)
        assert self.optim.sam_rho is not None
        return sam_ascent_(self.trainable, grads, rho=self.optim.sam_rho)

    def _unsynced(self) -> Any:
        return _NoReduction(self.model) if self.sharded else self.accelerator.no_sync(self.model)

    # ------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: `model`, `optimizer` and `average`, which is sharded where the model is."""
        state = optimizer_tensors(self.optimizer, self.names)
        tensors = {
            "model": {name: p.detach() for name, p in self.live.items()},
            # The averages have a file of their own, whatever the optimizer.
            "optimizer": {key: value for key, value in state.items() if not key.endswith("::ema")},
        }
        if (averages := self.averages) is not None:
            tensors["average"] = {name: p.detach() for name, p in averages.items()}
        return tensors

    def restore(self, saved: Saved) -> None:
        """Load a checkpoint of what `tensors` returned, in any number of processes."""
        for name, value in saved.tensors("model").items():
            copy_(self.live[name], value)
        restore_optimizer(self.optimizer, self.names, saved.tensors("optimizer"))
        if (averages := self.averages) is not None:
            for name, value in saved.tensors("average").items():
                copy_(averages[name], value)


def uses_cuda_graph(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Return whether a run launches its steps as one CUDA graph.

    Raises:
        ConfigError: if the run asks for it, and it cannot be.
    """
    if config.cuda_graph is False:
        return False
    reasons = {
        f"the device is {accelerator.device.type!r}": accelerator.device.type != "cuda",
        f"{accelerator.num_processes} processes train": accelerator.num_processes > 1,
        f"the optimizer is {config.optim.name!r}": config.optim.name != "sgd",
        "a loss scaler serves fp16": accelerator.scaler is not None,
        f"sharding is {config.sharding!r}": config.sharding != "none",
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if config.cuda_graph and against:
        raise ConfigError(f"a CUDA graph cannot hold the training step, as {against[0]}; leave --cuda-graph out")
    return not against


class _NoReduction:
    """Leave gradients unreduced, as DDP's `no_sync` does, under FSDP2."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)


def problem_type(config: TrainConfig) -> str | None:
    """Return the problem type of the model of a run, as `config.json` has it."""
    return MULTI_LABEL if config.multi_label else None


def fit_head(model: NFNet, config: TrainConfig, classes: int) -> None:
    """Give a model a new classifier, with a warning, if its own is of another task or number of classes."""
    if model.problem_type == problem_type(config) and model.config.num_classes == classes:
        return
    logger.warning(
        "%s has %d classes of a %s task: its classifier is replaced by a fresh one of %d for task %s, which must be "
        "trained",
        *(config.model, model.config.num_classes, "multi-label" if model.multi_label else "single-label"),
        *(classes, config.task),
    )
    model.reset_classifier(classes)


def copied(model: NFNet, num_classes: int) -> NFNet:
    """Return a copy of a model, in float32 on the CPU, with a fresh classifier where its own has other classes.

    Raises:
        ConfigError: for a folded model, and for one whose parameters are not those of its configuration.
    """
    params = {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in model.state_dict().items()}
    own = specs(model.config)
    strange = sorted(params.keys() ^ own.keys())
    if model.config.folded or strange or any(params[name].shape != shape for name, (shape, _) in own.items()):
        what = "is folded for inference" if model.config.folded else "was changed"
        where = f" (in {strange[0]})" if strange else ""
        raise ConfigError(f"the given model {what}{where}; give the model that it was made from")
    return assemble(model.description, params, num_classes=num_classes, source="the given model")


def head_for(
    classes: Sequence[str], labels: Sequence[str], params: Mapping[str, Tensor], model: str
) -> dict[str, Tensor]:
    """Return the classifier of a model with as many `labels` as there are classes, its outputs in the classes' order.

    A warning says that they were put in order, or that the names of the classes are not the model's.
    """
    head = {name: params[name] for name in ("head.weight", "head.bias")}
    try:
        order, _ = match_classes(classes, len(classes), labels, source="the data")
    except DataError:
        strange = next((name for name in classes if name not in labels), classes[0])
        logger.warning(
            "%s has as many classes as the data, with other names (the data have %r): its classifier goes on from them",
            *(model, strange),
        )
        return head
    if order == tuple(range(len(classes))):
        return head
    logger.warning("%s has the classes of the data in another order: its outputs are put into that of the data", model)
    return {name: value[list(order)] for name, value in head.items()}
