"""The content of `config.json`, and what transformers and the Hub read beside it.

nfzoo's own fields say what the model is. `config.json` repeats some of them in transformers' keys, which have to agree.
`preprocessor_config.json` repeats the preprocessing, and the code that `auto_map` names imports
`nfzoo.integrations.transformers`; nfzoo reads neither of these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nfzoo.config import ModelConfig, Preprocessing, config_from_dict
from nfzoo.errors import CheckpointError, ConfigError, nearest

FORMAT = 1
KEYS = {"format", "library_name", "name", "architecture", "preprocessing", "labels", "provenance", "temperature"}
KEYS |= {"problem_type", "thresholds"}

MULTI_LABEL = "multi_label_classification"
"""The problem type, as transformers names it, of a model of which each output is a label by itself."""

TEMPERATURES = "0.001 to 1000"

LABEL_KEYS = ("id2label", "label2id", "num_labels")
"""Keys in which transformers repeats the labels."""

FOREIGN_KEYS = {
    *("architectures", "auto_map", "base_model", "datasets", "dtype", "language", "license", "metrics", "model_type"),
    *("out_features", "out_indices", "pipeline_tag", "tags", "task_specific_params", "torch_dtype", "torchscript"),
    *("transformers_version", *LABEL_KEYS),
}
"""Keys that other tools add to `config.json`, besides all that begin with `_`. They are kept, and mean nothing here.

So is a `problem_type` other than `MULTI_LABEL`. Where the `model_type` is nfzoo's, so are those of `DERIVED_KEYS`: they
have to agree with its own fields.
"""

MODEL_TYPE = "nfzoo"
"""The key by which transformers finds the classes of `nfzoo.integrations.transformers`."""

PROCESSOR_FILE = "preprocessor_config.json"
CODE_FILE = "nfzoo_transformers.py"

DERIVED_KEYS = ("architectures", "auto_map", "id2label", "label2id", "model_type", "num_labels")
"""Keys of `config.json` that every save writes anew, or leaves out; see `model_fields`."""

CLASSIFIER, BACKBONE = "NFZooForImageClassification", "NFZooBackbone"
PROCESSOR = "NFZooImageProcessor"

_CODE = CODE_FILE.removesuffix(".py")
_AUTO_MAP = {
    "AutoBackbone": f"{_CODE}.{BACKBONE}",
    "AutoConfig": f"{_CODE}.NFZooConfig",
    "AutoImageProcessor": f"{_CODE}.{PROCESSOR}",
    "AutoModelForImageClassification": f"{_CODE}.{CLASSIFIER}",
}
_BICUBIC = 3  # as Pillow numbers it, and transformers

CODE = '''"""Lets transformers load this folder with `trust_remote_code=True`. The classes are those of nfzoo."""

try:
    from nfzoo.integrations.transformers import (
        NFZooBackbone,
        NFZooConfig,
        NFZooForImageClassification,
        NFZooImageProcessor,
    )
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("nfzoo"):
        raise
    raise ImportError(
        "this model needs the package nfzoo, in this or a newer version: `pip install .` in a clone of it"
    ) from error

__all__ = ["NFZooBackbone", "NFZooConfig", "NFZooForImageClassification", "NFZooImageProcessor"]
'''
"""Content of `CODE_FILE`."""


class Description(NamedTuple):
    """The content of `config.json`.

    Attributes:
        config: the architecture.
        preprocessing: the transform from an image to the model's input.
        name: the zoo's name, if the model has one.
        labels: class names, in the order of the logits.
        provenance: origin of the weights, free-form JSON.
        foreign: what other tools added, under their keys: see `FOREIGN_KEYS`.
        temperature: probabilities are `softmax(logits / temperature)`; 1 if it is `None`, and then no key of the file.
        problem_type: `MULTI_LABEL`, where probabilities are the sigmoids of the logits; else `None`, and no key.
        thresholds: of such a model's probabilities, from which on an image has a label; 0.5 if it is `None`.
    """

    config: ModelConfig
    preprocessing: Preprocessing
    name: str | None = None
    labels: tuple[str, ...] | None = None
    provenance: Mapping[str, Any] | None = None
    foreign: Mapping[str, Any] | None = None
    temperature: float | None = None
    problem_type: str | None = None
    thresholds: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`, ready for JSON."""
        return {
            "format": FORMAT,
            "library_name": "nfzoo",
            "name": self.name,
            "architecture": self.config.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "labels": None if self.labels is None else list(self.labels),
            "provenance": None if self.provenance is None else dict(self.provenance),
            **({} if self.temperature is None else {"temperature": self.temperature}),
            **({} if self.problem_type is None else {"problem_type": self.problem_type}),
            **({} if self.thresholds is None else {"thresholds": list(self.thresholds)}),
            **{k: v for k, v in (self.foreign or {}).items() if k != "problem_type" or self.problem_type is None},
        }


def describe(fields: object, source: str | Path) -> Description:
    """Check the fields of `config.json` and return its description; `source` is named in errors."""
    if not isinstance(fields, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not {type(fields).__name__}")
    if fields.get("library_name") != "nfzoo" or "architecture" not in fields:
        raise CheckpointError(
            f"{source} is not an nfzoo configuration: it needs 'library_name' nfzoo and an 'architecture'"
        )
    foreign = {key: value for key, value in fields.items() if key in FOREIGN_KEYS or key.startswith("_")}
    problem_type = fields.get("problem_type")
    if problem_type != MULTI_LABEL and "problem_type" in fields:
        foreign["problem_type"], problem_type = problem_type, None
    unknown = sorted(set(fields) - KEYS - set(foreign))
    if unknown:
        hint = nearest(unknown[0], KEYS) or f"; known: {', '.join(sorted(KEYS))}, and those that begin with '_'"
        raise CheckpointError(f"{source} has unknown keys {', '.join(unknown)}{hint}")
    if fields.get("format") != FORMAT:
        raise CheckpointError(f"{source} has format {fields.get('format')!r}; this nfzoo reads {FORMAT}: upgrade nfzoo")
    if "preprocessing" not in fields:
        raise CheckpointError(f"{source} lacks preprocessing")
    for key in ("architecture", "preprocessing"):
        if not isinstance(fields[key], dict):
            raise CheckpointError(f"{source}: {key!r} must be a JSON object, not {fields[key]!r}")
    try:
        config = config_from_dict(fields["architecture"])
        preprocessing = Preprocessing.from_dict(fields["preprocessing"])
        preprocessing.check_channels(config)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    labels = fields.get("labels")
    if labels is not None:
        if not isinstance(labels, list) or not all(isinstance(v, str) for v in labels):
            raise CheckpointError(f"{source}: 'labels' must be a list of strings")
        if len(labels) != config.num_classes:
            raise CheckpointError(f"{source}: {len(labels)} labels for {config.num_classes} classes")
        labels = tuple(labels)
    name, provenance = fields.get("name"), fields.get("provenance")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{source}: 'name' must be a string, not {name!r}")
    if provenance is not None and not isinstance(provenance, dict):
        raise CheckpointError(f"{source}: 'provenance' must be a JSON object, not {provenance!r}")
    temperature = fields.get("temperature")
    if not is_temperature(temperature):
        raise CheckpointError(f"{source}: 'temperature' must be a number from {TEMPERATURES}, not {temperature!r}")
    thresholds = fields.get("thresholds")
    problem = sets_problem(problem_type, thresholds, temperature, config.num_classes)
    if problem is not None:
        raise CheckpointError(f"{source}: {problem}")
    if fields.get("model_type") == MODEL_TYPE:
        problem = names_problem(fields, config.num_classes, labels)
        if problem is not None:
            raise CheckpointError(f"{source}: {problem}")
        foreign = {key: value for key, value in foreign.items() if key not in DERIVED_KEYS}
    about = config, preprocessing, name, labels, provenance, foreign or None, temperature, problem_type
    return Description(*about, None if thresholds is None else tuple(map(float, thresholds)))


def sets_problem(problem_type: object, thresholds: object, temperature: object, classes: int) -> str | None:
    """Return what is wrong with problem type, thresholds and temperature of a model; `None` if nothing is."""
    if problem_type not in (None, MULTI_LABEL):
        return f"'problem_type' must be {MULTI_LABEL!r} or None, not {problem_type!r}"
    if problem_type is not None and temperature is not None:
        return f"'temperature' is of a softmax, which a model of the problem type {MULTI_LABEL!r} does not have"
    if thresholds is None:
        return None
    if problem_type is None:
        return f"'thresholds' are of a model of the problem type {MULTI_LABEL!r}, which this one is not"
    if not isinstance(thresholds, list | tuple) or len(thresholds) != classes:
        return f"'thresholds' must be a list of {classes} numbers, one for each class"
    odd = [t for t in thresholds if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1]
    return f"'thresholds' must be numbers from 0 to 1, not {odd[0]!r}" if odd else None


def is_temperature(value: object) -> bool:
    """Return whether logits can be divided by a value, or it is `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return 1e-3 <= value <= 1e3


def model_fields(config: ModelConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return transformers' fields of `config.json`; the names of classes only if the model has labels."""
    names = {} if labels is None else dict(enumerate(labels))
    return {
        "model_type": MODEL_TYPE,
        "architectures": [CLASSIFIER if config.num_classes else BACKBONE],
        "auto_map": dict(_AUTO_MAP),
        **({"id2label": {str(i): name for i, name in names.items()}} if names else {}),
        **({"label2id": {name: i for i, name in names.items()}} if names else {}),
    }


def config_fields(description: Description) -> dict[str, Any]:
    """Return the content of `config.json`: nfzoo's own fields, and those of transformers' that follow from them."""
    own = {key: value for key, value in description.to_dict().items() if key not in DERIVED_KEYS}
    return {**own, **model_fields(description.config, description.labels)}


def names_problem(fields: Mapping[str, Any], classes: int, labels: Sequence[str] | None) -> str | None:
    """Return how the names of classes in `config.json` differ from nfzoo's labels; `None` if they do not.

    transformers would show its names, and nfzoo the labels. `LABEL_i`, transformers' name for class i, stands for none.
    """
    expected = dict(enumerate(labels or [f"LABEL_{i}" for i in range(classes)]))
    shown = "'labels'" if labels is not None else "a model without labels"
    remedy = "change both, or remove 'id2label' and 'label2id'"
    count = fields.get("num_labels")
    if count not in (None, classes):
        return f"'num_labels' is {count!r} for {classes} classes"
    names = fields.get("id2label")
    if names is not None:
        found = {str(key): name for key, name in names.items()} if isinstance(names, dict) else {}
        for i, name in expected.items():
            if found.get(str(i)) != name:
                return f"'id2label' has {found.get(str(i))!r} for class {i}, and {shown} {name!r}; {remedy}"
        if len(found) != classes:
            return f"'id2label' has {len(found)} entries for {classes} classes; {remedy}"
    numbers = fields.get("label2id")
    if numbers is not None and numbers != {name: i for i, name in expected.items()}:
        return f"'label2id' is not the inverse of {shown}; {remedy}"
    return None


def processor_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: nfzoo's preprocessing, and the same in transformers' keys.

    Readers that know these keys alone, such as transformers.js, resize by their own bicubic kernel, which is not
    TensorFlow's.
    """
    size, channels = preprocessing.test_size, len(preprocessing.mean)
    if preprocessing.resize == "deepmind":
        side = size + preprocessing.margin
        resized = {"height": side, "width": side}
    else:
        resized = {"shortest_edge": math.floor(size / preprocessing.crop)}
    return {
        "image_processor_type": PROCESSOR,
        # A list has the classes of transformers' two backends. Of a single name, transformers would derive that of a
        # video processor, and ask whether it may run the code for it.
        "auto_map": {"AutoImageProcessor": [_AUTO_MAP["AutoImageProcessor"], None]},
        "preprocessing": preprocessing.to_dict(),
        "do_convert_rgb": channels == 3,
        **({"do_convert_grayscale": True} if channels == 1 else {}),
        "do_resize": True,
        "size": resized,
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
