"""Configurations: checked when they are made, read back as they were written."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from nfzoo import ConfigError, NFNetConfig, NFRegNetConfig, NFResNetConfig, Preprocessing, model
from nfzoo.config import FAMILIES, RULES, config_from_dict
from nfzoo.variants import VARIANTS
from tests.support.helpers import SMALL
from tests.support.loops import each

BAD_NUMBERS: list[Any] = [0, -1, math.nan, math.inf, -math.inf, True, "2", None, [1], {}, 10**400]
BAD_COUNTS: list[Any] = [0, -1, 1.0, 2.5, math.nan, True, "2", None, [1], {}, 10**400]
BAD_RATES: list[Any] = [-0.1, 1, 1.0, 2, math.nan, math.inf, True, "0.1", None, [0.1], 10**400]
BAD_LISTS: list[Any] = ["1234", (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 0), (1, 2, 3, -4), (1, 2, 3, 4.0), (1, 2, 3, "4")]
BAD_LISTS += [(1, 2, 3, True), None, 4, {}, (1, 2, 3, [4]), (1, 2, 3, None), (1, 2, 3, 10**9), (1, 2, 3, 10**400)]
BAD_NAMES: list[Any] = ["", "selu", None, 1, True, ["relu"], {"a": 1}, math.nan]

FIELDS = {
    "num_classes": [v for v in BAD_COUNTS if v != 0 or v is False],
    "in_channels": BAD_COUNTS,
    "stem_width": BAD_COUNTS,
    "stem_hidden": ["123", (1, 2), (1, 2, 3, 4), (1, 2, 0), (1, 2, 3.0), (1, 2, True), (), 3, {}, (1, 2, 10**400)],
    "group_width": BAD_COUNTS,
    "alpha": BAD_NUMBERS,
    "skip_init": [-0.1, 1.01, math.nan, math.inf, True, "1", None, [1], {}, 10**400],
    "bottleneck": BAD_NUMBERS,
    "se_ratio": BAD_NUMBERS,
    "head_ratio": BAD_NUMBERS,
    "width_factor": BAD_NUMBERS,
    "drop_rate": BAD_RATES,
    "stochastic_depth": BAD_RATES,
    "depths": BAD_LISTS,
    "widths": BAD_LISTS,
    "activation": BAD_NAMES,
    "rules": BAD_NAMES,
    "attention": BAD_NAMES,
    "folded": [0, 1, None, "true", "False", [True], math.nan],
    "output_stride": [4, 64, 0, -32, 32.0, "32", None, True, [32], math.nan],
}
CASES = [
    (family, field, value)
    for family in ("nfnet", "nf-resnet", "nf-regnet")
    for field, values in FIELDS.items()
    if field in {f.name for f in dataclasses.fields(SMALL[family])}
    for value in values
]


def test_every_field_is_tried():
    tried = set(FIELDS)
    assert {f.name for cls in FAMILIES.values() for f in dataclasses.fields(cls)} == tried


@each(("family", "field", "value"), CASES)
def test_a_bad_value_is_a_config_error_that_names_the_field(family, field, value):
    with pytest.raises(ConfigError, match=field):
        SMALL[family].replace(**{field: value})


@each("name", VARIANTS)
def test_configurations_survive_json(name):
    row = VARIANTS[name]
    text = json.dumps([row.config.to_dict(), row.preprocessing.to_dict()], allow_nan=False)
    config, preprocessing = json.loads(text)
    assert config_from_dict(config) == row.config
    assert hash(config_from_dict(config)) == hash(row.config)
    assert Preprocessing.from_dict(preprocessing) == row.preprocessing


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL["nfnet"].alpha = 1.0  # type: ignore[misc]


def test_lists_become_tuples():
    cfg = NFResNetConfig(depths=[1, 1, 1, 1], widths=[8, 8, 8, 8])  # type: ignore[arg-type]
    assert cfg == NFResNetConfig(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8))
    assert model.parameter_count(cfg) > 0


def test_the_stem_halves_backwards_unless_its_channels_are_given():
    cfg = SMALL["nfnet"]
    assert isinstance(cfg, NFNetConfig)
    assert cfg.replace(stem_width=24).stem == (3, 6, 12, 24)
    assert cfg.replace(stem_width=7, stem_hidden=[5, 6, 7]).stem == (5, 6, 7, 7)
    for width in (12, 7):
        with pytest.raises(ConfigError, match="stem_width must be a positive multiple of 8"):
            cfg.replace(stem_width=width)


def test_a_plus_network_saved_with_the_narrow_stem_stays_what_it_was():
    """Until the stem had channels of its own, nfzoo's plus networks ended it in 128 of them, DeepMind's in 192."""
    now = VARIANTS["nfnet-f0-plus"].config
    fields = now.to_dict()
    del fields["stem_hidden"]
    before = config_from_dict({**fields, "stem_width": 128})
    assert isinstance(now, NFNetConfig)
    assert isinstance(before, NFNetConfig)
    assert (before.stem, now.stem) == ((16, 32, 64, 128), (16, 32, 64, 192))
    # The last stem convolution, and the two convolutions of the first block that read it.
    fewer = (9 * 64 + 2) * (192 - 128) + (192 - 128) * (128 + 384)
    assert model.parameter_count(before) == model.parameter_count(now) - fewer
    assert config_from_dict(before.to_dict()) == before
    assert before.to_dict() == {**fields, "stem_width": 128}


def test_an_unknown_field_names_its_neighbour():
    with pytest.raises(ConfigError, match="num_classes"):
        SMALL["nfnet"].replace(num_class=3)
    with pytest.raises(ConfigError, match="num_classes"):
        config_from_dict({**SMALL["nfnet"].to_dict(), "num_class": 3})


def test_missing_fields_and_families():
    fields = SMALL["nf-regnet"].to_dict()
    with pytest.raises(ConfigError, match="widths"):
        config_from_dict({k: v for k, v in fields.items() if k != "widths"})
    for family in (None, 3, ["nfnet"], "nfnett", ""):
        with pytest.raises(ConfigError, match="family"):
            config_from_dict({**fields, "family": family})
    with pytest.raises(ConfigError, match="family"):
        config_from_dict({})
    with pytest.raises(ConfigError, match="did you mean 'nfnet'"):
        config_from_dict({**fields, "family": "nfnett"})


def test_a_field_of_another_family_is_unknown():
    with pytest.raises(ConfigError, match="head_ratio"):
        SMALL["nf-resnet"].replace(head_ratio=2.0)


@each(
    ("cls", "fields"),
    [
        (NFNetConfig, {"group_width": 9, "bottleneck": 0.5, "widths": (16, 32, 32, 32)}),
        (NFNetConfig, {"group_width": 9, "bottleneck": 0.5, "widths": (32, 32, 16, 32)}),
        (NFNetConfig, {"group_width": 17, "bottleneck": 0.5, "widths": (32, 32, 32, 32), "rules": "timm"}),
        (NFRegNetConfig, {"group_width": 13, "width_factor": 0.75, "widths": (16, 32, 32, 32)}),
        (NFRegNetConfig, {"group_width": 8, "width_factor": 1.0, "bottleneck": 0.1, "widths": (16, 16, 16, 16)}),
        (NFRegNetConfig, {"group_width": 8, "width_factor": 0.55, "bottleneck": 0.95, "widths": (16, 16, 16, 16)}),
    ],
)
def test_a_group_wider_than_the_bottleneck_is_refused(cls, fields):
    with pytest.raises(ConfigError, match="group_width"):
        cls(depths=(1, 1, 1, 1), **fields)


@each("rules", RULES)
@each("fraction", [0.1, 0.3, 0.5, 0.77, 0.95, 1.3])
@each("group_width", [1, 3, 4, 8])
@each("width", [5, 8, 15, 16, 22])
def test_what_the_check_lets_through_has_a_plan(rules, fraction, group_width, width):
    """No configuration that was accepted fails later: every block has at least one group, every tensor an element."""
    shape: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (width,) * 4, "rules": rules, "num_classes": 2}
    shape |= {"bottleneck": fraction, "group_width": group_width}
    accepted = 0
    for make in (
        lambda: NFNetConfig(**shape, stem_width=8),
        lambda: NFRegNetConfig(**shape, width_factor=fraction),
        lambda: NFRegNetConfig(**shape),
    ):
        try:
            cfg = make()
        except ConfigError:
            continue
        accepted += 1
        assert all(math.prod(s) > 0 for s, _ in model.specs(cfg).values())
    if fraction * width >= 16:  # wide enough for any of the groups
        assert accepted == 3


@each(("value", "expected"), [(12, 16), (11.9, 16), (3, 8), (20, 24), (64, 64), (33, 32), (30, 32)])
def test_timm_rounds_channels_to_multiples_of_eight(value, expected):
    assert RULES["timm"].channels(value) == expected


def test_rounding_never_loses_a_tenth():
    assert RULES["timm"].channels(10.9) == 16  # 8 is less than 0.9 * 10.9
    assert RULES["timm"].channels(10.9, floor_fraction=0.0) == 8
    assert RULES["deepmind"].channels(10.9) == 10
    assert RULES["deepmind"].channels(0.3) == 1


BAD_PREPROCESSING: list[tuple[str, Any]] = [
    *(("train_size", v) for v in BAD_COUNTS),
    *(("test_size", v) for v in BAD_COUNTS),
    *(("margin", v) for v in (-1, 1.0, True, "1", None, [1], math.nan, 30_000)),
    *(("crop", v) for v in (0, -0.5, 1.1, math.nan, math.inf, True, "1", None, [1.0], 5e-324, 1e-4, 0.0078)),
    *((name, 4097) for name in ("train_size", "test_size")),
    *(("mean", v) for v in ("abc", (), 0.5, None, ("0.5",) * 3, (True,) * 3, (math.nan,) * 3, (math.inf,) * 3, ([],))),
    *(
        ("std", v)
        for v in ("abc", (), 0.5, None, (0.0, 1.0, 1.0), (-1.0,) * 3, (1.0,), (math.nan,) * 3, (10**400,) * 3)
    ),
    *(("resize", v) for v in ("bilinear", None, 3, ["deepmind"])),
]


@each(("field", "value"), BAD_PREPROCESSING)
def test_bad_preprocessing_is_a_config_error(field, value):
    fields = Preprocessing(train_size=32, test_size=32).to_dict()
    with pytest.raises(ConfigError, match=field if field != "mean" else "mean|std"):
        Preprocessing.from_dict({**fields, field: value})


def test_preprocessing_fields_are_checked():
    with pytest.raises(ConfigError, match="test_size"):
        Preprocessing.from_dict({"train_size": 32})
    with pytest.raises(ConfigError, match="test_size"):
        Preprocessing.from_dict({"train_size": 32, "test_size": 32, "tset_size": 3})


def test_a_configuration_of_endless_blocks() -> None:
    """`nfzoo info` would count their operations for minutes."""
    config = VARIANTS["nfnet-test"].config
    assert config.replace(depths=(128, 128, 128, 128)).depths == (128,) * 4
    for depths in ((128, 128, 128, 129), (1024,) * 4):
        with pytest.raises(ConfigError, match="depths must be"):
            config.replace(depths=depths)
