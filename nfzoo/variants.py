"""The table of variants: the name, configuration, preprocessing and source of every model of the zoo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nfzoo.config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig, Preprocessing
from nfzoo.errors import UnknownModelError, nearest, shown

PAPER_1 = "arXiv 2101.08692"
PAPER_2 = "arXiv 2102.06171"
TIMM = "timm 1.0, models/nfnet.py"


class Variant(NamedTuple):
    """One row of the table; `top1` is the ImageNet accuracy in percent that the source reports, if it does."""

    name: str
    config: ModelConfig
    preprocessing: Preprocessing
    source: str
    top1: float | None = None


def _scaled(depths: tuple[int, ...], factor: int) -> tuple[int, ...]:
    return tuple(d * factor for d in depths)


def _nfnets() -> Iterator[Variant]:
    # Train size, test size, dropout and ImageNet top-1 of arXiv 2102.06171; F6's top-1 is with SAM.
    rows = [
        (192, 256, 0.2, 83.6),
        (224, 320, 0.3, 84.7),
        (256, 352, 0.4, 85.1),
        (320, 416, 0.4, 85.7),
        (384, 512, 0.5, 85.9),
        (416, 544, 0.5, 86.0),
        (448, 576, 0.5, 86.5),
        (480, 608, 0.5, None),
    ]
    # The released code's stem is 16, 32, 64 and half the first stage, which for the base networks is the default.
    plus: dict[str, Any] = {"widths": (384, 768, 2048, 2048), "stem_width": 384 // 2, "stem_hidden": (16, 32, 64)}
    for n, (train, test, drop, top1) in enumerate(rows):
        cfg = NFNetConfig(depths=_scaled((1, 2, 6, 3), n + 1), drop_rate=drop, stochastic_depth=0.25)
        size = Preprocessing(train_size=train, test_size=test)
        yield Variant(f"nfnet-f{n}", cfg, size, PAPER_2, top1)
        yield Variant(f"nfnet-f{n}-plus", cfg.replace(**plus), size, f"{PAPER_2}, released code")


_RESNETS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}


def _nf_resnets() -> Iterator[Variant]:
    size = Preprocessing(train_size=224, test_size=256)
    for depth, depths in _RESNETS.items():
        cfg = NFResNetConfig(depths=depths, stochastic_depth=0.1)
        yield Variant(f"nf-resnet-{depth}", cfg, size, PAPER_1)
        yield Variant(f"nf-resnet-{depth}-se", cfg.replace(attention="se"), size, PAPER_1)


_REGNET_WIDTHS = [
    (48, 104, 208, 440),
    (48, 104, 208, 440),
    (56, 112, 232, 488),
    (56, 128, 248, 528),
    (64, 144, 288, 616),
    (80, 168, 336, 704),
    (88, 184, 376, 792),
    (96, 208, 416, 880),
    (104, 232, 456, 968),
]
_REGNET_DEPTHS = [
    (1, 3, 6, 6),
    (2, 4, 7, 7),
    (2, 4, 8, 8),
    (2, 5, 9, 9),
    (2, 6, 11, 11),
    (3, 7, 14, 14),
    (3, 8, 16, 16),
    (4, 10, 19, 19),
    (4, 11, 22, 22),
]
_REGNET_SIZES = [
    (192, 224),
    (224, 256),
    (240, 272),
    (288, 320),
    (320, 384),
    (384, 456),
    (448, 528),
    (512, 600),
    (600, 672),
]
_REGNET_DROP = [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5]


def _nf_regnets() -> Iterator[Variant]:
    for n, (depths, widths, (train, test), drop) in enumerate(
        zip(_REGNET_DEPTHS, _REGNET_WIDTHS, _REGNET_SIZES, _REGNET_DROP, strict=True)
    ):
        cfg = NFRegNetConfig(depths=depths, widths=widths, drop_rate=drop, stochastic_depth=0.1)
        size = Preprocessing(train_size=train, test_size=test)
        yield Variant(f"nf-regnet-b{n}", cfg, size, f"{PAPER_1}, released code")


def _timm_size(train: int, test: int, crop: float) -> Preprocessing:
    return Preprocessing(train_size=train, test_size=test, resize="shortest-edge", crop=crop)


def _light_nfnets() -> Iterator[Variant]:
    light = NFNetConfig(
        depths=(1, 2, 6, 3),
        rules="timm",
        activation="silu",
        bottleneck=0.25,
        group_width=64,
        se_ratio=0.25,
        head_ratio=1.5,
    )
    yield Variant("nfnet-l0", light, _timm_size(224, 288, 1.0), TIMM)
    eca = light.replace(attention="eca")
    yield Variant("eca-nfnet-l0", eca, _timm_size(224, 288, 1.0), TIMM)
    eca = eca.replace(head_ratio=2.0)
    for n, (train, test) in enumerate([(256, 320), (320, 384), (352, 448)], start=1):
        cfg = eca.replace(depths=_scaled((1, 2, 6, 3), n + 1))
        yield Variant(f"eca-nfnet-l{n}", cfg, _timm_size(train, test, 1.0), TIMM)


def _timm_forms() -> Iterator[Variant]:
    sizes = [(192, 256), (224, 320), (256, 352), (320, 416), (384, 512), (416, 544), (448, 576), (480, 608)]
    for n, (train, test) in enumerate(sizes):
        cfg = NFNetConfig(depths=_scaled((1, 2, 6, 3), n + 1), rules="timm", activation="gelu")
        yield Variant(f"timm-nfnet-f{n}", cfg, _timm_size(train, test, 0.9), TIMM)
    for depth, depths in {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}.items():
        cfg = NFResNetConfig(depths=depths, rules="timm")
        test, crop = (288, 0.94) if depth == 50 else (224, 0.9)
        size = _timm_size(256 if depth == 50 else 224, test, crop)
        yield Variant(f"timm-nf-resnet-{depth}", cfg, size, TIMM)
        yield Variant(f"timm-nf-seresnet-{depth}", cfg.replace(attention="se"), _timm_size(224, 224, 0.9), TIMM)
        yield Variant(f"timm-nf-ecaresnet-{depth}", cfg.replace(attention="eca"), _timm_size(224, 224, 0.9), TIMM)
    sizes = [(192, 256), (256, 288), (240, 272), (288, 320), (320, 384), (384, 456)]
    for n, (train, test) in enumerate(sizes):
        cfg = NFRegNetConfig(depths=_REGNET_DEPTHS[n], widths=_REGNET_WIDTHS[n], rules="timm")
        yield Variant(f"timm-nf-regnet-b{n}", cfg, _timm_size(train, test, 0.9), TIMM)


def _tiny() -> Iterator[Variant]:
    cfg = NFNetConfig(
        depths=(1, 1, 1, 1), widths=(32, 64, 128, 128), group_width=16, stem_width=32, num_classes=10, head_ratio=2.0
    )
    size = Preprocessing(train_size=32, test_size=32, margin=0)
    yield Variant("nfnet-test", cfg, size, "nfzoo, for tests and the demonstration")


def _small_images() -> Iterator[Variant]:
    # Images of about 30 pixels are enlarged, since the stem has stride 4. Its channels are few, since it sees most
    # pixels. ReLU and groups of 32 without attention take little time on a CPU. Branches start open, as runs
    # are short.
    cfg = NFNetConfig(
        depths=(1, 1, 1, 1),
        widths=(64, 192, 384, 384),
        rules="timm",
        activation="relu",
        group_width=32,
        attention="none",
        stem_width=32,
        stem_hidden=(8, 8, 16),
        num_classes=10,
        skip_init=1.0,
    )
    size = Preprocessing(train_size=48, test_size=48, margin=0)
    yield Variant("nfnet-s0", cfg, size, "nfzoo, for small images")


_ROWS = (_nfnets, _nf_resnets, _nf_regnets, _light_nfnets, _timm_forms, _small_images, _tiny)
VARIANTS: dict[str, Variant] = {v.name: v for rows in _ROWS for v in rows()}


def variant(name: str) -> Variant:
    """Return the row of `name`.

    Raises:
        UnknownModelError: for an unknown name; the message has the nearest ones.
    """
    if not isinstance(name, str):
        raise UnknownModelError(
            f"a model is a name such as 'nfnet-f0' or a configuration such as nfzoo.NFNetConfig(), not {shown(name)}"
        )
    if name not in VARIANTS:
        raise UnknownModelError(f"no model is called {name!r}{nearest(name, VARIANTS)}; `nfzoo list` shows all")
    return VARIANTS[name]
