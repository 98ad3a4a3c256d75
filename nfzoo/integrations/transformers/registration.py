"""Make nfzoo's classes known to the Auto classes of transformers."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from transformers import (  # pyright: ignore[reportMissingImports]
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from nfzoo.checkpoint.description import MODEL_TYPE
from nfzoo.checkpoint.model_folder import CONFIG_FILE
from nfzoo.files import read_json
from nfzoo.integrations.transformers.configuration import NFZooConfig
from nfzoo.integrations.transformers.image_processing import NFZooImageProcessor
from nfzoo.integrations.transformers.modeling import NFZooBackbone, NFZooForImageClassification


def register() -> None:
    """Register all classes; a second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, NFZooConfig, exist_ok=True)
    AutoModelForImageClassification.register(NFZooConfig, NFZooForImageClassification, exist_ok=True)
    AutoBackbone.register(NFZooConfig, NFZooBackbone, exist_ok=True)
    # Under both names, as transformers warns where it finds none under the first.
    classes = dict.fromkeys(("torchvision", "pil"), NFZooImageProcessor)
    AutoImageProcessor.register(NFZooConfig, image_processor_classes=classes, exist_ok=True)
    if not hasattr(AutoBackbone.from_pretrained, "of_nfzoo"):
        AutoBackbone.from_pretrained = classmethod(_of_folders(AutoBackbone.from_pretrained.__func__))


def _of_folders(original: Any) -> Any:
    """Return `AutoBackbone.from_pretrained` that loads nfzoo's folders, and leaves all else to transformers.

    transformers, up to 5.24 at least, asks the Hub whether there is a repository of this name. So it loads no folder of
    any model.
    """

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_folder_of_nfzoo(pretrained_model_name_or_path, kwargs.get("subfolder") or ""):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        kwargs.pop("use_timm_backbone", None)
        return NFZooBackbone.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.of_nfzoo = True  # type: ignore[attr-defined]
    return from_pretrained


def _is_folder_of_nfzoo(source: Any, subfolder: str) -> bool:
    try:
        return read_json(Path(os.fspath(source), subfolder, CONFIG_FILE)).get("model_type") == MODEL_TYPE
    except (AttributeError, OSError, TypeError, ValueError):
        return False
