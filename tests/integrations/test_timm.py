"""timm's `create_model` makes nfzoo's models, with nfzoo's arithmetic, and refuses what they do not have."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import nfzoo
from benchmarks import peer
from nfzoo import CheckpointError, ConfigError, NFNet
from nfzoo.conversion.timm import to_timm
from nfzoo.hub.registry import PUBLIC
from nfzoo.variants import VARIANTS
from tests.support.helpers import (
    assert_same,
    images,
    random_params,
    reference_array,
    reference_input,
    reference_params,
    relative,
)
from tests.support.hub_server import HubServer
from tests.support.loops import each

timm: Any = peer.timm()
timm_data, timm_optim = import_module("timm.data"), import_module("timm.optim")
OWN = set(timm.list_models())

import nfzoo.integrations.timm as registered  # noqa: E402  # after it is known what timm has by itself

CLOSE = 1e-5  # float32 sums in another order
FAR = 0.01  # what timm's own arithmetic differs by at least


@pytest.fixture
def digits(tmp_path: Path) -> NFNet:
    row = VARIANTS["nfnet-test"]
    model = NFNet(row.config, preprocessing=row.preprocessing, labels=tuple("abcdefghij"), name=row.name)
    model.load_state_dict(random_params(row.config))
    model.eval().save_pretrained(tmp_path / "digits")
    return model


def test_the_names() -> None:
    names = ["nfzoo", *("nfzoo_" + name.replace("-", "_") for name in nfzoo.list_models())]
    assert set(timm.list_models("nfzoo*")) == set(names)
    assert set(timm.list_models()) - set(names) == OWN
    assert len(timm.list_models("nfzoo*", pretrained=True)) == len(PUBLIC)
    assert "nfzoo_nfnet_f0.dm_in1k" in timm.list_models("nfzoo*", pretrained=True)
    for name in timm.list_models("nfzoo*"):
        assert (
            timm.create_model(name, device="meta").pretrained_cfg["architecture"] == name if name != "nfzoo" else True
        )


def test_a_slash_never_gives_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nfzoo/nfnet_f0", "nfzoo/nfzoo_nfnet_f0"):
        with pytest.raises(ValueError, match="has no source prefix"):
            timm.create_model(name)
    # As timm 1.0.27 does.
    monkeypatch.setattr(timm.models, "parse_model_name", lambda name: ("timm", name.rpartition("/")[2]))
    with pytest.raises(ConfigError, match=r"takes nfzoo/nfnet_f0 for its own nfnet_f0: pip install 'timm>=1\.0\.30'"):
        registered._check_timm()


@torch.no_grad()
def test_deepminds_arithmetic() -> None:
    params = reference_params("nfnet_F0")
    x, expected = reference_input(75, 53), reference_array("nfnet_F0_75x53_1000")["logits"]
    model = timm.create_model("nfzoo_nfnet_f0").eval()
    model.load_state_dict(params)
    assert relative(model(x), expected) < CLOSE
    port = timm.create_model("dm_nfnet_f0").eval()
    port.load_state_dict(to_timm(model.config, params))
    assert relative(port(x), expected) > FAR


def test_random_weights_and_options() -> None:
    torch.manual_seed(0)
    model = timm.create_model("nfzoo_nfnet_test", num_classes=7, in_chans=1, global_pool="avg")
    torch.manual_seed(0)
    expected = nfzoo.create("nfnet-test", num_classes=7, in_channels=1)
    assert_same(model.state_dict(), expected.state_dict())
    assert model.description == expected.description
    assert type(model) is NFNet
    assert model.training
    changed = timm.create_model("nfzoo_nfnet_test", drop_rate=0.1, drop_path_rate=0.3, output_stride=16)
    assert changed.config == expected.config.replace(
        num_classes=10, in_channels=3, drop_rate=0.1, stochastic_depth=0.3, output_stride=16
    )
    assert changed.forward_features(images(changed.config, 1, 64)).shape[2:] == (4, 4)
    assert timm.create_model("nfzoo_nfnet_test", device="meta").head.weight.is_meta
    assert timm.create_model("nfzoo_nfnet_test", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_weights_of_files(digits: NFNet, tmp_path: Path) -> None:
    x, folder = images(digits.config), tmp_path / "digits"
    file = str(folder / "model.safetensors")
    for name in ("nfzoo", "nfzoo_nfnet_test"):
        for source in (str(folder), file):
            for options in (
                {"pretrained_cfg": {"file": source}},
                {"pretrained_cfg": timm.models.PretrainedCfg(file=source)},
                {"pretrained_cfg_overlay": {"file": source}},
            ):
                model = timm.create_model(name, pretrained=True, **options)
                assert model.training
                assert relative(model.eval()(x), digits(x)) == 0
                assert model.labels == digits.labels
    model = timm.create_model("nfzoo_nfnet_test", checkpoint_path=file).eval()
    assert relative(model(x), digits(x)) == 0
    options = {"pretrained": True, "pretrained_cfg": {"file": str(folder)}}
    adapted = timm.create_model("nfzoo", num_classes=3, in_chans=1, drop_rate=0.5, output_stride=8, **options)
    assert (adapted.num_classes, adapted.config.in_channels, adapted.config.drop_rate) == (3, 1, 0.5)
    assert adapted.config.output_stride == 8
    assert (
        relative(adapted.get_parameter("stages.0.0.conv1.weight"), digits.get_parameter("stages.0.0.conv1.weight")) == 0
    )
    digits.for_inference().save_pretrained(tmp_path / "folded")
    folded = timm.create_model("nfzoo", pretrained=True, pretrained_cfg={"file": str(tmp_path / "folded")})
    assert not folded.training
    assert relative(folded(x), digits(x)) < CLOSE


def test_public_weights_come_by_from_pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def stub(source: str, **options: Any) -> NFNet:
        asked.append((source, options["revision"], options["cache_dir"], options["num_classes"]))
        return nfzoo.create("nfnet-f0", device="meta")

    monkeypatch.setattr(registered, "from_pretrained", stub)
    for name in ("nfzoo_nfnet_f0", "nfzoo_nfnet_f0.dm_in1k"):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path, num_classes=7)
    other = {"hf_hub_id": "org/mine@v2"}
    timm.create_model("nfzoo_nfnet_f0", pretrained=True, pretrained_cfg_overlay=other)
    timm.create_model("nfzoo", pretrained=True, pretrained_cfg=other)
    public = ("hub:timm/dm_nfnet_f0.dm_in1k", None, tmp_path, 7)  # the commit that is pinned
    mine = ("hub:org/mine", "v2", None, None)
    assert asked == [public, public, mine, mine]


def test_a_repository(digits: NFNet, tmp_path: Path, hub: HubServer) -> None:
    hub.add("org/digits", {p.name: p.read_bytes() for p in (tmp_path / "digits").iterdir()})
    model = timm.create_model("nfzoo", pretrained=True, pretrained_cfg={"hf_hub_id": "org/digits"})
    assert_same(model.state_dict(), digits.state_dict())


def test_there_and_back_by_timms_own_folders(digits: NFNet, tmp_path: Path, hub: HubServer) -> None:
    folder = tmp_path / "timm"
    timm.models.save_for_hf(digits, folder, model_config={"label_names": list("abcdefghij")}, safe_serialization=True)
    hub.add("org/timm", {p.name: p.read_bytes() for p in folder.iterdir()})
    for source in (f"local-dir:{folder}", "hf-hub:org/timm"):
        model = timm.create_model(source, pretrained=True)
        assert_same(model.state_dict(), digits.state_dict())
        assert model.description._replace(provenance=None) == digits.description
        assert timm.create_model(source, pretrained=True, num_classes=3).num_classes == 3
    loaded = nfzoo.from_pretrained(folder)
    assert_same(loaded.state_dict(), digits.state_dict())
    # timm takes the key `architecture` of nfzoo's own folders for a name.
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'split'"):
        timm.create_model(f"local-dir:{tmp_path / 'digits'}", pretrained=True)


def test_feature_maps(digits: NFNet, tmp_path: Path) -> None:
    x = images(digits.config, 2, 64)
    weights = {"pretrained": True, "pretrained_cfg": {"file": str(tmp_path / "digits")}}
    _, expected = digits.forward_intermediates(x)
    every = timm.create_model("nfzoo", features_only=True, **weights).eval()
    assert all(relative(a, b) == 0 for a, b in zip(every(x), expected, strict=True))
    assert every.feature_info.channels() == [a.shape[1] for a in expected]
    assert every.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert every.out_indices == (0, 1, 2, 3, 4)
    some = timm.create_model("nfzoo_nfnet_test", features_only=True, out_indices=(1, -2), feature_cls="getter")
    assert [a.shape[1] for a in some(x)] == some.feature_info.channels() == [expected[1].shape[1], expected[3].shape[1]]
    torch.stack([a.square().mean() for a in some(x)]).sum().backward()
    wanted = {name for name, p in some.named_parameters() if p.requires_grad}
    assert {name for name, p in some.named_parameters() if p.grad is not None} == wanted
    assert not any(name.startswith(("model.head", "model.final_conv")) for name in wanted)
    timms = timm.create_model("nfnet_f0", features_only=True, device="meta")
    own = timm.create_model("nfzoo_timm_nfnet_f0", features_only=True, device="meta")
    assert own.feature_info.channels() == timms.feature_info.channels()
    assert own.feature_info.reduction() == timms.feature_info.reduction()


def test_transforms() -> None:
    """timm's resize differs from DeepMind's; that of timm's own models is the same to the bit."""
    picture = Image.fromarray(load_sample_image("china.jpg"))
    for name, least, most in (("nfnet_f0", 6.0, 6.2), ("nfnet_l0", 0.0, 0.0)):
        model = timm.create_model(f"nfzoo_{name}", device="meta")
        config = timm_data.resolve_model_data_config(model, use_test_size=True)
        theirs, own = timm_data.create_transform(**config)(picture), model.preprocess(picture)
        assert theirs.shape == own.shape
        levels = 255 * torch.tensor(model.preprocessing.std)[:, None, None] * (theirs - own)
        assert least <= levels.abs().mean() <= most, name  # docs/timm.md has this figure
        assert timm_data.resolve_model_data_config(model)["input_size"][1] == model.preprocessing.train_size


