"""Checkpoints on disk: a folder of `config.json` and `model.safetensors`, written atomically and read strictly.

The weight file repeats the configuration in its metadata. A weight file alone therefore loads, and a folder with files
of two different saves is refused. Folders of shards, as other libraries write them, are read as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.run_state import STATE_FILE
from nfzoo.checkpoint.weight_files import (
    FLOATS,
    open_tensors,
    open_weights,
    read_index,
    save_tensors,
    stated_checksum,
    warn_unchecked,
)
from nfzoo.config import ModelConfig, Preprocessing, config_from_dict
from nfzoo.errors import CheckpointError, ConfigError, nearest, shown
from nfzoo.files import parse_json, read_text
from nfzoo.model import reparametrized_hint, specs
from nfzoo.types import Params

logger = logging.getLogger("nfzoo")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # where the weights are in shards
ONNX_FOLDER = "onnx"  # programs made from the weights, where transformers.js looks for them
ONNX_FILE, ONNX_DATA = "model.onnx", "model.onnx_data"
SHEET_FILE = "nfzoo.json"  # beside a program: its input and output
FORMAT = 1
_KEYS = {"format", "library_name", "name", "architecture", "preprocessing", "labels", "provenance", "temperature"}
_KEYS |= {"problem_type", "thresholds"}

_SHARED = ("config", "preprocessing", "labels", "temperature", "problem_type", "thresholds")
"""Fields in which the files of a folder have to agree."""

MULTI_LABEL = "multi_label_classification"
"""The problem type, as transformers names it, of a model of which each output is a label by itself."""

_TEMPERATURES = "0.001 to 1000"

LABEL_KEYS = ("id2label", "label2id", "num_labels")
"""Keys in which transformers repeats the labels."""

FOREIGN_KEYS = {
    *("architectures", "auto_map", "base_model", "datasets", "dtype", "language", "license", "metrics", "model_type"),
    *("pipeline_tag", "tags", "task_specific_params", "torch_dtype", "torchscript"),
    *("transformers_version", *LABEL_KEYS),
}
"""Keys that other tools add to `config.json`, besides all that begin with `_`. They are kept, and mean nothing here.

