"""The recipes that come with nfzoo: they parse, name models of the zoo, and say what the papers say."""

import math
from pathlib import Path

import pytest
import yaml

from nfzoo.errors import ConfigError
from nfzoo.train import config as recipe
from nfzoo.train import run as train
from nfzoo.train.config import recipes
from nfzoo.variants import VARIANTS

RECIPES = recipes.shipped()
NEEDED = ["--data", "digits", "--output", "x"]

# arXiv 2102.06171, table 1 (drop rate, train and test size) and appendix A.3 (RandAugment's magnitude).
F = {
    0: (0.2, 192, 256, 5),
    1: (0.3, 224, 320, 10),
    2: (0.4, 256, 352, 10),
    3: (0.4, 320, 416, 15),
    4: (0.5, 384, 512, 15),
    5: (0.5, 416, 544, 15),
    6: (0.5, 448, 576, 15),
}


def parsed(name: str) -> recipe.TrainConfig:
    return recipes.parse(["--recipe", name, *NEEDED])


def test_there_are_those_that_the_papers_ask_for() -> None:
    wanted = {f"nfnet-f{n}-imagenet" for n in F} | {"nfnet-f5-sam-imagenet", "nfnet-f6-sam-imagenet"}
    wanted |= {f"nfnet-f{n}-finetune" for n in F} | {"head", "nfnet-transfer", "nfnet-f0-small-batch"}
    wanted |= {"fashion-mnist"}
    wanted |= {f"nf-regnet-b{n}-imagenet" for n in range(6)} | {"nf-resnet-50-imagenet", "nf-resnet-200-imagenet"}
    assert set(RECIPES) == wanted


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_names_its_source(name: str) -> None:
    config = parsed(name)
    assert config.model in VARIANTS
    text = RECIPES[name].read_text()
    assert text.startswith("# ")
    assert "arXiv" in text or "practice" in text
    assert set(yaml.safe_load(text)) <= set(config.to_dict())


