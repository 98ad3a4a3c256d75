"""Count the units that AGC clipped, of all parameters together and of kinds of them, without a pass or a wait more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.runtime.distributed import sum_over


class Tally(NamedTuple):
    """Units that a part of an update clipped.

    Attributes:
        entries: `(n,)` booleans or whole numbers, such as the mask of the units: what was clipped of each entry.
        owners: the parameters that the entries are of, each with the number of its entries, in their order.
        units: number of units of all owners.
    """

    entries: Tensor
    owners: Sequence[tuple[Tensor, int]]
    units: int


def tally_masks(masks: Sequence[Tensor], params: Sequence[Tensor]) -> Tally:
    """Return the tally of one mask of clipped units for each parameter."""
    flat = [mask.flatten() for mask in masks]
    owners = [(p, len(mask)) for p, mask in zip(params, flat, strict=True)]
    return Tally(torch.cat(flat), owners, sum(map(len, flat)))


def tally_shards(
    masks: Sequence[Tensor], params: Sequence[Any], spread: Sequence[tuple[bool, ...]], units: int
) -> Tally:
    """Return the tally of parameters that are `DTensor`s; all processes call this.

    Args:
        masks: of the units that this process holds, `(n,)`.
        spread: for each dimension of the parameter's mesh, whether its processes hold other units.
        units: number of units of all parameters, over all processes.
    """
    alike: dict[Any, list[int]] = {}
    for i, (p, dimensions) in enumerate(zip(params, spread, strict=True)):
        alike.setdefault((p.device_mesh, dimensions), []).append(i)
    counts, owners = [], []
    for (mesh, dimensions), some in alike.items():
        counts.append(sum_over(torch.stack([masks[i].sum() for i in some]), mesh, dimensions))
        owners += [(params[i], 1) for i in some]
    return Tally(torch.cat(counts), owners, units)


def total(tallies: Sequence[Tally]) -> Tensor:
    """Return the number of clipped units of all tallies, of which there is one at least, 0-dimensional."""
    return _joined(tallies).sum()


def _joined(tallies: Sequence[Tally]) -> Tensor:
    device = tallies[0].entries.device
    return torch.cat([tally.entries.to(device) for tally in tallies])


class KindCounter:
    """Count the clipped units of each kind of parameter.

    Args:
        kinds: the kind of each parameter, a number from 0 on.
        units: the number of units of each parameter.
    """

    def __init__(self, kinds: Mapping[Tensor, int], units: Mapping[Tensor, int]) -> None:
        self._kinds, self._units = dict(kinds), dict(units)
        self._count = 1 + max(kinds.values(), default=0)
        self._prepared: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, tallies: Sequence[Tally]) -> Tensor:
        """Return the fraction of each kind's units that was clipped, `(kinds,)`, float32; 0 where there are none."""
        entries = _joined(tallies)
        index, units = self._index(tallies, entries.device)
        counts = torch.zeros(self._count, device=entries.device).index_add_(0, index, entries.float())
        return counts / units

    def _index(self, tallies: Sequence[Tally], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the kind of each entry, and the units of each kind; kept on the device, as a copy would hold it up."""
        key = (device, *((id(p), entries) for tally in tallies for p, entries in tally.owners))
        if key not in self._prepared:
            self._prepared.clear()
            owners = [owner for tally in tallies for owner in tally.owners]
            kinds = torch.tensor([self._kinds[p] for p, _ in owners])
            units = torch.zeros(self._count)
            units.index_add_(0, kinds, torch.tensor([float(self._units[p]) for p, _ in owners]))
            index = kinds.repeat_interleave(torch.tensor([entries for _, entries in owners]))
            self._prepared[key] = index.to(device), units.clamp(min=1).to(device)
        return self._prepared[key]
