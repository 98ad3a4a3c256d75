"""The papers' optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfzoo.optim.clipping import CLIP, EPS, check_clip, clip_all, clip_dtensors, mask_owners, unit_shape
from nfzoo.optim.compiled_update import compiled_update, is_matrix
from nfzoo.optim.counting import KindCounter, Tally, tally_masks, total
from nfzoo.optim.options import OPTIONS, check_options, check_state
from nfzoo.optim.parameters import kinds_by_parameter
from nfzoo.optim.sgd import CLIPPED, DECAYED, MOMENTUM, WEIGHT_DECAY, ema_, ema_decay, sgd_
from nfzoo.runtime.distributed import is_dtensor, local_tensor
from nfzoo.types import Params

IN_CACHE = 1 << 17  # numbers of kernels that a CPU updates together; with gradient, momentum and average 2 MiB
MAX_PREPARED = 64  # lists of parameters for which an optimizer keeps what `triton_update` prepares


class AGCSGD(torch.optim.Optimizer):
    """AGC, then weight decay, then Nesterov SGD: the papers' optimizer.

    A shell over `nfzoo.agc` and `nfzoo.optim.sgd.sgd`.

    Args:
        params: parameters or groups; `param_groups(model)` gives the papers' groups.
        lr: learning rate; the papers' is 0.1 * batch / 256.
        momentum, nesterov, weight_decay: of SGD.
        clip: AGC threshold, `None` for no clipping; a group option.
        eps: floor of the parameter norm in AGC.
        ema_decay: keep a moving average of the parameters, as `nfzoo.optim.sgd.ema` defines it: see `averages`. It
            counts the steps in each group's `"steps"`, a number or a 0-dimensional tensor, which may be set.
        compiled: compile the update: on CUDA devices, with Triton, to a few kernels for all parameters
            (`nfzoo.optim.triton_update`), elsewhere to a graph for kernels of all shapes.

    Attributes:
        clipped_fraction: fraction of the units that the last step clipped, a tensor; `None` before the first, and
            after a step on a CPU that the gate shut out.
        count_kinds: a counter of kinds of parameters, or `None`. Set it to have `clipped_kinds` counted.
        clipped_kinds: fraction of the units of each kind that the last step clipped, `(kinds,)`; `None` where
            `clipped_fraction` is, and without a counter.
        gate: a 0-dimensional boolean tensor on the parameters' device, or `None`. Set it before `step`. Where it is
            false nothing changes, and the host does not wait. `norm.isfinite()` of the gradients' norm skips broken
            steps.

    Raises:
        ValueError: for a learning rate, momentum or decay that is negative or no number, or a clip or eps that is not
            positive; by `step`, for a gate of another kind.
    """

    gate: Tensor | None = None
    clipped_fraction: Tensor | None = None
    count_kinds: KindCounter | None = None
    clipped_kinds: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip: float | None = CLIP,
        eps: float = EPS,
        ema_decay: float | None = None,
        compiled: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clip": clip,
            "eps": eps,
            "ema_decay": ema_decay,
            "compiled": compiled,
            "steps": 0,
        }
        super().__init__(params, defaults)
        self._fused: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "gate": self.gate,
            "clipped_fraction": self.clipped_fraction,
            "clipped_kinds": self.clipped_kinds,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused = {}
        for group in self.param_groups:  # pickled before all options were there
            for name, value in {**OPTIONS, **self.defaults}.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `AGCSGD` or of `torch.optim.SGD`.

        Options that its groups lack stay those of this optimizer's groups; SGD's lack all that concerns AGC and
        averages.

        Raises:
            ValueError: for a state of another optimizer, one of SGD with `maximize` or `dampening`, or bad options.
        """
        check_state(state_dict)
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):  # otherwise torch refuses it
            own = [{name: group[name] for name in ("lr", *OPTIONS)} for group in self.param_groups]
            saved = [{**ours, **theirs} for ours, theirs in zip(own, saved, strict=True)]
            for group in saved:
                check_options(group)
        state = {
            key: {name: value for name, value in values.items() if value is not None}  # SGD without momentum
            for key, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state, "param_groups": saved})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip, decay, and take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.gate is not None and (self.gate.dtype != torch.bool or self.gate.ndim):
            raise ValueError(f"the gate must be a boolean tensor without dimensions, not {self.gate!r}")
        for group in self.param_groups:
            group["steps"] = group["steps"] + 1  # not in place, as a tensor may be the caller's
        gate = self.gate
        if gate is not None and gate.device.type == "cpu" and not torch.compiler.is_compiling():
            # The host reads it at no cost, and saves two passes over parameters and momenta.
            if not gate:
                self.clipped_fraction = self.clipped_kinds = None
                return loss
            gate = None
        tallies: list[Tally] = []
        for group in self.param_groups:
            for bundle in self._bundles(group):
                tallies += [tally for tally in self._update(group, bundle, gate) if tally is not None]
        self.clipped_fraction = total(tallies) / sum(tally.units for tally in tallies) if tallies else None
        self.clipped_kinds = self.count_kinds(tallies) if tallies and self.count_kinds is not None else None
        return loss

    def averages(self, named: Mapping[str, Tensor]) -> Params:
        """Return the moving averages of named parameters, such as `dict(model.named_parameters())`; not copied.

        A parameter that was never updated is its own average.

        Raises:
            ValueError: if the optimizer keeps no averages.
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise ValueError("this optimizer keeps no moving average; pass ema_decay")
        return {name: self.state.get(p, {}).get("ema", p.detach()) for name, p in named.items()}

    def init_state(self) -> None:
        """Create momenta and averages of all parameters, instead of at each parameter's first step."""
        for group in self.param_groups:
            for p in group["params"]:
                self._init(group, p)

    def _init(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        if group["ema_decay"] is not None and "ema" not in state:
            state["ema"] = p.detach().clone()

    def _bundles(self, group: dict[str, Any]) -> Iterable[list[Tensor]]:
        """Return the group's parameters that have gradients, in lists of one device and dtype, sharded ones apart.

        On a CPU kernels go in lists of `IN_CACHE` numbers: long ones would leave the cache between two passes.
        """
        bundles: dict[tuple[Any, ...], list[Tensor]] = {}
        number = filled = 0  # of the list that the next kernel goes to, and the numbers in it
        for p in group["params"]:
            if p.grad is not None:
                part = 0
                if p.device.type == "cpu" and p.ndim > 1 and not group["compiled"]:
                    if filled + p.numel() > IN_CACHE:
                        number, filled = number + 1, 0
                    part, filled = number + 1, filled + p.numel()
                bundles.setdefault((p.device, p.dtype, p.grad.dtype, is_dtensor(p), part), []).append(p)
                self._init(group, p)
        return bundles.values()

    def _update(self, group: dict[str, Any], params: list[Tensor], gate: Tensor | None) -> list[Tally | None]:
        """Update one bundle in parts. Return the units of each part that were clipped; `None` without clipping."""
        eager = functools.partial(self._update_eager, gate=gate)
        if not group["compiled"] or is_dtensor(params[0]):
            return [eager(group, params)]
        if has_fused(params[0].device):
            takes, update = _rowwise, functools.partial(self._update_fused, gate=gate)
        elif gate is None:
            takes, update = is_matrix, self._update_compiled
        else:
            return [eager(group, params)]
        chosen = [p for p in params if takes(p, p.grad, *self.state[p].values())]
        kept = set(chosen)
        rest = [p for p in params if p not in kept]
        return [run(group, some) for run, some in ((update, chosen), (eager, rest)) if some]

    def _update_eager(self, group: dict[str, Any], params: list[Tensor], gate: Tensor | None) -> Tally | None:
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if sharded := is_dtensor(params[0]):
            grads = [g.redistribute(placements=p.placements) for g, p in zip(grads, params, strict=True)]  # type: ignore[attr-defined]
        tally = None
        if group["clip"] is not None:
            limits = {"clip": group["clip"], "eps": group["eps"]}
            if sharded:
                grads, tally = clip_dtensors(grads, params, **limits)
            else:
                grads, mask = clip_all(grads, params, **limits)
                tally = Tally(mask, mask_owners(params), len(mask))
        # Of `DTensor`s each process updates what it holds, as operations on `DTensor`s take the host far longer.
        live = [local_tensor(p) for p in params]
        sgd_(
            live,
            [local_tensor(grad) for grad in grads],
            [local_tensor(self.state[p]["momentum_buffer"]) for p in params],
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            gate=gate,
            overwrite=group["clip"] is not None,
        )
        if group["ema_decay"] is not None:
            average = {str(i): local_tensor(self.state[p]["ema"]) for i, p in enumerate(params)}
            named = {str(i): p for i, p in enumerate(live)}
            ema_(average, named, group["steps"] - 1, decay=group["ema_decay"], gate=gate)
        if sharded:  # autograd does not know that what they hold has changed
            torch.autograd.graph.increment_version(params)
        return tally

    def _update_fused(self, group: dict[str, Any], params: list[Tensor], gate: Tensor | None) -> Tally | None:
        """Update one bundle in a few Triton kernels."""
        from nfzoo.optim.triton_update import FusedUpdate

        key = (params[0].device, tuple(p.shape for p in params))
        if key not in self._fused:
            while len(self._fused) >= MAX_PREPARED:  # if the parameters with gradients change from step to step
                self._fused.pop(next(iter(self._fused)))
            self._fused[key] = FusedUpdate(params)
        fused = self._fused[key]
        lr, weight = self._numbers(group, params[0].device)
        counts = fused(
            params,
            [p.grad for p in params],
            [self.state[p]["momentum_buffer"] for p in params],
            None if weight is None else [self.state[p]["ema"] for p in params],
            lr=lr,
            weight=weight,
            gate=gate,
            **{name: group[name] for name in ("clip", "eps", "momentum", "nesterov", "weight_decay")},
        )
        if counts is None:
            return None
        return Tally(counts, [(params[i], tiles) for i, tiles in fused.owners], fused.units)

    def _update_compiled(self, group: dict[str, Any], params: list[Tensor]) -> Tally | None:
        """Update kernels and linears by one graph for all shapes: see `compile_of_any_shape`."""
        constants = (group["clip"], group["eps"], group["momentum"], group["nesterov"], group["weight_decay"])
        update = compiled_update(*constants)
        lr, weight = self._numbers(group, params[0].device)
        masks = []
        for p in params:
            m, average = self.state[p]["momentum_buffer"], self.state[p].get("ema")
            rows = (None if t is None else t.view(unit_shape(p.shape)) for t in (p, p.grad, m, average))
            masks.append(update(*rows, lr, weight))
            # The compiled function writes without autograd's knowledge.
            torch.autograd.graph.increment_version([t for t in (p, m, average) if t is not None])
        return None if group["clip"] is None else tally_masks(masks, params)

    def _numbers(self, group: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the learning rate, and the share of the new parameters in the moving average, on the device."""
        decay = group["ema_decay"]
        weight = None if decay is None else _number(1 - ema_decay(group["steps"] - 1, decay), device)
        return _number(group["lr"], device), weight


def can_compile(device: torch.device) -> bool:
    """Return whether `AGCSGD(compiled=True)` runs on a device: a CPU, or where `triton_update` does."""
    return device.type == "cpu" or has_fused(device)


@functools.cache
def has_fused(device: torch.device) -> bool:
    """Return whether `triton_update` runs on a device: CUDA, where torch's compiler brings Triton."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _rowwise(*tensors: Tensor | None) -> bool:
    """Return whether `_update_fused` takes these: float32, one memory layout for all, units one after another in it."""
    present = [t for t in tensors if t is not None]
    if not all(t.dtype == torch.float32 and t.numel() for t in present):
        return False
    if all(t.is_contiguous() for t in present):
        return True
    return present[0].ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in present)


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, device=device, dtype=torch.float32)


