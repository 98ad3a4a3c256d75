"""The table of variants: counted by other people's code and tables, and every row runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nfzoo
from nfzoo import ConfigError, UnknownModelError, list_models, model
from nfzoo.cli.list_models import COUNTS
from nfzoo.variants import VARIANTS, variant
from tests.support.helpers import DEEPMIND_COUNTS, TIMM, timm_golden
from tests.support.loops import each

# arXiv 2102.06171, table 1 and appendix; the test sizes are those of the table.
PAPER_PARAMETERS = {0: 71.5e6, 1: 132.6e6, 2: 193.8e6, 3: 254.9e6, 4: 316.1e6, 5: 377.2e6, 6: 438.4e6}
PAPER_FLOPS = {0: 12.38e9, 1: 35.54e9, 2: 62.59e9, 3: 114.76e9, 4: 215.24e9, 5: 289.76e9, 6: 377.28e9}
PARAMETER_DIGITS = 0.05e6  # half of the last digit printed
FLOP_DIGITS = 0.005e9
STEM_STRIDES = [2, 4, 8, 16, 32]


def haiku_kernels(config, prefix):
    """Shapes of the kernels whose names begin with `prefix`, HWIO."""
    shapes = [shape for key, (shape, _) in model.specs(config).items() if key.startswith(prefix)]
    return [[*shape[2:], shape[1], shape[0]] for shape in shapes if len(shape) == 4]


@each("name", DEEPMIND_COUNTS)
def test_deepminds_code_counts_the_same(name):
    config, counts = VARIANTS[name].config, DEEPMIND_COUNTS[name]
    assert model.parameter_count(config) == counts["parameters"]
    assert len(model.specs(config)) == counts["arrays"]
    assert haiku_kernels(config, "stem.") == counts["stem"]


def test_every_variant_is_counted_by_others():
    assert VARIANTS.keys() == DEEPMIND_COUNTS.keys() | set(TIMM.values()) | {"nfnet-s0", "nfnet-test"}
    assert not DEEPMIND_COUNTS.keys() & {name for name in TIMM.values() if VARIANTS[name].config.rules == "timm"}


def conv(kernel, inputs, outputs, groups=1):
    return kernel**2 * inputs // groups * outputs + 2 * outputs  # and a gain and a bias


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_the_model_for_small_images_counted_by_hand():
    count = conv(3, 3, 8) + conv(3, 8, 8) + conv(3, 8, 16) + conv(3, 16, 32)
    inputs = 32
    for outputs in (64, 192, 384, 384):
        middle = outputs // 2
        count += conv(1, inputs, outputs)  # the shortcut: each stage downsamples
        count += conv(1, inputs, middle) + 2 * conv(3, middle, middle, middle // 32) + conv(1, middle, outputs)
        inputs = outputs
    assert model.parameter_count(VARIANTS["nfnet-s0"].config) == count + conv(1, 384, 768) + linear(768, 10)


def test_the_test_model_counted_by_hand():
    count = conv(3, 3, 4) + conv(3, 4, 8) + conv(3, 8, 16) + conv(3, 16, 32)
    inputs = 32
    for outputs in (32, 64, 128, 128):
        middle = outputs // 2
        count += conv(1, inputs, outputs) if outputs > 32 else 0  # the shortcut of a stage that downsamples
        count += conv(1, inputs, middle) + 2 * conv(3, middle, middle, middle // 16)
        count += conv(1, middle, outputs) + linear(outputs, middle) + linear(middle, outputs) + 1
        inputs = outputs
    assert model.parameter_count(VARIANTS["nfnet-test"].config) == count + conv(1, 128, 256) + linear(256, 10)


@each("level", PAPER_PARAMETERS)
def test_the_papers_parameter_counts(level):
    count = model.parameter_count(VARIANTS[f"nfnet-f{level}"].config)
    assert count == pytest.approx(PAPER_PARAMETERS[level], abs=PARAMETER_DIGITS)


@each("arch", TIMM)
def test_timm_counts_the_same(arch):
    config = VARIANTS[TIMM[arch]].config
    for classes, count in timm_golden()["architectures"][arch]["parameters"].items():
        assert model.parameter_count(config.replace(num_classes=int(classes))) == count


def test_all_of_timms_models_are_compared():
    # timm's own test model is in the golden data too; the zoo has no such row, test_reference.py builds it.
    assert TIMM.keys() == timm_golden()["architectures"].keys() - {"test_nfnet"}


@each("level", PAPER_FLOPS)
def test_the_papers_multiply_accumulates(level):
    row = VARIANTS[f"nfnet-f{level}"]
    macs = model.mac_count(row.config, row.preprocessing.test_size)
    assert macs == pytest.approx(PAPER_FLOPS[level], abs=FLOP_DIGITS)


@each("name", ["nfnet-f0-plus", "nf-resnet-50-se", "nf-regnet-b0", "eca-nfnet-l0", "timm-nf-regnet-b0", "nfnet-test"])
def test_torch_counts_the_same_multiply_accumulates(name):
    torch_counts_the_same(name)


@pytest.mark.long
@each("name", VARIANTS)
def test_torch_counts_the_same_multiply_accumulates_of_all(name):
    torch_counts_the_same(name)


def torch_counts_the_same(name):
    cfg, size = VARIANTS[name].config, VARIANTS[name].preprocessing.test_size
    params = model.init(cfg, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.apply(cfg, params, torch.empty((1, cfg.in_channels, size, size), device="meta"))
    assert model.mac_count(cfg, size) * 2 == counter.get_total_flops()


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_on_shapes(name):
    """Meta tensors: init, logits and five feature maps at strides 2 to 32."""
    cfg, preprocessing, source = VARIANTS[name].config, VARIANTS[name].preprocessing, VARIANTS[name].source
    params = model.init(cfg, device="meta")
    assert {k: tuple(v.shape) for k, v in params.items()} == {k: s for k, (s, _) in model.specs(cfg).items()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in params.values())
    x = torch.empty((2, cfg.in_channels, 64, 96), device="meta")
    assert model.apply(cfg, params, x).shape == (2, cfg.num_classes)
    maps = model.features(cfg, params, x)
    assert [m.shape[-2:] for m in maps] == [(64 // s, 96 // s) for s in STEM_STRIDES]
    assert len(preprocessing.mean) == cfg.in_channels
    assert source


def test_every_variant_runs_on_shapes_with_two_blocks_a_stage():
    # Many differ in depth and rates alone.
    shapes = {shallow(row.config.replace(stochastic_depth=0.0, drop_rate=0.0)): name for name, row in VARIANTS.items()}
    assert len(shapes) > 20
    for i, name in enumerate(shapes.values()):
        keeps_a_stride(name, (8, 16, 32)[i % 3])


@pytest.mark.long
@each("name", VARIANTS)
@each("output_stride", [8, 16, 32])
def test_every_variant_keeps_every_stride(name, output_stride):
    keeps_a_stride(name, output_stride)


def shallow(cfg):
    """The third and later blocks of a stage are the second again, so two of each say all."""
    return cfg.replace(depths=tuple(min(d, 2) for d in cfg.depths))


def keeps_a_stride(name, output_stride):
    cfg = VARIANTS[name].config
    assert model.specs(cfg.replace(output_stride=output_stride)) == model.specs(cfg)
    cfg = shallow(cfg.replace(output_stride=output_stride))
    params = model.init(cfg, device="meta")
    x = torch.empty((1, cfg.in_channels, 75, 53), device="meta")
    maps = model.features(cfg, params, x)
    strides = [min(s, output_stride) for s in STEM_STRIDES]
    assert [m.shape[-2:] for m in maps] == [(-(-75 // s), -(-53 // s)) for s in strides], name


def test_names_and_rows_agree():
    assert list_models() == list(VARIANTS)
    assert list_models("nfnet-f0*") == ["nfnet-f0", "nfnet-f0-plus"]
    assert set(list_models("nfnet-*", pretrained=True)) < set(list_models("nfnet-*"))
    assert set(dir(nfzoo)) == set(nfzoo.__all__)
    assert all(name == row.name for name, row in VARIANTS.items())
    assert all(variant(name) is VARIANTS[name] for name in VARIANTS)
    assert len({(row.config, row.preprocessing) for row in VARIANTS.values()}) == len(VARIANTS)


def test_the_counts_that_are_listed_are_the_plans():
    counts = json.loads(files("nfzoo").joinpath(COUNTS).read_text())
    assert counts == {name: model.parameter_count(row.config) for name, row in VARIANTS.items()}


def test_public_names_and_modules_are_imported_on_first_use():
    code = "import nfzoo; assert 'torch' not in __import__('sys').modules; "
    uses = [*(f"nfzoo.{name}" for name in nfzoo.__all__), "nfzoo.model.apply", "nfzoo.optim", "nfzoo.step.train_step"]
    subprocess.run([sys.executable, "-c", code + "; ".join(uses)], check=True)
    with pytest.raises(AttributeError, match="'nothing'"):
        nfzoo.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "near"), [("nfnet-f8", "nfnet-f"), ("NFNet-F0", "'nfnet-f0'"), ("nf_resnet50", "nf-")]
)
def test_an_unknown_name_gives_the_nearest(name, near):
    for look in (variant, nfzoo.create):
        with pytest.raises(UnknownModelError, match="did you mean") as caught:
            look(name)
        assert near in str(caught.value)
        assert repr(name) in str(caught.value)


def test_a_name_like_no_other_gives_none():
    with pytest.raises(UnknownModelError) as caught:
        variant("zzz")
    assert "did you mean" not in str(caught.value)


def test_create_changes_fields():
    made = nfzoo.create("nfnet-test", num_classes=3, in_channels=1, output_stride=8)
    assert made(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    assert len(made.preprocessing.mean) == len(made.preprocessing.std) == 1
    with pytest.raises(ConfigError, match="num_classes"):
        nfzoo.create("nfnet-test", num_clases=3)


def test_create_takes_labels():
    made = nfzoo.create("nfnet-test", labels=["cat", "dog"])
    assert made.config.num_classes == 2
    assert made.labels == ("cat", "dog")
    with pytest.raises(ConfigError, match="2 labels for 3 classes"):
        nfzoo.create("nfnet-test", labels=["cat", "dog"], num_classes=3)
