"""Read and write timm's NF-networks: its state dicts, and its folders of `config.json` and a weight file.

Source: the parameter names of timm 1.0, models/nfnet.py; gains there are `(out, 1, 1, 1)`, squeeze-excite is made of
1x1 convolutions and the skip gain is 0-dimensional. The folder is the one that timm's `push_to_hf_hub` writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Description,
    check_params,
    replaceable_onnx,
)
from nfzoo.checkpoint.state_dicts import StateDict, check_values, is_torch_file, open_state_dict
from nfzoo.checkpoint.weight_files import save_tensors
from nfzoo.config import NOT_THE_ARCHITECTURE, ModelConfig
from nfzoo.conversion.timm_config import (
    ARCHITECTURES,
    REGISTERED,
    apply_arguments,
    described_by,
    pretrained_cfg,
    read_config,
    read_labels,
    read_preprocessing,
    timm_config,
)
from nfzoo.data.labels import imagenet
from nfzoo.errors import CheckpointError, ConversionError, nearest
from nfzoo.files import nearest_path, open_regular
from nfzoo.model import specs
from nfzoo.runtime.output import json_text
from nfzoo.types import Params
from nfzoo.variants import VARIANTS, variant

PICKLED_FILE = "pytorch_model.bin"
"""timm's older weight file."""

IMAGENET_TAG = "in1k"
"""timm's tags of weights whose 1,000 classes are ImageNet's, such as `ra2_in1k`, end in this."""

ANCHORS = ("stem.conv.weight", "stem.conv1.weight", "stem.conv0.weight")
"""The first tensor of every model, in timm's layout and in nfzoo's."""

_LAYER = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "shortcut": "downsample.conv",
}

# ---------------------------------------------------------------- state dicts


def timm_names(cfg: ModelConfig) -> dict[str, str]:
    """Return nfzoo key -> timm key, for every parameter."""
    attention = "attn" if cfg.family == "nf_regnet" else "attn_last"
    names = {}
    for key in specs(cfg):
        parts = key.split(".")
        if parts[0] == "stages":
            layer, leaf = parts[3], parts[-1]
            if layer == "skip_gain":
                local = "skipinit_gain"
            elif layer == "se":
                local = f"{attention}.fc{int(parts[4][2:]) + 1}.{leaf}"
            elif layer == "eca":
                local = f"{attention}.conv.{leaf}"
            else:
                local = f"{_LAYER[layer]}.{leaf}"
            names[key] = ".".join((*parts[:3], local))
        elif key.startswith("stem.conv") and parts[1] != "conv":
            names[key] = f"stem.conv{int(parts[1][4:]) + 1}.{parts[2]}"
        else:
            names[key] = key.replace("head.", "head.fc.") if parts[0] == "head" else key
    return names


def timm_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return timm key -> shape of every entry of a model's state dict."""
    names = timm_names(cfg)
    return {names[key]: _timm_shape(key, shape) for key, (shape, _) in specs(cfg).items()}


def from_timm(cfg: ModelConfig, state: Mapping[str, Tensor]) -> Params:
    """Return the parameters of `cfg` from a timm state dict, in which nothing is missing, unexpected or misshaped."""
    names = timm_names(cfg)
    unexpected = sorted(set(state) - set(names.values()))
    if unexpected:
        raise ConversionError(f"the file has {len(unexpected)} tensors that the model lacks, such as {unexpected[0]}")
    params = {}
    for key, (shape, _) in specs(cfg).items():
        if names[key] not in state:
            raise ConversionError(f"the file lacks {names[key]}, the model's {key}")
        value = state[names[key]]
        if tuple(value.shape) != _timm_shape(key, shape):
            raise ConversionError(
                f"{names[key]} has shape {tuple(value.shape)}, which does not fit {key} of shape {shape}"
            )
        params[key] = value.reshape(shape).clone()
    check_values(params)
    return params


def to_timm(cfg: ModelConfig, params: Mapping[str, Tensor]) -> Params:
    """Return the timm state dict of a model's parameters: the inverse of `from_timm`, bit for bit."""
    return {
        name: params[key].detach().reshape(_timm_shape(key, tuple(params[key].shape))).clone()
        for key, name in timm_names(cfg).items()
    }


def _timm_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if key.endswith(".gain"):
        return (*shape, 1, 1, 1)
    if key.endswith(".skip_gain"):
        return ()
    if ".se." in key and len(shape) == 2:
        return (*shape, 1, 1)
    return shape


# ---------------------------------------------------------------- reading