So is a `problem_type` other than `MULTI_LABEL`.
"""


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
    unknown = sorted(set(fields) - _KEYS - set(foreign))
    if unknown:
        hint = nearest(unknown[0], _KEYS) or f"; known: {', '.join(sorted(_KEYS))}, and those that begin with '_'"
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
        raise CheckpointError(f"{source}: 'temperature' must be a number from {_TEMPERATURES}, not {temperature!r}")
    thresholds = fields.get("thresholds")
    problem = sets_problem(problem_type, thresholds, temperature, config.num_classes)
    if problem is not None:
        raise CheckpointError(f"{source}: {problem}")
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


def read_description(path: Path) -> Description:
    """Read `config.json`, or the metadata of a weight file."""
    if path.suffix == ".safetensors":
        with open_weights(path, "cpu") as file:
            metadata = file.metadata() or {}
        if "nfzoo" not in metadata:
            raise CheckpointError(
                f"{path} has no model description in its metadata; put the {CONFIG_FILE} of its model beside it"
            )
        text, source = metadata["nfzoo"], f"the metadata of {path}"
    else:
        try:
            text, source = read_text(path), str(path)
        except FileNotFoundError as error:
            run = (path.parent / STATE_FILE).is_file()
            remedy = "; it is a checkpoint of a run, of which `nfzoo convert` makes a model" if run else ""
            raise CheckpointError(f"there is no {path.name} in {path.parent}{remedy}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not text: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _parse(text, source)


def _parse(text: str, source: str) -> Description:
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{source} is not JSON: {error}") from error
    return describe(fields, source)


def save_checkpoint(
    folder: str | Path,
    description: Description,
    params: Mapping[str, Tensor],
    *,
    write_onnx: Callable[[Path, str | None], None] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all.

    A new folder appears by one rename. In an existing folder the two files are replaced one after the other, the
    weights first; other files stay, but for `onnx/`, which is made from the weights: see `replaceable_onnx`.

    Args:
        write_onnx: `write_onnx(folder, checksum)`, which fills the new folder `onnx` from weights of this checksum.

    Raises:
        CheckpointError: if the parameters do not fit the configuration, or `folder` is a file.
        ConfigError: for a temperature that is not between 0.001 and 1000, and for thresholds that do not fit.
        OSError: if writing fails; an earlier checkpoint then still loads, at least from its weight file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint needs a folder")
    if not is_temperature(description.temperature):
        raise ConfigError(
            f"the model's temperature must be None or a number from {_TEMPERATURES}, not {description.temperature!r}"
        )
    about = description.problem_type, description.thresholds, description.temperature
    problem = sets_problem(*about, description.config.num_classes)
    if problem is not None:
        raise ConfigError(f"the model cannot be saved: {problem}")
    check_params(description.config, {k: tuple(v.shape) for k, v in params.items()}, "the model")
    text = _json(description, indent=2) + "\n"
    _parse(text, "the model's description")  # raises for what could not be loaded again, such as labels of other types
    tensors = {k: v.detach().cpu() for k, v in params.items()}
    metadata = {"nfzoo": _json(description)}
    with replaced_folder(folder, subfolders=replaceable_onnx(folder, renewed=write_onnx is not None)) as scratch:
        (scratch / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_tensors(scratch / WEIGHTS_FILE, tensors, metadata)
        if write_onnx is not None:
            (scratch / ONNX_FOLDER).mkdir()
            write_onnx(scratch / ONNX_FOLDER, stated_checksum(scratch / WEIGHTS_FILE))
    return folder


def replaceable_onnx(folder: Path, *, renewed: bool) -> tuple[str, ...]:
    """Return the subfolders for `replaced_folder` where new weights are written: `onnx`, or none.

    An `onnx` that nfzoo wrote goes with the weights that it was made from, of which a warning tells unless it is
    `renewed`. One that holds other files stays, with a warning.

    Raises:
        ConfigError: if it is to be renewed and holds other files.
    """
    old = folder / ONNX_FOLDER
    others = [] if not old.is_dir() else sorted({p.name for p in old.iterdir()} - {ONNX_FILE, ONNX_DATA, SHEET_FILE})
    if others and renewed:
        raise ConfigError(f"{old} holds {others[0]!r}, which nfzoo did not write; move it away, or give another folder")
    if others:
        logger.warning("%s stays, and is of the weights that were there before: it holds %s", old, shown(others[0]))
        return ()
    if old.is_dir() and not renewed:
        logger.warning("removing %s, which was made from the weights that were there before", old)
    return (ONNX_FOLDER,)


def _json(description: Description, *, indent: int | None = None) -> str:
    """Return JSON that UTF-8 can hold: a lone surrogate in a label is written as its escape, which JSON reads back."""
    text = json.dumps(description.to_dict(), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def load_checkpoint(
    path: str | Path, *, device: torch.device | str | None = None, skip_head: bool = False, hashed: bool = False
) -> tuple[Description, Params]:
    """Read a checkpoint folder, whose weights may be in shards, or a single weight file.

    Tensors are compared with the checksum that nfzoo writes beside them. A warning says if a file has none.

    Args:
        skip_head: leave out the classifier's weight and bias (for a new number of classes).
        hashed: whether the files were compared with a hash already.

    Raises:
        CheckpointError: if a file is missing, damaged or inconsistent, or the tensors are not exactly the model's.
    """
    path = Path(path)
    weights = path
    if path.is_dir():
        description = read_description(path / CONFIG_FILE)
        weights = path / weight_files(path)[0]
    elif weights.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a .safetensors file or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; `nfzoo convert` "
            "reads weights of other programs"
        )
    else:
        sibling = path.parent / CONFIG_FILE
        alone = _has_metadata(weights) or not sibling.exists()
        description = read_description(weights if alone else sibling)
    with open_tensors(weights, str(device or "cpu")) as tensors:
        if not hashed:
            warn_unchecked(*tensors.unchecked)
        for file_path, file in tensors.files.items() if path.is_dir() else ():
            text = (file.metadata() or {}).get("nfzoo")
            own = description if text is None else _parse(text, f"the metadata of {file_path}")
            if any(getattr(own, key) != getattr(description, key) for key in _SHARED):
                raise CheckpointError(
                    f"{CONFIG_FILE} and {file_path.name} in {path} describe different models, perhaps after an "
                    f"interrupted save or an edit; load {weights} alone and save it anew, or restore the pair"
                )
        check_params(description.config, tensors.shapes, str(weights))
        params = {}
        for key, (_, kind) in specs(description.config).items():
            if skip_head and (kind == "head" or key == "head.bias"):
                continue
            value = tensors.get_tensor(key)
            if value.dtype not in FLOATS:
                raise CheckpointError(f"{key} in {weights} is {value.dtype}, not floating point")
            params[key] = value
    return description, params


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that hold a folder's weights: `model.safetensors`, or the index and its shards.

    Raises:
        CheckpointError: if the folder has neither, or the index is unreadable.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return (WEIGHTS_FILE,)
    if (folder / INDEX_FILE).is_file():
        return (INDEX_FILE, *sorted(set(read_index(folder / INDEX_FILE).values())))
    raise CheckpointError(f"there is no {WEIGHTS_FILE} in {folder}, nor {INDEX_FILE}")


def check_params(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise a `CheckpointError` unless `shapes` are exactly those of the model's parameters."""
    expected = {key: shape for key, (shape, _) in specs(cfg).items()}
    problems = []
    for title, keys in (
        ("missing", [k for k in expected if k not in shapes]),
        ("unexpected", [k for k in shapes if k not in expected]),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}, such as {keys[0]!r}")
    wrong = [k for k in expected if k in shapes and shapes[k] != expected[k]]
    if wrong:
        key = wrong[0]
        problems.append(f"{len(wrong)} of another shape, such as {key!r}: {shapes[key]} instead of {expected[key]}")
    if problems:
        raise CheckpointError(
            f"the tensors of {source} do not fit the configuration: {'; '.join(problems)}{reparametrized_hint(shapes)}"
        )


def _has_metadata(path: Path) -> bool:
    with open_weights(path, "cpu") as file:
        return "nfzoo" in (file.metadata() or {})
