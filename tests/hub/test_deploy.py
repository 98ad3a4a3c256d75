"""`nfzoo space deploy` against a Hub on this machine, and the Space that it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard, constants
from packaging.requirements import Requirement

import nfzoo
from nfzoo import ConfigError, HubError
from nfzoo.cli.main import main
from nfzoo.hub.registry import PUBLIC
from nfzoo.hub.space.deploy import RECORD_FILE, deploy, space_files
from tests.support.hub_server import HubServer
from tests.support.loops import each

# huggingface_hub 2.4 uploads in a way that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SPACE, KEY = "me/pets", "spaces/me/pets"


def tree(hub: HubServer) -> dict[str, bytes]:
    return hub.repos[KEY].commits[hub.repos[KEY].branches["main"]]


def test_a_space_is_made_and_updated(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "good")
    assert main(["space", "deploy", SPACE, "--model", "nfnet-f0", "--model", "me/nfnet-pets", "--private"]) == 0
    assert capsys.readouterr().out == f"deployed {hub.url}/{KEY}\n"
    assert KEY in hub.closed
    first = tree(hub)
    assert json.loads(first[RECORD_FILE]) == {"models": ["nfnet-f0", "hub:me/nfnet-pets"], "nfzoo": nfzoo.__version__}
    card = SpaceCard(first["README.md"].decode()).data.to_dict()
    assert (card["sdk"], card["app_file"], card["title"]) == ("gradio", "app.py", "pets")
    assert card["models"] == [PUBLIC["nfnet-f0"].repo_id, "me/nfnet-pets"]
    assert hub.asked("POST", "/api/validate-yaml")
    assert len(hub.repos[KEY].commits) == 2
    # An update removes what is no longer part of nfzoo, and leaves what the owner has added.
    hub.add(KEY, {"nfzoo/hub/gone.py": b"", "examples/cat.jpg": b"cat"})
    assert main(["space", "deploy", SPACE, "--model", "me/other", "--title", "Cats", "--message", "Again"]) == 0
    second = tree(hub)
    assert second.keys() == first.keys() | {"examples/cat.jpg"}
    assert json.loads(second[RECORD_FILE])["models"] == ["hub:me/other"]
    assert b"title: Cats" in second["README.md"]


def test_nothing_is_sent_by_a_dry_run(hub, monkeypatch, capsys):
    monkeypatch.setenv("NFZOO_SPACE_MODELS", "me/a, me/b")
    assert main(["space", "deploy", SPACE, "--dry-run", "--title", "Pets & co"]) == 0
    shown = capsys.readouterr().out
    assert "- me/a\n- me/b\n" in shown
    assert "title: Pets & co" in shown
    assert "\ntorch>=" in shown
    monkeypatch.delenv("NFZOO_SPACE_MODELS")
    assert main(["space", "deploy", SPACE, "--dry-run", "--package", "nfzoo==1.0"]) == 0
    shown = capsys.readouterr().out
    assert "- timm/eca_nfnet_l2.ra3_in1k\n" in shown
    assert "\nnfzoo==1.0\n" in shown
    assert "nfzoo/*" not in shown
    assert "torch>=" not in shown
    assert hub.requests == []


@pytest.mark.slow
def test_the_space_runs(tmp_path):
    """As on the Hub: its files alone, the requirements installed, and Gradio from elsewhere."""
    written = space_files(SPACE, ["nfnet-f0", "hub:nfzoo/pets"])
    for name, content in written.files.items():
        path = tmp_path / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert not list((tmp_path / "app").rglob("*.pyc"))
    stub = """
import nfzoo, sys
from nfzoo.hub.registry import PUBLIC
class Page:
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def launch(self, **options): print(nfzoo.__file__, PUBLIC["nfnet-f0"].revision, *chosen)
chosen = []
def Dropdown(choices, **options):
    chosen.extend(choices)
    return Part()
class Part(Page):
    def change(self, *_, **__): pass
def __getattr__(name):
    return (lambda *_, **__: Part()) if name[0].isupper() and name != "Blocks" else Page
