"""Write the model card: `README.md` of a repository, with the metadata by which the Hub finds and shows a model."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from nfzoo.checkpoint.model_folder import ONNX_FILE, ONNX_FOLDER, Description
from nfzoo.data.labels import imagenet
from nfzoo.errors import CheckpointError
from nfzoo.evaluate import EVALUATION_FILE
from nfzoo.model import mac_count, parameter_count
from nfzoo.runtime.output import escaped
from nfzoo.train.run_folder import CURVES_FILE
from nfzoo.variants import VARIANTS

IMAGENET = "imagenet-1k"

_ONNX = f"{ONNX_FOLDER}/{ONNX_FILE}"

_FAMILY = {"nfnet": "NFNet", "nf_resnet": "NF-ResNet", "nf_regnet": "NF-RegNet"}
_RULES = {"deepmind": "DeepMind's released code", "timm": "timm"}

_METRICS = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("accuracy", "top-5 accuracy")}
_SET_METRICS = {
    "map": ("mean_average_precision", "mean average precision"),
    "f1": ("f1", "macro F1"),
    "micro_f1": ("f1", "micro F1"),
}
_SHOWN = {"top1": "top-1", "top5": "top-5", "map": "mean average precision", "f1": "macro F1", "micro_f1": "micro F1"}

_MARKDOWN = frozenset(r"\`*_{}[]<>()#+-.!|~&$:@^=")

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
) -> str:
    """Return the card of a model, as Markdown after a YAML header.

    Args:
        repo_id: the repository that the card is for.
        license: the Hub's identifier of the licence of the weights.
        evaluation: what `nfzoo evaluate --json` wrote.
        files: names of the other files in the repository; the card shows the training curves if they are among them.

    Source: https://huggingface.co/docs/hub/model-cards
    """
    config, preprocessing = description.config, description.preprocessing
    title = repo_id.rpartition("/")[2]
    results = _trained(description) if evaluation is None else _results(description, evaluation)
    metadata = ModelCardData(
        license=license,
        library_name="nfzoo",
        tags=[
            *("nfzoo", "pytorch", "image-classification", "normalizer-free", config.family.replace("_", "-")),
            *(["onnx"] if _ONNX in files else []),
        ],
        pipeline_tag="image-classification",
        datasets=[IMAGENET] if _of_imagenet(description) else None,
        metrics=[results[0].metric_type] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
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
        _table(("", ""), facts),
        "## Use",
        _usage(repo_id, description),
    ]
    if evaluation is not None:
        parts += ["## Evaluation", _evaluation(evaluation)]
    if CURVES_FILE in files:
        parts += ["## Training", f"![training curves]({CURVES_FILE})"]
    if description.provenance:
        known = {key: value for key, value in description.provenance.items() if value is not None}
        rows = [(_cell(key), _cell(json.dumps(value, ensure_ascii=False))) for key, value in known.items()]
        parts += ["## Where the weights come from", _table(("", ""), rows)]
    parts += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _usage(repo_id: str, description: Description) -> str:
    if description.problem_type is not None:
        return f"""\
```sh
pip install nfzoo
```

```python
import nfzoo

model = nfzoo.from_pretrained("{repo_id}")
for label, probability in model.predict("photo.jpg"):  # the labels that reach their thresholds, perhaps none
    print(f"{{probability:6.1%}}  {{label}}")
```"""
    classes = description.config.num_classes
    logits = "model(image[None])" if description.temperature is None else "(model(image[None]) / model.temperature)"
    return f"""\
```sh
pip install nfzoo
```

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
    return f"{len(labels):,}: " + ", ".join(map(_cell, labels[:10])) + more


def _of_imagenet(description: Description) -> bool:
    """Return whether the weights were trained on ImageNet itself, as far as their provenance says."""
    provenance = description.provenance or {}
    return description.labels == imagenet() and "trained_from" not in provenance


def _results(description: Description, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    measured = _METRICS if description.problem_type is None else _SET_METRICS
    for key, kind in (("dataset", str), ("images", int), *((key, float | int) for key in measured), ("size", int)):
        if not isinstance(evaluation.get(key), kind):
            raise CheckpointError(
                f"{EVALUATION_FILE} lacks {key!r}, or it is of another type; write it with `nfzoo evaluate --json`"
            )
    whole = description.labels == imagenet() and evaluation.get("classes") == 1000
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=IMAGENET if whole else "imagefolder",
            dataset_name=evaluation["dataset"],
            dataset_split=evaluation.get("split"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(evaluation[key]), 6),
        )
        for key, (kind, name) in measured.items()
    ]


def _trained(description: Description) -> list[EvalResult]:
    """Return the accuracy, or mean average precision, on held-out images that `nfzoo train` notes in the provenance."""
    provenance = description.provenance or {}
    kind, name = ("accuracy", "top-1 accuracy") if description.problem_type is None else _SET_METRICS["map"]
    accuracy, data = provenance.get("accuracy" if description.problem_type is None else "map"), provenance.get("data")
    if not isinstance(accuracy, float) or not isinstance(data, str):
        return []
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=PurePath(data).name or data,
            dataset_split="validation",
            metric_type=kind,
            metric_name=name,
            metric_value=round(accuracy, 6),
        )
    ]


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    data = _cell(str(evaluation["dataset"])) + (
        f", {_cell(str(evaluation['split']))}" if evaluation.get("split") else ""
    )
    rows = [
        ("data", data),
        ("images", f"{evaluation['images']:,}"),
        ("input", f"{evaluation['size']} x {evaluation['size']} pixels"),
        *((name, f"{evaluation[key]:.2%}") for key, name in _SHOWN.items() if key in evaluation),
    ]
    return _table(("", ""), rows)


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Escape text that would be Markdown, HTML, a formula or a link in a table, and characters that cannot be seen."""
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in escaped(text))
