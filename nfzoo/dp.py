"""Differentially private training: clip each example's gradient, then add noise to the sum.

Without batch normalisation every example has its own gradient, and `torch.func.vmap` over `torch.func.grad` computes
it. `python -m nfzoo.dp` trains `nfnet-test` on the embedded digits, and prints the epsilon that the training spent.

This is an example for research. The noise comes from torch's floating-point generators, which do not withstand an
attack on the generator. A search for good options costs privacy too, which the epsilon does not count.

Source: Abadi et al., "Deep Learning with Differential Privacy" (arXiv 1607.00133), algorithm 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.config import ModelConfig
from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.source import open_split
from nfzoo.errors import ConfigError, NfzooError
from nfzoo.model import apply, init
from nfzoo.optim.sgd import ema, sgd, sgd_init
from nfzoo.runtime import program
from nfzoo.runtime.cpu import keep_freed_memory
from nfzoo.step import cross_entropy
from nfzoo.transforms.preprocess import evaluation_transform
from nfzoo.types import Params
from nfzoo.variants import variant

MODEL = "nfnet-test"
STEPS, BATCH, NOISE, CLIP_NORM, LR = 150, 256.0, 2.0, 1.0, 0.1  # epsilon 5.5 at delta 1e-5


class MissingAccountantError(NfzooError, ModuleNotFoundError):
    """An epsilon was asked for where dp-accounting is not installed."""


def clipped_sum(
    loss_fn: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    *,
    clip_norm: float,
    chunk: int | None = None,
) -> tuple[Params, Tensor]:
    """Return the sum over examples of `g * min(1, clip_norm / |g|)`, and the norms `|g|`, `(N,)`.

    `|g|` is the L2 norm of an example's gradient over all parameters. A gradient that is not finite counts as 0, as no
    scaling would bring it within `clip_norm`.

    Args:
        loss_fn: `loss_fn(params, *example)`, the scalar loss of one example without a batch axis.
        batch: tensors with a common first axis `N`, which may be 0.
        chunk: number of examples whose gradients are in memory at a time; all by default.
    """

    def one(params: Mapping[str, Tensor], *example: Tensor) -> tuple[Params, Tensor]:
        grads = torch.func.grad(loss_fn)(params, *example)
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        factor = clip_norm / norm.clamp(min=clip_norm)
        return {k: torch.where(norm.isfinite(), g * factor, 0.0) for k, g in grads.items()}, norm

    count = len(batch[0])
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    norms = [next(iter(params.values())).new_zeros(0)]
    each = torch.func.vmap(one, in_dims=(None, *([0] * len(batch))))
    for start in range(0, count, chunk or max(count, 1)):
        part = [t[start : start + (chunk or count)] for t in batch]
        grads, chunk_norms = each(params, *part)
        total = {name: value + grads[name].sum(0) for name, value in total.items()}
        norms.append(chunk_norms)
    return total, torch.cat(norms)


def private_gradient(
    loss_fn: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Params:
    """Estimate the mean gradient with differential privacy: `(clipped_sum + noise) / expected_batch`.

    The noise of every element is drawn from N(0, (noise_multiplier * clip_norm) ** 2).

    Args:
        loss_fn, batch, chunk: see `clipped_sum`. The function `epsilon` assumes that `batch` comes from
            `poisson_sample`.
        expected_batch: the sampling rate times the number of examples. The actual size of the batch would reveal
            something about the examples in it.
        generator: source of the noise, on the parameters' device.

    Raises:
        ValueError: unless `clip_norm` and `expected_batch` are positive and `noise_multiplier` is not negative.

    Source: arXiv 1607.00133, algorithm 1.
    """
    for name, value in (("clip_norm", clip_norm), ("expected_batch", expected_batch)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value!r}")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be a number of at least 0, not {noise_multiplier!r}")
    total, _ = clipped_sum(loss_fn, params, batch, clip_norm=clip_norm, chunk=chunk)
    scale = noise_multiplier * clip_norm
    return {
        name: (g + scale * torch.randn(g.shape, generator=generator, device=g.device, dtype=g.dtype)) / expected_batch
        for name, g in total.items()
    }


def poisson_sample(count: int, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw the indices of a batch; each of `count` examples is in it independently with probability `rate`."""
    return (torch.rand(count, generator=generator, dtype=torch.float64) < rate).nonzero()[:, 0]


def epsilon(*, rate: float, noise_multiplier: float, steps: int, delta: float = 1e-5) -> float:
    """Return the epsilon of `steps` private gradients at `delta`, for data sets that differ by one added example.

    The package dp-accounting computes it from the privacy loss distribution of the Poisson-sampled Gaussian mechanism.

    Args:
        rate: probability of each example in `poisson_sample`.

    Raises:
        MissingAccountantError: without dp-accounting.

    Source: arXiv 1607.00133; Koskela et al. (arXiv 1906.03049) for the accounting.
    """
    if noise_multiplier == 0 and steps:
        return math.inf
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld
    except ModuleNotFoundError as error:
        text = "an epsilon needs dp-accounting: pip install 'nfzoo[private]'"
        raise MissingAccountantError(text, name="dp_accounting") from error
    accountant = pld.PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), steps)
    return accountant.get_epsilon(delta)


