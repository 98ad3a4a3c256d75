"""nfzoo's preprocessing as an image processor of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature  # pyright: ignore[reportMissingImports]
from transformers.image_processing_utils import BaseImageProcessor  # pyright: ignore[reportMissingImports]

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.description import CODE, CODE_FILE, PROCESSOR_FILE, processor_fields
from nfzoo.checkpoint.model_folder import CONFIG_FILE, read_description
from nfzoo.config import Preprocessing
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.preprocess import evaluation_transform

_CHANNELS = (1, 3, 4)
_ALSO = ("feature_extractor_type", "processor_class", "transformers_version")
"""Keys that transformers may write into `preprocessor_config.json`, and that say nothing of pixels."""


class NFZooImageProcessor(BaseImageProcessor):
    """The pixels of `nfzoo.NFNet.preprocess`: nfzoo's decoding, its resize and its normalisation.

    The attributes by transformers' names, such as `size` and `image_mean`, say what `preprocessing` does, and cannot be
    set. Their meaning is transformers'; the resize itself is DeepMind's, or Pillow's, as `preprocessing` says.

    Args:
        preprocessing: the fields of `nfzoo.Preprocessing`.
        fields: the rest of `preprocessor_config.json`, which has to agree with it.

    Raises:
        ConfigError: for fields that do not agree, or that are unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012, a list in transformers

    def __init__(self, preprocessing: dict[str, Any] | Preprocessing | None = None, **fields: Any) -> None:
        if preprocessing is None:
            raise ConfigError(f"an image processor of nfzoo needs 'preprocessing', a field of {PROCESSOR_FILE}")
        stated = preprocessing if isinstance(preprocessing, Preprocessing) else Preprocessing.from_dict(preprocessing)
        expected = processor_fields(stated)
        for key, value in fields.items():
            if key in ("auto_map", "image_processor_type", *_ALSO) or key.startswith("_"):
                continue
            if key not in expected:
                raise ConfigError(f"an image processor of nfzoo has no {key!r}; it has 'preprocessing' alone")
            if _plain(value) != expected[key]:
                raise ConfigError(
                    f"{key!r} is {value!r}, and 'preprocessing' makes it {expected[key]!r}; change 'preprocessing', "
                    f"also in {CONFIG_FILE}, or leave {key!r} out"
                )
        super().__init__()
        self.preprocessing = stated.to_dict()

    def __getattr__(self, name: str) -> Any:
        """Return a value by transformers' name, such as `image_mean`."""
        own = self.__dict__.get("preprocessing")
        fields = {} if own is None else processor_fields(Preprocessing.from_dict(own))
        if name in fields and name != "auto_map":
            return fields[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("preprocessing")
        if own is not None and name in processor_fields(Preprocessing.from_dict(own)) and name != "preprocessing":
            raise ConfigError(f"{name!r} of an image processor of nfzoo follows from 'preprocessing'; change that")
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load the processor of a folder or repository; one that contradicts the `config.json` of a folder is refused.

        Raises:
            CheckpointError: if the two differ.
        """
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        path = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", CONFIG_FILE)
        if path.is_file():
            processor = result[0] if isinstance(result, tuple) else result
            stated = read_description(path).preprocessing
            if stated.to_dict() != processor.preprocessing:
                raise CheckpointError(
                    f"{path} and {PROCESSOR_FILE} beside it describe different preprocessings; nfzoo itself reads the "
                    "former: load the model by nfzoo and save it anew"
                )
        return result

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Do as `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        size: int | None = None,
    ) -> BatchFeature:
        """Return the model's input of one or more images: `pixel_values`, float32 `(N, C, size, size)`.

        Args:
            images: a file, a Pillow image, or an array or tensor of uint8; a list of these; or an array or tensor of
                several images, with four dimensions.
            return_tensors: `"pt"` or `"np"`; by default a list of tensors, one for each image.
            input_data_format: `"channels_first"` or `"channels_last"` of arrays; by default told by their shape.
            size: side of the result in pixels; `test_size` of the preprocessing by default.

        Raises:
            DataError: for what is no image, and for arrays of other types than uint8.
        """
        preprocessing = Preprocessing.from_dict(self.preprocessing)
        channels = len(preprocessing.mean)
        pixels = [
            evaluation_transform(open_image(image, channels=channels), preprocessing, size=size)
            for image in _flat(images, input_data_format)
        ]
        if not pixels:
            raise DataError("there are no images")
        match str(return_tensors.value if hasattr(return_tensors, "value") else return_tensors):  # type: ignore[union-attr]
            case "pt":
                values: Any = torch.stack(pixels)
            case "np":
                values = torch.stack(pixels).numpy()
            case "None":
                values = pixels
            case other:
                raise ConfigError(f"return_tensors must be 'pt', 'np' or None, not {other!r}")
        return BatchFeature({"pixel_values": values})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `preprocessor_config.json`."""
        return processor_fields(Preprocessing.from_dict(self.preprocessing))

    def to_json_string(self) -> str:
        """Return the text of `preprocessor_config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write `preprocessor_config.json` and the code that its `auto_map` names, atomically; return its path."""
        folder = Path(save_directory)
        with replaced_folder(folder) as scratch:
            (scratch / PROCESSOR_FILE).write_text(self.to_json_string(), encoding="utf-8")
            (scratch / CODE_FILE).write_text(CODE, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / PROCESSOR_FILE)]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Do nothing: transformers would copy nfzoo's own modules into the folders that it saves."""


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, dict) else value


def _flat(images: Any, data_format: str | None) -> list[str | Path | BinaryIO | Image.Image | np.ndarray]:
    """Return a list of images that `open_image` takes, with the channels of arrays last."""
    if data_format not in (None, "channels_first", "channels_last"):
        raise DataError(f"input_data_format must be 'channels_first' or 'channels_last', not {data_format!r}")
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [one for image in images for one in _flat(image, data_format)]
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    if not isinstance(images, np.ndarray):
        return [images]
    if images.ndim == 4:
        return [_channels_last(image, data_format) for image in images]
    return [_channels_last(images, data_format)]


def _channels_last(image: np.ndarray, data_format: str | None) -> np.ndarray:
    """Return an array `(H, W)` or `(H, W, C)`."""
    if image.ndim != 3:
        return image
    first, last = (image.shape[axis] in _CHANNELS for axis in (0, 2))
    if data_format is None and first and last:
        raise DataError(
            f"an image of the shape {image.shape} may have its channels first or last; pass input_data_format, "
            "'channels_first' or 'channels_last'"
        )
    return image.transpose(1, 2, 0) if data_format == "channels_first" or (data_format is None and first) else image
