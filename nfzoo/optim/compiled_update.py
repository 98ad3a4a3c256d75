"""Compile the whole update of a kernel for the CPU: AGC, weight decay, Nesterov momentum, moving average in one pass.

It is what `agc`, `sgd` and `ema` state as formulas, in one graph for kernels of all shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from nfzoo.optim.clipping import clip_unitwise
from nfzoo.optim.sgd import SGDState, sgd
from nfzoo.runtime.compile import compile_of_any_shape


@functools.lru_cache(maxsize=64)
def compiled_update(
    clip: float | None, eps: float, momentum: float, nesterov: bool, weight_decay: float
) -> Callable[..., Tensor | None]:
    """Compile the whole update of one kernel `(out, fan_in)` to one graph."""
    # As text: Dynamo turns numbers into inputs, which compiled code would load and convert for every element.
    limit = None if clip is None else repr(float(clip))
    floor, keep, decay = (repr(float(value)) for value in (eps, momentum, weight_decay))

    def update(
        p: Tensor,
        grad: Tensor,
        m: Tensor,
        average: Tensor | None,
        lr: Tensor,
        weight: Tensor | None,
    ) -> Tensor | None:
        mask = None
        if limit is not None:
            grad, mask = clip_unitwise(grad, p, clip=float(limit), eps=float(floor))
        new, state = sgd(
            {"p": p},
            {"p": grad},
            SGDState({"p": m}),
            lr=lr,
            momentum=float(keep),
            nesterov=nesterov,
            weight_decay=float(decay),
        )
        new_p, new_m = new["p"], state.momentum["p"]
        p.copy_(new_p)
        m.copy_(new_m)
        if average is not None and weight is not None:
            average.copy_(average + weight * (new_p - average))
        return mask  # counted by the caller, as inductor fails on a sum beside in-place updates

    return compile_of_any_shape(update)


def is_matrix(*tensors: Tensor | None) -> bool:
    """Return whether `compiled_update` can see the rows of a parameter, and of all that belongs to it, as a matrix."""
    return all(t is None or (t.ndim > 1 and t.is_contiguous()) for t in tensors)
