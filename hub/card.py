"""Write the model card: `README.md` of a repository, with the metadata by which the Hub finds and shows a model."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from nfzoo.checkpoint.model_folder import ONNX_FILE, ONNX_FOLDER, Description
from nfzoo.conversion.download import PUBLISHED
from nfzoo.data.digits import DIGITS
from nfzoo.data.labels import imagenet
from nfzoo.evaluate import EVALUATION_FILE
from nfzoo.evaluate.scores import tells_top5
from nfzoo.hub.registry import HUB, PUBLIC, is_repository
from nfzoo.hub.results import IMAGENET, measured, trained, training_data
from nfzoo.model import mac_count, parameter_count
from nfzoo.runtime.output import escaped, markdown_table, markdown_text
from nfzoo.train.run_folder import CURVES_FILE, RUN_FILE
from nfzoo.variants import VARIANTS

_ONNX = f"{ONNX_FOLDER}/{ONNX_FILE}"

_FAMILY = {"nfnet": "NFNet", "nf_resnet": "NF-ResNet", "nf_regnet": "NF-RegNet"}
_RULES = {"deepmind": "DeepMind's released code", "timm": "timm"}

_SHOWN = {"top1": "top-1", "top5": "top-5", "map": "mean average precision", "f1": "macro F1", "micro_f1": "micro F1"}

# Pictures of ImageNet's classes for the Hub's page, which the cards of many models of others show too.
_PICTURES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
_WIDGET = [{"src": f"{_PICTURES}/{name.lower()}.jpg", "example_title": name} for name in ("Tiger", "Teapot")]

_CITATION = """\
@inproceedings{brock2021characterizing,
  author    = {Andrew Brock and Soham De and Samuel L. Smith},
  title     = {Characterizing signal propagation to close the performance gap in unnormalized {ResNets}},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://arxiv.org/abs/2101.08692}
}

@inproceedings{brock2021high,
  author    = {Andrew Brock and Soham De and Samuel L. Smith and Karen Simonyan},
  title     = {High-Performance Large-Scale Image Recognition Without Normalization},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2102.06171}
}"""


def model_card(
    description: Description,
    repo_id: str,
    *,
    license: str = "apache-2.0",
    evaluation: Mapping[str, Any] | None = None,
    files: Collection[str] = (),
    emissions: Mapping[str, Any] | None = None,
) -> str:
    """Return the card of a model, as Markdown after a YAML header.

    Args:
        repo_id: the repository that the card is for.
        license: the Hub's identifier of the licence of the weights.
        evaluation: what `nfzoo evaluate --json` wrote.
        files: names of the other files in the repository; the card shows the training curves if they are among them.
        emissions: see `nfzoo.hub.results.emissions`.

    Source: https://huggingface.co/docs/hub/model-cards
    """
    config, preprocessing = description.config, description.preprocessing
    title = repo_id.rpartition("/")[2]
    results = trained(description) if evaluation is None else measured(description, evaluation)
    base, data = _base_model(description), training_data(description)
    metadata = ModelCardData(
        license=license,
        library_name="nfzoo",
        tags=[
            *("nfzoo", "pytorch", "image-classification", "normalizer-free", config.family.replace("_", "-")),
            *(["onnx"] if _ONNX in files else []),
        ],
        pipeline_tag="image-classification",
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=[data] if data else [IMAGENET] if _of_imagenet(description) else None,
        metrics=[results[0].metric_type] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
        co2_eq_emissions=None if emissions is None else dict(emissions),
        widget=_WIDGET if description.labels == imagenet() else None,
    )
    size = preprocessing.test_size
    facts = [
        ("architecture", f"{_FAMILY[config.family]}, depths {', '.join(map(str, config.depths))}, {config.activation}"),
        ("arithmetic", f"the rules of {_RULES[config.rules]}"),
        ("parameters", f"{parameter_count(config):,}"),
        ("multiply-accumulates", f"{mac_count(config, size):,} at {size} x {size} pixels"),
        ("input", f"{preprocessing.train_size} pixels in training, {size} in evaluation"),
        ("classes", _classes(description)),
    ]
    if description.temperature is not None:
        facts.append(("temperature of the probabilities", f"{description.temperature:.4g}"))
    if description.problem_type is not None:
        facts.append(("labels", "several an image, or none: those whose sigmoids reach their thresholds"))
    if _ONNX in files:
        shape = f"(N, {config.in_channels}, {size}, {size})"
        facts.append(("ONNX", f"`{_ONNX}`, from `pixel_values` {shape} to `logits`"))
    parts = [
        f"# {title}",
        f"A Normalizer-Free network for nfzoo{_zoo(description)}.",
        markdown_table(("", ""), facts),
        "## Use",
        _usage(repo_id, description),
    ]
    if evaluation is not None:
        parts += ["## Evaluation", _evaluation(evaluation)]
    if CURVES_FILE in files:
        parts += ["## Training", f"![training curves]({CURVES_FILE})"]
    if description.provenance:
        known = {key: value for key, value in description.provenance.items() if value is not None}
        rows = [
            (markdown_text(key), markdown_text(json.dumps(value, ensure_ascii=False))) for key, value in known.items()
        ]
        parts += ["## Where the weights come from", markdown_table(("", ""), rows)]
    commands = _reproduction(repo_id, description, evaluation, files)
    if commands:
        parts += ["## Reproduce", *commands]
    parts += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _usage(repo_id: str, description: Description) -> str:
    if description.problem_type is not None:
        return f"""\
{_install()}

```python
import nfzoo

model = nfzoo.from_pretrained("{repo_id}")
for label, probability in model.predict("photo.jpg"):  # the labels that reach their thresholds, perhaps none
    print(f"{{probability:6.1%}}  {{label}}")
```"""
    classes = description.config.num_classes
    logits = "model(image[None])" if description.temperature is None else "(model(image[None]) / model.temperature)"
    return f"""\
{_install()}

