"""What is timed: inference and training steps of nfzoo's and timm's networks, for the same input."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import peer, timing
from nfzoo.model import mac_count
from nfzoo.nn import NFNet, create
from nfzoo.optim.clipping import CLIP
from nfzoo.optim.sgd import EMA_DECAY
from nfzoo.runtime.compile import compile_alone
from nfzoo.step import cross_entropy
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.run import prepared
from nfzoo.variants import VARIANTS

# The paper's table 3 for the NFNets, arXiv 1905.11946 for the EfficientNets: ImageNet top-1, size of test images.
ACCURACY = {f"nfnet-f{n}": top1 for n, top1 in enumerate((83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5))}
EFFICIENTNETS = {
    "tf_efficientnet_b0": (77.3, 224),
    "tf_efficientnet_b1": (79.2, 240),
    "tf_efficientnet_b2": (80.3, 260),
    "tf_efficientnet_b3": (81.7, 300),
    "tf_efficientnet_b4": (83.0, 380),
    "tf_efficientnet_b5": (83.7, 456),
    "tf_efficientnet_b6": (84.2, 528),
    "tf_efficientnet_b7": (84.4, 600),
}


CLASSES = 10  # of the digits, on which both sides train
MAX_BATCH = 1024  # that they fill
PRECISION: dict[torch.dtype, Literal["no", "bf16", "fp16"]] = {
    torch.float32: "no",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


class Work(NamedTuple):
    """Where, in what precision and in which memory format both sides compute."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Training in low precision keeps float32 parameters."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def images(self, batch: int, size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch, 3, size, size).to(self.device, dtype).to(memory_format=self.layout)


def sizes(variant: str) -> tuple[int, int]:
    """Training and test size of the paper."""
    preprocessing = VARIANTS[variant].preprocessing
    return preprocessing.train_size, preprocessing.test_size


def macs(variant: str, size: int) -> int:
    return mac_count(VARIANTS[variant].config, size)


def network(variant: str, work: Work, *, training: bool) -> NFNet:
    """An nfzoo model with random weights; neither side draws dropout or stochastic depth."""
    net: Any = create(variant, drop_rate=0.0, stochastic_depth=0.0).to(work.device)
    return net.to(memory_format=work.layout).train(training)


def inference(
    variant: str, work: Work, *, batch: int, size: int, compiled: bool = True
) -> dict[str, Callable[[], Any]]:
    """Contenders of inference in `work.dtype`, weights included; on CUDA each as a CUDA graph."""
    x = work.images(batch, size, dtype=work.dtype)
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, net: Callable[[Tensor], Tensor]) -> None:
        @torch.no_grad()
        def call() -> Tensor:
            return net(x)

        if work.device.type == "cuda":
            with torch.no_grad():
                calls[name] = timing.captured(call)
        else:
            calls[name] = call

    ours = network(variant, work, training=False).to(work.dtype)
    if work.device.type == "cpu":
        add("nfzoo eager", ours)
    add("nfzoo folded", ours.for_inference())
    if work.device.type == "cpu":
        add("nfzoo folded, prepacked", ours.for_inference().prepack())
    if compiled:
        add("nfzoo folded, compiled", ours.for_inference().compile_blocks())
    if peer.timm() is not None:
        theirs: Any = peer.model(peer.name_of(variant), work.device, training=False).to(work.dtype)
        theirs = theirs.to(memory_format=work.layout)
        add("timm eager", theirs)
        if compiled:
            add("timm compiled", torch.compile(theirs, dynamic=False))
            if work.device.type == "cpu":
                add("timm compiled, frozen", _frozen(theirs, x))
    return calls