# ---------------------------------------------------------------- the example


class PrivateRun(NamedTuple):
    """Held-out accuracy in [0, 1], and the parameters."""

    accuracy: float
    params: Params


def digits(cfg: ModelConfig, part: Digits) -> tuple[Tensor, Tensor]:
    """Return all images of a part as inputs of `nfnet-test`, `(N, in_channels, S, S)`, and labels `(N,)`."""
    preprocessing = variant(MODEL).preprocessing.for_channels(cfg.in_channels)
    mode = "L" if cfg.in_channels == 1 else "RGB"
    images = [evaluation_transform(part[i][0].convert(mode), preprocessing) for i in range(len(part))]
    return torch.stack(images), torch.from_numpy(np.asarray(part.labels)).long()


def train_privately(
    cfg: ModelConfig,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch: float,
    clip_norm: float,
    noise_multiplier: float,
    lr: float,
    seed: int,
    ema_decay: float | None = None,
    chunk: int = 32,
    report: Callable[[int], None] | None = None,
) -> PrivateRun:
    """Train from scratch with private gradients and momentum 0.9.

    Args:
        batch: examples in a Poisson-sampled batch on average.
        ema_decay: return a moving average of the parameters, as `nfzoo.optim.sgd.ema` defines it, instead of the last
            ones. It averages the noise of many steps, and costs no privacy.
        report: called after each step with its number, from 1.
    """
    keep_freed_memory()
    generator = torch.Generator().manual_seed(seed)
    params = init(cfg, generator=generator)
    state, average = sgd_init(params), params
    images, labels = train
    rate = batch / len(images)

    def loss_fn(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(apply(cfg, params, x[None]), y[None])

    for step in range(1, steps + 1):
        chosen = poisson_sample(len(images), rate, generator)
        grads = private_gradient(
            loss_fn,
            params,
            (images[chosen], labels[chosen]),
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            expected_batch=batch,
            generator=generator,
            chunk=chunk,
        )
        params, state = sgd(params, grads, state, lr=lr)
        average = params if ema_decay is None else ema(average, params, step - 1, decay=ema_decay)
        if report is not None:
            report(step)
    with torch.no_grad():
        accuracy = float((apply(cfg, average, held_out[0]).argmax(1) == held_out[1]).float().mean())
    return PrivateRun(accuracy, average)


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="python -m nfzoo.dp",
        description="Train nfnet-test on the embedded digits with differentially private SGD.",
    )
    parser.add_argument("--steps", type=program.positive_int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    parser.add_argument(
        "--batch", type=_positive, default=BATCH, metavar="N", help=f"mean size of a batch (default: {BATCH:g})"
    )
    parser.add_argument(
        "--noise",
        type=_positive,
        default=NOISE,
        metavar="S",
        help=f"standard deviation of the noise as a multiple of the clipping norm (default: {NOISE:g})",
    )
    parser.add_argument(
        "--clip-norm", type=_positive, default=CLIP_NORM, metavar="C", help=f"largest L2 norm (default: {CLIP_NORM:g})"
    )
    parser.add_argument("--lr", type=_positive, default=LR, metavar="X", help=f"learning rate (default: {LR:g})")
    text = "decay of a moving average of the weights, which is tested in their place (default: none)"
    parser.add_argument("--ema-decay", type=_probability, metavar="X", help=text)
    parser.add_argument("--delta", type=_probability, default=1e-5, metavar="D", help="default: 1e-5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and noise (default: 0)")
    return parser


def _positive(text: str) -> float:
    value = float(text)  # argparse reports a ValueError
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _probability(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    """Train, and print accuracy and privacy: 0 when done, 2 for bad input."""
    return program.run("nfzoo.dp", lambda: _main(_parser().parse_args(argv)))


def _main(options: argparse.Namespace) -> None:
    cfg = variant(MODEL).config.replace(in_channels=1)
    split = open_split(DIGITS)
    assert isinstance(split.train, Digits)
    assert isinstance(split.validation, Digits)
    train, held_out = digits(cfg, split.train), digits(cfg, split.validation)
    count = len(train[0])
    if options.batch > count:
        raise ConfigError(f"batches of {options.batch:g} cannot be drawn from {count} images")
    rate = options.batch / count
    spent = epsilon(rate=rate, noise_multiplier=options.noise, steps=options.steps, delta=options.delta)

    def report(step: int) -> None:
        if step % 10 == 0 or step == options.steps:
            print(f"step {step} of {options.steps}", flush=True)

    result = train_privately(
        cfg,
        train,
        held_out,
        steps=options.steps,
        batch=options.batch,
        clip_norm=options.clip_norm,
        noise_multiplier=options.noise,
        lr=options.lr,
        seed=options.seed,
        ema_decay=options.ema_decay,
        report=report,
    )
    print(f"\n{MODEL} reads {result.accuracy:.1%} of {len(held_out[0])} held-out digits")
    print(
        f"it is ({spent:.2f}, {options.delta:g})-differentially private towards each of the {count} training digits\n"
        f"(one digit added or gone; {options.steps} steps, each digit in each with probability {rate:.3g}, "
        f"noise multiplier {options.noise:g})"
    )


if __name__ == "__main__":
    sys.exit(main())
