"""Pushing to a Hub on this machine, over HTTP, and the cards of what is pushed."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nfzoo
from nfzoo import CheckpointError, HubError, NFNet
from nfzoo.checkpoint.model_folder import MULTI_LABEL, Description
from nfzoo.cli.main import main
from nfzoo.data.labels import imagenet
from nfzoo.export import onnx_folder
from nfzoo.hub import push
from nfzoo.hub.card import model_card
from nfzoo.hub.publish import bundle
from nfzoo.predict import predict
from nfzoo.runtime.output import escaped
from nfzoo.variants import VARIANTS
from tests.support.helpers import assert_same

# huggingface_hub 2.4 uploads in a way that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/small"
FILES = ("config.json", "model.safetensors", "nfzoo_transformers.py", "preprocessor_config.json")
ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- there and back


def test_push_and_load(hub, model, tmp_path):
    folder = model.save_pretrained(tmp_path / "m")
    url = push(folder, REPO, token="good")
    assert url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main']}"
    assert len(hub.repos[REPO].commits) == 2  # the Hub's own first one, and ours
    assert hub.repos[REPO].commits[url.rpartition("/")[2]].keys() == {*FILES, "README.md", ".gitattributes"}
    loaded = nfzoo.from_pretrained(REPO)
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.description == model.description
    assert not loaded.training


def test_the_method_and_the_class_method(hub, model):
    model.push_to_hub(REPO, token="good", commit_message="First")
    assert_same(NFNet.from_pretrained(REPO).state_dict(), model.state_dict())
    assert {r.token for r in hub.asked("POST")} == {"good"}


def test_a_private_repository(hub, model):
    model.push_to_hub(REPO, token="good", private=True)
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        nfzoo.from_pretrained(REPO)
    assert_same(nfzoo.from_pretrained(REPO, token="good").state_dict(), model.state_dict())


def test_a_branch_and_a_pull_request(hub, model):
    model.push_to_hub(REPO, token="good")
    main = hub.repos[REPO].branches["main"]
    model.push_to_hub(REPO, token="good", revision="next")
    model.push_to_hub(REPO, token="good", create_pr=True)
    assert hub.repos[REPO].branches["main"] == main
    assert {"next", "refs/pr/1"} <= hub.repos[REPO].branches.keys()


def test_weights_that_are_not_finite_are_not_published(hub, model, tmp_path):
    folder = model.save_pretrained(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][0] = torch.nan
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", {"nfzoo": metadata["nfzoo"]})
    with pytest.raises(CheckpointError, match=r"not to be published: head\.bias holds numbers that are not finite"):
        push(folder, REPO, token="good")
    assert hub.requests == []


def test_a_program_of_earlier_weights_leaves_the_repository(hub, model, monkeypatch, caplog):
    monkeypatch.setattr(onnx_folder, "write_onnx", lambda model, x, batch, path, **names: path.write_bytes(b"program"))

    def programs() -> set[str]:
        tree = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
        return {path for path in tree if path.startswith("onnx/")}

    model.push_to_hub(REPO, token="good", with_onnx=True)
    assert programs() == {"onnx/model.onnx", "onnx/nfzoo.json"}
    hub.add(REPO, {"onnx/model.onnx_data": b"of a larger model"})
    model.push_to_hub(REPO, token="good", with_onnx=True)
    assert programs() == {"onnx/model.onnx", "onnx/nfzoo.json"}
    assert not caplog.records
    model.push_to_hub(REPO, token="good")
    assert programs() == set()
    assert f"removing onnx/model.onnx of {REPO}, which is of earlier weights" in caplog.text
    hub.add(REPO, {"onnx/model.onnx": b"of somebody else"})
    model.push_to_hub(REPO, token="good")
    assert programs() == {"onnx/model.onnx"}
    assert f"onnx/model.onnx of {REPO} stays, which nfzoo did not write, and may be of other weights" in caplog.text


# ---------------------------------------------------------------- the card


@pytest.fixture
def run(model: NFNet, tmp_path: Path) -> Path:
    """What a training run and an evaluation leave."""
    folder = model.save_pretrained(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(folder / "curves.png")
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (folder / "train.yaml").write_text(
        "model: nfnet-test\ndata: /home/someone/pets\noutput: /home/someone/run\nepochs: 1\n"
    )
    (folder / "secret.txt").write_text("not to be published")
    result = {
        "dataset": "pets|",
        "split": "val",
        "images": 1200,
        "top1": 0.8125,
        "top5": 0.97,
        "size": 32,
        "classes": 7,
    }
    (folder / "evaluation.json").write_text(json.dumps(result))
    return folder


def test_what_is_published(hub, run):
    push(run, REPO, token="good")
    tree = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    extras = {"curves.png", "metrics.jsonl", "train.yaml", "evaluation.json"}
    assert tree.keys() == {".gitattributes", "README.md", *FILES, *extras}
    assert tree["train.yaml"] == b"model: nfnet-test\ndata: pets\nepochs: 1\n"
    for name in (*FILES, *extras - {"train.yaml"}):
        assert tree[name] == (run / name).read_bytes()
    card = tree["README.md"].decode()
    assert hub.asked("POST", "/api/validate-yaml")  # as the Hub does before it takes a card
    assert "](curves.png)" in card


def test_a_run_of_fewer_epochs_than_planned_is_published_with_a_warning(run, caplog) -> None:
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    for epochs, said in ((2, []), (5, [f"the model of {run} has been trained for 2 of 5 epochs"])):
        (run / "train.yaml").write_text(f"model: nfnet-test\nepochs: {epochs}\n")
        caplog.clear()
        bundle(run, REPO)
        assert [record.getMessage() for record in caplog.records] == said


def test_evaluations_of_other_weights_and_of_training_images(run: Path) -> None:
    path = run / "evaluation.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "weights": "00000000"}))
    with pytest.raises(CheckpointError, match=r"is of other weights than those of .*; evaluate anew, or remove it"):
        bundle(run, REPO)
    with safe_open(run / "model.safetensors", "pt") as file:
        checksum = file.metadata()["crc32"]
    path.write_text(json.dumps({**fields, "weights": checksum, "trained_on": True, "split": None, "classes": 5}))
    card = bundle(run, REPO).card
    assert "| 1,200, most of them trained on |" in card
    assert "split: train" in card
    assert "top-5" not in card  # of five classes


def test_an_evaluation_of_odd_classes_is_refused(run: Path) -> None:
    path = run / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": "many"}))
    with pytest.raises(CheckpointError, match="lacks 'classes', or it is of another type"):
        bundle(run, REPO)


def test_the_metadata(hub, run, tmp_path):
    push(run, REPO, token="good")
    (tmp_path / "card.md").write_bytes(hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"])
    metadata = metadata_load(tmp_path / "card.md")
    assert metadata is not None
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "nfzoo"
    assert metadata["pipeline_tag"] == "image-classification"
    assert "normalizer-free" in metadata["tags"]
    assert "datasets" not in metadata
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "small"
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "pets|", "type": "imagefolder", "split": "val"}
    assert [(m["type"], m["name"], m["value"]) for m in result["metrics"]] == [
        ("accuracy", "top-1 accuracy", 0.8125),
        ("accuracy", "top-5 accuracy", 0.97),
    ]


def test_the_accuracy_of_training_is_in_the_metadata(model):
    description = model.description._replace(provenance={"data": "/home/me/pets", "accuracy": 0.75, "epochs": 3})
    (entry,) = ModelCard(model_card(description, REPO)).data.to_dict()["model-index"]
    (result,) = entry["results"]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("pets", 0.75)


HOSTILE = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:b)", "![a](//e.org/b)", "&lt;b&gt;"),
    *(
        "a | b |\n| c | d |",
        "`a`",
        "**a** __b__ ~~c~~",
        "# a",
        "\n---\n",
        "\n\n## a\n",
        "https://e.org www.e.org <a@e.org>",
    ),
    *("$$x$$ \\\\(y\\\\)", "\\|", "a\x1b[2J\x07\x9b\u202e\u2028\udcff", "license: x\n---\n<b>", "- a: !!python/name:b"),
)


def test_text_from_files_is_text_in_a_card(model, monkeypatch):
    """Rendered, a card with such labels and facts has the parts of a card with plain ones, and shows the text."""
    markdown_it = pytest.importorskip("markdown_it")  # comes with the Hub's client
    monkeypatch.setattr("nfzoo.hub.card.mac_count", lambda config, size: 1)  # which takes longest of all
    render = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def card(text: str) -> ModelCard:
        labels = (text, *"bcde")
        description = model.description._replace(labels=labels, provenance={text: text, "data": text, "accuracy": 0.5})
        result = {"dataset": text, "split": text, "images": 1, "top1": 0.5, "top5": 0.5, "size": 32}
        written = model_card(description, REPO, evaluation=result)
        assert written.encode().decode() == written
        return ModelCard(written)

    def parts(card: ModelCard) -> list[str]:
        tokens = [inner for token in render.parse(card.text) for inner in (token, *(token.children or ()))]
        return [f"{token.type} {token.attrs}" for token in tokens if token.type != "text"]

    plain = card("plain")
    for text in HOSTILE:
        found = card(text)
        assert parts(found) == parts(plain), text
        shown = "".join(t.content for token in render.parse(found.text) for t in token.children or ())
        assert shown.count(escaped(text)) >= 3, text
        assert found.data.to_dict().keys() == plain.data.to_dict().keys()
        (entry,) = found.data.to_dict()["model-index"]
        assert entry["results"][0]["dataset"]["name"] == entry["results"][0]["dataset"]["split"] == text


def test_the_usage_runs(hub, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("photo.jpg")
    for temperature, name in ((None, REPO), (0.25, f"{REPO}-calibrated")):
        model.temperature = temperature
        model.push_to_hub(name, token="good")
        card = hub.repos[name].commits[hub.repos[name].branches["main"]]["README.md"].decode()
        assert ("| temperature of the probabilities | 0.25 |" in card) == (temperature is not None)
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(compile(code, "README.md", "exec"), {})
        lines = [line.split("%") for line in capsys.readouterr().out.splitlines()]
        expected = predict(model, ["photo.jpg"])[0].top
        assert [(label.strip(), value.strip()) for value, label in lines] == [
            (label, f"{100 * value:.1f}") for label, value in expected
        ]


def test_the_card_of_a_multi_label_model(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("photo.jpg")
    twin = copy.deepcopy(model)
    twin.temperature = None
    twin.problem_type, twin.thresholds = MULTI_LABEL, (0.0,) * model.config.num_classes
    twin.provenance = {"data": "/home/me/pets", "map": 0.75}
    twin.save_pretrained("sets")
    text = model_card(twin.description, "me/sets")
    data = ModelCard(text).data.to_dict()
    assert data["metrics"] == ["mean_average_precision"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code.replace("me/sets", "sets"), "README.md", "exec"), {})
    lines = [line.split("%")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [label for label, _ in twin.predict("photo.jpg")]
    evaluation = {"dataset": "pets", "images": 7, "size": 32, "map": 0.5, "f1": 0.25, "micro_f1": 0.125}
    text = model_card(twin.description, "me/sets", evaluation=evaluation)
    for words in ("| mean average precision | 50.00% |", "| macro F1 | 25.00% |", "| micro F1 | 12.50% |"):
        assert words in text
    assert "top-1" not in text
    with pytest.raises(CheckpointError, match="lacks 'map'"):
        model_card(twin.description, "me/sets", evaluation={**evaluation, "map": None})


def test_a_card_that_is_no_text_and_names_that_cannot_be(run):
    for name in ("me/..", "me", "me/x/y", "a--b/c"):
        with pytest.raises(HubError, match="no name of a repository"):
            bundle(run, name)
    (run / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not text"):
        bundle(run, REPO)


def test_a_card_of_ones_own(hub, run):
    (run / "README.md").write_text("---\nlicense: mit\nlibrary_name: nfzoo\n---\n# Mine\n")
    push(run, REPO, token="good")
    assert b"# Mine" in hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"]
    for text in ("# no metadata\n", "---\n: {\n---\n", "---\nlicense: mit\n---\n"):
        (run / "README.md").write_text(text)
        with pytest.raises(CheckpointError, match="metadata"):
            push(run, REPO, token="good")


@pytest.mark.parametrize("row", ["nfnet-f0", "nf-resnet-50", "eca-nfnet-l1", "timm-nf-regnet-b1"])
def test_cards_of_the_zoo(row):
    variant = VARIANTS[row]
    description = Description(variant.config, variant.preprocessing, row, imagenet(), {"sha256": "ab" * 32})
    card = model_card(description, f"org/{row}")
    assert ModelCard(card).data.to_dict()["datasets"] == ["imagenet-1k"]
    assert "2102.06171" in card
    assert "2101.08692" in card
    assert ("83.6 %" in card) == (row == "nfnet-f0")
    if row == "nfnet-f0":
        assert "71,489,284" in card


def test_a_broken_folder_is_not_published(hub, run, tmp_path):
    for name, content, match in (
        ("evaluation.json", b"{", "not JSON"),
        ("evaluation.json", b"[]", "JSON object"),
        ("evaluation.json", b'{"top1": 1}', "lacks 'dataset'"),
        ("model.safetensors", b"", "damaged"),
    ):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            push(run, REPO, token="good")
        (run / name).write_bytes(before)
    with pytest.raises(CheckpointError, match="no folder"):
        push(tmp_path / "none", REPO)
    for name in ("small", "a/b/c", "org/", "a b/c"):
        with pytest.raises(HubError, match="ORGANISATION/NAME"):
            push(run, name)
    assert hub.requests == []


def test_the_hub_refuses_a_push(hub, run, monkeypatch):
    for token in ("bad", False):
        with pytest.raises(HubError, match="hf auth login"):
            push(run, REPO, token=token)
    with pytest.raises(HubError, match=r"org/a--b"):
        push(run, "org/a--b", token="good")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="could not be published"):
        push(run, REPO, token="good")


# ---------------------------------------------------------------- the command line


def test_the_command(hub, run, model, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "good")
    assert main(["push", str(run), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^model.safetensors +{(run / 'model.safetensors').stat().st_size:,}$", shown, re.MULTILINE)
    assert "library_name: nfzoo" in shown
    assert "secret" not in shown
    assert hub.requests == []
    assert main(["push", str(run), REPO, "--private", "--license", "mit", "--message", "First"]) == 0
    assert capsys.readouterr().out.startswith(f"published {hub.url}/{REPO}/commit/")
    assert REPO in hub.closed
    assert b"license: mit" in hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"]
    assert_same(nfzoo.from_pretrained(REPO).state_dict(), model.state_dict())
    for wrong in ([], [str(run)], [str(run), REPO, "--all-deepmind", "org"], ["--all-deepmind", "org", str(run)]):
        assert main(["push", *wrong]) == 2
        assert "needs either" in capsys.readouterr().err


def test_all_of_deepmind(hub, model, monkeypatch, capsys):
    asked = []

    def convert(source: str, target: Path) -> None:
        asked.append(source)
        if source == "dm:F3":
            raise nfzoo.ConversionError("the server is down")
        model.save_pretrained(target)

    monkeypatch.setattr("nfzoo.conversion.convert.convert", convert)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert main(["push", "--all-deepmind", "org", "--dry-run"]) == 0
    assert "71,489,284" in capsys.readouterr().out
    assert not asked
    assert main(["push", "--all-deepmind", "org"]) == 2
    shown = capsys.readouterr()
    assert asked == [f"dm:F{n}" for n in range(7)]
    assert hub.repos.keys() == {f"org/nfnet-f{n}" for n in (0, 1, 2, 4, 5, 6)}
    assert shown.out.count("published ") == 6
    assert "org/nfnet-f3: the server is down" in shown.err


def test_unknown_options_are_named_before_anything_is_sent(hub, model, tmp_path):
    folder = model.save_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="no option 'comit_message'; it has private, token"):
        push(folder, REPO, comit_message="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no option 'comit_message'"):
        model.push_to_hub(REPO, comit_message="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'revison'"):
        nfzoo.from_pretrained(folder, revison="main")  # type: ignore[call-arg]
    assert not hub.requests
