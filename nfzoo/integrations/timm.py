"""nfzoo's models by timm's `create_model`: importing this module registers each model of the zoo as `nfzoo_…`.

    import nfzoo.integrations.timm
    import timm

    model = timm.create_model("nfzoo_nfnet_f0.dm_in1k", pretrained=True)  # an nfzoo.NFNet, with DeepMind's arithmetic
    model = timm.create_model("nfzoo", pretrained=True, pretrained_cfg={"file": "runs/digits"})  # any folder of nfzoo's

timm refuses names with a slash, which it takes for paths, so the prefix ends in an underscore. Versions before 1.0.30
that drop what stands before the slash are refused: `nfzoo/nfnet_f0` would be timm's own model there. Nothing in timm is
changed, and no name of its own is taken.

Source: timm 1.0.31, models/_factory.py and models/_builder.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from nfzoo.config import NOT_THE_ARCHITECTURE, ModelConfig
from nfzoo.errors import CheckpointError, ConfigError, nearest
from nfzoo.files import nearest_path
from nfzoo.hub.pretrained import from_pretrained
from nfzoo.hub.registry import HUB, PUBLIC, repository_of
from nfzoo.nn import NFNet, create
from nfzoo.runtime.timm_interface import check_global_pool, pretrained_cfg, take_indices, timm_name
from nfzoo.variants import VARIANTS

__all__: list[str] = []  # timm adds the names that it registers

ANY = "nfzoo"
"""The name of a model that the files of `pretrained_cfg` describe themselves."""

_OPTIONS = (
    *("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "output_stride"),
    *("features_only", "out_indices", "feature_cls", "device", "dtype"),
)
_SOURCES = {"file", "hf_hub_id", "source", "architecture", "tag"}
_FREE = (*NOT_THE_ARCHITECTURE, "output_stride", "folded")


class FeatureNet(nn.Module):
    """A model that returns feature maps, as timm's `create_model(…, features_only=True)` makes it.

    The maps are those of `forward_intermediates`. What comes after the last of them is not computed, and its parameters
    require no gradients.

    Attributes:
        model: the model, without classifier.
        feature_info: timm's description of the maps: `channels()`, `reduction()`.
    """

    def __init__(self, model: NFNet, out_indices: int | Sequence[int] | None = None) -> None:
        from timm.models import FeatureInfo  # pyright: ignore[reportMissingImports]

        super().__init__()
        maps = [dict(info) for info in model.feature_info]
        self.out_indices = tuple(take_indices(len(maps), out_indices))
        self.feature_info = FeatureInfo(maps, self.out_indices)
        self.model = model
        self.output_fmt = "NCHW"
        self.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ("num_classes", "classifier")}
        self.default_cfg = self.pretrained_cfg
        names = [block.name for block in model.plan]
        for name in names[names.index(maps[self.out_indices[-1]]["module"]) + 1 :]:
            model.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps `(N, C, H, W)` of normalised images, in the network's order."""
        return self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)  # type: ignore[return-value]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do as `NFNet.checkpoint_blocks`."""
        self.model.checkpoint_blocks(enabled=enable)


