"""Checkpoints on disk: a folder of `config.json` and `model.safetensors`, written atomically and read strictly.

The weight file repeats the configuration in its metadata. A weight file alone therefore loads, and a folder with files
of two different saves is refused. Folders of shards, as other libraries write them, are read as well. What transformers
needs besides is written too: see `model_fields` and `processor_fields` of `description`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.description import (
    CODE,
    CODE_FILE,
    DERIVED_KEYS,
    PROCESSOR_FILE,
    TEMPERATURES,
    config_fields,
    is_temperature,
    model_fields,
    processor_fields,
    sets_problem,
)
from nfzoo.checkpoint.description import LABEL_KEYS as LABEL_KEYS
from nfzoo.checkpoint.description import MULTI_LABEL as MULTI_LABEL
from nfzoo.checkpoint.description import Description as Description
from nfzoo.checkpoint.description import describe as describe
from nfzoo.checkpoint.run_state import STATE_FILE
from nfzoo.checkpoint.weight_files import (
    FLOATS,
    Weights,
    open_tensors,
    open_weights,
    read_index,
    save_tensors,
    stated_checksum,
    warn_unchecked,
)
from nfzoo.config import ModelConfig
from nfzoo.errors import CheckpointError, ConfigError, shown
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

_SHARED = ("config", "preprocessing", "labels", "temperature", "problem_type", "thresholds")
"""Fields in which the files of a folder have to agree."""


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
    """Write a checkpoint folder, whole or not at all: `config.json`, `model.safetensors`, and transformers' two files.

    A new folder appears by one rename. In an existing folder the files are replaced one after the other, the weights
    before `config.json`; other files stay, but for `onnx/`, which is made from the weights: see `replaceable_onnx`.

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
            f"the model's temperature must be None or a number from {TEMPERATURES}, not {description.temperature!r}"
        )
    about = description.problem_type, description.thresholds, description.temperature
    problem = sets_problem(*about, description.config.num_classes)
    if problem is not None:
        raise ConfigError(f"the model cannot be saved: {problem}")
    check_params(description.config, {k: tuple(v.shape) for k, v in params.items()}, "the model")
    tensors = {k: v.detach().cpu() for k, v in params.items()}
    description = _without_stale(description, tensors)
    metadata = {"nfzoo": _json(description.to_dict())}
    files = texts(description)
    with replaced_folder(folder, subfolders=replaceable_onnx(folder, renewed=write_onnx is not None)) as scratch:
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
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
    if old.exists() and not old.is_dir():
        if renewed:
            raise ConfigError(f"{old} is a file; move it away, or give another folder")
        return ()
    others = [] if not old.is_dir() else sorted({p.name for p in old.iterdir()} - {ONNX_FILE, ONNX_DATA, SHEET_FILE})
    if others and renewed:
        raise ConfigError(f"{old} holds {others[0]!r}, which nfzoo did not write; move it away, or give another folder")
    if others:
        logger.warning("%s stays, and is of the weights that were there before: it holds %s", old, shown(others[0]))
        return ()
    if old.is_dir() and not renewed:
        logger.warning("removing %s, which was made from the weights that were there before", old)
    return (ONNX_FOLDER,)


def texts(description: Description) -> dict[str, str]:
    """Return the content of a folder's files besides its weights: `config.json`, and what transformers needs.

    Raises:
        CheckpointError: for what could not be loaded again, such as labels of other types.
    """
    _parse(_json(description.to_dict()), "the model's description")
    return {
        CONFIG_FILE: _json(config_fields(description), indent=2) + "\n",
        PROCESSOR_FILE: _json(processor_fields(description.preprocessing), indent=2) + "\n",
        CODE_FILE: CODE,
    }


def _without_stale(description: Description, params: Mapping[str, Tensor]) -> Description:
    """Return the description without what other tools noted of another model: names of classes, a dtype.

    A warning names what is lost.
    """
    derived = model_fields(description.config, description.labels)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in params.values()}
    lost, kept = [], {}
    for key, value in (description.foreign or {}).items():
        if key in DERIVED_KEYS:
            lost += [key] if value != derived.get(key) else []
        elif key not in ("dtype", "torch_dtype") or dtypes == {value}:
            kept[key] = value
    if lost:
        logger.warning(
            "%s of another tool are not kept in %s: nfzoo writes its own there", ", ".join(map(repr, lost)), CONFIG_FILE
        )
    return description._replace(foreign=kept or None)


def _json(fields: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return JSON that UTF-8 can hold: a lone surrogate in a label is written as its escape, which JSON reads back."""
    text = json.dumps(fields, indent=indent, ensure_ascii=False)
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
        if path.is_dir():
            _check_descriptions(description, tensors, path)
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


def check_folder(folder: Path) -> None:
    """Raise a `CheckpointError` unless a folder's weights are whole, and of the model of its `config.json`."""
    description = read_description(folder / CONFIG_FILE)
    with open_tensors(folder / weight_files(folder)[0]) as tensors:
        _check_descriptions(description, tensors, folder)


def _check_descriptions(description: Description, tensors: Weights, folder: Path) -> None:
    for path, file in tensors.files.items():
        text = (file.metadata() or {}).get("nfzoo")
        own = description if text is None else _parse(text, f"the metadata of {path}")
        if any(getattr(own, key) != getattr(description, key) for key in _SHARED):
            raise CheckpointError(
                f"{CONFIG_FILE} and {path.name} in {folder} describe different models, perhaps after an interrupted "
                f"save or an edit; load {folder / weight_files(folder)[0]} alone and save it anew, or restore the pair"
            )


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
