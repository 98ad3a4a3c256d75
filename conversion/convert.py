"""Convert any weights that nfzoo reads to any form that it writes, as `nfzoo convert` does."""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from nfzoo.checkpoint.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Description,
    describe,
    load_checkpoint,
    read_description,
)
from nfzoo.checkpoint.run_state import STATE_FILE, open_state
from nfzoo.checkpoint.state_dicts import is_torch_file
from nfzoo.conversion.download import PUBLISHED, fetch, published_url
from nfzoo.conversion.haiku import from_arrays, recognize
from nfzoo.conversion.haiku_files import open_source
from nfzoo.conversion.pickle_writer import write_haiku
from nfzoo.conversion.timm import PICKLED_FILE, file_sha256, read_timm, write_timm
from nfzoo.data.labels import imagenet
from nfzoo.errors import CheckpointError, ConversionError
from nfzoo.files import read_json
from nfzoo.nn import NFNet
from nfzoo.types import Params
from nfzoo.variants import VARIANTS

logger = logging.getLogger("nfzoo")

Form = Literal["nfzoo", "haiku", "timm"]
_WEIGHT_FILES = (WEIGHTS_FILE, INDEX_FILE, PICKLED_FILE)
_TORCH = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")

# What other programs write: the name of the file, or of one in the folder -> what it is.
_TO_STATE_DICT = "load it where it was written, and save model.state_dict()"
_TO_TREE = "save its parameters as {module: {name: array}} by pickle"
_FOREIGN = {
    "*.keras": f"is a model of Keras; {_TO_TREE}",
    "*.h5": f"is an HDF5 file, as Keras writes; {_TO_TREE}",
    "*.msgpack": f"is a file of Flax; {_TO_TREE}",
    "*.onnx": f"is an ONNX program; {_TO_STATE_DICT}",
    "*.pt2": f"is a program of torch.export; {_TO_STATE_DICT}",
    "*.gguf": f"is a GGUF file; {_TO_STATE_DICT}",
    "*.index": f"is a checkpoint of TensorFlow; {_TO_TREE}",
    "saved_model.pb": f"is a SavedModel of TensorFlow; {_TO_TREE}",
    "_CHECKPOINT_METADATA": f"is a checkpoint of Orbax; {_TO_TREE}",
    "*.distcp": "is a sharded checkpoint of torch; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` "
    "makes a file of it",
    "zero_to_fp32.py": "is a checkpoint of DeepSpeed; its zero_to_fp32.py makes a file of it",
    "pytorch_model.bin.index.json": f"is a model in several pickled files; {_TO_STATE_DICT}",
}


class Weights(NamedTuple):
    """A model that was read, and the form it had: `nfzoo`, `timm`, `checkpoint`, or what `open_source` says."""

    description: Description
    params: Params
    form: str


def convert(
    source: str | Path | Weights,
    target: str | Path,
    *,
    to: Form = "nfzoo",
    model: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    require_hash: bool = False,
    allow_pickle: bool = False,
    with_onnx: bool = False,
) -> Weights:
    """Read weights, and write them in another form: whole, or not at all.

    Args:
        source: DeepMind's pickle or an archive of such a tree; `dm:F0` … `dm:F6`, DeepMind's own, to be fetched; a
            folder or weight file of timm's or nfzoo's; a training run's checkpoint, of which the average is taken if it
            has one; or weights that were read already, such as those of a Hub repository.
        target: the folder, or for `haiku` the file, to write.
        to: the form to write.
        model: the zoo's name (or timm's) where names and shapes do not tell the model, or to insist on one.
        overwrite: replace a model that is at `target`.
        progress: show a bar on standard error.
        require_hash: see `nfzoo.conversion.download.fetch`.
        allow_pickle: read a file of `torch.save`; DeepMind's pickles have a reader of nfzoo's own, and need no leave.
        with_onnx: also write `onnx/model.onnx` into nfzoo's folder: see `NFNet.save_pretrained`. A model of nfzoo's,
            which is otherwise refused as there is nothing to convert, is then read as well.

    Raises:
        ConfigError: see `NFNet.save_pretrained`.
        ConversionError: for weights that are refused, unknown or do not fit, and for a model in the way.
        CheckpointError: for a folder or file of nfzoo's that is damaged.
    """
    target = Path(target)
    if with_onnx and to != "nfzoo":
        raise ConversionError(f"an ONNX program goes with nfzoo's folder, not with the form {to}")
    _check_target(target, to, overwrite)
    weights = (
        source
        if isinstance(source, Weights)
        else read(source, model=model, progress=progress, require_hash=require_hash, allow_pickle=allow_pickle)
    )
    description, params, form = weights
    name = (description.name or description.config.family) if isinstance(source, Weights) else source
    if form == to == "nfzoo" and not with_onnx:
        raise ConversionError(f"{name} is a model of nfzoo's already; --to haiku and --to timm write others")
    if description.config.folded and not with_onnx:
        raise ConversionError(f"{name} is folded for inference, and only nfzoo reads that; convert the trained model")
    if to != "nfzoo" and description.temperature is not None:
        logger.warning(
            "%s has a temperature, which other formats do not keep: divide its logits by %.6g before the softmax",
            name,
            description.temperature,
        )
    if to != "nfzoo" and description.problem_type is not None:
        logger.warning(
            "%s has labels at thresholds, which other formats do not keep: an image has those whose sigmoids reach %s",
            name,
            "0.5" if description.thresholds is None else "the thresholds of its config.json",
        )
    if to == "haiku" and (lost := _not_in_haiku(description)):
        logger.warning("DeepMind's form does not keep the %s of %s; keep that model too", " and ".join(lost), name)
    if to == "haiku":
        write_haiku(target, description.config, params)
    elif to == "timm":
        write_timm(target, description, params)
    else:
        NFNet.from_params(description, params).save_pretrained(target, with_onnx=with_onnx)
    return weights


