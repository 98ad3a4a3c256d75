"""Describe TPU chips, and requests to compile a model's step for them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nfzoo.config import ModelConfig, config_from_dict

Dtype = Literal["bfloat16", "float32"]


class Chip(NamedTuple):
    """A generation of TPU chips.

    Attributes:
        hbm: memory of a chip in bytes, as far as the compiler hands it out: its own figure when a program is too big.
        peak: published bfloat16 floating-point operations per second of a chip.
        sides: numbers that describe a topology.
        options: libtpu's, so that a chip is one device.
    """

    hbm: int
    peak: float
    sides: int
    options: Mapping[str, str] = {}


_GIB = 1 << 30

# Memory: libtpu 0.0.42. Peak rates: Google Cloud's TPU documentation, the page of each generation.
CHIPS: dict[str, Chip] = {
    "v4": Chip(int(30.75 * _GIB), 275e12, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 2),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 3),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 2),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request to compile a model's step.

    Attributes:
        config: the model.
        chip: a key of `CHIPS`.
        shape: chips along each side of the topology.
        batch: images over all chips together.
        size: side of the square images in pixels.
        train: the training step, else the forward pass.
        dtype: of the activations; parameters and optimizer are float32.
    """

    config: ModelConfig
    chip: str
    shape: tuple[int, ...]
    batch: int
    size: int
    train: bool
    dtype: Dtype

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(self.shape)

    @property
    def topology(self) -> str:
        """Return the topology as in `v5e:2x2`."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    def to_json(self) -> str:
        """Return one line of JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**fields, "config": self.config.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        config = config_from_dict(fields["config"])
        return cls(**{**fields, "config": config, "shape": tuple(fields["shape"])})