```python
import nfzoo
import torch

model = nfzoo.from_pretrained("{repo_id}")
image = model.preprocess("photo.jpg")
with torch.inference_mode():
    probabilities = {logits}.softmax(dim=1)[0]
for probability, index in zip(*probabilities.topk({min(5, classes)})):
    print(f"{{probability:6.1%}}  {{model.labels[index] if model.labels else int(index)}}")
```"""


def _zoo(description: Description) -> str:
    row = VARIANTS.get(description.name or "")
    if row is None:
        return ""
    text = f", of the zoo's form `{row.name}` ({row.source})"
    if row.top1 is not None:
        text += f". For this form the source reports {row.top1:.1f} % top-1 accuracy on ImageNet"
    return text


def _classes(description: Description) -> str:
    labels = description.labels
    if labels is None:
        return str(description.config.num_classes)
    if labels == imagenet():
        return "1,000, those of ImageNet"
    more = ", …" if len(labels) > 10 else ""
    return f"{len(labels):,}: " + ", ".join(map(markdown_text, labels[:10])) + more


def _install() -> str:
    """Return the commands that install nfzoo: from the address that the package names, else from a clone."""
    try:
        addresses = importlib.metadata.metadata("nfzoo").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        addresses = []
    for address in addresses:
        name, _, url = address.partition(", ")
        if name.lower() in ("repository", "source", "source code"):
            return f"```sh\npip install git+{url}\n```"
    return "nfzoo is not on PyPI yet. In a clone of its repository:\n\n```sh\npip install .\n```"


def _base_model(description: Description) -> str | None:
    """Return the repository of the weights that the training began with, if it is one of the Hub."""
    source = (description.provenance or {}).get("trained_from")
    if not isinstance(source, str):
        return None
    source = PUBLIC[source].repo_id if source in PUBLIC else source.removeprefix(HUB)
    return source if is_repository(source) else None


def _reproduction(
    repo_id: str, description: Description, evaluation: Mapping[str, Any] | None, files: Collection[str]
) -> list[str]:
    """Return what makes the weights and the evaluation anew, as far as it is known: sentences and commands."""
    title, provenance = shlex.quote(repo_id.rpartition("/")[2]), description.provenance or {}
    parts = []
    origin = {key: provenance.get(key) for key in ("url", "repository", "revision", "format")}
    published = re.fullmatch(re.escape(PUBLISHED) + r"/(F[0-6])_haiku\.npz", str(origin["url"]))
    if published:
        parts.append(_sh("The published weights, converted:", f"nfzoo convert dm:{published[1]} {title}"))
    elif is_repository(str(origin["repository"])) and re.fullmatch("[0-9a-f]{40}", str(origin["revision"])):
        layout = ', layout="haiku"' if str(origin["format"]).startswith("haiku") else ""
        call = f'nfzoo.from_pretrained("{HUB}{origin["repository"]}", revision="{origin["revision"]}"{layout})'
        parts.append(f'The published weights, converted:\n\n```py\n{call}.save_pretrained("{title}")\n```')
    if RUN_FILE in files:
        data = provenance.get("data")
        known = isinstance(data, str) and (data == DIGITS or data.startswith(HUB))
        where = "" if known else ", beside the folder of the data, or with `--data FOLDER`"
        fetch = f"hf download {shlex.quote(repo_id)} {RUN_FILE} --local-dir ."
        train = f"nfzoo train --recipe {RUN_FILE} --output runs/{title}"
        parts.append(_sh(f"The training{where}:", fetch, train))
    if evaluation is not None:
        parts.append(
            _sh(f"The evaluation{_versions(evaluation)}:", _evaluate_command(repo_id, description, evaluation))
        )
    return parts


def _sh(sentence: str, *commands: str) -> str:
    return f"{sentence}\n\n```sh\n" + "\n".join(map(escaped, commands)) + "\n```"


def _versions(evaluation: Mapping[str, Any]) -> str:
    known = [f"{name} {markdown_text(str(evaluation[name]))}" for name in ("nfzoo", "torch") if evaluation.get(name)]
    return f" ({', '.join(known)})" if known else ""


def _evaluate_command(repo_id: str, description: Description, evaluation: Mapping[str, Any]) -> str:
    data = evaluation["dataset"]
    words = ["nfzoo", "evaluate", repo_id, "--data", HUB + data if is_repository(data.partition(":")[0]) else data]
    if description.problem_type is not None:
        words += ["--labels", "labels.csv"]
    if evaluation["size"] != description.preprocessing.test_size:
        words += ["--size", str(evaluation["size"])]
    if evaluation.get("skipped"):
        words += ["--skip-broken"]
    return shlex.join([*words, "--json", EVALUATION_FILE])


def _of_imagenet(description: Description) -> bool:
    """Return whether the weights were trained on ImageNet itself, as far as their provenance says."""
    provenance = description.provenance or {}
    return description.labels == imagenet() and "trained_from" not in provenance


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    data = markdown_text(str(evaluation["dataset"])) + (
        f", {markdown_text(str(evaluation['split']))}" if evaluation.get("split") else ""
    )
    rows = [
        ("data", data),
        ("images", f"{evaluation['images']:,}" + (", most of them trained on" if evaluation.get("trained_on") else "")),
        ("input", f"{evaluation['size']} x {evaluation['size']} pixels"),
        *(
            (name, f"{evaluation[key]:.2%}")
            for key, name in _SHOWN.items()
            if key in evaluation and (key != "top5" or tells_top5(evaluation.get("classes", 1000)))
        ),
    ]
    return markdown_table(("", ""), rows)
