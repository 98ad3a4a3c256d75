"""Count the units that AGC clipped, of all parameters together and of kinds of them, without a pass or a wait more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.runtime.distributed import full_tensor, is_dtensor


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
    """Return the tally of one mask of clipped units for each parameter; all processes call this for `DTensor`s.

    Masks that are `DTensor`s are counted over all processes, with one reduction for those of one placement.
    """
    units = sum(mask.numel() for mask in masks)
    if not is_dtensor(masks[0]):
        flat = [mask.flatten() for mask in masks]
        return Tally(torch.cat(flat), [(p, len(mask)) for p, mask in zip(params, flat, strict=True)], units)
    from torch.distributed.tensor import DTensor

    kinds: dict[Any, list[tuple[Tensor, Any]]] = {}
    for p, mask in zip(params, masks, strict=True):
        count: Any = mask.sum()
        kinds.setdefault((count.device_mesh, count.placements), []).append((p, count))
    counts, owners = [], []
    for (mesh, placements), some in kinds.items():
        local = torch.stack([count.to_local() for _, count in some])
        counts.append(full_tensor(DTensor.from_local(local, mesh, placements)))
        owners += [(p, 1) for p, _ in some]
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
