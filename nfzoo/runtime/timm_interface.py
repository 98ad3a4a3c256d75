"""A model's interface under the names of timm 1.0: features, intermediate maps, classifier, parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from nfzoo import model as functional_model
from nfzoo.config import ModelConfig, Preprocessing, is_int
from nfzoo.errors import ConfigError
from nfzoo.models import functional as nf
from nfzoo.models.folded import FoldedConv, unfused
from nfzoo.models.layers import classifier
from nfzoo.runtime.block_module import BlockModule, check_input
from nfzoo.types import Noise, Plan

fx.wrap("check_input")


class FeatureInfo(list[dict[str, Any]]):
    """The maps of `forward_intermediates`: for each `num_chs`, `reduction` (stride) and `module`, its block's name."""

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return `key` of one map, or a list of it for several, or for all."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the maps' numbers of channels."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the maps' strides in pixels of the image."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the names of the blocks that return the maps."""
        return self.get("module", idx)


class TimmInterface(nn.Module):
    """The methods of timm's models that are not torch's own; `NFNet` is the model."""

    config: ModelConfig
    preprocessing: Preprocessing
    plan: Plan
    name: str | None
    _blocks: Callable[[], list[Callable[..., Tensor]]]
    checkpoint_blocks: Callable[..., Any]

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 if there is none."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.feature_info.channels(-1)

    @property
    def head_hidden_size(self) -> int:
        """Inputs of the classifier."""
        return self.num_features

    @property
    def feature_info(self) -> FeatureInfo:
        """The maps of `forward_intermediates`."""
        return feature_info(self.config)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Input size, normalisation, the names of first convolution and classifier, and the name in timm's registry."""
        architecture = None if self.name is None else timm_name(self.name)
        return {"architecture": architecture, **pretrained_cfg(self.config, self.preprocessing)}

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same as `pretrained_cfg`."""
        return self.pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map `(N, num_features, H, W)`, after the final convolution and activation.

        `forward_head(forward_features(x))` is `forward(x)`. In training mode both draw their noise.
        """
        check_input(x, self.config.in_channels)
        noise = self._noise(self.plan[:-2], x)
        for block, run in zip(self.plan[:-2], self._blocks(), strict=False):
            x = run(x, noise.get(block.name))
        return self._activated(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits `(N, num_classes)` of a map of `forward_features`; with `pre_logits` the classifier's input."""
        x = nf.global_mean(x) if self._pool() else self.get_submodule("pool")(x)
        keep = self._noise(self.plan[-1:], x).get("head")
        return classifier({}, x, 1.0, keep) if pre_logits else self._blocks()[-1](x, keep)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the result of `forward_features`, and intermediate maps before their activations.

        The maps are timm's, which `feature_info` lists: the stem's, then each stage's, the last after the final
        convolution if there is one. Those of `features` differ in the last, which is the last stage's.

        Args:
            x: normalised images `(N, in_channels, H, W)`.
            indices: the last n maps, or the indices of maps, which come in the network's order; all by default.
            norm: has no effect, as there is no final normalisation.
            stop_early: compute nothing after the last of these maps, and return it in place of `forward_features`,
                unless it is the network's last.
            output_fmt: `"NCHW"`.
            intermediates_only: return the maps alone.

        Raises:
            ConfigError: for indices out of range, or another `output_fmt`.
        """
        check_input(x, self.config.in_channels)
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        names = self.feature_info.module_name()
        wanted = [names[i] for i in take_indices(len(names), indices)]
        noise, maps = self._noise(self.plan[:-2], x), []
        *before, last = zip(self.plan[:-2], self._blocks(), strict=False)
        for block, run in before:
            x = run(x, noise.get(block.name))
            if block.name in wanted:
                maps.append(x[0] if isinstance(x, tuple) else x)  # compiled folded blocks pass pairs
                if block.name == wanted[-1] and (stop_early or intermediates_only):
                    return maps if intermediates_only else (maps[-1], maps)
        block, run = last
        pool = self._pool()
        if isinstance(run, BlockModule) and isinstance(run.block.fn, FoldedConv) and pool:
            # Its activation is folded into it, and the map is the one before.
            plain, activated = unfused(run.block.fn, pool)
            x = plain(run.parameter_dict(), x, block.beta, None)
            final = activated(x)
        else:
            x = run(x, noise.get(block.name))
            final = self._activated(x)
        maps += [x] if block.name in wanted else []
        return maps if intermediates_only else (final, maps)

    def _noise(self, blocks: Plan, x: Tensor) -> Noise:
        if not self.training:
            return {}
        return functional_model.sample_masks(blocks, x.shape[0], device=x.device, dtype=x.dtype)

    def _pool(self) -> Any:
        """Return the function of the pool, `None` if another module stands in its place."""
        pool = self.get_submodule("pool")
        return pool.block.fn if isinstance(pool, BlockModule) else None

    def _activated(self, x: Tensor) -> Tensor:
        pool = self._pool()
        return pool.activated(x) if pool else x

    def get_classifier(self) -> nn.Module:
        """Return the classifier, a linear layer, or an identity if there is none."""
        head = self.get_submodule("head")
        return nn.Identity() if isinstance(head, BlockModule) and not self.num_classes else head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into groups in the network's order: by block, or by stage if `coarse`."""
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^final_conv", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do as `checkpoint_blocks`."""
        self.checkpoint_blocks(enabled=enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves out: gains, biases, skip gains."""
        kinds = functional_model.specs(self.config).items()
        return {name for name, (_, kind) in kinds if kind in ("gain", "bias", "skip_gain")}


def timm_name(name: str) -> str:
    """Return the name under which `nfzoo.integrations.timm` registers a model of the zoo: `nfzoo_nfnet_f0`."""
    return "nfzoo_" + name.replace("-", "_")


def feature_info(cfg: ModelConfig) -> FeatureInfo:
    """Return the maps of timm's `forward_intermediates`: see `TimmInterface`."""
    blocks = functional_model.plan(cfg)[:-2]
    tapped = [block for block in blocks if block.feature]
    tapped[-1] = blocks[-1]  # the final convolution, if there is one
    return FeatureInfo(
        {
            "num_chs": (block.specs.get("conv2.bias") or block.specs["bias"]).shape[0],
            "reduction": min(2 << i, cfg.output_stride),
            "module": block.name,
        }
        for i, block in enumerate(tapped)
    )


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return indices of `count` maps in ascending order: of the last n, of a sequence, or of all.

    Raises:
        ConfigError: if there are no such maps.
    """
    if indices is None:
        indices = count
    if is_int(indices, 1, count):
        return list(range(count - indices, count))
    if isinstance(indices, Sequence) and len(indices) and all(is_int(i, -count, count - 1) for i in indices):
        return sorted({i % count for i in indices})
    raise ConfigError(
        f"indices of maps must be from {-count} to {count - 1}, or a number of last maps from 1 to {count}; not "
        f"{indices!r}"
    )


def check_global_pool(global_pool: str | None) -> None:
    """Raise a `ConfigError` for a pooling that the network does not have."""
    if global_pool not in (None, "avg"):
        way_out = "; for maps that are not pooled, use forward_features" if global_pool == "" else ""
        raise ConfigError(f"global_pool must be 'avg', not {global_pool!r}{way_out}")


def pretrained_cfg(cfg: ModelConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return what timm's `pretrained_cfg` says of input and preprocessing, with the names of nfzoo's layers.

    Source: timm 1.0, data/config.py (`resolve_data_config`).
    """
    train, test = preprocessing.train_size, preprocessing.test_size
    squash = preprocessing.resize == "deepmind"
    # timm resizes to floor(size / crop_pct); rounded up, the crop would lose a pixel.
    crop = math.floor(1e6 * test / (test + preprocessing.margin)) / 1e6 if squash else preprocessing.crop
    return {
        "input_size": (cfg.in_channels, train, train),
        "test_input_size": (cfg.in_channels, test, test),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": crop,
        **({} if squash else {"test_crop_pct": crop}),
        "crop_mode": "squash" if squash else "center",
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "num_classes": cfg.num_classes,
        "pool_size": (-(-train // cfg.output_stride),) * 2,
        "first_conv": functional_model.plan(cfg)[0].name,
        "classifier": "head",
    }