def read_timm(
    path: Path, *, model: str | None = None, sha256: str | None = None, allow_pickle: bool = False
) -> tuple[Description, Params]:
    """Read a model in timm's layout: a folder with its `config.json` and weight file, or a weight file alone.

    A folder brings the number of classes, the preprocessing and the labels. A file alone brings its shapes; the
    preprocessing is then that of the zoo. Pickled files are read by torch's weights-only reader. What trainers wrap
    around a state dict is taken off: see `open_state_dict`. A state dict under nfzoo's own names is read as well, and a
    folder that timm wrote of a model of `nfzoo.integrations.timm`.

    Args:
        path: a folder, a `.safetensors` file, or a file that torch wrote.
        model: timm's or the zoo's name; needed where neither `config.json` nor the shapes say it.
        sha256: of the weight file, if it is known, so that it is not read a second time.
        allow_pickle: read a file that torch wrote, which is a pickle.

    Raises:
        ConversionError: for what is missing, damaged, of another architecture, or changed by `model_args` or
            `pretrained_cfg` in a way that nfzoo does not compute.

    Source: timm 1.0, models/_hub.py and data/config.py.
    """
    path = Path(path)
    weights = _weight_file(path)
    fields = read_config(path / CONFIG_FILE) if (path / CONFIG_FILE).exists() else None
    with open_state_dict(weights, ANCHORS, allow_pickle=allow_pickle, hashed=sha256 is not None) as state:
        shapes = state.shapes
        gains = [shape for key, shape in shapes.items() if key.endswith(".gain")]
        if fields is None and gains and all(len(shape) == 1 for shape in gains):
            return _read_own(weights, state, model, sha256)
        own = None if fields is None else REGISTERED.get(fields["architecture"].partition(".")[0])
        if fields is not None and own is not None:
            if model not in (None, own):
                raise ConversionError(f"{path / CONFIG_FILE} says {own!r}, not {model!r}")
            description, params = _read_own(weights, state, own, sha256)
            return described_by(fields, description, VARIANTS[own].preprocessing, path / CONFIG_FILE), params
        stated = None if fields is None else _architecture(fields["architecture"])
        chosen = None if model is None else _architecture(model)
        if stated and chosen and stated != chosen:
            raise ConversionError(f"{path / CONFIG_FILE} says {stated!r}, not {chosen!r}")
        arch = stated or chosen or recognize(shapes, weights)
        row = VARIANTS[ARCHITECTURES[arch]]
        config = row.config.replace(**_sizes(row.config, shapes, weights))
        preprocessing, labels, tag = row.preprocessing.for_channels(config.in_channels), None, None
        if fields is not None:
            cfg = pretrained_cfg(fields, path / CONFIG_FILE)
            tag = cfg.get("tag") or None
            config = apply_arguments(config, fields, path / CONFIG_FILE)
            preprocessing = read_preprocessing(arch, row.preprocessing, cfg, config, path / CONFIG_FILE)
            labels = read_labels(fields.get("label_names", cfg.get("label_names")), config, path / CONFIG_FILE)
            if labels is None and config.num_classes == 1000 and str(tag).endswith(IMAGENET_TAG):
                labels = imagenet()
        try:
            params = from_timm(config, state)
        except ConversionError as error:
            raise ConversionError(f"{weights} is no {arch}: {error}") from error
    provenance = {"format": "timm", "architecture": arch, "tag": tag, "source": weights.name}
    provenance["sha256"] = sha256 or file_sha256(weights)
    return Description(config, preprocessing, row.name, labels, provenance), params


def _read_own(weights: Path, state: StateDict, model: str | None, sha256: str | None) -> tuple[Description, Params]:
    """Read a state dict under nfzoo's names, of which `model` or the shapes tell the variant."""
    if model is not None:
        row = variant(model)
    else:
        row = variant(_only({name: _shapes(row.config) for name, row in VARIANTS.items()}, state.shapes, weights))
    head, stem = state.shapes.get("head.weight"), next(iter(_shapes(row.config)))
    sizes = {"num_classes": head[0] if head else 0}
    if stem in state.shapes and len(state.shapes[stem]) == 4:
        sizes["in_channels"] = state.shapes[stem][1]
    config = row.config.replace(**sizes)
    try:
        check_params(config, state.shapes, str(weights))
    except CheckpointError as error:
        raise ConversionError(f"{weights} is no {row.name}: {error}") from error
    params = {key: state[key].clone() for key in _shapes(config)}
    check_values(params)
    provenance = {"format": "state dict", "source": weights.name, "sha256": sha256 or file_sha256(weights)}
    return Description(config, row.preprocessing.for_channels(config.in_channels), row.name, None, provenance), params


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in specs(cfg).items()}


def recognize(shapes: Mapping[str, tuple[int, ...]], source: Path | str = "the file") -> str:
    """Return timm's architecture by the names and shapes of a state dict; classes and input channels are free."""
    if not shapes or "head.fc.weight" not in shapes:
        raise ConversionError(f"{source} holds no NF-network of timm's with a classifier: it lacks head.fc.weight")
    return _only({arch: timm_shapes(VARIANTS[name].config) for arch, name in ARCHITECTURES.items()}, shapes, source)


