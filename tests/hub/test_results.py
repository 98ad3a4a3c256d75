"""What the Hub reads of a model's results, by the Hub's own code, and the commands that make them anew."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shlex
from email.message import Message
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from nfzoo.checkpoint.model_folder import MULTI_LABEL, Description
from nfzoo.cli.main import main
from nfzoo.data.labels import imagenet
from nfzoo.hub import push
from nfzoo.hub.card import model_card
from nfzoo.hub.publish import bundle
from nfzoo.hub.results import emissions, eval_results
from nfzoo.variants import VARIANTS
from tests.support.loops import each

# huggingface_hub 2.4 uploads in a way that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/small"


@pytest.fixture(autouse=True)
def no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfzoo.hub.card.mac_count", lambda config, size: 1)  # which takes longest of all


MEASURED = {"dataset": "pets", "images": 1200, "top1": 0.8125, "top5": 0.97, "size": 32, "classes": 5}
ROW = VARIANTS["nfnet-test"]
IMAGENET = Description(ROW.config.replace(num_classes=1000), ROW.preprocessing, "nfnet-test", imagenet())


def entry(description: Description, **fields: Any) -> tuple[str, Any] | None:
    """The name of the file, and its only entry as the Hub's client reads it; the client writes the same."""
    files = eval_results(REPO, description, {**MEASURED, **fields})
    if not files:
        return None
    ((name, content),) = files.items()
    written = yaml.safe_load(content)
    (found,) = huggingface_hub.parse_eval_result_entries(written)
    assert huggingface_hub.eval_result_entries_to_yaml([found]) == written
    return name, found


def test_results_on_data_of_the_hub(model):
    named = entry(model.description, dataset="org/pets", date="2026-01-31")
    assert named is not None
    name, found = named
    assert name == f"{huggingface_hub.constants.EVAL_RESULTS_FOLDER}/pets.yaml"
    assert (found.dataset_id, found.task_id, found.value) == ("org/pets", "default", 0.8125)
    assert (found.date, found.source_name) == ("2026-01-31", "nfzoo evaluate")
    assert found.source_url == f"https://huggingface.co/{REPO}/blob/main/evaluation.json"
    assert found.notes == "top-1 accuracy on 1,200 images at 32 x 32 pixels"
    named = entry(model.description, dataset="org/pets:small")
    assert named is not None
    assert (named[1].dataset_id, named[1].task_id, named[1].date) == ("org/pets", "small", None)
    sets = model.description._replace(problem_type=MULTI_LABEL)
    named = entry(sets, dataset="org/pets", map=0.5, f1=0.25, micro_f1=0.125)
    assert named is not None
    assert (named[1].value, named[1].notes.split(" on ")[0]) == (0.5, "mean average precision")


def test_results_on_imagenet():
    """Its validation images are known by their number, as other sets have its classes too."""
    of_imagenet = {"dataset": "imagenet", "split": "val", "classes": 1000}
    named = entry(IMAGENET, **of_imagenet, images=50_000)
    assert named is not None
    assert (named[0], named[1].dataset_id) == (".eval_results/imagenet-1k.yaml", "ILSVRC/imagenet-1k")
    assert entry(IMAGENET, **of_imagenet, images=10_000) is None
    assert entry(IMAGENET, **{**of_imagenet, "classes": 100}, images=50_000) is None


@each("dataset", ["pets", "../../x", "org/../x", "a/b/c", "/etc/x", "org/x\n", "org/", "-x/y", "hub:org/x"])
def test_a_folder_has_no_page_on_the_hub(dataset, model):
    assert entry(model.description, dataset=dataset) is None


def test_results_are_published(hub, model, tmp_path):
    folder = model.save_pretrained(tmp_path / "m")
    (folder / "evaluation.json").write_text(json.dumps({**MEASURED, "dataset": "org/pets", "split": "test"}))
    push(folder, REPO, token="good")
    tree = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert huggingface_hub.parse_eval_result_entries(yaml.safe_load(tree[".eval_results/pets.yaml"]))[0].value == 0.8125
    (index,) = ModelCard(tree["README.md"].decode()).data.to_dict()["model-index"]
    assert index["results"][0]["dataset"] == {"name": "org/pets", "type": "org/pets", "split": "test"}
    # A card of one's own does not hide the results.
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: nfzoo\n---\n# Mine\n")
    assert ".eval_results/pets.yaml" in bundle(folder, REPO).files


# ---------------------------------------------------------------- origin and emissions


def metadata(description: Description, **options: Any) -> dict[str, Any]:
    return ModelCard(model_card(description, REPO, **options)).data.to_dict()


@each(
    ("provenance", "expected"),
    [
        ({"trained_from": "nfnet-f0", "data": "pets"}, {"base_model": "timm/dm_nfnet_f0.dm_in1k"}),
        ({"trained_from": "org/base", "data": "hub:org/pets:small?image=x"}, {"base_model": "org/base"}),
        ({"trained_from": "random weights", "data": "hub:org/pets"}, {"datasets": ["org/pets"]}),
        ({"trained_from": "base", "data": "memory:Pairs"}, {}),
        ({"trained_from": 3, "data": ["x"]}, {}),
    ],
)
def test_where_a_model_comes_from(provenance, expected, model):
    found = metadata(model.description._replace(provenance=provenance))
    if provenance["data"] == "hub:org/pets:small?image=x":
        expected = {**expected, "datasets": ["org/pets"]}
    if "base_model" in expected:
        expected = {**expected, "base_model_relation": "finetune"}
    assert {key: found[key] for key in ("base_model", "base_model_relation", "datasets") if key in found} == expected


def test_a_picture_to_try_is_one_of_the_models_classes(model):
    assert {"Tiger", "Teapot"} == {item["example_title"] for item in metadata(IMAGENET)["widget"]}
    assert {"tiger", "teapot"} <= {name.partition(",")[0] for name in imagenet()}
    assert "widget" not in metadata(model.description)


# The columns that CodeCarbon 2 and 3 write, as far as they are read here; emissions are in kg.
CARBON = """\
timestamp,project_name,duration,emissions,country_name,region,cpu_model,gpu_count,gpu_model
2026-01-01T00:00:00,codecarbon,60.5,0.0015,Canada,quebec,AMD EPYC,,
2026-01-02T00:00:00,codecarbon,61,0.00025,Germany,bavaria,AMD EPYC,2.0,NVIDIA A100
"""


def test_emissions_that_codecarbon_measured(model, tmp_path, caplog):
    folder = model.save_pretrained(tmp_path / "m")
    assert emissions(folder, model.description) is None
    (folder / "emissions.csv").write_text(CARBON)
    found = ModelCard(bundle(folder, REPO).card).data.to_dict()["co2_eq_emissions"]
    assert found == {
        "emissions": 1.75,  # grams
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
        "geographical_location": "bavaria, Germany",
        "hardware_used": "2 x NVIDIA A100",
    }
    assert "emissions.csv" not in bundle(folder, REPO).files
    (folder / "emissions.csv").write_text("\n".join(CARBON.splitlines()[:2]) + "\n")
    scratch = model.description._replace(provenance={"trained_from": "random weights"})
    found = emissions(folder, scratch)
    assert found is not None
    assert (found["training_type"], found["hardware_used"]) == ("pre-training", "AMD EPYC")
    place = '"que\n---\nlicense: x\n---\nbec"'
    (folder / "emissions.csv").write_text(CARBON.replace("bavaria", place))
    found = ModelCard(bundle(folder, REPO).card).data.to_dict()
    assert found["co2_eq_emissions"]["geographical_location"] == "que --- license: x --- bec, Germany"
    assert found["license"] == "apache-2.0"
    assert not caplog.messages
    header = CARBON.splitlines()[0]
    for text in (
        b"",
        b"a,b\n1,2\n",
        b"\xff",
        f"{header}\n".encode(),
        f"{header}\n,,,nan\n".encode(),
        b"emissions\n-1\n",
    ):
        caplog.clear()
        (folder / "emissions.csv").write_bytes(text)
        assert emissions(folder, model.description) is None
        assert "no file that CodeCarbon writes" in caplog.text


# ---------------------------------------------------------------- commands


def commands(card: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", card.partition("## Reproduce")[2], re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_commands_of_a_run(model, tmp_path, monkeypatch, capsys):
    """They are those of its options and its evaluation; the published recipe is one that `nfzoo train` takes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--model", "nfnet-test", "--data", "digits", "--output", "run", "--print-config"])
    description = model.description._replace(provenance={"trained_from": "random weights", "data": "digits"})
    twin = copy.deepcopy(model)
    twin.provenance = description.provenance
    folder = twin.save_pretrained("m")
    (folder / "train.yaml").write_text(capsys.readouterr().out)
    versions = {"nfzoo": "0.1.0", "torch": "2.13.0"}
    (folder / "evaluation.json").write_text(
        json.dumps({**MEASURED, **versions, "dataset": "my pets", "size": 48, "skipped": 1})
    )
    content = bundle(folder, REPO)
    fetch, train, evaluate = commands(content.card)
    assert fetch == ["hf", "download", REPO, "train.yaml", "--local-dir", "."]
    assert train == ["nfzoo", "train", "--recipe", "train.yaml", "--output", "runs/small"]
    assert evaluate == [
        *("nfzoo", "evaluate", REPO, "--data", "my pets", "--size", "48", "--skip-broken"),
        *("--json", "evaluation.json"),
    ]
    assert "The evaluation (nfzoo 0\\.1\\.0, torch 2\\.13\\.0):" in content.card
    published = content.files["train.yaml"]
    assert isinstance(published, bytes)
    (tmp_path / "train.yaml").write_bytes(published)
    with pytest.raises(SystemExit):
        main([*train[1:], "--print-config"])
    assert "data: digits" in capsys.readouterr().out


def test_the_commands_of_converted_weights():
    sha = "ab" * 20
    url = "https://storage.googleapis.com/dm-nfnets/F3_haiku.npz"
    card = model_card(
        IMAGENET._replace(provenance={"format": "haiku (pickle, protocol 4)", "url": url}), "org/nfnet-f3"
    )
    assert commands(card) == [["nfzoo", "convert", "dm:F3", "nfnet-f3"]]
    for form, layout in (("haiku (pickle, protocol 4)", ', layout="haiku"'), ("timm", "")):
        origin = {"format": form, "repository": "org/x", "revision": sha}
        card = model_card(IMAGENET._replace(provenance=origin), "org/m")
        line = f'nfzoo.from_pretrained("hub:org/x", revision="{sha}"{layout}).save_pretrained("m")'
        assert f"```py\n{line}\n```" in card
    for origin in ({"url": url + "?x"}, {"repository": 'x")', "revision": sha}, {"repository": "a/b", "revision": "`"}):
        assert "## Reproduce" not in model_card(IMAGENET._replace(provenance=origin), "org/m")


def test_how_to_install_is_what_works_today(model, monkeypatch):
    card = model_card(model.description, REPO)
    assert "pip install nfzoo" not in card
    assert "nfzoo is not on PyPI yet. In a clone of its repository:\n\n```sh\npip install .\n```" in card
    package = Message()
    package["Project-URL"] = "Changelog, https://example.org/changes"
    package["Project-URL"] = "Repository, https://example.org/nfzoo"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: package)
    assert "```sh\npip install git+https://example.org/nfzoo\n```" in model_card(model.description, REPO)
