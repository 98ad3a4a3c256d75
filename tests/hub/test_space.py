"""What the Space shows and says, without Gradio; tests/browser/check_space.py looks at the page itself."""

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nfzoo
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.cli.main import main as cli
from nfzoo.hub.registry import PUBLIC
from nfzoo.hub.space import app
from nfzoo.hub.space.app import Gallery, SpaceError, named, offered
from nfzoo.predict import classify

SPACE = Path(app.__file__).parent


def save(folder: Path, labels: Sequence[str], seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return nfzoo.create("nfnet-test", labels=list(labels), generator=generator).save_pretrained(folder)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save(tmp_path / "models" / "letters", "abcdefgh")
    save(tmp_path / "models" / "pets", ["cat", "dog"])
    return tmp_path / "models"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


# -- the answer


def test_answer_is_what_the_model_predicts(models: Path, picture: Path) -> None:
    gallery = Gallery([str(models / "letters"), str(models / "pets")])
    assert gallery.choices == ["letters", "pets"]
    found = gallery.look(str(picture), "letters")
    assert found is not None
    model = nfzoo.from_pretrained(models / "letters")
    assert list(found.items()) == classify(model, [model.preprocess(picture)], topk=5)[0]
    assert len(found) == 5
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(gallery.look(picture, "pets") or {}) == {"cat", "dog"}
    assert gallery.look(None, "pets") is None


def test_equal_labels_stay_apart(tmp_path: Path, picture: Path) -> None:
    save(tmp_path / "m", ["cat", "cat", "dog"])
    found = Gallery([str(tmp_path / "m")]).look(picture, "m")
    assert found is not None
    assert len(found) == 3
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)


def test_a_set_is_all_that_reaches_its_thresholds(tmp_path: Path, picture: Path) -> None:
    model = nfzoo.create("nfnet-test", labels=list("abcdefgh"), generator=torch.Generator().manual_seed(0))
    model.problem_type = MULTI_LABEL
    for thresholds, expected in (((0.0,) * 8, 8), ((1.0,) * 8, 0), ((0.0, *(1.0,) * 7), 1)):
        model.thresholds = thresholds
        model.save_pretrained(tmp_path / "m")
        found = Gallery([str(tmp_path / "m")]).look(picture, "m")
        assert found is not None
        assert len(found) == expected
        assert list(found.items()) == nfzoo.from_pretrained(tmp_path / "m").for_inference().predict(picture)


# -- the chooser


def test_models_are_loaded_when_chosen_and_the_last_ones_kept() -> None:
    loaded: list[str] = []

    def load(source: str) -> nfzoo.NFNet:
        loaded.append(source)
        return nfzoo.create("nfnet-test")

    gallery = Gallery(["a/x", "a/y", "a/z"], load=load, kept=2)
    assert loaded == []
    first = gallery.model("a/x")
    assert not first.training
    assert gallery.model("a/x") is first
    gallery.model("a/y")
    gallery.model("a/x")
    gallery.model("a/z")  # y was used longest ago
    gallery.model("a/x")
    assert loaded == ["a/x", "a/y", "a/z"]
    gallery.model("a/y")
    assert loaded == ["a/x", "a/y", "a/z", "a/y"]


def test_names_of_sources(models: Path, tmp_path: Path) -> None:
    save(tmp_path / "other" / "pets", ["x", "y"])
    one, two = str(models / "pets"), str(tmp_path / "other" / "pets")
    assert named([one]) == {"pets": one}
    assert named([one, two, one]) == {one: one, two: two}
    assert named([str(models)]) == {"letters": str(models / "letters"), "pets": one}
    weights = str(models / "pets" / "model.safetensors")
    assert named([weights, "nfnet-f0", "org/name"]) == {
        "pets/model.safetensors": weights,
        "nfnet-f0": "nfnet-f0",
        "org/name": "org/name",
    }


