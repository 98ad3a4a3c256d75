"""nfzoo's networks as models of transformers.

A model holds the modules of an `NFNet` as its own children, so that the keys of its `state_dict` are nfzoo's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.backbone_utils import BackboneMixin  # pyright: ignore[reportMissingImports]
from transformers.modeling_outputs import (  # pyright: ignore[reportMissingImports]
    BackboneOutput,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple  # pyright: ignore[reportMissingImports]

from nfzoo.checkpoint.description import Description
from nfzoo.checkpoint.model_folder import check_folder, save_checkpoint
from nfzoo.errors import CheckpointError, ConfigError
from nfzoo.integrations.transformers.configuration import NFZooConfig
from nfzoo.model import sample_masks
from nfzoo.nn import NFNet
from nfzoo.runtime.block_module import BlockModule, Classifier, Layer, check_input

logger = logging.getLogger("nfzoo")


class NFZooPreTrainedModel(PreTrainedModel):
    """What the models have in common: an `NFNet`, whose modules are the model's own.

    Attributes:
        network: the `NFNet`. It is no child, and shares its children with the model.
    """

    config: NFZooConfig
    config_class = NFZooConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = [BlockModule.__name__, Classifier.__name__]  # noqa: RUF012, a list in transformers

    network: NFNet

    def __init__(self, config: NFZooConfig) -> None:
        super().__init__(config)
        stated = self.description()
        network = NFNet(stated.config, preprocessing=stated.preprocessing)
        self.__dict__["network"] = network
        for name, child in network.named_children():
            self.add_module(name, child)
        for parameter in network.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True  # type: ignore[attr-defined], transformers would draw it once more
        self._freeze()

    def _freeze(self) -> None:
        """Leave a folded network without gradients and in evaluation mode, as nfzoo does."""
        if self.network.config.folded:
            self.requires_grad_(False)
            self.eval()

    def description(self) -> Description:
        """Return what nfzoo saves beside the weights."""
        return self.config.description()

    def parameter_kinds(self) -> dict[str, str]:
        """Return the kind of every parameter, by which AGC spares the classifier: see `NFNet.parameter_kinds`."""
        return self.network.parameter_kinds()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        network = self.__dict__.get("network")
        if isinstance(value, nn.Module) and network is not None and name in dict(network.named_children()):
            setattr(network, name, value)  # `model.head = ...`
            self.config.num_labels = network.config.num_classes
            self.config.temperature = self.config.thresholds = None

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that a module holds itself, as `nfzoo.create` does, unless they were loaded."""
        if isinstance(module, Layer):
            block, prefix = module._layer_of
        elif isinstance(module, BlockModule):
            block, prefix = module.block, ""
        else:
            super()._init_weights(module)
            return
        for leaf, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                spec = block.specs[f"{prefix}.{leaf}".removeprefix(".")]
                options = {"device": parameter.device, "dtype": parameter.dtype}
                parameter.copy_(spec.init(spec.shape, generator=None, **options))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a model in evaluation mode: see the base class.

        Raises:
            CheckpointError: where weights are missing, unknown or of another shape, of which transformers itself would
                only print a report. Those of a classifier for another number of classes may be. Also for a folder whose
                weights are damaged, or of another model than its `config.json` describes.
        """
        source = pretrained_model_name_or_path
        if isinstance(source, str | os.PathLike) and Path(source).is_dir():
            check_folder(Path(source, kwargs.get("subfolder") or ""))
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        drawn = "head." if model.network.config.num_classes != model.config.architecture["num_classes"] else " "
        wrong = {
            words: sorted(name for name in names if words == "unknown" or not name.startswith(drawn))
            for words, names in (
                ("missing", info["missing_keys"]),
                ("unknown", info["unexpected_keys"]),
                ("of another shape", [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]),
            )
        }
        problems = [f"{len(names)} {words}, such as {names[0]!r}" for words, names in wrong.items() if names]
        if problems:
            raise CheckpointError(f"the weights do not fit the configuration: {'; '.join(problems)}")
        model._freeze()
        return (model, info) if output_loading_info else model

    def _replicate_for_data_parallel(self) -> Any:
        raise ConfigError(
            "torch.nn.DataParallel, which Trainer uses where it sees several GPUs, cannot replicate a model of nfzoo: "
            "start a process for each GPU by `accelerate launch`, or let CUDA_VISIBLE_DEVICES name one"
        )

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode.

        The temperature, thresholds and provenance in `config` are those of weights that are not trained further, and
        training leaves them out.
        """
        self.network.train(mode)  # raises for a folded network
        known = [key for key in ("temperature", "thresholds") if getattr(self.config, key) is not None]
        if mode and known:
            logger.warning("training leaves out the model's %s, which fitted the weights as they were", known[0])
        if mode:
            self.config.forget_weights()
        return super().train(mode)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Do as `NFNet.checkpoint_blocks`, for every n-th block."""
        if getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is not checkpoint:
            raise ConfigError("activations are computed again, and not offloaded: leave out offload=True")
        self.network.checkpoint_blocks(enabled=False)
        blocks = [module for module in self.network.modules() if isinstance(module, BlockModule)]
        for module in blocks[::every_n_layers] if enable else ():
            module.checkpointed = True
        self.gradient_checkpointing = enable

    def _maps(self, x: Tensor, *, last: str | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and the maps of `NFNet.features`; with noise in training mode.

        Args:
            x: normalised images.
            last: the block after which to stop.
        """
        network, maps = self.network, []
        noise = {}
        if self.training:
            noise = sample_masks(network.plan, x.shape[0], device=x.device, dtype=x.dtype)
        for block, run in zip(network.plan, network._blocks(), strict=True):
            x = run(x, noise.get(block.name))
            if block.feature:
                maps.append(x[0] if isinstance(x, tuple) else x)  # compiled folded blocks pass pairs
            if block.name == last:
                break
        return x, maps

    def _input(self, pixel_values: Tensor) -> Tensor:
        """Return the images in the weights' dtype."""
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(next(self.parameters()).dtype)
        check_input(pixel_values, self.network.config.in_channels)
        return pixel_values

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that nfzoo and transformers load, atomically, with the weights in one file.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes.
            state_dict: the weights; the model's own by default.
            push_to_hub: also publish it, under the name of the folder or `repo_id`.
            max_shard_size: has no effect, as there is one file.
            variant: is not supported.
            token: for the Hub.
            kwargs: those of `push_to_hub`.

        Raises:
            CheckpointError: if the weights do not fit the configuration.
            ConfigError: for options that are not supported.
        """
        if variant is not None or kwargs.pop("distributed_checkpoint", False):
            raise ConfigError("nfzoo writes model.safetensors alone: leave out variant and distributed_checkpoint")
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ConfigError("adapters are not saved by nfzoo; merge them first, or save them by peft")
        if is_main_process:
            self.network._check_blocks()
            params = self.state_dict() if state_dict is None else state_dict
            save_checkpoint(Path(save_directory), self.description(), params)
        for option in ("save_peft_format", "save_original_format"):
            kwargs.pop(option, None)
        if push_to_hub and is_main_process:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), token=token, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would copy nfzoo's own modules into the folders that it saves."""


