"""The one table of public weights: zoo name -> repositories on the Hub, and what is known of their files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nfzoo.checkpoint.model_folder import WEIGHTS_FILE
from nfzoo.errors import CheckpointError, ConfigError, UnknownModelError, nearest
from nfzoo.files import nearest_path, read_json
from nfzoo.variants import VARIANTS

Layout = Literal["nfzoo", "timm", "haiku"]

HUB = "hub:"
"""Prefix of a repository id, for one that looks like a path here."""

HAIKU_FILE = "model.npz"
"""DeepMind's parameter file in a repository of the Hub: a pickle, whatever its name says."""

PINS = Path(__file__).with_name("pins.json")
"""Repository -> commit, and size and sha256 of its weight file; `python -m nfzoo.hub.pin` writes it."""

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl", ".json")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Pin(NamedTuple):
    """What is known of a repository before it is asked.

    Attributes:
        revision: the commit that is fetched; the main branch if it is `None`.
        size: bytes of the weight file.
        sha256: of the weight file.
    """

    revision: str | None = None
    size: int | None = None
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are known, ready for JSON."""
        return {key: value for key, value in self._asdict().items() if value is not None}


class Repository(NamedTuple):
    """A repository of weights on the Hub.

    Attributes:
        repo_id: `organisation/name` on the Hub.
        revision: a branch, tag or commit.
        layout: whose files it holds; `None` if only the download tells.
        sha256, size: of the weight file, where they are known in advance. Without them a download is checked against
            the sha256 that the Hub itself states.
        model: the zoo's name of the one architecture that it holds, if it is known to hold DeepMind's own file.
    """

    repo_id: str
    revision: str = "main"
    layout: Layout | None = None
    sha256: str | None = None
    size: int | None = None
    model: str | None = None

    @property
    def weights_file(self) -> str:
        """The name of the weight file."""
        return HAIKU_FILE if self.layout == "haiku" else WEIGHTS_FILE

    def pinned(self, pin: Pin) -> Repository:
        """Return the repository at the commit of a pin, with its file's size and sha256."""
        return self._replace(revision=pin.revision or self.revision, size=pin.size, sha256=pin.sha256)

    def at(self, revision: str | None) -> Repository:
        """Return the repository at another revision, of whose file nothing is known."""
        if revision is None or revision == self.revision:
            return self
        return self._replace(revision=revision, sha256=None, size=None)


def read_pins(path: Path = PINS) -> dict[str, Pin]:
    """Read the file of pins.

    Raises:
        ConfigError: for a file that is no such table.
    """
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise ConfigError(f"{path} must hold an object of objects: repository -> revision, size and sha256")
    return {repo_id: _pin(row, f"{path}: {repo_id}") for repo_id, row in table.items()}


def _pin(row: Mapping[str, Any], where: str) -> Pin:
    if unknown := sorted(row.keys() - set(Pin._fields)):
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}{nearest(unknown[0], Pin._fields)}")
    for key, digits in (("revision", 40), ("sha256", 64)):
        value = row.get(key)
        if value is not None and not (isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value)):
            raise ConfigError(f"{where}: {key} must be {digits} hexadecimal digits, not {value!r}")
    size = row.get("size")
    if size is not None and (type(size) is not int or size <= 0):
        raise ConfigError(f"{where}: size must be a number of bytes, not {size!r}")
    return Pin(**row)


_PINS = read_pins()


def _row(repository: Repository) -> Repository:
    return repository.pinned(_PINS.get(repository.repo_id, Pin()))


def _timm(name: str) -> Repository:
    return _row(Repository(f"timm/{name}", layout="timm"))


# timm's repositories, as its models/nfnet.py names them. The dm_ ones hold DeepMind's own weights, published with
# arXiv 2102.06171; the others are timm's training. Of those without a pin the main branch is fetched, and a download is
# checked against the checksum that the Hub states.
PUBLIC: dict[str, Repository] = {
    **{f"nfnet-f{n}": _timm(f"dm_nfnet_f{n}.dm_in1k") for n in range(7)},
    "nfnet-l0": _timm("nfnet_l0.ra2_in1k"),
    "eca-nfnet-l0": _timm("eca_nfnet_l0.ra2_in1k"),
    "eca-nfnet-l1": _timm("eca_nfnet_l1.ra2_in1k"),
    "eca-nfnet-l2": _timm("eca_nfnet_l2.ra3_in1k"),
    "timm-nf-resnet-50": _timm("nf_resnet50.ra2_in1k"),
    "timm-nf-regnet-b1": _timm("nf_regnet_b1.ra2_in1k"),
}

# DeepMind's own files on the Hub, uploaded by somebody else, and on DeepMind's server (see nfzoo.conversion.download).
COPIES: dict[str, Repository] = {
    f"nfnet-f{n}": _row(Repository(f"ethanluoyc/dm-nfnet-f{n}-in1k", layout="haiku", model=f"nfnet-f{n}"))
    for n in range(7)
}
ORIGINALS: dict[str, str] = {f"nfnet-f{n}": f"dm:F{n}" for n in range(7)}


def repository_of(name: str) -> Repository:
    """Return the repository of a zoo name or a repository id, for a name that does not exist on disk.

    Raises:
        UnknownModelError: for what is neither.
        CheckpointError: for what looks like a path, and for a zoo name without public weights.
    """
    if name.startswith(HUB):
        name = name.removeprefix(HUB)
        if not _REPOSITORY.fullmatch(name):
            raise UnknownModelError(f"{HUB + name!r} names no repository of the Hub; write {HUB}ORG/NAME")
        return _known(name)
    if name in PUBLIC:
        return PUBLIC[name]
    if name in VARIANTS:
        raise CheckpointError(
            f"no weights are published for {name!r}; nfzoo.create({name!r}) gives the model with random weights, "
            f"`nfzoo train --model {name} --data FOLDER --output FOLDER` trains it, and `nfzoo convert` reads weights "
            "of DeepMind's or timm's code"
        )
    path = Path(name)
    in_a_folder = "/" in name and os.path.isdir(path.parts[0])
    if in_a_folder or is_file_name(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        hub = f" ({HUB}{name} would be a repository of the Hub)" if _REPOSITORY.fullmatch(name) else ""
        raise CheckpointError(f"there is no file or folder {name!r}{hub}{nearest_path(name)}")
    if not _REPOSITORY.fullmatch(name):
        raise UnknownModelError(
            f"{name!r} is no folder, no file, no Hub repository (org/name) and no zoo model"
            f"{nearest(name, VARIANTS) or nearest_path(name)}; `nfzoo list` shows the zoo"
        )
    return _known(name)


def _known(repo_id: str) -> Repository:
    """Return the repository of this id, as the table has it if it is there."""
    known = (row for row in (*PUBLIC.values(), *COPIES.values()) if row.repo_id == repo_id)
    return next(known, Repository(repo_id))


def is_repository(name: str) -> bool:
    """Return whether a name could be one of a repository of the Hub, `ORG/NAME`."""
    return _REPOSITORY.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Return whether a name ends as those of weight files do."""
    return Path(name).suffix in _SUFFIXES