def param_groups(
    model: nn.Module, *, weight_decay: float = WEIGHT_DECAY, clip: float | None = CLIP
) -> list[dict[str, Any]]:
    """Return the papers' groups: no decay of gains, biases and skip gains, no clipping of the classifier's weight.

    Zoo models are found inside wrappers and other modules, also several. Parameters outside of them follow the same
    rule: those of two dimensions or more (kernels, linears) decay, those of one (gains, biases) do not, and all are
    clipped, since nothing tells a classifier from other linears. Parameters in what replaced a model's own classifier
    are not clipped if they have two dimensions or more. Frozen parameters (`requires_grad=False`) are left out.

    Raises:
        ConfigError: if a model is folded for inference.
        ValueError: for a `FullyShardedDataParallel`; use `fully_shard`. For a negative decay, or a clip that is not
            positive.

    Source: arXiv 2102.06171, sections 4.1 and 5.
    """
    if isinstance(weight_decay, str) or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a number that is not negative, not {weight_decay!r}")
    check_clip(1.0 if clip is None else clip, EPS)
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for p, kind in kinds_by_parameter(model).items():
        if p.requires_grad:
            groups.setdefault((kind in DECAYED, kind in CLIPPED), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "clip": clip if clipped else None}
        for (decayed, clipped), params in groups.items()
    ]
