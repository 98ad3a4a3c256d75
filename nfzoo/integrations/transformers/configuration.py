"""The content of `config.json` as a configuration of transformers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig  # pyright: ignore[reportMissingImports]
from transformers.backbone_utils import BackboneConfigMixin  # pyright: ignore[reportMissingImports]

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.description import (
    CODE,
    CODE_FILE,
    FOREIGN_KEYS,
    KEYS,
    LABEL_KEYS,
    MODEL_TYPE,
    MULTI_LABEL,
    Description,
    config_fields,
    describe,
)
from nfzoo.checkpoint.model_folder import CONFIG_FILE
from nfzoo.errors import ConfigError
from nfzoo.variants import VARIANTS

SINGLE_LABEL = "single_label_classification"
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]
"""Names of the maps of `nfzoo.model.features`, as transformers names those of a ResNet."""

_PLAIN = PreTrainedConfig()


class NFZooConfig(BackboneConfigMixin, PreTrainedConfig):
    """A model of nfzoo's: its architecture, its preprocessing and its classes.

    nfzoo's own fields say what the model is. transformers' `num_labels`, `id2label` and `problem_type` can be changed,
    and `description` follows them: another number of classes is another classifier.

    Args:
        fields: those of `config.json`; or `name` alone, a name of `nfzoo.list_models()`; and transformers' own.

    Raises:
        CheckpointError: for fields that are wrong, or that contradict each other.
    """

    model_type: ClassVar[str] = MODEL_TYPE

    def __init__(self, **fields: Any) -> None:
        own = {key: fields.pop(key) for key in list(fields) if not _is_transformers(key)}
        maps = own.pop("out_features", None), own.pop("out_indices", None)
        stated = _described(own)
        foreign = dict(stated.foreign or {})
        classes = stated.config.num_classes
        names = stated.labels or [f"LABEL_{i}" for i in range(classes)]
        problem = stated.problem_type or foreign.pop("problem_type", None)
        if problem is None and classes > 1:
            problem = SINGLE_LABEL
        dtype = foreign.pop("dtype", None) or foreign.pop("torch_dtype", None)
        super().__init__(
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type=problem,
            **{"dtype": dtype, **fields},
        )
        self.name = stated.name
        self.architecture = stated.config.to_dict()
        self.preprocessing = stated.preprocessing.to_dict()
        self.provenance = None if stated.provenance is None else dict(stated.provenance)
        self.temperature = stated.temperature
        self.thresholds = None if stated.thresholds is None else list(stated.thresholds)
        self.foreign = {key: value for key, value in foreign.items() if key != "transformers_version"}
        self.stage_names = list(STAGES)
        self.out_features = maps[0] or [STAGES[-1]]
        if maps[1] is not None:
            self.out_indices = maps[1]
            if maps[0] not in (None, self.out_features):
                raise ConfigError(f"out_features {maps[0]!r} are not those of out_indices {list(maps[1])!r}")

    @classmethod
    def from_description(cls, description: Description) -> Self:
        """Return the configuration of a model, such as `nfzoo.NFNet.description`."""
        return cls(**config_fields(description))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a `config.json`, with changes such as `num_labels`: see the base class."""
        count, problem = kwargs.pop("num_labels", None), kwargs.get("problem_type")
        names = kwargs.get("id2label")
        if None not in (count, names) and len(names) != count:
            raise ConfigError(f"num_labels is {count}, and id2label has {len(names)} names; give the same number")
        result = super().from_dict(dict(config_dict), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if count is not None:
            config.num_labels = count
        if problem is None and config.num_labels == 1 and config.problem_type == SINGLE_LABEL:
            config.problem_type = None  # transformers then takes it for a regression
        return result

    def description(self) -> Description:
        """Return what nfzoo saves beside the weights, after the changes that were made here.

        Another number of classes than the architecture's comes without the temperature and thresholds of the old ones.
        transformers' own names, `LABEL_0` and so on, are no labels.
        """
        config = describe(self._own(), "the configuration").config
        classes = len(self.id2label)
        names = tuple(self.id2label.get(i) for i in range(classes))
        odd = next((name for name in names if not isinstance(name, str)), "")
        if odd != "":
            raise ConfigError(f"id2label must have a name for each of 0 to {classes - 1}, not {odd!r}")
        labels = None if names == tuple(f"LABEL_{i}" for i in range(classes)) else names
        several = self.problem_type == MULTI_LABEL
        same = classes == config.num_classes
        foreign = dict(self.foreign)
        if self.problem_type not in (None, MULTI_LABEL, SINGLE_LABEL):
            foreign["problem_type"] = self.problem_type
        fields = {
            **self._own(),
            "architecture": config.replace(num_classes=classes).to_dict(),
            "labels": None if labels is None else list(labels),
            **({"problem_type": MULTI_LABEL} if several else {}),
            **({"thresholds": self.thresholds} if several and same and self.thresholds is not None else {}),
            **({"temperature": self.temperature} if not several and same and self.temperature is not None else {}),
            **foreign,
        }
        return describe(fields, "the configuration")

    def _own(self) -> dict[str, Any]:
        """Return nfzoo's fields, but for those of the classes."""
        return {
            "format": 1,
            "library_name": "nfzoo",
            "name": self.name,
            "architecture": self.architecture,
            "preprocessing": self.preprocessing,
            "provenance": self.provenance,
        }

    def forget_weights(self) -> None:
        """Leave out what was measured with weights that are no more: temperature, thresholds, provenance."""
        self.temperature = self.thresholds = self.provenance = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`, of which options of single calls, as `return_dict`, are none."""
        fields = config_fields(self.description())
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.out_features != [STAGES[-1]]:
            fields |= {"out_features": list(self.out_features), "out_indices": list(self.out_indices)}
        fields["transformers_version"] = _PLAIN.to_dict()["transformers_version"]
        return copy.deepcopy(fields)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`."""
        return self.to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, and the code that its `auto_map` names, atomically."""
        with replaced_folder(Path(save_directory)) as scratch:
            (scratch / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            (scratch / CODE_FILE).write_text(CODE, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy nfzoo's own modules into the folders that it saves."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NFZooConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


def _is_transformers(key: str) -> bool:
    """Return whether transformers has an attribute of this name and `config.json` no field."""
    if key.startswith("_"):
        return key in ("_name_or_path", "_commit_hash")
    known = hasattr(_PLAIN, key) or key in ("attn_implementation", "experts_implementation")
    return known and key not in KEYS and key not in FOREIGN_KEYS


def _described(fields: dict[str, Any]) -> Description:
    row = VARIANTS.get(str(fields.get("name")))
    if "architecture" not in fields:
        if row is None:
            raise ConfigError(
                "NFZooConfig needs the fields of a config.json, or the name of a model, such as "
                "NFZooConfig(name='nfnet-f0'); NFZooConfig.from_description takes a model's description"
            )
        rest = {key: value for key, value in fields.items() if key not in LABEL_KEYS}
        names, count = fields.get("id2label"), fields.get("num_labels", row.config.num_classes)
        labels = None if names is None else [name for _, name in sorted((int(i), name) for i, name in names.items())]
        architecture = row.config.replace(num_classes=count if labels is None else len(labels))
        fields = {
            "format": 1,
            "library_name": "nfzoo",
            "architecture": architecture.to_dict(),
            "preprocessing": row.preprocessing.to_dict(),
            "labels": labels,
            **rest,
        }
    return describe({**fields, "model_type": MODEL_TYPE}, "the configuration")