def _frozen(net: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A whole network compiled with its weights as constants: standardised, and laid out for oneDNN, once."""
    from torch._inductor import config

    own = copy.deepcopy(net)

    def call(x: Tensor) -> Tensor:
        return own(x)

    made = compile_alone(call)  # by itself: Dynamo would find the graph of `net`, whose weights are arguments
    with torch.no_grad(), config.patch(freezing=True):  # Dynamo reads it too, so that it is no matter of `options`
        made(x)
    return made


class Training(NamedTuple):
    """One side's training: the whole step, its forward pass with loss, and what holds its weights."""

    step: Callable[[], Tensor]
    forward: Callable[[], Tensor]
    net: torch.nn.Module


def train_nfzoo(
    variant: str,
    work: Work,
    *,
    batch: int,
    size: int,
    compiled: bool,
    checkpointed: bool = False,
    cuda_graph: bool | None = None,
) -> Training:
    """Return the step of `nfzoo.train` itself, `Trainer.train_step`, on a batch that the loader has made.

    The digits are its data, which have 10 classes. The step takes the batch to the device, normalises it, and sums up
    the metrics, as in every training.
    """
    if work.channels_last:
        raise ValueError("nfzoo.train chooses the memory format by the device; leave --channels-last to inference")
    if work.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        config = TrainConfig(
            model=variant,
            data="digits",
            output=f"{scratch}/run",
            pretrained=False,
            batch_size=batch,
            accumulation=1,
            train_size=size,
            drop_rate=0.0,
            stochastic_depth=0.0,
            workers=0,
            mixed_precision=PRECISION[work.dtype],
            compile=compiled,
            cuda_graph=cuda_graph,
            activation_checkpointing=checkpointed,
            optim=OptimConfig(clip=CLIP, ema_decay=EMA_DECAY, lr=1e-4),
        )
        with prepared(config) as trainer:
            loaded = next(trainer.pipeline.batches(0, 0))
    learner = trainer.learner
    learner.model.train()
    inputs = trainer.pipeline.inputs(loaded, 0, {})

    def forward() -> Tensor:
        with learner.autocast():
            logits = learner.model(inputs.images, {})
        return cross_entropy(logits, inputs.targets, config.optim.label_smoothing)

    def step() -> Tensor:
        trainer.train_step([loaded])
        return trainer.metrics.loss

    return Training(step, forward, learner.bare)


def backward_nfzoo(variant: str, work: Work, *, batch: int, size: int, compiled: bool) -> Callable[[], None]:
    """Return forward and backward pass in the memory format of `work`, where `nfzoo.train` has the device's."""
    net = network(variant, work, training=True)
    if compiled:
        net.compile_blocks()
    x, labels = work.images(batch, size), torch.arange(batch, device=work.device)

    def call() -> None:
        net.zero_grad()
        with work.autocast():
            logits = net(x, {})
        cross_entropy(logits, labels).backward()

    return call


def train_timm(
    name: str,
    work: Work,
    *,
    batch: int,
    size: int,
    compiled: bool,
    agc: bool = True,
    checkpointed: bool = False,
    cuda_graph: bool = False,
) -> Training:
    """Return the step of a timm model as its users write it; with `cuda_graph`, the whole step as one CUDA graph."""
    net: Any = peer.model(name, work.device, training=True, num_classes=CLASSES)
    net = net.to(memory_format=work.layout)
    if checkpointed:
        net.set_grad_checkpointing(True)
    update = peer.update_of(net, clip=0.01 if agc else None)
    made = _training(net, torch.compile(net, dynamic=False) if compiled else net, update, work, batch, size)
    return made._replace(step=timing.captured(made.step)) if cuda_graph else made


def _training(
    net: torch.nn.Module, call: Callable[[Tensor], Tensor], update: Callable[[], Any], work: Work, batch: int, size: int
) -> Training:
    x, labels = work.images(batch, size), torch.arange(batch, device=work.device) % CLASSES

    def forward() -> Tensor:
        with work.autocast():
            logits = call(x)
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    def step() -> Tensor:
        for p in net.parameters():
            p.grad = None
        loss = forward()
        loss.backward()
        update()
        return loss.detach()

    return Training(step, forward, net)
