"""Sharpness-aware minimisation: the gradient is taken where the loss nearby is highest.

Source: Foret et al. 2021, arXiv 2010.01412, equation 2; arXiv 2102.06171, section 5, for NFNet-F6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nfzoo.torch_internals import foreach
from nfzoo.types import Params

RHO = 0.05
"""The radius that NFNet-F6 was trained with. Source: arXiv 2102.06171, section 5."""

FRACTION = 0.2
"""The part of each replica's batch that finds the ascent. Source: arXiv 2102.06171, section 5."""

NORM_FLOOR = 1e-12  # keeps the division finite where the gradient vanishes


def sam_ascent(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], *, rho: float = RHO) -> Params:
    """Return where SAM takes its gradient: `p + rho * g / |g|`, with one norm over all of `grads`.

    Args:
        params: the parameters; those without a gradient stay.
        grads: gradients of the loss on a part of the batch.
        rho: radius of the ascent, in units of the parameters.

    Source: arXiv 2010.01412, equation 2; arXiv 2102.06171 takes rho 0.05 and the gradient of a fifth of each replica's
    batch.
    """
    scale = _scale(list(grads.values()), rho)
    return {name: p + scale * grads[name] if name in grads else p for name, p in params.items()}


@torch.no_grad()
def sam_ascent_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rho: float = RHO) -> list[Tensor]:
    """Ascend in place as `sam_ascent` does; return the values before it, to go back with `restore_`."""
    before = [p.clone() for p in params]
    scale = _scale(grads, rho)
    foreach._foreach_add_(list(params), foreach._foreach_mul(list(grads), scale))
    return before


@torch.no_grad()
def restore_(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Undo `sam_ascent_`, to the bit."""
    foreach._foreach_copy_(list(params), list(before))


def _scale(grads: Sequence[Tensor], rho: float) -> Tensor:
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
    return rho / norm.clamp(min=NORM_FLOOR)


def ascent_rows(rows: int, fraction: float) -> int:
    """Return how many of a batch's rows find the ascent, one at least."""
    return max(1, min(rows, round(rows * fraction)))