def Blocks(*_, **__): return Page()
"""
    (tmp_path / "app" / "gradio.py").write_text(stub)
    done = subprocess.run([sys.executable, "app.py"], cwd=tmp_path / "app", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    where, revision, *models = done.stdout.split()
    assert Path(where) == tmp_path / "app" / "nfzoo" / "__init__.py"
    assert revision == PUBLIC["nfnet-f0"].revision
    assert models == ["nfnet-f0", "nfzoo/pets"]


def test_the_requirements_are_those_of_the_package():
    lines = space_files(SPACE, ["nfnet-f0"]).files["requirements.txt"]
    assert isinstance(lines, bytes)
    names = {Requirement(line).name for line in lines.decode().splitlines()}
    assert {"torch", "numpy", "pillow", "safetensors", "huggingface-hub"} <= names
    assert not {"nfzoo", "gradio", "pytest", "jax"} & names


def test_the_sources_are_those_that_git_has():
    """No file that happens to lie among them, such as weights, a picture or compiled code, goes with them."""
    root = Path(__file__).resolve().parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "nfzoo", "hub", "conversion", "recipes"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this copy of the sources has no repository whose list of files could be asked for")
    tracked = {name if name.startswith("nfzoo/") else f"nfzoo/{name}" for name in listed.stdout.splitlines()}
    sent = {name for name in space_files(SPACE, ["nfnet-f0"]).files if name.startswith("nfzoo/")}
    assert tracked <= sent
    assert {Path(name).suffix for name in sent} == {Path(name).suffix for name in tracked}


@each(
    ("models", "options", "told"),
    [
        (["{folder}"], {}, "is on this machine.*nfzoo push"),
        ([], {}, "needs a model"),
        (["nfnet-f00"], {}, "did you mean 'nfnet-f0'"),
        (["nf-resnet-50"], {}, "no weights are published"),
        (["nfnet-f0"], {"title": "a\nmodels: [x]"}, "title of a Space must be one line"),
        (["nfnet-f0"], {"title": " "}, "title of a Space must be one line"),
        (["nfnet-f0"], {"package": "nfzoo\n-r x"}, "package of a Space must be one line"),
    ],
)
def test_what_is_refused_before_anything_is_sent(models, options, told, hub, tmp_path):
    with pytest.raises(nfzoo.NfzooError, match=told):
        deploy(SPACE, [model.format(folder=tmp_path) for model in models], **options, token="good")
    assert hub.requests == []


def test_titles_are_text(hub):
    """A title that YAML or Markdown would take for more is the title, and nothing else."""
    for title in ("a: b # c", "- x", "<script>", "{{x}}", "'\"", "!!python/name:b"):
        text = space_files(SPACE, ["me/x"], title=title).files["README.md"]
        assert isinstance(text, bytes)
        card = SpaceCard(text.decode())
        assert card.data.to_dict()["title"] == title
        assert title not in card.text


def test_spaces_of_others_stay(hub):
    hub.add(KEY, {"app.py": b"print('mine')\n", "README.md": b""})
    before = dict(hub.repos[KEY].commits)
    with pytest.raises(HubError, match=r"holds 'app\.py', which .* did not put there; .*--overwrite"):
        deploy(SPACE, ["nfnet-f0"], token="good")
    assert hub.repos[KEY].commits == before
    deploy(SPACE, ["nfnet-f0"], token="good", overwrite=True)
    assert RECORD_FILE in tree(hub)


def test_refusals(hub, monkeypatch):
    for token in ("bad", False):
        with pytest.raises(HubError, match=r"the Hub refused 'spaces/me/pets'.*hf auth login"):
            deploy(SPACE, ["nfnet-f0"], token=token)
    for name in ("pets", "a/b/c", "a--b/c"):
        with pytest.raises(HubError, match="ORGANISATION/NAME"):
            deploy(name, ["nfnet-f0"], token="good")
    assert KEY not in hub.repos
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="could not be published"):
        deploy(SPACE, ["nfnet-f0"], token="good")


def test_without_metadata_the_requirements_are_unknown(monkeypatch):
    from importlib import metadata

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    with pytest.raises(ConfigError, match="give --package"):
        space_files(SPACE, ["nfnet-f0"])
    assert space_files(SPACE, ["nfnet-f0"], package="nfzoo==1.0").files.keys() == {
        *("README.md", "app.py", RECORD_FILE, "requirements.txt")
    }
