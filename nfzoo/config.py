"""Frozen configurations of the three families, which are checked when they are created.

The module is long because the families share their fields, and each field its check.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, TypeVar, get_args

from nfzoo.errors import ConfigError, nearest

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
Attention = Literal["none", "se", "eca"]
RulesName = Literal["deepmind", "timm"]
Resize = Literal["deepmind", "shortest-edge"]

ACTIVATIONS: list[str] = list(get_args(Activation))
"""Names of activations; `nfzoo.register_activation` adds to them."""

T = TypeVar("T")

# Far above any network. Without limits a damaged configuration would give endless plans and overflowing numbers.
MAX_BLOCKS = 512  # of all stages; counting the operations of one takes milliseconds
MAX_SIZE = 1 << 20  # channels, classes, ratios
MAX_SIDE = 4096  # pixels of an input or a resized image; one of this size takes 200 MB

NOT_THE_ARCHITECTURE: tuple[str, ...] = ("num_classes", "in_channels", "drop_rate", "stochastic_depth", "skip_init")
"""Fields of `ModelConfig` that may change without it becoming another network than that of a name."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Differences in arithmetic between networks trained by different code. Weights work only under their own rules.

    Attributes:
        gamma_on_weight: gamma multiplies every standardised kernel instead of every activation.
        variance_floor: the root is of `max(var * fan_in, 1e-4)`, else of `(var + 1e-5) * fan_in`.
        same_padding: padding is TensorFlow's SAME, else symmetric.
        skip_gain: residual branches end in a learned scalar that starts at 0; else the gains of their last convolutions
            start at 0.
        pooled_shortcut: downsampling shortcuts average 2x2 pixels; else (NF-ResNet only) their 1x1 kernel has a stride.
        neighbour_pool: pooled shortcuts whose stride the output stride leaves out average 2x2 adjacent pixels, and
            count zeros behind the border; else pixels that lie the dilation apart, and none behind the border.
        divisor: channel counts are rounded to multiples of it; 0 truncates them to integers.
        se_ratio: NF-ResNet's squeeze-excite ratio.
        rescale_drop: kept residual branches are divided by the keep probability.
        last_block_rate: the last block has the full stochastic depth rate `r`; else block i of n has `r * i / n`.
    """

    gamma_on_weight: bool
    variance_floor: bool
    same_padding: bool
    skip_gain: bool
    pooled_shortcut: bool
    neighbour_pool: bool
    divisor: int
    se_ratio: float
    rescale_drop: bool
    last_block_rate: bool

    def channels(self, value: float, floor_fraction: float = 0.9) -> int:
        """Round a channel count: to the nearest multiple of `divisor`, but not below `floor_fraction` of `value`."""
        if not self.divisor:
            return max(1, int(value))
        rounded = max(self.divisor, int(value + self.divisor / 2) // self.divisor * self.divisor)
        return rounded + self.divisor if rounded < floor_fraction * value else rounded


RULES: dict[str, Rules] = {
    # The code released with arXiv 2102.06171.
    "deepmind": Rules(
        gamma_on_weight=False,
        variance_floor=True,
        same_padding=True,
        skip_gain=True,
        pooled_shortcut=False,
        neighbour_pool=False,
        divisor=0,
        se_ratio=0.25,
        rescale_drop=False,
        last_block_rate=False,
    ),
    # timm 1.0, models/nfnet.py, except for its dm_ models.
    "timm": Rules(
        gamma_on_weight=True,
        variance_floor=False,
        same_padding=False,
        skip_gain=False,
        pooled_shortcut=True,
        neighbour_pool=True,
        divisor=8,
        se_ratio=1 / 16,
        rescale_drop=True,
        last_block_rate=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields of all families.

    Attributes:
        depths: number of blocks of each of the four stages.
        widths: output channels of each stage (NF-RegNet: before its width factor).
        activation: one of `ACTIVATIONS`.
        rules: a key of `RULES`.
        num_classes: outputs of the classifier; 0 leaves it out, and the network's output is the pooled features.
        in_channels: channels of the input image.
        output_stride: 32, 16 or 8; below 32 the last stages keep their resolution and dilate instead. Under DeepMind's
            rules every second or fourth pixel of the maps is the strided network's, but for squeeze-excite, which then
            averages over more pixels; timm's shortcuts differ there.
        alpha: factor of the residual branches.
        skip_init: initial skip gain, under timm's rules initial gain of a branch's last convolution. The papers' 0 is
            SkipInit (arXiv 2002.10444), which shuts the branches; in runs of a few thousand steps open ones, at 0.25
            or 1, learn more (benchmarks/results/stability.md).
        drop_rate: dropout on the pooled features, in [0, 1).
        stochastic_depth: rate at the end of the network, in [0, 1); it rises linearly from 0.
        folded: whether this is the inference form, with weights from `nfzoo.model.fold`; it cannot be trained.
    """

    family: ClassVar[str]

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    activation: str
    rules: RulesName = "deepmind"
    num_classes: int = 1000
    in_channels: int = 3
    output_stride: int = 32
    alpha: float = 0.2
    skip_init: float = 0.0
    drop_rate: float = 0.0
    stochastic_depth: float = 0.0
    folded: bool = False

    def __post_init__(self) -> None:
        _integers(self, "depths", 4, MAX_BLOCKS)
        if sum(self.depths) > MAX_BLOCKS:
            raise ConfigError(f"depths must be at most {MAX_BLOCKS} blocks together, not {list(self.depths)}")
        _integers(self, "widths", 4, MAX_SIZE)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {self.activation!r} is not known; choose one of {', '.join(ACTIVATIONS)}"
                f"{nearest(str(self.activation), ACTIVATIONS)}; another of your own is made known by "
                "nfzoo.register_activation, before a model is made or loaded"
            )
        _one_of("rules", self.rules, RULES)
        for name, least in (("num_classes", 0), ("in_channels", 1)):
            value = getattr(self, name)
            if not is_int(value, least, MAX_SIZE):
                raise ConfigError(f"{name} must be an integer from {least} to {MAX_SIZE}, not {value!r}")
        if not is_int(self.output_stride, 8) or self.output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride must be 8, 16 or 32, not {self.output_stride!r}")
        for name in ("drop_rate", "stochastic_depth"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {value!r}")
        if not isinstance(self.folded, bool):
            raise ConfigError(f"folded must be true or false, not {self.folded!r}")
        _positive(self, "alpha")
        if not _is_number(self.skip_init) or not 0 <= self.skip_init <= 1:
            raise ConfigError(f"skip_init must be in [0, 1], not {self.skip_init!r}")

    @property
    def rule(self) -> Rules:
        """The rules that `rules` names."""
        return RULES[self.rules]

    def replace(self, **changes: Any) -> Self:
        """Return the configuration with some fields changed; raise a `ConfigError` for an unknown field."""
        _check_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, `family` first; `folded`, `stem_hidden` and `skip_init` only if set."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("folded", "stem_hidden", "skip_init"):
            if not fields.get(name):
                fields.pop(name, None)
        return {"family": self.family, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def check_classifier(self) -> None:
        """Raise a `ConfigError` if the network has no classifier; call it before images are labelled."""
        if not self.num_classes:
            raise ConfigError(
                "the model has no classifier (num_classes 0), so it labels no images: embed them with model.embed or "
                "`nfzoo bulk --embeddings`, or give it a classifier with reset_classifier"
            )


@dataclass(frozen=True, kw_only=True)
class NFNetConfig(ModelConfig):
    """NFNet (arXiv 2102.06171, section 4 and appendix C).

    Attributes:
        bottleneck: width of the 3x3 convolutions as a fraction of the block's output.
        group_width: channels of one group of the 3x3 convolutions.
        attention: `"se"`, `"eca"` or `"none"`.
        se_ratio: hidden width of squeeze-excite as a fraction of the block's output.
        head_ratio: width of the final convolution as a multiple of the last stage.
        stem_width: output channels of the four-convolution stem.
        stem_hidden: channels of its first three convolutions; `None` is an eighth, a quarter and a half of
            `stem_width`, which is then a multiple of 8.
    """

    family: ClassVar[str] = "nfnet"

    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    activation: str = "gelu_tanh"
    bottleneck: float = 0.5
    group_width: int = 128
    attention: Attention = "se"
    se_ratio: float = 0.5
    head_ratio: float = 2.0
    stem_width: int = 128
    stem_hidden: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("attention", self.attention, ("none", "se", "eca"))
        for name in ("bottleneck", "se_ratio", "head_ratio"):
            _positive(self, name)
        if self.stem_hidden is not None:
            _integers(self, "stem_hidden", 3, MAX_SIZE)
        multiple = 8 if self.stem_hidden is None else 1
        if not is_int(self.stem_width, multiple, MAX_SIZE) or self.stem_width % multiple:
            raise ConfigError(
                f"stem_width must be a positive multiple of {multiple} up to {MAX_SIZE}, not {self.stem_width!r}"
            )
        channels = self.rule.channels
        _check_groups(self.group_width, min(channels(channels(w) * self.bottleneck) for w in self.widths))

    @property
    def stem(self) -> tuple[int, ...]:
        """Output channels of the stem's four convolutions."""
        hidden = self.stem_hidden or tuple(self.stem_width // divisor for divisor in (8, 4, 2))
        return (*hidden, self.stem_width)


@dataclass(frozen=True, kw_only=True)
class NFResNetConfig(ModelConfig):
    """NF-ResNet (arXiv 2101.08692, section 4).

    Attributes:
        bottleneck: width of the 3x3 convolution as a fraction of the block's output.
        attention: `"se"`, `"eca"` or `"none"`; the squeeze-excite ratio is a field of `Rules`.
        stem_width: output channels of the 7x7 stem.
    """

    family: ClassVar[str] = "nf_resnet"

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    activation: str = "relu"
    bottleneck: float = 0.25
    attention: Attention = "none"
    stem_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("attention", self.attention, ("none", "se", "eca"))
        _positive(self, "bottleneck")
        if not is_int(self.stem_width, 1, MAX_SIZE):
            raise ConfigError(f"stem_width must be a positive integer up to {MAX_SIZE}, not {self.stem_width!r}")


@dataclass(frozen=True, kw_only=True)
class NFRegNetConfig(ModelConfig):
    """NF-RegNet (arXiv 2101.08692, section 5 and appendix).

    Attributes:
        width_factor: multiplies `widths`.
        bottleneck: width of the 3x3 convolution as a multiple of the block's INPUT (1 in the very first block).
        group_width: channels of one group of the 3x3 convolution.
        se_ratio: hidden width of squeeze-excite as a fraction of the 3x3 convolution's width.
    """

    family: ClassVar[str] = "nf_regnet"

    activation: str = "silu"
    width_factor: float = 0.75
    bottleneck: float = 2.25
    group_width: int = 8
    se_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width_factor", "bottleneck", "se_ratio"):
            _positive(self, name)
        channels = self.rule.channels
        inputs = [channels(w * self.width_factor) for w in self.widths]
        _check_groups(self.group_width, min(channels(inputs[0]), *(channels(w * self.bottleneck) for w in inputs)))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Transform from an image to the model's input.

    Attributes:
        train_size, test_size: side of the square input in pixels.
        resize: `"deepmind"` resizes the whole image to a square of side `size + margin` by TensorFlow's bicubic;
            `"shortest-edge"` resizes the shorter edge to `size / crop` by Pillow's. A centre crop follows.
        margin: pixels that the centre crop removes (`"deepmind"`).
        crop: fraction of the shorter edge that the crop keeps (`"shortest-edge"`).
        mean, std: per channel, of pixel values in [0, 1].
    """

    train_size: int
    test_size: int
    resize: Resize = "deepmind"
    margin: int = 32
    crop: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ConfigError(f"{name} must be one number per channel, not {value!r}")
            value = tuple(value)
            if not value or not all(_is_number(v) and abs(v) <= MAX_SIZE for v in value):
                raise ConfigError(f"{name} must be one number per channel, not {value!r}")
            object.__setattr__(self, name, value)
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise ConfigError(f"std must be positive and as long as mean, not {self.std!r}")
        for name in ("train_size", "test_size"):
            value = getattr(self, name)
            if not is_int(value, 1, MAX_SIDE):
                raise ConfigError(f"{name} must be a positive number of pixels up to {MAX_SIDE}, not {value!r}")
        _one_of("resize", self.resize, ("deepmind", "shortest-edge"))
        if not is_int(self.margin, 0, MAX_SIDE):
            raise ConfigError(f"margin must be a number of pixels up to {MAX_SIDE}, not {self.margin!r}")
        least = max(self.train_size, self.test_size) / MAX_SIDE
        if not _is_number(self.crop) or not least <= self.crop <= 1:
            raise ConfigError(
                f"crop must be from {least:.4g}, which resizes the edge to {MAX_SIDE} pixels, to 1, not {self.crop!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def for_channels(self, channels: int) -> Self:
        """Return the preprocessing for `channels`, with mean and std 0.5 if it has another number of channels."""
        if channels == len(self.mean):
            return self
        return dataclasses.replace(self, mean=(0.5,) * channels, std=(0.5,) * channels)

    def adapted(self, channels: int) -> Self:
        """Return the preprocessing for a model that is adapted to `channels`: see `nfzoo.model.adapt_input`.

        One channel has the average of the old means and deviations, n channels have the old ones in turn. The weights
        keep the range of numbers that they were trained on.
        """
        mean, std = (
            (sum(old) / len(old),) if channels == 1 else tuple(old[i % len(old)] for i in range(channels))
            for old in (self.mean, self.std)
        )
        return dataclasses.replace(self, mean=mean, std=std)

    def check_channels(self, config: ModelConfig) -> None:
        """Raise a `ConfigError` unless `mean` has the number of the model's input channels."""
        if len(self.mean) != config.in_channels:
            raise ConfigError(
                f"the preprocessing has {len(self.mean)} channels and the model {config.in_channels}; "
                f"use preprocessing.for_channels({config.in_channels})"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Invert `to_dict`; raise a `ConfigError` for unknown or missing fields."""
        return _build(cls, fields)


FAMILIES: dict[str, type[ModelConfig]] = {c.family: c for c in (NFNetConfig, NFResNetConfig, NFRegNetConfig)}


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """Invert `ModelConfig.to_dict`; raise a `ConfigError` for unknown or missing fields."""
    rest = dict(fields)
    family = rest.pop("family", None)
    if not isinstance(family, str):
        raise ConfigError(f"a model configuration needs a 'family', one of {', '.join(FAMILIES)}; found {family!r}")
    _one_of("family", family, FAMILIES)
    return _build(FAMILIES[family], rest)


def _check_keys(cls: type, fields: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            hint = nearest(str(name), known) or "; known: " + ", ".join(known)
            raise ConfigError(f"{cls.__name__} has no field {name!r}{hint}")


def _build(cls: type[T], fields: Mapping[str, Any]) -> T:
    _check_keys(cls, fields)
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**fields)


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ConfigError(
            f"{name} {value!r} is not known; choose one of {', '.join(known)}{nearest(str(value), known)}"
        )


def is_int(value: object, low: int, high: float = math.inf) -> TypeGuard[int]:
    """Return whether `value` is an integer from `low` to `high`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -math.inf < value < math.inf  # false for NaN; integers too large for a float compare exactly


def _integers(config: ModelConfig, name: str, length: int, limit: int) -> None:
    """Check a field of `length` positive integers, and make it a tuple."""
    value = getattr(config, name)
    value = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
    if not isinstance(value, tuple) or len(value) != length or not all(is_int(v, 1, limit) for v in value):
        raise ConfigError(f"{name} must be {length} positive integers up to {limit}, not {value!r}")
    object.__setattr__(config, name, value)


def _positive(config: ModelConfig, name: str) -> None:
    value = getattr(config, name)
    if not _is_number(value) or not 0 < value <= MAX_SIZE:
        raise ConfigError(f"{name} must be positive, and at most {MAX_SIZE}, not {value!r}")


def _check_groups(group_width: object, narrowest: int) -> None:
    if not is_int(group_width, 1, narrowest):
        raise ConfigError(
            f"group_width must be between 1 and the narrowest bottleneck, {narrowest}; not {group_width!r}"
        )