class NFZooForImageClassification(NFZooPreTrainedModel):
    """A classifier. Its logits are those of `nfzoo.NFNet`.

    `num_labels` of the configuration, with `ignore_mismatched_sizes=True`, draws a new classifier as `nfzoo.load` does.
    """

    def __init__(self, config: NFZooConfig) -> None:
        super().__init__(config)
        if not config.num_labels:
            raise ConfigError("the model has no classifier: pass num_labels, or use AutoBackbone")
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> Any:
        """Return logits `(N, num_labels)`, and with `labels` the loss.

        Args:
            pixel_values: normalised images `(N, C, H, W)`.
            labels: for exclusive classes their numbers `(N,)`, whose cross-entropy is the loss; for several labels an
                image 0 and 1 as floating-point numbers `(N, num_labels)`, with the binary cross-entropy.
            output_hidden_states: also return the maps of `NFNet.features`, the stem's and each stage's.
            return_dict: `False` returns a tuple.
        """
        x, maps = self._input(pixel_values), None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            logits, maps = self._maps(x)
        else:
            logits = self.network(x)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=None if maps is None else tuple(maps),
        )


class NFZooBackbone(BackboneMixin, NFZooPreTrainedModel):
    """The maps of `NFNet.features`, for a detector.

    They are called `stem`, with half of the image's side, and `stage1` to `stage4`. `out_features` or `out_indices` of
    the configuration choose among them; by default the last is returned.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012, a list in transformers

    def __init__(self, config: NFZooConfig) -> None:
        super().__init__(config)
        channels = {block.name: block for block in self.network.plan if block.feature}
        self.num_features = [
            (block.specs.get("conv2.bias") or block.specs["bias"]).shape[0] for block in channels.values()
        ]
        self._last = list(channels)
        self.post_init()

    def description(self) -> Description:
        """Return what nfzoo saves beside the weights: that of a model without classifier."""
        stated = super().description()
        return stated._replace(
            config=stated.config.replace(num_classes=0),
            labels=None,
            temperature=None,
            problem_type=None,
            thresholds=None,
        )

    def _freeze(self) -> None:
        super()._freeze()
        for name, child in self.network.named_children():
            if name not in ("stem", "stages"):
                child.requires_grad_(False)  # nothing uses it, which processes that train together would wait for

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> Any:
        """Return the maps `(N, C, H, W)` of `out_features`.

        Args:
            pixel_values: normalised images `(N, C, H, W)`.
            output_hidden_states: also return all maps.
            return_dict: `False` returns a tuple.
        """
        _, maps = self._maps(self._input(pixel_values), last=self._last[-1])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        chosen: Any = tuple(one for name, one in zip(self.stage_names, maps, strict=True) if name in self.out_features)
        hidden: Any = tuple(maps) if wanted else None
        return BackboneOutput(feature_maps=chosen, hidden_states=hidden)
