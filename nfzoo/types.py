"""Types that all modules share: parameters, noise, parameter specifications, blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Flat parameters: dotted key -> tensor. The keys are those of `state_dict` and of the safetensors file."""

Noise: TypeAlias = Mapping[str, Tensor]
"""Block name -> keep mask, already scaled. Absent or `None` means evaluation."""

Kind: TypeAlias = Literal["weight", "gain", "bias", "skip_gain", "head"]
"""Kind of a parameter, for the optimizer. `head` is the classifier's weight, which AGC does not clip."""


class Init(Protocol):
    """Function that draws the initial value of one parameter."""

    def __call__(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Tensor: ...


class ParamSpec(NamedTuple):
    """Shape, initial distribution and kind of one parameter.

    Vectors are `(out,)`, scalars `(1,)`, kernels `(out, in / groups, height, width)`, linears `(out, in)`.
    """

    shape: tuple[int, ...]
    init: Init
    kind: Kind


Specs: TypeAlias = dict[str, ParamSpec]


class Drop(NamedTuple):
    """Distribution of a block's keep mask: Bernoulli(1 - rate) of shape `(batch, *shape)`, times `scale`."""

    rate: float
    shape: tuple[int, ...]
    scale: float


BlockFn: TypeAlias = "Callable[[Mapping[str, Tensor], Tensor, float | Tensor, Tensor | None], Tensor]"
"""`fn(params, x, beta, keep) -> y`, with the block's own parameters under their local names."""

BranchFn: TypeAlias = "Callable[[Mapping[str, Tensor], Tensor, float | Tensor], tuple[Tensor, Tensor]]"
"""`branches(params, x, beta) -> (shortcut, residual)`, before stochastic depth, skip gain and alpha."""


class Block(NamedTuple):
    """One step of a plan: a pure function and the parameters it needs.

    `beta` is the only number in which the blocks of one shape differ, so it is an argument and not part of `fn`: blocks
    with equal `fn` share one compiled graph. `feature` marks the blocks whose output `features` returns.
    """

    name: str
    fn: BlockFn
    specs: Specs
    beta: float = 1.0
    drop: Drop | None = None
    branches: BranchFn | None = None
    feature: bool = False


Plan: TypeAlias = tuple[Block, ...]