def test_timms_tools(digits: NFNet) -> None:
    optimizer = timm_optim.create_optimizer_v2(digits, opt="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.7)
    kinds = digits.parameter_kinds()
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(digits.get_parameter(n)) for n, kind in kinds.items() if kind in ("weight", "head")}
    assert len({g["lr"] * g.get("lr_scale", 1) for g in optimizer.param_groups}) > 4
    arguments = timm.models._factory.resolve_model_input_args(
        "nfzoo_nfnet_test", {}, num_classes=5
    )  # as its scripts do
    assert timm.create_model(**arguments).num_classes == 5


@each(
    ("name", "options", "match"),
    [
        ("nfzoo_nfnet_test", {"global_pool": "max"}, "global_pool must be 'avg', not 'max'"),
        ("nfzoo_nfnet_test", {"global_pool": ""}, "use forward_features"),
        ("nfzoo_nfnet_test", {"output_stride": 4}, "output_stride must be 8, 16 or 32, not 4"),
        ("nfzoo_nfnet_test", {"drop_rate": 1.5}, r"drop_rate must be in \[0, 1\)"),
        ("nfzoo_nfnet_test", {"in_chan": 3}, "nfzoo_nfnet_test has no option 'in_chan'; did you mean 'in_chans'"),
        ("nfzoo_nfnet_test", {"img_size": 64}, "has no option 'img_size'"),
        ("nfzoo_nfnet_test", {"scriptable": True}, "cannot be scripted"),
        ("nfzoo_nfnet_test", {"out_indices": (1,)}, "are for features_only=True"),
        ("nfzoo_nfnet_test", {"features_only": True, "out_indices": (9,)}, "indices of maps must be from -5 to 4"),
        (
            "nfzoo_nfnet_test",
            {"features_only": True, "feature_cls": "hook"},
            "feature_cls must be 'getter', not 'hook'",
        ),
        ("nfzoo_nfnet_test", {"pretrained_cfg_overlay": {"mean": (0, 0, 0)}}, r"pretrained_cfg says mean=\(0, 0, 0\)"),
        ("nfzoo_nfnet_test", {"pretrained_cfg": {"url": "https://example.org"}}, "pretrained_cfg says url="),
        ("nfzoo_nfnet_test", {"pretrained": True}, "no weights are published for 'nfnet-test'"),
        ("nfzoo_nfnet_f0", {"pretrained": True, "pretrained_cfg": {"tag": "x"}}, "names no weights of nfnet-f0"),
        ("nfzoo", {}, "with pretrained=True; for random weights give a name"),
        ("nfzoo", {"pretrained": True}, "nfzoo needs pretrained_cfg="),
        (
            "nfzoo",
            {"pretrained": True, "pretrained_cfg": {"file": "org/name"}},
            "there is no file or folder 'org/name'",
        ),
    ],
)
def test_what_cannot_be_done(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=match):
        timm.create_model(name, **options)


def test_weights_of_another_model_are_refused(digits: NFNet, tmp_path: Path) -> None:
    file = {"file": str(tmp_path / "digits")}
    with pytest.raises(CheckpointError, match="digits is no nfnet-f0, but of another architecture"):
        timm.create_model("nfzoo_nfnet_f0", pretrained=True, pretrained_cfg=file)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("nfzoo_nfnet_f0.ra2_in1k", pretrained=True)


def test_the_code_of_the_documentation(digits: NFNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/timm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^<!-- not run: needs timm -->\n```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 2
    digits.save_pretrained(tmp_path / "runs/digits")
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
