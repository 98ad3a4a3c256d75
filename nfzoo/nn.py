"""The `nn.Module` shell over a plan: parameters under the plan's keys, the forward pass of `nfzoo.model`.

It is longer than other modules, as all methods of `NFNet` are public and each says what it takes.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, Unpack, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn

from nfzoo import model as functional_model
from nfzoo.checkpoint.model_folder import LABEL_KEYS, MULTI_LABEL, Description, load_checkpoint, save_checkpoint
from nfzoo.config import NOT_THE_ARCHITECTURE, ModelConfig, Preprocessing, is_int
from nfzoo.errors import CheckpointError, ConfigError, shown
from nfzoo.model import fold
from nfzoo.models.functional import register_activation as register_activation
from nfzoo.models.modules import module_tree, tree_keys
from nfzoo.models.onednn import PackedBlock
from nfzoo.runtime import execution as executions
from nfzoo.runtime.block_module import (
    BlockModule,
    Classifier,
    check_holders,
    check_hooks,
    check_input,
    is_hooked,
    owners,
    replaced,
    submodule,
)
from nfzoo.runtime.compile import CompiledBlock, compile_blocks, compile_options
from nfzoo.runtime.timm_interface import TimmInterface, check_global_pool, take_indices
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.preprocess import evaluation_transform
from nfzoo.types import Noise, Params
from nfzoo.variants import VARIANTS, Variant, variant

if TYPE_CHECKING:
    from nfzoo.hub.publish import PushOptions

fx.wrap("check_input")
logger = logging.getLogger("nfzoo")


class NFNet(TimmInterface):
    """A Normalizer-Free network of any family.

    In training mode, `forward` draws dropout and stochastic depth itself unless it gets `noise`. A model with a folded
    configuration (see `for_inference`) stays in evaluation mode, and its parameters require no gradients.

    Args:
        config: the architecture.
        preprocessing: the transform from image to input; by default that of the zoo's variant `name`, else one for 224
            pixels.
        labels: class names.
        name: name that is saved with the weights.
        generator, device, dtype: as for `nfzoo.model.init`.

    Attributes:
        temperature: divisor of the logits before the softmax of `nfzoo.predict`, `None` for 1. It is saved with the
            model; another classifier or training leaves it out.
        problem_type: `"multi_label_classification"` for a model of which each output is a label by itself, `None` for
            one of exclusive classes. It is saved with the model. `forward` returns logits in either case.
        thresholds: of a multi-label model, one number from 0 to 1 for each class: an image has the labels whose
            sigmoids are not below them; `None` for 0.5 each. They are saved with the model; another classifier leaves
            them out.
        execution: how a model that `optimize` returned computes, and what was measured; else `None`.
        pool: activation and mean over the pixels. A module in its place gets the map before the activation.
        head: the classifier. Another module of pooled features may stand in its place; then `labels` are gone. With an
            `nn.Linear` with bias or an `nn.Identity` there, `config` follows, and the model can be saved and folded.
    """

    head: nn.Module
    execution: executions.Execution | None = None
    _no_split_modules = (BlockModule.__name__, Classifier.__name__)  # accelerate and FSDP keep these on one device

    def __init__(
        self,
        config: ModelConfig,
        *,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        name: str | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise ConfigError(
                f"a model is built from a configuration, not from {shown(config)}: nfzoo.create takes a name as well"
            )
        if labels is not None and len(labels) != config.num_classes:
            raise ConfigError(f"{len(labels)} labels for {config.num_classes} classes")
        self.config = config
        self.name = name
        self.labels = None if labels is None else tuple(labels)
        if preprocessing is None:
            known = VARIANTS.get(name or "")
            preprocessing = known.preprocessing if known else Preprocessing(train_size=224, test_size=224)
            preprocessing = preprocessing.for_channels(config.in_channels)
        preprocessing.check_channels(config)
        self.preprocessing = preprocessing
        self.provenance: dict[str, Any] | None = None
        self.foreign: dict[str, Any] | None = None
        self.temperature: float | None = None
        self.problem_type: str | None = None
        self.thresholds: tuple[float, ...] | None = None
        self._register(functional_model.init(config, generator=generator, device=device, dtype=dtype))

    @classmethod
    def from_params(cls, description: Description, params: Params) -> Self:
        """Return a model that holds these parameters, without a copy."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.config, self.preprocessing, self.name, self.labels = description[:4]
        self._set_origin(description)
        self._register(params)
        return self

    def _set_origin(self, description: Description) -> None:
        self.provenance = None if description.provenance is None else dict(description.provenance)
        self.foreign = None if description.foreign is None else dict(description.foreign)
        self.temperature = description.temperature
        self.problem_type, self.thresholds = description.problem_type, description.thresholds

    def _set_labels(self, labels: Sequence[str] | None) -> None:
        """Set a new classifier's labels; forget those of other tools, and the old one's temperature and thresholds."""
        self.labels = None if labels is None else tuple(labels)
        self.temperature = self.thresholds = None
        self.foreign = {k: v for k, v in (self.foreign or {}).items() if k not in LABEL_KEYS} or None

    def _register(self, params: Params) -> None:
        self.plan = functional_model.plan(self.config)
        for block in self.plan:
            *path, leaf = block.name.split(".")
            kind = Classifier if leaf == "head" else BlockModule
            submodule(self, path).add_module(leaf, kind(block, functional_model.block_params(block, params)))
        self._find()
        if self.config.folded:
            self.eval().requires_grad_(False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "head" and not isinstance(value, BlockModule) and "plan" in self.__dict__:
            self._set_labels(None)
            if type(value) is nn.Linear and value.bias is not None:
                self.config = self.config.replace(num_classes=value.out_features)
            elif type(value) is nn.Identity:
                self.config = self.config.replace(num_classes=0)

    def _find(self) -> None:
        """Find the modules that hold the blocks, once for all calls."""
        names = [block.name for block in self.plan]
        check_holders(self, names)
        self._owners, self._links = owners(self, names)

    def _blocks(self) -> list[Callable[..., Tensor]]:
        """Return the blocks in the plan's order, as they are now: `model.head = ...` takes effect."""
        if replaced(self._links):  # `model.stages[0] = ...`
            self._find()
        check_hooks(self._links)
        runs = [getattr(owner, leaf) for _, owner, leaf in self._owners]
        return [
            run if isinstance(run, BlockModule) else functools.partial(_foreign, run, block.name == "head")
            for run, block in zip(runs, self.plan, strict=True)
        ]

    @property
    def description(self) -> Description:
        """The description that is saved beside the weights."""
        about = self.config, self.preprocessing, self.name, self.labels, self.provenance, self.foreign
        return Description(*about, self.temperature, self.problem_type, self.thresholds)

    @property
    def multi_label(self) -> bool:
        """Whether each output is a label by itself, of which an image may have several or none."""
        return self.problem_type == MULTI_LABEL

    def _check_blocks(self) -> None:
        """Raise a `ConfigError` if more than `config` and the parameters tell what the network computes."""
        self._blocks()  # finds replaced ones
        for name, owner, leaf in self._owners:
            module = getattr(owner, leaf)
            if not isinstance(module, BlockModule) and not (
                name == "head" and type(module) in (nn.Linear, nn.Identity)
            ):
                takes = "an nn.Linear with bias or an nn.Identity" if name == "head" else "the block itself"
                raise ConfigError(
                    f"a model with a {type(module).__name__} as {name} can be neither saved nor folded: that takes "
                    f"{takes}; to save any other, use state_dict"
                )
        if any(p.is_meta for p in self.parameters()):
            raise ConfigError(
                "parameters are on the meta device, as those that accelerate offloads are; load the model without that"
            )

    def _check_foldable(self) -> None:
        """Raise a `ConfigError` if a folded model would compute something else."""
        self._check_blocks()
        for name in ("forward", "embed"):
            if getattr(type(self), name) is not getattr(NFNet, name):
                raise ConfigError(
                    f"{type(self).__name__} has a {name} of its own, which a folded model or tree of layers would lack"
                )
        hooked = [name for name, module in self.named_modules() if is_hooked(module)]
        if hooked:
            logger.warning("the new model has no hooks, as this one has on %r", hooked[0] or type(self).__name__)

    def parameter_kinds(self) -> dict[str, str]:
        """Return the kind of every parameter: `weight`, `gain`, `bias`, `skip_gain`, or `head` (classifier weight)."""
        self._check_trainable()
        return {name: kind for name, (_, kind) in functional_model.specs(self.config).items()}

    def sample_noise(self, batch: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw dropout and stochastic depth masks for one step, on the parameters' device."""
        self._check_trainable()
        p = next(self.parameters())
        return functional_model.sample_noise(self.config, batch, generator=generator, device=p.device, dtype=p.dtype)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Return logits `(N, num_classes)` of normalised images `(N, in_channels, H, W)`."""
        check_input(x, self.config.in_channels)
        if isinstance(noise, fx.Proxy):
            check_no_noise(noise)
            noise = None
        if noise is not None:
            self._check_trainable()
        if self.training and noise is None:
            noise = functional_model.sample_noise(self.config, x.shape[0], device=x.device, dtype=x.dtype)
        blocks = self._blocks()
        if self.execution is not None and not isinstance(x, fx.Proxy):
            if outputs := self.execution.outputs(x, blocks):
                return outputs[1]
            x = self.execution.images(x)
        # NFNet.forward == model.apply, tests/core/test_nn.py
        for block, run in zip(self.plan, blocks, strict=True):
            x = run(x, None if noise is None else noise.get(block.name))
        return x

    def embed(self, x: Tensor) -> Tensor:
        """Return the pooled features `(N, F)` of normalised images, without noise."""
        check_input(x, self.config.in_channels)
        *blocks, _ = whole = self._blocks()
        if self.execution is not None and not isinstance(x, fx.Proxy):
            if outputs := self.execution.outputs(x, whole):
                return outputs[0]
            x = self.execution.images(x)
        for run in blocks:
            x = run(x)
        return x

    def features(self, x: Tensor, out_indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Return the feature maps of `nfzoo.model.features`: the stem's (stride 2), then each stage's.

        Args:
            x: normalised images.
            out_indices: return the last n maps, or those of these indices, in the network's order; all by default.
        """
        check_input(x, self.config.in_channels)
        names = [block.name for block in self.plan if block.feature]
        wanted = [names[i] for i in take_indices(len(names), out_indices)]
        maps = []
        for block, run in zip(self.plan, self._blocks(), strict=True):
            x = run(x)
            if block.name in wanted:
                maps.append(x[0] if isinstance(x, tuple) else x)  # compiled folded blocks pass pairs
            if block.name == wanted[-1]:
                break
        return maps

    def for_inference(self) -> NFNet:
        """Return a folded model, which computes the same by plain convolutions: see `nfzoo.model.fold`.

        It has its own parameters. It can be saved, loaded, compiled and exported like any other model, but not trained:
        `train()`, noise, another classifier and a second folding raise a `ConfigError`.
        """
        self._check_foldable()
        config, params = fold(self.config, {name: p.detach() for name, p in self.named_parameters()})
        return NFNet.from_params(self.description._replace(config=config), params)

    def as_modules(self) -> nn.Sequential:
        """Return the model as a tree of `torch.nn` layers, for tools that replace, wrap or hook layers.

        It has its own parameters, with the model's values and `requires_grad`, and the model's mode. Of a folded model
        (`model.for_inference().as_modules()`) it is a plain network of `nn.Conv2d` and `nn.Linear`, which tools may
        train as well. Of a trained one, a parametrization of each `nn.Conv2d` standardises its weight. Tools that write
        to the weight itself, as LoRA's merge does, need the folded form. `load_modules` copies the parameters back.

        Raises:
            ConfigError: for a head that `config` does not tell of, a pruned or parametrized model, and subclasses with
                another `forward`.
        """
        self._check_foldable()
        own = dict(self.named_parameters())
        functional_model.check_params(self.config, own)
        tree = module_tree(functional_model.plan(self.config.replace(folded=False)), folded=self.config.folded)
        keys = tree_keys(functional_model.plan(self.config))
        tree.load_state_dict({keys[name]: p.detach().clone() for name, p in own.items()}, assign=True)
        for name, p in own.items():
            tree.get_parameter(keys[name]).requires_grad_(p.requires_grad)
        return tree.train(self.training)

    @torch.no_grad()
    def load_modules(self, tree: nn.Module) -> Self:
        """Copy the parameters of a tree that `as_modules` returned into this model, and return the model.

        Raises:
            ConfigError: if the parameters of the tree are not those of this model's tree.
        """
        keys = tree_keys(functional_model.plan(self.config))
        state, own = tree.state_dict(), dict(self.named_parameters())
        expected = {keys[name]: tuple(p.shape) for name, p in own.items()}
        found = functional_model.mismatch(expected, state)
        if found:
            raise ConfigError(
                f"the tree is not one of this model: {found}; merge adapters, undo quantization and pruning, and call "
                "load_modules of the form (trained or folded) that the tree was made from"
            )
        for key in expected:
            if type(state[key]) is not Tensor or state[key].is_meta or not state[key].is_floating_point():
                kind = "on the meta device" if state[key].is_meta else f"a {type(state[key]).__name__}"
                raise ConfigError(f"{key!r} of the tree is {kind}, not a tensor of floating-point numbers")
        pairs = [(state[keys[name]], p) for name, p in own.items()]
        if all(a.device == p.device and a.dtype == p.dtype and torch.equal(a, p) for a, p in pairs):
            logger.warning(
                "the tree has the parameters that the model has already; what a tool wrote to a weight that a "
                "parametrization computes, as LoRA's merge does, is lost: use for_inference().as_modules() there"
            )
        for name, p in own.items():
            p.copy_(state[keys[name]])
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a folded model has only the latter."""
        if mode:
            self._check_trainable()
        return super().train(mode)

    def _check_trainable(self) -> None:
        if self.config.folded:
            raise ConfigError(
                "the model is folded for inference: it takes no training, no noise and no other classifier; "
                "use the trained model that it was made from"
            )

    def compile_blocks(
        self,
        *,
        enabled: bool = True,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = False,
    ) -> Self:
        """Compile one graph for each distinct block, and return the model.

        The time to compile does not grow with depth. For training on a CPU, one more pair of graphs standardises the
        weights of all blocks. Nothing falls back to eager: a graph break raises. The keys of `state_dict` do not
        change. The residual blocks of a folded model pass pairs to one another, a map and its activation, which hooks
        on them meet.

        Args:
            enabled: `False` returns to eager.
            backend, mode, options, dynamic: as for `torch.compile`. By default each input shape has its own graphs.
        """
        compile_blocks(self, compile_options(backend, mode, options, dynamic) if enabled else None)
        return self

    def prepack(self, *, enabled: bool = True) -> Self:
        """Let oneDNN lay out a folded model's weights for the CPU once instead of in every call; return the model.

        For batches of one size this is faster than `compile_blocks`, which it replaces; for sizes that alternate it is
        slower. The weights take twice the memory. `state_dict` does not change. If gradients are required, torch's own
        convolution computes.

        Changed weights are laid out again. Changes through `.data` or numpy, and of weights that were created in
        inference mode, go unnoticed: call this again after them.

        Raises:
            ConfigError: if the model is not folded; see `for_inference`.
        """
        if not self.config.folded:
            raise ConfigError("prepack is for models folded for inference: call for_inference() first")
        for module in self.modules():
            if isinstance(module, BlockModule):
                module.fn = PackedBlock(module.block.fn) if enabled else module.block.fn
        return self

    def optimize(
        self,
        *,
        batch: int = 1,
        size: int | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        backend: str = "torch",
        tolerance: float | None = None,
    ) -> NFNet:
        """Return a folded model that computes batches of one shape by the fastest way that was measured on this CPU.

        Ways are the plain blocks with images in either layout, and `prepack`. Each computes a few batches of random
        numbers, which takes seconds and depends on the number of threads. Its logits have to agree with the model's.
        The choice and all times are in `execution` of the result, and are logged. The result has parameters of its own
        only in another dtype. It is used, saved and pickled like any model, and computes other shapes as well.

        Args:
            batch: images of a batch.
            size: their side in pixels; by default the model's test size.
            dtype: of parameters and images, such as `"bf16"`; by default the model's.
            compile: measure also `compile_blocks`, and the whole network compiled with its weights as constants. This
                takes up to minutes, and needs a C++ compiler.
            backend: `"torch"`; `"openvino"`, which alone is then taken; or `"any"`, of which the fastest is. OpenVINO
                needs the extra `nfzoo[openvino]`, and computes batches of the given shape alone; the blocks compute
                others.
            tolerance: largest |logits - model's| / |model's|; by default 1e-4 in float32 and 0.05 in bfloat16.

        Raises:
            ConfigError: for a model that is not folded or not on the CPU, for options out of range, and if no way
                agrees with the model.
        """
        if not self.config.folded:
            raise ConfigError("optimize is for models folded for inference: call for_inference() first")
        p = next(self.parameters())
        if p.device.type != "cpu":
            raise ConfigError(f"optimize chooses among ways to compute on the CPU; the model is on {p.device}")
        self._check_foldable()
        target = executions.dtype_of(dtype, p.dtype)
        found = executions.candidates(backend, compile=compile, dtype=target)
        side = self.preprocessing.test_size if size is None else size
        x = executions.example(batch, self.config.in_channels, side)
        params = {name: value.detach() for name, value in self.named_parameters()}
        with torch.no_grad():
            reference = NFNet.from_params(self.description, params)(x.to(p.dtype))
        own = {name: value.to(target) for name, value in params.items()}
        make = functools.partial(NFNet.from_params, self.description, own)
        return executions.fastest(make, reference, x.to(target), found, tolerance=tolerance)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        execution = self.execution
        if execution is not None and execution.program is not None:
            logger.warning("a copy of the model computes block by block, without %s: call optimize()", execution.form)
            state.pop("execution")
        return state

    def checkpoint_blocks(self, *, enabled: bool = True) -> Self:
        """Keep only the blocks' inputs for the backward pass, which recomputes the other activations; return the model.

        This costs one more forward pass, and saves most of the memory of activations.
        """
        for module in self.modules():
            if isinstance(module, BlockModule):
                module.checkpointed = enabled
        return self

    def preprocess(self, image: str | Path | BinaryIO | Image.Image | np.ndarray, *, size: int | None = None) -> Tensor:
        """Turn one image into the input `(in_channels, size, size)`: see `nfzoo.transforms.preprocess`."""
        opened = open_image(image, channels=self.config.in_channels)
        return evaluation_transform(opened, self.preprocessing, size=size)

    def predict(
        self,
        images: str | Path | Image.Image | np.ndarray | Sequence[str | Path | Image.Image | np.ndarray],
        *,
        topk: int | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Return the most probable labels of images, with probabilities, after the model's own preprocessing.

        Of a multi-label model these are the labels whose sigmoids reach their `thresholds`, perhaps none.

        Args:
            images: a file, a Pillow image or an array `(H, W, C)`; a folder of images; or a list of any of these.
            topk: number of labels, by default 5; of a multi-label model the most that are given, by default all.
            batch_size: images at a time.

        Returns:
            Of one image its `(label, probability)` pairs, the most probable first. Of a folder or a list such a list
            for each image, in a dictionary under the paths of a folder.

        Raises:
            DataError: for an image that cannot be read, and a folder without images.
            ConfigError: for a model without classifier.
        """
        from nfzoo.predict import predict_images

        return predict_images(self, images, topk=topk, batch_size=batch_size)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, *, labels: Sequence[str] | None = None
    ) -> None:
        """Replace the classifier by a randomly initialised one for `num_classes`; 0 leaves the pooled features.

        Args:
            num_classes: outputs of the new classifier.
            global_pool: `"avg"`, the only pooling there is.
            labels: class names.
        """
        self._check_trainable()
        check_global_pool(global_pool)
        if labels is not None and len(labels) != num_classes:
            raise ConfigError(f"{len(labels)} labels for {num_classes} classes")
        p = next(self.parameters())
        self.config = self.config.replace(num_classes=num_classes)
        self._set_labels(labels)
        self.plan = functional_model.plan(self.config)
        head = self.plan[-1]
        params = {k: s.init(s.shape, generator=None, device=p.device, dtype=p.dtype) for k, s in head.specs.items()}
        old = self.head
        self.head = new = Classifier(head, params)
        if isinstance(old, BlockModule):
            new.checkpointed = old.checkpointed
            if isinstance(old.fn, CompiledBlock):
                compile_blocks(new, old.fn.options)

    def save_pretrained(self, folder: str | Path, *, with_onnx: bool = False) -> Path:
        """Write `config.json` and `model.safetensors` into `folder`, and what transformers needs, atomically.

        Args:
            with_onnx: also write `onnx/model.onnx`, for transformers.js and other runtimes: see
                `nfzoo.export.onnx_folder`. Without it, an `onnx` of earlier weights is removed, with a warning.

        Raises:
            ConfigError: for a head that `config` does not tell of, or a temperature that is not between 0.001 and 1000;
                with `with_onnx` also for a model without classifier, without the packages of `nfzoo[export]`, and where
                `onnx` holds files that nfzoo did not write.
        """
        self._check_blocks()
        if not with_onnx:
            return save_checkpoint(folder, self.description, self.state_dict())
        from nfzoo.export.onnx_folder import check_onnx, write_onnx_folder

        self._check_foldable()
        check_onnx(self)
        write = functools.partial(write_onnx_folder, self)
        return save_checkpoint(folder, self.description, self.state_dict(), write_onnx=write)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Self:
        """Load a pretrained model in evaluation mode: see `nfzoo.from_pretrained`, which has the same options.

        A subclass is made by its own `__init__`, which takes the arguments of `NFNet`; parameters that it adds keep
        their initial values.
        """
        from nfzoo.hub import from_pretrained

        loaded = from_pretrained(source, **options)
        if cls is NFNet:
            return loaded  # pyright: ignore[reportReturnType]
        config, preprocessing, name, labels, *_ = loaded.description
        p = next(loaded.parameters())
        made = cls(config, preprocessing=preprocessing, labels=labels, name=name, device=p.device, dtype=p.dtype)
        made._set_origin(loaded.description)
        weights, own = loaded.state_dict(), {key: tuple(value.shape) for key, value in made.state_dict().items()}
        odd = [key for key, value in weights.items() if own.get(key) != tuple(value.shape)]
        if odd:
            raise CheckpointError(
                f"{len(odd)} tensors of {source} have no place in {cls.__name__}, such as {odd[0]!r}; a subclass keeps "
                "the parameters of NFNet, and replaces modules after loading"
            )
        made.load_state_dict(weights, strict=False, assign=True)
        return made.eval()

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Publish the model with its card as one commit of a Hub repository; return the commit's URL.

        Args:
            repo_id: `organisation/name`.
            options: see `nfzoo.hub.publish.PushOptions`.
        """
        from nfzoo.hub import push

        with tempfile.TemporaryDirectory() as scratch:
            with_onnx = options.pop("with_onnx", False)
            return push(self.save_pretrained(Path(scratch) / "model", with_onnx=with_onnx), repo_id, **options)


# A graph of torch.fx keeps the types of its inputs, and can be pickled if they are no strings.
NFNet.forward.__annotations__.update(get_type_hints(NFNet.forward))


@fx.has_side_effect  # nothing uses its result, and torch.fx keeps its node nevertheless
@fx.wrap
def check_no_noise(noise: Noise | None) -> None:
    """Raise a `ConfigError` for noise, of which a graph of `torch.fx` knows nothing but what it draws itself."""
    if noise is not None:
        raise ConfigError("a model traced by torch.fx takes no noise; use the model that it was made from")


def _foreign(module: nn.Module, is_head: bool, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Call a module that stands in the place of a block: a head after dropout, and none with stochastic depth."""
    return module(x * keep.to(x.dtype) if keep is not None and is_head else x)


def create(
    model: str | ModelConfig | Variant,
    *,
    preprocessing: Preprocessing | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    labels: Sequence[str] | None = None,
    **changes: Any,
) -> NFNet:
    """Create a model with random weights: `create("nfnet-f0", num_classes=10)`.

    Args:
        model: a name of `nfzoo.list_models()`, its row of the table (`nfzoo.variant`), or a configuration.
        preprocessing: the transform from image to input, with the sizes in pixels; by default that of the name, and of
            a configuration one for 224 pixels.
        changes: configuration fields to change, such as `num_classes`, `in_channels`, `depths`, `widths`,
            `activation`, `drop_rate`. One that changes the architecture leaves the model without the zoo's name.

    Raises:
        UnknownModelError: for an unknown name; the message has the nearest ones.
        ConfigError: for what no network can be built from.
    """
    if isinstance(model, ModelConfig):
        name, config = None, model
    else:
        row = model if isinstance(model, Variant) else variant(model)
        name, config = row.name, row.config
        preprocessing = preprocessing or row.preprocessing.for_channels(changes.get("in_channels", config.in_channels))
    config = config.replace(**changes) if changes else config
    if not changes.keys() <= set(NOT_THE_ARCHITECTURE):
        name = None
    if labels is not None and "num_classes" not in changes:
        config = config.replace(num_classes=len(labels))
    return NFNet(
        config, preprocessing=preprocessing, labels=labels, name=name, generator=generator, device=device, dtype=dtype
    )


def load(
    path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    hashed: bool = False,
) -> NFNet:
    """Load a checkpoint folder or weight file, in evaluation mode.

    Args:
        path: the folder or file.
        num_classes: another number than the checkpoint's draws a new classifier.
        in_channels: another number than the checkpoint's adapts the first convolution: see `nfzoo.model.adapt_input`.
        device, dtype: of the parameters.
        hashed: whether the files were compared with a hash already; otherwise a warning names those without a checksum.

    Raises:
        CheckpointError: see `nfzoo.checkpoint.model_folder.load_checkpoint`.
        ConfigError: if a folded model is to be changed.
    """
    check_changes(num_classes, in_channels)
    description, params = load_checkpoint(path, device=device, hashed=hashed)
    return assemble(description, params, num_classes=num_classes, in_channels=in_channels, dtype=dtype, source=path)


def check_changes(num_classes: int | None, in_channels: int | None) -> None:
    """Raise a `ConfigError` for an invalid number of either; call it before anything is read or downloaded."""
    for name, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1)):
        if value is not None and not is_int(value, least):
            raise ConfigError(f"{name} must be an integer from {least} on, not {value!r}")


def assemble(
    description: Description,
    params: Params,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dtype: torch.dtype | None = None,
    source: str | Path,
) -> NFNet:
    """Return a model of these parameters, in evaluation mode; warn, with `source`, if its classifier is replaced."""
    check_changes(num_classes, in_channels)
    if in_channels is not None and in_channels != description.config.in_channels:
        config, params = functional_model.adapt_input(description.config, params, in_channels)
        preprocessing = description.preprocessing.adapted(in_channels)
        description = description._replace(config=config, preprocessing=preprocessing)
    if dtype is not None:
        params = {key: value.to(dtype) for key, value in params.items()}
    model = NFNet.from_params(description, params)
    if num_classes is not None and num_classes != description.config.num_classes:
        model._check_trainable()
        if num_classes:
            logger.warning(
                "%s has %d classes: its classifier is replaced by a fresh one of %d, which must be trained",
                source,
                description.config.num_classes,
                num_classes,
            )
        model.reset_classifier(num_classes)
    return model.eval()