def _only(
    known: Mapping[str, Mapping[str, tuple[int, ...]]], shapes: Mapping[str, tuple[int, ...]], source: Path | str
) -> str:
    """Return the one model that these names and shapes fit; the error says where the nearest differs."""
    names = [name for name, own in known.items() if _fits(own, shapes)]
    if len(names) == 1:
        return names[0]
    if names:
        raise ConversionError(f"{source} fits {' and '.join(names)}; say which it is with --model {names[0]}")
    counts = {name: len(_differences(own, shapes)) for name, own in known.items()}
    name = min(known, key=counts.__getitem__)
    first = _differences(known[name], shapes)[0]
    raise ConversionError(
        f"{source} fits no NF-network of timm's or nfzoo's. The nearest is {name}, from which it differs in "
        f"{counts[name]} tensors, such as {first}: {shapes.get(first, 'missing')} instead of "
        f"{known[name].get(first, 'none')}; if it is another, name it with --model"
    )


def _differences(known: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    common = known.keys() & shapes.keys()
    return sorted((known.keys() ^ shapes.keys()) | {key for key in common if not _agree(key, known[key], shapes[key])})


def _fits(known: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether names and shapes agree, but for the number of classes and of input channels."""
    common = known.keys() & shapes.keys()
    return all(key.startswith("head.") and key not in common for key in _differences(known, shapes))


def _agree(key: str, known: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if key.startswith("head."):
        return known[1:] == shape[1:]
    if key in ANCHORS:
        return len(shape) == 4 and known[:1] + known[2:] == shape[:1] + shape[2:]
    return known == shape


def _architecture(name: str) -> str:
    """Return timm's name from timm's (with or without a tag) or the zoo's."""
    by_zoo = {zoo: arch for arch, zoo in ARCHITECTURES.items()}
    arch = by_zoo.get(name, name.partition(".")[0])
    if arch not in ARCHITECTURES:
        raise ConversionError(f"{name!r} is no NF-network of timm's that nfzoo has{nearest(name, ARCHITECTURES)}")
    return arch


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        more = sorted(path.glob("model_[0-9]*.safetensors"))
        if more and (path / WEIGHTS_FILE).is_file():
            raise ConversionError(f"{path} holds more than one model, such as {more[0].name}; name the file of one")
        for name in (WEIGHTS_FILE, INDEX_FILE, PICKLED_FILE):
            if (path / name).is_file():
                return path / name
        raise ConversionError(f"there is no {WEIGHTS_FILE} or {PICKLED_FILE} in {path}")
    if not path.is_file():
        raise ConversionError(f"there is no file or folder {path}{nearest_path(path)}")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and not is_torch_file(path):
        raise ConversionError(f"{path} is no folder, no .safetensors file and no file of torch's")
    return path


def _sizes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> dict[str, int]:
    """Return the numbers of classes and of input channels."""
    names = timm_names(config)
    head, stem = names["head.weight"], next(iter(names.values()))
    for key, rank in ((head, 2), (stem, 4)):
        if key not in shapes:
            hint = "; a model without its classifier cannot be read" if key == head else ""
            raise ConversionError(f"{source} lacks {key}{hint}")
        if len(shapes[key]) != rank or 0 in shapes[key]:
            raise ConversionError(f"{key} in {source} has shape {shapes[key]}, not one of {rank} axes")
    return {"num_classes": shapes[head][0], "in_channels": shapes[stem][1]}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- writing


def timm_architecture(cfg: ModelConfig) -> str:
    """Return timm's name of this network, whatever `NOT_THE_ARCHITECTURE` says and, in timm's, its stride."""
    names = list(NOT_THE_ARCHITECTURE)
    if cfg.rules == "timm":
        names.append("output_stride")
    free = {key: getattr(cfg, key) for key in names}
    for arch, name in ARCHITECTURES.items():
        known = VARIANTS[name].config
        if type(known) is type(cfg) and known.replace(**free) == cfg:
            return arch
    raise ConversionError(
        f"timm has no network of this configuration ({cfg.family}, depths {cfg.depths}, widths {cfg.widths}, "
        f"{cfg.activation}, {cfg.rules!r} rules); it has {', '.join(ARCHITECTURES.values())}"
    )


def write_timm(folder: Path, description: Description, params: Mapping[str, Tensor]) -> Path:
    """Write a model as timm's `push_to_hf_hub` does, whole or not at all: `config.json` and `model.safetensors`.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it strictly. Under DeepMind's rules timm's logits are
    about 2 % away, since its arithmetic differs.

    Raises:
        ConversionError: where timm has no such network.
        OSError: if the disk does not take it.
    """
    folder = Path(folder)
    arch = timm_architecture(description.config)
    state = {key: value.cpu().contiguous() for key, value in to_timm(description.config, params).items()}
    with replaced_folder(folder, subfolders=replaceable_onnx(folder, renewed=False)) as scratch:
        save_tensors(scratch / WEIGHTS_FILE, state)
        text = json_text(timm_config(arch, description))
        (scratch / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder
