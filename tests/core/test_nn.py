"""The module shell: it is `nfzoo.model.apply`, and it behaves as torch expects of a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nfzoo
from nfzoo import CheckpointError, ConfigError, NFNet, NfzooError, Preprocessing, create, model, param_groups
from nfzoo.bulk import predict_all
from nfzoo.checkpoint.model_folder import Description
from nfzoo.evaluate import evaluate
from nfzoo.model import is_untrained
from nfzoo.predict import classify
from nfzoo.train.config import TrainConfig
from tests.support.helpers import FAMILIES, SMALL, assert_same, generator, images, random_params, relative

FLOAT32 = 1e-5  # a few dozen layers in float32, in another order
small = pytest.mark.parametrize("name", SMALL)


def shell(name: str = "nfnet", **changes) -> NFNet:
    made = NFNet(SMALL[name].replace(**changes))
    made.load_state_dict(random_params(made.config))
    return made


@small
def test_shell_equals_apply(name):
    module, x = shell(name).eval(), images(SMALL[name])
    params = dict(module.named_parameters())
    assert torch.equal(module(x), model.apply(module.config, params, x))
    assert torch.equal(module.embed(x), model.embed(module.config, params, x))
    for a, b in zip(module.features(x), model.features(module.config, params, x), strict=True):
        assert torch.equal(a, b)


@small
def test_keys_are_the_plans_and_all_state_is_parameters(name):
    module = shell(name)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        k: s for k, (s, _) in model.specs(module.config).items()
    }
    assert list(module.buffers()) == []
    assert module.parameter_kinds().keys() == module.state_dict().keys()


def test_init_is_that_of_the_model():
    cfg = SMALL["nf-regnet"]
    assert_same(NFNet(cfg, generator=generator(2)).state_dict(), model.init(cfg, generator=generator(2)))
    assert {p.dtype for p in NFNet(cfg, dtype=torch.float64).parameters()} == {torch.float64}


@small
def test_without_rates_training_is_evaluation(name):
    module, x = shell(name), images(SMALL[name])
    assert module.training
    assert torch.equal(module(x), module.eval()(x))


def test_training_draws_noise_and_evaluation_does_not():
    module = shell("nfnet", stochastic_depth=0.5, drop_rate=0.5)
    x = images(module.config, 8)
    torch.manual_seed(0)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    noise = module.sample_noise(8, generator=generator())
    expected = model.apply(module.config, dict(module.named_parameters()), x, noise)
    assert torch.equal(module(x, noise), expected)
    module.eval()
    assert torch.equal(module(x), module(x))
    assert torch.equal(module(x, noise), expected)  # noise that is given is used


def test_sample_noise_is_that_of_the_model():
    module = shell("nfnet", stochastic_depth=0.5, drop_rate=0.5)
    expected = model.sample_noise(module.config, 4, generator=generator(1))
    assert_same(module.sample_noise(4, generator=generator(1)), expected)
    assert {v.dtype for v in module.bfloat16().sample_noise(4).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_pickles_compute_the_same(name):
    module = shell(name).eval()
    module.labels = tuple("abcde")
    x = images(module.config)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), module(x))
        assert twin.description == module.description
        assert not twin.training
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), module(x))  # its own parameters


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("assign", [True, False])
def test_from_meta_nothing_is_lost(name, assign):
    """All that a module is stands in its configuration and its state dict."""
    cfg, params = SMALL[name], random_params(SMALL[name])
    empty = NFNet(cfg, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    module = empty if assign else empty.to_empty(device="cpu")
    module.load_state_dict(params, assign=assign)
    x = images(cfg)
    assert torch.equal(module.eval()(x), model.apply(cfg, params, x))
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in module.parameters())


def test_under_the_meta_device_context():
    with torch.device("meta"):
        module = NFNet(SMALL["nfnet"])
    assert all(p.is_meta for p in module.parameters())


def test_load_state_dict_is_strict():
    module, params = shell(), random_params(SMALL["nfnet"])
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        module.load_state_dict({k: v for k, v in params.items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**params, "extra": torch.zeros(1)})


@pytest.mark.parametrize("bad", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3), (1, 3, 32)])
def test_a_wrong_input_is_a_value_error(bad):
    module = shell()
    for call in (module, module.embed, module.features):
        with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\)"):
            call(torch.zeros(bad))


def test_reset_classifier():
    module = shell()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.reset_classifier(7, labels=list("abcdefg"))
    x = images(module.config)
    assert module(x).shape == (2, 7)
    assert module.config.num_classes == 7
    assert module.labels == tuple("abcdefg")
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith("head."))
    assert torch.equal(module(x), model.apply(module.config, dict(module.named_parameters()), x))
    module.reset_classifier(3)
    assert module.labels is None
    with pytest.raises(ConfigError, match="2 labels for 3"):
        module.reset_classifier(3, labels=["a", "b"])
    with pytest.raises(ConfigError, match="num_classes"):
        module.reset_classifier(-1)
    assert module(x).shape == (2, 3)  # an error leaves the module as it was


def test_labels_must_fit():
    with pytest.raises(ConfigError, match="2 labels for 5 classes"):
        NFNet(SMALL["nfnet"], labels=["a", "b"])


def test_preprocessing_comes_from_the_name():
    row = nfzoo.variant("nfnet-test")
    assert nfzoo.create("nfnet-test").preprocessing == row.preprocessing
    assert NFNet(row.config, name="nfnet-test").preprocessing == row.preprocessing
    own = Preprocessing(train_size=1, test_size=2)
    assert NFNet(row.config, name="nfnet-test", preprocessing=own).preprocessing == own


def test_from_params_shares_the_tensors():
    params = random_params(SMALL["nfnet"])
    module = NFNet.from_params(Description(SMALL["nfnet"], Preprocessing(train_size=8, test_size=8)), params)
    assert module.get_parameter("stem.conv0.weight").data_ptr() == params["stem.conv0.weight"].data_ptr()


@small
def test_channels_last_is_only_a_layout(name):
    module, x = shell(name).eval(), images(SMALL[name])
    expected = module(x)
    module = module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    got = module(x.to(memory_format=torch.channels_last))
    assert relative(got, expected) < FLOAT32


def test_the_module_prints_its_blocks():
    text = repr(shell())
    assert "FBlock" in text
    assert "stem" in text


def test_state_dict_hooks_of_submodules_work():
    """Blocks are found by name, as fine-tuning scripts freeze them."""
    module = shell()
    for p in module.get_submodule("stages.1").parameters():
        p.requires_grad_(False)
    module(images(module.config)).sum().backward()
    assert all((p.grad is None) == k.startswith("stages.1.") for k, p in module.named_parameters())


@pytest.mark.parametrize("name", ["nfnet", "nf-resnet", "nf-regnet"])
def test_no_classes_leave_the_pooled_features(name: str, tmp_path: Path) -> None:
    whole = NFNet(SMALL[name])
    x = images(whole.config, 2)
    net = NFNet(SMALL[name].replace(num_classes=0))
    net.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("head.")})
    for made in (net.eval(), NFNet.from_pretrained(net.save_pretrained(tmp_path / "model"))):
        assert torch.equal(made(x), whole.eval().embed(x))
        assert not [key for key in made.state_dict() if key.startswith("head.")]
        torch.testing.assert_close(made.for_inference()(x), made(x))
    whole.reset_classifier(0)
    assert torch.equal(whole(x), net(x))
    whole.reset_classifier(4)
    assert whole(x).shape == (2, 4)
    assert NFNet.from_pretrained(tmp_path / "model", num_classes=3)(x).shape == (2, 3)
    with pytest.raises(ConfigError, match="no classifier"):
        classify(net, list(x))


def test_a_linear_layer_or_identity_as_head(tmp_path: Path) -> None:
    net = NFNet(SMALL["nfnet"].replace(drop_rate=0.5)).eval()
    x = images(net.config, 2)
    features = net.embed(x)
    net.head = torch.nn.Linear(features.shape[1], 3)
    assert torch.equal(net(x), net.head(features))
    net.train()
    noise = {"head": torch.zeros_like(features)}
    assert torch.equal(net(x, noise), net.head.bias.expand(2, 3))  # dropout is still there
    loaded = NFNet.from_pretrained(net.save_pretrained(tmp_path / "model"))
    assert torch.equal(loaded(x), net.eval()(x))
    torch.testing.assert_close(net.for_inference()(x), net(x))
    assert len(param_groups(net)) == 3
    net.head = torch.nn.Identity()
    assert torch.equal(net(x), features)
    assert net.description.config.num_classes == 0
    net.head = torch.nn.Sequential(torch.nn.Linear(features.shape[1], 2))
    assert net(x).shape == (2, 2)
    with pytest.raises(ConfigError, match="head"):
        net.save_pretrained(tmp_path / "other")


def test_a_subclass_loads_as_itself(tmp_path: Path) -> None:
    class Plain(NFNet):
        pass

    class More(NFNet):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.more = torch.nn.Linear(2, 2)

    net = NFNet(SMALL["nfnet"], labels=[f"class {i}" for i in range(SMALL["nfnet"].num_classes)], name="mine").eval()
    x = images(net.config, 2)
    folder = net.save_pretrained(tmp_path / "model")
    for kind in (Plain, More):
        loaded = kind.from_pretrained(folder)
        assert type(loaded) is kind
        assert torch.equal(loaded(x), net(x))
        assert (loaded.labels, loaded.name, loaded.training) == (net.labels, "mine", False)


def test_grey_levels_are_refused_with_the_way_out():
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"not torch.uint8; see model.preprocess"):
        NFNet(SMALL["nfnet"])(x)


def test_what_config_does_not_tell_is_neither_saved_nor_folded(tmp_path: Path) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Scaled(NFNet):
        def forward(self, x: torch.Tensor, noise: Any = None) -> torch.Tensor:
            return 2 * super().forward(x, noise)

    net = NFNet(SMALL["nfnet"], labels=[f"class {i}" for i in range(SMALL["nfnet"].num_classes)]).eval()
    features = net.embed(images(net.config, 1)).shape[1]
    for head in (Doubled(features, 3), torch.nn.Linear(features, 3, bias=False), torch.nn.Sequential()):
        net.head = head
        assert net.labels is None  # they were the old classifier's
        for refused in (net.for_inference, lambda: net.save_pretrained(tmp_path / "model")):
            with pytest.raises((ConfigError, CheckpointError), match="head"):
                refused()
    assert not (tmp_path / "model").exists()
    with pytest.raises(ConfigError, match="Scaled has a forward of its own"):
        Scaled(SMALL["nfnet"]).eval().for_inference()


def test_a_subclass_that_moves_parameters_does_not_load_in_part(tmp_path: Path) -> None:
    class Moved(NFNet):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.classifier, self.head = self.head, torch.nn.Identity()

    folder = NFNet(SMALL["nfnet"]).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"2 tensors of .* have no place in Moved, such as 'head"):
        Moved.from_pretrained(folder)


@pytest.mark.parametrize("name", ["stages.1", "stem", "stages"])
def test_what_holds_blocks_holds_nothing_else(name: str) -> None:
    net = NFNet(SMALL["nfnet"]).eval()
    x = images(net.config, 1)
    parent, _, leaf = name.rpartition(".")
    holder = net.get_submodule(parent)
    old = getattr(holder, leaf)
    for module in (torch.nn.Sequential(*old.children(), torch.nn.ReLU()), torch.nn.Identity()):
        setattr(holder, leaf, module)
        with pytest.raises(ConfigError, match=f"'{name}' must hold"):
            net(x)


def test_a_replaced_pool_is_neither_saved_nor_folded(tmp_path):
    model = nfzoo.create("nfnet-test").eval()
    model.pool = torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten())
    for use in (lambda: model.save_pretrained(tmp_path / "m"), model.for_inference, model.as_modules):
        with pytest.raises(ConfigError, match="with a Sequential as pool can be neither saved nor folded"):
            use()
    assert not (tmp_path / "m").exists()


def test_a_model_on_the_meta_device_is_neither_saved_nor_folded(tmp_path):
    model = nfzoo.create("nfnet-test", device="meta")
    with pytest.raises(ConfigError, match="on the meta device"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="on the meta device"):
        model.for_inference()


def test_hooks_that_a_new_model_lacks_are_told(caplog):
    model = nfzoo.create("nfnet-test")
    model.for_inference()
    assert not caplog.text
    model.get_submodule("stages.1.0").register_forward_hook(lambda *_: None)
    for use in (model.for_inference, model.as_modules):
        caplog.clear()
        use()
        assert "has no hooks, as this one has on 'stages.1.0'" in caplog.text


def test_what_no_model_is_made_of_is_one_clear_error() -> None:
    class Images:
        pass

    def run(**changes: Any) -> TrainConfig:
        return TrainConfig(**{"model": "nfnet-test", "data": "digits", "output": "runs/x", **changes})

    cases: dict[str, tuple[Callable[[], object], str]] = {
        "number": (lambda: nfzoo.create(3), "not 3"),  # type: ignore[arg-type]
        "nothing": (lambda: nfzoo.create(None), "not None"),  # type: ignore[arg-type]
        "name of a class": (lambda: NFNet("nfnet-f0"), "nfzoo.create takes a name"),  # type: ignore[arg-type]
        "weights": (lambda: nfzoo.from_pretrained(SMALL["nfnet"]), "nfzoo.create makes"),  # type: ignore[arg-type]
        "data": (
            lambda: run(data=Images()),
            "data must be text, not an object of the class Images",
        ),
        "model": (lambda: run(model=create("nfnet-test")), "save_pretrained"),
        "epochs": (lambda: run(epochs="3"), "epochs must be a whole number, not '3'"),
        "tune": (lambda: run(tune="heads"), "must be all, head or stages:N"),
        "lr": (lambda: run(optim={"lr": "0.1"}), "optim.lr must be a number or null"),
        "group": (lambda: run(optim={"rate": 1}), "rate"),
        "train": (lambda: nfzoo.train("nfnet-test"), "train takes a TrainConfig"),  # type: ignore[operator]
        "evaluate": (lambda: evaluate(create("nfnet-test"), Images()), "by name, not an object"),  # type: ignore[arg-type]
        "bulk": (lambda: predict_all(create("nfnet-test"), Images(), "x"), "by name, not an object"),  # type: ignore[arg-type]
    }
    for name, (call, said) in cases.items():
        with pytest.raises(NfzooError) as caught:
            call()
        assert said in str(caught.value), name
        assert len(str(caught.value)) < 300
    config = run(data=Path("photos"), optim={"lr": 1}, augment={"mixup": 0.2})
    assert (config.data, config.optim.lr, config.augment and config.augment.mixup) == ("photos", 1, 0.2)


def test_a_configuration_of_ones_own() -> None:
    config = nfzoo.NFNetConfig(depths=(1, 1, 2, 1), widths=(16, 32, 48, 48), group_width=8, stem_width=16)
    model = nfzoo.create(config, num_classes=3, preprocessing=nfzoo.Preprocessing(train_size=32, test_size=48))
    assert (model.config, model.name) == (config.replace(num_classes=3), None)
    assert (model.preprocessing.train_size, model.preprocessing.test_size) == (32, 48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    row = nfzoo.variant("nfnet-test")
    assert nfzoo.create(row).description == nfzoo.create("nfnet-test").description
    assert nfzoo.create(row, labels=("a", "b")).config.num_classes == 2


def test_untrained_is_told_from_the_parameters_that_start_constant() -> None:
    for name in ("nfnet-test", "timm-nf-regnet-b0", "nf-resnet-50"):
        changes: dict[str, Any] = {} if name == "nfnet-test" else {"depths": (1, 1, 1, 1), "widths": (32, 48, 64, 64)}
        model = nfzoo.create(name, **changes)
        assert is_untrained(model.config, dict(model.named_parameters()))
        for kind in ("gain", "bias"):
            params = {key: value.detach().clone() for key, value in model.named_parameters()}
            key = next(key for key, found in model.parameter_kinds().items() if found == kind)
            params[key][0] += 1e-3
            assert not is_untrained(model.config, params), key
    opened = nfzoo.create("nfnet-test", skip_init=0.3)
    for dtype in (torch.float32, torch.bfloat16):  # in which 0.3 is another number
        params = {key: value.to(dtype) for key, value in opened.named_parameters()}
        assert is_untrained(opened.config, params)
        assert not is_untrained(opened.config.replace(skip_init=0.0), params)
    folded = nfzoo.create("nfnet-test").for_inference()
    assert not is_untrained(folded.config, dict(folded.named_parameters()))


def test_another_architecture_has_not_the_name_of_the_zoos() -> None:
    assert nfzoo.create("nfnet-test", num_classes=3, in_channels=1, drop_rate=0.1).name == "nfnet-test"
    assert nfzoo.create("nfnet-test", depths=(1, 1, 1, 2)).name is None
    assert nfzoo.create("nfnet-test", activation="relu").name is None