def _not_in_haiku(description: Description) -> list[str]:
    """Return what a model says besides its arrays that is not read from them again."""
    preprocessing = VARIANTS[description.name].preprocessing if description.name in VARIANTS else None
    labels = description.labels is not None and description.labels != imagenet()
    return ["labels"] * labels + ["preprocessing"] * (preprocessing != description.preprocessing)


def read(
    source: str | Path,
    *,
    model: str | None = None,
    progress: bool = False,
    require_hash: bool = False,
    allow_pickle: bool = False,
) -> Weights:
    """Read the model that `source` holds: see `convert`.

    Raises:
        ConversionError: also for a `source` that is neither a file nor a folder here.
    """
    name = str(source)
    if name.startswith("dm:"):
        path = fetch(name, progress=progress, require_hash=require_hash)
        return read_haiku(path, model=model, progress=progress, origin={"url": published_url(name, PUBLISHED)})
    path = Path(source)
    form = _form(path)
    if form == "haiku":
        _refuse_foreign(path)
        return read_haiku(path, model=model, progress=progress)
    if form == "timm":
        description, params = read_timm(path, model=model, allow_pickle=allow_pickle)
        return Weights(description, params, (description.provenance or {})["format"])
    if model is not None:
        raise ConversionError(f"{name} says itself what model it is; leave out --model")
    if form == "nfzoo":
        return Weights(*load_checkpoint(path), form)
    if form == "checkpoint":
        saved = open_state(path)
        kind = "model" if saved.facts["config"]["optim"]["ema_decay"] is None else "average"
        return Weights(describe(saved.facts["description"], path), saved.tensors(kind), form)
    raise ConversionError(
        f"{name} is no folder, no file here; load what the Hub has with nfzoo.from_pretrained, and save it"
    )


def is_name(source: str) -> bool:
    """Return whether `source` names no file here and nothing of DeepMind's, so that only the Hub can know it."""
    return source.startswith("hub:") or (not source.startswith("dm:") and _form(Path(source)) == "name")


def _form(path: Path) -> Literal["nfzoo", "haiku", "timm", "checkpoint", "name"]:
    """Return the form of what lies at `path`; `name` if nothing does."""
    if not path.exists():
        looks_local = path.is_absolute() or path.suffix in (".npz", ".pkl", ".pickle", ".dill", *_TORCH)
        return "haiku" if looks_local else "name"  # which says that there is no such file
    if (path / STATE_FILE).is_file():
        return "checkpoint"
    folder = path if path.is_dir() else path.parent
    is_torch = path.is_file() and (path.suffix in _TORCH or (path.suffix != ".npz" and is_torch_file(path)))
    if path.is_file() and not is_torch:
        return "haiku"
    if path.suffix == ".safetensors" and _describes_itself(path):
        return "nfzoo"
    try:
        fields = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        # Without a config.json the weights are another trainer's.
        return "timm" if is_torch or any((folder / name).is_file() for name in _WEIGHT_FILES) else "haiku"
    if isinstance(fields, dict) and isinstance(fields.get("architecture"), str):
        return "timm"
    return "nfzoo"


def _refuse_foreign(path: Path) -> None:
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    for pattern, what in _FOREIGN.items():
        if path.exists() and fnmatch.filter(names, pattern):
            raise ConversionError(f"{path} {what}")


def _describes_itself(path: Path) -> bool:
    try:
        read_description(path)
    except CheckpointError:
        return False
    return True


def read_haiku(
    path: Path, *, model: str | None = None, progress: bool = False, origin: Mapping[str, str] | None = None
) -> Weights:
    """Read a file of Haiku parameters, of which nothing is executed.

    Args:
        path: the file.
        model: the zoo's name, where names and shapes do not tell the model, or to insist on one.
        progress: show a bar on standard error.
        origin: more facts for the provenance.

    Raises:
        ConversionError: for a file that is refused, or holds another model.
    """
    with open_source(path) as source:
        row, config = recognize({name: array.shape for name, array in source.arrays.items()}, model)
        total = sum(array.dtype.itemsize * math.prod(array.shape) for array in source.arrays.values())
        with tqdm(desc=row.name, total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            params = from_arrays(config, source.arrays, on_read=bar.update)
    provenance: dict[str, Any] = {
        "format": f"haiku ({source.form})",
        "source": path.name,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        **(origin or {}),
    }
    # DeepMind published its files under these names; whoever trains on other classes does not.
    published = config.num_classes == 1000 and path.name == f"{row.name.removeprefix('nfnet-').upper()}_haiku.npz"
    labels = imagenet() if published else None
    preprocessing = row.preprocessing.for_channels(config.in_channels)
    return Weights(Description(config, preprocessing, row.name, labels, provenance), params, source.form)


def _check_target(target: Path, to: Form, overwrite: bool) -> None:
    if to == "haiku":
        if target.is_dir():
            raise ConversionError(f"{target} is a folder; --to haiku writes a file, such as {target / 'F0_haiku.npz'}")
        existing = target if target.exists() else None
    else:
        if target.exists() and not target.is_dir():
            raise ConversionError(f"{target} is a file; --to {to} writes a folder")
        if (target / STATE_FILE).exists():
            raise ConversionError(f"{target} is a checkpoint of a run; give another folder for the model")
        existing = next((target / n for n in (*_WEIGHT_FILES, CONFIG_FILE) if (target / n).exists()), None)
    if existing is not None and not overwrite:
        raise ConversionError(f"{existing} is there already; --overwrite replaces it")