def test_what_is_offered() -> None:
    assert offered(None) == offered("") == offered(" , ") == list(PUBLIC)
    assert offered("runs/digits, nfnet-f0,") == ["runs/digits", "nfnet-f0"]
    assert list(named(offered(None))) == list(PUBLIC)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nfnet-f00", "did you mean 'nfnet-f0'"),
        ("nf-resnet-50", "no weights are published"),
        ("/no/such/folder", "there is no file or folder '/no/such/folder'"),
        ("{empty}", "holds no model"),
    ],
)
def test_unknown_models_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    assert cli(["space", "--model", source.format(empty=tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nfzoo space: error: ")
    assert err.count("\n") == 1
    assert message in err


# -- what can go wrong


def test_damaged_pictures_are_named_without_the_path(models: Path, picture: Path) -> None:
    gallery = Gallery([str(models / "pets")])
    picture.write_bytes(picture.read_bytes()[:300])
    with pytest.raises(SpaceError, match=r"^The picture cannot be read: it cannot be decoded .*cut off\.$"):
        gallery.look(str(picture), "pets")
    with pytest.raises(SpaceError, match="it does not exist"):
        gallery.look(str(picture.parent / "gone.png"), "pets")
    picture.write_text("no picture")
    with pytest.raises(SpaceError, match="no image of a known format"):
        gallery.look(str(picture), "pets")


def test_models_that_cannot_be_used_are_named(models: Path, picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    gallery = Gallery([str(models)])
    with pytest.raises(SpaceError, match="There is no model 'cows' here"):
        gallery.look(picture, "cows")
    with pytest.raises(SpaceError, match="Choose a model first"):
        gallery.look(picture, None)
    weights = models / "letters" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(SpaceError, match=r"^letters cannot be loaded\. The log of the server says why\.$"):
        gallery.look(picture, "letters")
    assert "model.safetensors is damaged" in caplog.text
    weights.write_bytes(whole)
    assert gallery.look(picture, "letters")  # a failure is not kept

    broken = nfzoo.create("nfnet-test")
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(SpaceError, match=r"x/y gives no answer: .*not finite"):
        Gallery(["x/y"], load=lambda _: broken).look(picture, "x/y")


# -- the page, with a stand-in for Gradio


class Recorder:
    """Takes the place of the `gradio` module: components remember how they were made and what they trigger."""

    def __init__(self) -> None:
        self.made: dict[str, SimpleNamespace] = {}
        self.events: list[tuple[Any, ...]] = []
        self.launched: list[dict[str, Any]] = []
        self.options: list[dict[str, Any]] = []  # of the events

    class Error(Exception):
        def __init__(self, message: str, **_: object) -> None:
            super().__init__(message)

    def __getattr__(self, kind: str) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            component = Component(self, arguments, options)
            self.made[kind] = component
            return component

        return make


class Component(SimpleNamespace):
    def __init__(self, recorder: Recorder, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        super().__init__(arguments=arguments, options=options, preprocess=None)
        self.change = lambda *event, **named: (recorder.events.append(event), recorder.options.append(named))
        self.launch = lambda **options: recorder.launched.append(options)

    def __enter__(self) -> "Component":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_page(models: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = Recorder()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    monkeypatch.setenv("NFZOO_SPACE_MODELS", str(models / "pets"))
    assert cli(["space", "--port", "7999"]) == 0
    assert [launched["server_port"] for launched in gradio.launched] == [7999]
    dropdown, image = gradio.made["Dropdown"], gradio.made["Image"]
    assert dropdown.arguments == (["pets"],)
    assert dropdown.options["value"] == "pets"
    assert image.preprocess(None) is None
    assert image.preprocess(SimpleNamespace(path="p")) == "p"
    (look, inputs, output), again = gradio.events
    assert again[0] is look
    assert [options.get("api_name") or options["api_visibility"] for options in gradio.options] == [
        "predict",
        "private",
    ]
    assert (inputs, output) == ([image, dropdown], gradio.made["Label"])
    assert set(look(str(picture), "pets")) == {"cat", "dog"}
    with pytest.raises(Recorder.Error, match="There is no model 'cows' here"):
        look(str(picture), "cows")
    assert gradio.launched[0]["max_file_size"] == app.MAX_UPLOAD


def test_text_from_elsewhere_is_no_markup_and_names_no_path(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio shows errors as HTML, and labels as text; the user may be anybody."""
    save(tmp_path / "m", ["<b>cat</b>\x1b\u202e", "dog"])
    gradio = Recorder()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    app.build(Gallery([str(tmp_path / "m")]))
    look = gradio.events[0][0]
    assert set(look(str(picture), "m")) == {"<b>cat</b>\\x1b\\u202e", "dog"}
    evil = tmp_path / "<img src=x onerror=alert(1)>\x1b&.png"
    evil.write_bytes(picture.read_bytes()[:300])

    def refused(path: Path, choice: str) -> None:
        with pytest.raises(Recorder.Error) as caught:
            look(str(path), choice)
        text = str(caught.value)
        assert not {"<", ">", "\x1b"} & {*text}, text
        assert str(tmp_path) not in text

    refused(evil, "m")
    refused(evil, "<script>")
    refused(tmp_path / "<b>", "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    app.build(Gallery([str(tmp_path / "m")]))
    look = gradio.events[-1][0]
    refused(picture, "m")


def test_without_gradio_the_remedy_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli(["space", "--model", str(models)]) == 2
    assert capsys.readouterr().err == "nfzoo space: error: the Space needs Gradio: pip install 'nfzoo[space]'\n"


@pytest.mark.parametrize("port", ["0", "http", "65536"])
def test_bad_ports_are_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["space", "--port", port]) == 2
    assert "--port" in capsys.readouterr().err


# -- the folder that is pushed


def test_the_folder_is_a_space() -> None:
    import yaml

    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert app.MODELS_VARIABLE in (SPACE / "README.md").read_text(encoding="utf-8")
    assert "nfzoo" in (SPACE / "requirements.txt").read_text(encoding="utf-8").split()


def test_the_app_runs_as_a_script(tmp_path: Path) -> None:
    # As on the Hub: a copy of the file, run by itself, with Gradio from elsewhere.
    (tmp_path / "app.py").write_bytes((SPACE / "app.py").read_bytes())
    (tmp_path / "gradio.py").write_text("def __getattr__(name):\n    raise SystemExit(f'reached gradio.{name}')\n")
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={**os.environ, "NFZOO_SPACE_MODELS": "nfnet-f0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "reached gradio.Blocks" in done.stderr


def test_the_address_is_told_as_json(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []

    class Page:
        def launch(self, **how: object) -> tuple[None, str, None]:
            assert how["prevent_thread_lock"]
            print("* Running on local URL")  # as Gradio does
            return None, "http://127.0.0.1:7860/", None

        def block_thread(self) -> None:
            called.append("block")

    monkeypatch.setattr(app, "build", lambda gallery: Page())
    assert cli(["space", "--model", str(models), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"url": "http://127.0.0.1:7860/", "models": ["letters", "pets"]}
    assert (err, called) == ("* Running on local URL\n", ["block"])