@pytest.mark.parametrize("n", F)
def test_pretraining_is_the_papers(n: int) -> None:
    names = [f"nfnet-f{n}-imagenet", *([f"nfnet-f{n}-sam-imagenet"] if n in (5, 6) else [])]
    for name in names:
        config, (drop, train_size, test_size, magnitude) = parsed(name), F[n]
        assert (config.model, config.pretrained) == (f"nfnet-f{n}", False)
        assert (config.epochs, config.batch_size, config.mixed_precision) == (360, 4096, "bf16")
        assert (config.drop_rate, config.train_size, config.test_size) == (drop, train_size, test_size)
        assert config.stochastic_depth == 0.25
        a, o = config.augment, config.optim
        assert a is not None
        assert (a.scale, a.ratio, a.flip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
        assert (a.layers, a.magnitude, a.mixup, a.cutmix) == (4, magnitude, 0.2, True)
        assert (o.name, o.lr, o.momentum, o.nesterov) == ("sgd", pytest.approx(0.1 * 4096 / 256), 0.9, True)
        assert (o.weight_decay, o.clip, o.warmup_epochs, o.min_lr) == (2e-5, 0.01, 5, 0)
        assert (o.label_smoothing, o.ema_decay) == (0.1, 0.99999)
        assert (o.sam_rho, o.sam_fraction) == ((0.05, 0.2) if "sam" in name else (None, 0.2))
        row = VARIANTS[config.model]  # the zoo's own defaults are these too
        assert (row.config.drop_rate, row.preprocessing.train_size, row.preprocessing.test_size) == F[n][:3]


def test_regnets_are_the_released_configurations() -> None:
    for n in range(6):
        config = parsed(f"nf-regnet-b{n}-imagenet")
        assert config.optim.weight_decay == pytest.approx(5e-5 + n * 1e-5)
        assert (config.optim.lr, config.optim.min_lr, config.optim.clip) == (0.4, 0.001, None)
        assert config.drop_rate == VARIANTS[config.model].config.drop_rate


def test_transfer_takes_the_papers_steps() -> None:
    config = parsed("nfnet-transfer")
    steps_per_epoch = 1_281_167 // config.batch_size
    assert config.epochs * steps_per_epoch == 15_000
    assert config.optim.warmup_epochs * steps_per_epoch == 5_000
    assert math.isclose(config.optim.lr or 0, 0.1)


def test_an_option_behind_a_recipe_wins() -> None:
    config = recipes.parse(["--recipe=nfnet-f1-finetune", *NEEDED, "--optim.clip", "0.3", "--epochs", "2"])
    assert (config.optim.clip, config.epochs, config.optim.ema_decay) == (0.3, 2, 0.999)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("head").write_text("model: nfnet-test\nepochs: 3\n")
    assert parsed("head").epochs == 3


def test_an_unknown_recipe_has_near_ones_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nfnet-f1-finetune'"):
        parsed("nfnet-f1-finetun")
    with pytest.raises(ConfigError, match="there are fashion-mnist, head, nf-regnet-b0-imagenet"):
        parsed("zzz")


@pytest.mark.parametrize(
    "name", ["nfnet-f1-finetune", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nfnet-f6-sam-imagenet", "head"))]
)
def test_recipes_run(name: str, tmp_path: Path) -> None:
    small = ["--model", "nfnet-test", "--train-size", "16", "--test-size", "16", "--epochs", "1"]
    small += ["--batch-size", "144", "--accumulation", "2", "--pretrained", "null", "--validation-fraction", "0.8"]
    assert train.main(["--recipe", name, "--data", "digits", "--output", str(tmp_path / "run"), *small]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [a\nx", "line 2: expected"),
        ("modell: nfnet-f0", "no option 'modell'; did you mean 'model'"),
        ("optim: {lrr: 3}", "no option 'optim.lrr'; did you mean 'lr'"),
        ("augment:\n  layer: 4", "no option 'augment.layer'; did you mean 'layers'"),
        ("just text", "holds a str, not options"),
        ("- 1", "holds a list, not options"),
        ("augment: 3", "augment must be a mapping of options such as cutmix, not 3"),
        ("? [a]\n: 1", "line 1: found unhashable key"),
        ("epochs: 1\nepochs: 2", "line 2: 'epochs' is there twice"),
        (b"\xff\xfe", "cannot be read: 'utf-8'"),
        ("optim: {lr: 1}\noptim.lr: 2", "optim is there twice, the second time as optim.lr"),
        ("a: &a [x, x]\nb: [*a, *a]", r"line 2: '\*a' refers to another place; write its content out"),
        ("optim: {options: " + "[" * 9999, "line 1: it is nested deeper than 20 levels"),
        ("allow_import: true", "no option 'allow_import'"),
        ("print_config: true", "no option 'print_config'"),
        ("allow_pickle: true", "allow_pickle: true, which is no part of a recipe"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["--recipe", str(path)], [f"--recipe={path}"]):
        with pytest.raises(ConfigError, match=message) as raised:
            recipes.parse([*arguments, *NEEDED])
        assert repr(str(path)) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: abc", "epochs must be a whole number, not 'abc'"),
        ("optim:\n  lr: big", "optim.lr must be a number, not 'big'"),
        ("seed: null", "seed must have a value, not null; leave it out for the default"),
        ("optim: {momentum: null}", "optim.momentum must have a value, not null; leave it out for the default"),
        ("optim: {min_lr: .inf}", "optim.min_lr must be a finite number, not inf"),
        ("batch_size: 0", "batch_size must be at least 1, not 0"),
        ("resume: 1", "resume must be true or false, not 1"),
        ("model: 3", "model must be text, not 3"),
        ("augment: {scale: [0.5]}", "augment.scale must be a list of 2 numbers, not [0.5]"),
        ("optim: {options: 3}", "optim.options must be a mapping, not 3"),
        ("augment: {mixup: yes please}", "augment.mixup must be a number, not 'yes please'"),
        ("mixed_precision: half", "mixed_precision must be one of no, bf16, fp16, not 'half'"),
    ],
)
@pytest.mark.parametrize("flag", [["--recipe", "RECIPE"], ["--recipe=RECIPE"]], ids=["two words", "one word"])
def test_a_value_of_the_wrong_kind_is_named_with_its_recipe(content, message, flag, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    others = ["--model", "nfnet-test", "--data", "digits", "--output", "x"]
    with pytest.raises(ConfigError) as raised:
        recipes.parse([*(word.replace("RECIPE", str(path)) for word in flag), *others])
    assert str(raised.value) == f"the recipe {str(path)!r}: {message}"
    with pytest.raises(ConfigError, match=r"^epochs must be a whole number, not 1\.5$"):
        recipes.parse(["--recipe", "nfnet-f0-finetune", *others, "--epochs", "1.5"])


def test_dashes_and_underscores_are_the_same() -> None:
    needed = ["--model", "nfnet-test", *NEEDED]
    for options in (
        ["--batch-size", "8", "--optim.weight-decay", "1e-3"],
        ["--batch_size=8", "--optim.weight_decay=1e-3"],
    ):
        config = recipes.parse([*needed, *options])
        assert (config.batch_size, config.optim.weight_decay) == (8, 1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optim", "{lr: 3}", "--optim.clip", "null"], {"lr": 3.0, "clip": None}),
        (
            ["--optim.name", "adamw", "--optim.options", "{eps: 1e-8, foreach: no}"],
            {"options": {"eps": 1e-8, "foreach": False}},
        ),
        (["--optim.name", "adamw", "--optim.options.weight_betas", "[1, 2]"], {"options": {"weight_betas": [1, 2]}}),
        (["--optim.options", "{a: 1}", "--optim.options", "{b: 1}", "--optim.name", "adamw"], {"options": {"b": 1}}),
    ],
)
def test_options_of_the_optimizer(options: list[str], expected: dict[str, object]) -> None:
    found = vars(recipes.parse(["--model", "nfnet-test", *NEEDED, *options]).optim)
    assert {name: found[name] for name in expected} == expected


EVIL = """
import pathlib
pathlib.Path("was imported").touch()
from torch.optim import Adam
"""


def test_a_recipe_imports_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evil.py").write_text(EVIL)
    arguments = ["--model", "nfnet-test", "--data", "digits", "--epochs", "1", "--batch-size", "1000"]
    arguments += ["--train-size", "16", "--test-size", "16", "--output", "run"]
    for name in (
        "evil.Adam",
        "evil",
        "torch.optim.adam.evil.Adam",
        "torch.optim.",
        "Torch.optim.Adam",
        "torch.evil.Adam",
    ):
        Path("theirs.yaml").write_text(f"optim: {{name: {name}}}")
        assert train.main([*arguments, "--recipe", "theirs.yaml"]) == 2, name
        error = capsys.readouterr().err
        assert f"the recipe 'theirs.yaml': optim.name '{name}' is neither sgd" in error, name
        assert "pass --allow-import" in error
        assert train.main([*arguments, "--optim.name", name]) == 2, name
    assert not Path("was imported").exists()
    assert not Path("run").exists()
    assert train.main([*arguments, "--optim.name", "evil.Adam", "--allow-import"]) == 0
    assert Path("was imported").exists()
    assert train.main(["--recipe", "run/train.yaml", "--overwrite", "true"]) == 2  # what it wrote asks anew
    assert "pass --allow-import" in capsys.readouterr().err


def test_naming_one_option_of_augment_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: nfnet-test\nmixed_precision: no\naugment: {layers: 3, mixup: 0.2}\n")
    config = recipes.parse(["--recipe", str(path), *NEEDED, "--augment.layers", "4"])
    assert config.augment is not None
    assert (config.augment.layers, config.augment.mixup, config.mixed_precision) == (4, 0.2, "no")
    assert recipes.parse(["--recipe", str(path), *NEEDED, "--augment", "null"]).augment is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "^missing --data, --output; give what is missing as an option or in a recipe$"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--optim.lr", "[1"], r"^optim.lr must be a number, not '\[1'$"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.parse(["--model", "nfnet-test", *options])


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--seed N of everything random (default: 0)" in text
    assert "--epochs N passes over the training images; by default 15, or as many as take 100 steps --" in text
    assert "--optim.momentum X of SGD (default: 0.9)" in text
    assert "_" not in "".join(word for word in text.split() if word.startswith("--"))