def create_registered(
    name: str | None,
    *,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    output_stride: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> nn.Module:
    """Return a model for `timm.create_model`, in training mode as timm's are; a folded one has evaluation mode alone.

    Args:
        name: the zoo's name, or `None` for a model that its files describe.
        pretrained: load weights, by `nfzoo.from_pretrained`: those of the name, or those of `pretrained_cfg`.
        pretrained_cfg, pretrained_cfg_overlay: a tag of timm's, or other weights: `file`, a folder or weight file, or
            `hf_hub_id`, a repository, perhaps with `@revision`.
        pretrained_model_args: what timm read of the weights' folder; the folder is read again.
        cache_dir: where downloads are kept.
        num_classes, in_chans: as `num_classes` and `in_channels` of `nfzoo.create` and `nfzoo.from_pretrained`.
        global_pool: `"avg"`.
        drop_rate, drop_path_rate: dropout and stochastic depth; by default the model's own, where timm has none.
        output_stride: 32, 16 or 8.
        features_only: return a `FeatureNet`.
        out_indices: its maps, by default all.
        feature_cls: `"getter"`, the only one of timm's.
        device, dtype: of the parameters.
        others: options that no model here has, which are refused.

    Raises:
        ConfigError: for what cannot be done.
        CheckpointError: for weights that are missing, damaged or of another model.
    """
    registered = ANY if name is None else timm_name(name)
    _check_options(registered, others, features_only, out_indices, feature_cls)
    check_global_pool(global_pool)
    cfg = _resolved(registered, pretrained_cfg, pretrained_cfg_overlay)
    placed = {"device": device, "dtype": dtype}
    changes = {"drop_rate": drop_rate, "stochastic_depth": drop_path_rate, "output_stride": output_stride}
    changes = {key: value for key, value in changes.items() if value is not None}
    classes = 0 if features_only else num_classes
    if pretrained:
        model = _loaded(name, cfg, num_classes=classes, in_channels=in_chans, cache_dir=cache_dir, **placed)
    elif name is None or cfg.source in ("local-dir", "hf-hub"):
        raise ConfigError(
            f"{registered} loads a model that its files describe, with pretrained=True; for random weights give a name "
            f"such as {timm_name('nfnet-f0')}"
        )
    else:
        sizes = {"num_classes": classes, "in_channels": in_chans}
        model = create(name, **{k: v for k, v in sizes.items() if v is not None}, **placed)
    if changes:  # of a network of the same name, also where the stride is another
        params = {key: p.detach() for key, p in model.named_parameters()}
        model = NFNet.from_params(model.description._replace(config=model.config.replace(**changes)), params)
    made = FeatureNet(model, out_indices) if features_only else model
    return made if model.config.folded else made.train()


def _check_options(
    registered: str, others: Mapping[str, Any], features_only: bool, out_indices: Any, feature_cls: Any
) -> None:
    from timm.layers import is_scriptable  # pyright: ignore[reportMissingImports]

    for key in others:
        hint = nearest(key, _OPTIONS)
        raise ConfigError(f"{registered} has no option {key!r}{hint or '; it has ' + ', '.join(_OPTIONS)}")
    if is_scriptable():
        raise ConfigError("models of nfzoo cannot be scripted by torch.jit; use torch.export or torch.compile")
    if not features_only and (out_indices is not None or feature_cls is not None):
        raise ConfigError("out_indices and feature_cls are for features_only=True")
    if feature_cls not in (None, "getter"):
        raise ConfigError(f"feature_cls must be 'getter', not {feature_cls!r}: the network calls its blocks itself")


def _resolved(registered: str, given: Any, overlay: Mapping[str, Any] | None) -> Any:
    """Return timm's record of the weights; refuse what says more than where they lie, as nothing would act on it."""
    from timm.models import PretrainedCfg, resolve_pretrained_cfg  # pyright: ignore[reportMissingImports]

    fields = given
    if isinstance(given, PretrainedCfg):
        standard = PretrainedCfg().to_dict()
        fields = {key: value for key, value in given.to_dict().items() if standard.get(key) != value}
    cfg = resolve_pretrained_cfg(registered, fields, dict(overlay or {}))
    own = resolve_pretrained_cfg(registered).to_dict()
    stated = dict(overlay or {})
    if isinstance(fields, Mapping) and fields.get("source") not in ("local-dir", "hf-hub"):
        stated |= {key: value for key, value in fields.items() if _plain(value) != _plain(own.get(key))}
    for key in sorted(stated.keys() - _SOURCES):
        raise ConfigError(
            f"pretrained_cfg says {key}={stated[key]!r}, which nfzoo reads from the folder of the weights; give `file` "
            "or `hf_hub_id` alone, and change model.preprocessing after loading"
        )
    return cfg


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _loaded(name: str | None, cfg: Any, **options: Any) -> NFNet:
    if cfg.source == "hf-hub" or (cfg.hf_hub_id and not cfg.file):
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        source, options = HUB + repo_id, {**options, "revision": revision or None}
    elif cfg.file:
        source = cfg.file
        if not os.path.exists(source):
            raise CheckpointError(f"there is no file or folder {source!r}{nearest_path(source)}")
    elif name is None:
        raise ConfigError(f"{ANY} needs pretrained_cfg={{'file': FOLDER}} or {{'hf_hub_id': 'ORG/NAME'}}")
    else:
        repository_of(name)  # says what can be done about a name without public weights
        raise ConfigError(f"pretrained_cfg names no weights of {name}: give 'file' or 'hf_hub_id', or leave it out")
    model = from_pretrained(source, **options)
    if name is not None and _architecture(model.config) != _architecture(VARIANTS[name].config):
        raise CheckpointError(
            f"{source} is no {name}, but of another architecture; timm.create_model({ANY!r}) takes any"
        )
    return model


def _architecture(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _FREE}


def _entrypoint(name: str | None) -> Callable[..., nn.Module]:
    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        return create_registered(name, pretrained=pretrained, **options)

    make.__name__ = make.__qualname__ = ANY if name is None else timm_name(name)
    make.__doc__ = f"Return {name or 'a model of nfzoo that files describe'}: see `create_registered`."
    return make


def _check_timm() -> None:
    """Raise a `ConfigError` for a timm in which `nfzoo/nfnet_f0` is timm's own `nfnet_f0`."""
    from timm.models import parse_model_name  # pyright: ignore[reportMissingImports]

    try:
        parse_model_name(f"{ANY}/nfnet_f0")
    except ValueError:
        return
    raise ConfigError(f"timm {version('timm')} takes {ANY}/nfnet_f0 for its own nfnet_f0: pip install 'timm>=1.0.30'")


def _register() -> None:
    """Make timm know the zoo: names, what their images are like, and the tags of public weights."""
    from timm.models import generate_default_cfgs, register_model  # pyright: ignore[reportMissingImports]

    cfgs: dict[str, dict[str, Any]] = {ANY: {}}
    for name, row in VARIANTS.items():
        fields = pretrained_cfg(row.config, row.preprocessing)
        if name in PUBLIC:
            repo_id = PUBLIC[name].repo_id
            cfgs[f"{timm_name(name)}.{repo_id.partition('.')[2]}"] = {**fields, "hf_hub_id": repo_id}
        else:
            cfgs[timm_name(name)] = fields
    globals()["default_cfgs"] = generate_default_cfgs(cfgs)  # `register_model` looks for it here
    for name in (None, *VARIANTS):
        entrypoint = _entrypoint(name)
        globals()[entrypoint.__name__] = register_model(entrypoint)


_check_timm()
_register()
