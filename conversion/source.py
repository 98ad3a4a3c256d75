"""A file of Haiku parameters, whatever its form: pickle or archive, tree or flattened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nfzoo.conversion.arrays import Leaf, RefusedError
from nfzoo.conversion.haiku import canonical
from nfzoo.conversion.npz import read_npz
from nfzoo.conversion.pickle_reader import read_pickle
from nfzoo.errors import ConversionError

_KEYSTR = re.compile(r"\['([^']*)'\]\['([^']*)'\]")  # jax.tree_util.keystr of a path


class Source(NamedTuple):
    """An open file of parameters.

    Attributes:
        path: the file.
        form: `pickle, protocol 4` or `npz`.
        leaves: canonical name -> array, to be read while the file is open.
    """

    path: Path
    form: str
    leaves: dict[str, Leaf]


@contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Open a file of Haiku parameters. Nothing in it is executed; a `ConversionError` of the block names the file.

    Raises:
        ConversionError: for what is no pickle or archive of floating-point arrays under the names of parameters, with
            the reason.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder without a model" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise ConversionError(f"{path} {what}; give DeepMind's file, or a folder of nfzoo's or timm's")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            magic = file.read(4)
            if magic[:1] == b"\x80":
                pickled = read_pickle(file, size)
                form, tree = f"pickle, protocol {pickled.protocol}", pickled.tree
            elif magic[:2] == b"PK":
                form, tree = "npz", read_npz(file, size)
            else:
                what = "it is empty" if not size else "it is neither a pickle of protocol 2 to 5 nor an .npz archive"
                raise RefusedError(what)
            yield Source(path, form, _flat(tree))
        except ConversionError as error:
            raise ConversionError(f"{path}: {error}") from error


def _flat(tree: dict[Any, Any]) -> dict[str, Leaf]:
    """Leaves under canonical names, from `{module: {name: leaf}}` or from `{path: leaf}`."""
    leaves: dict[str, Leaf] = {}
    for key, value in tree.items():
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) == 1 and (match := _KEYSTR.fullmatch(parts[0])):
            parts = match.groups()
        found = value.items() if isinstance(value, dict) else [(None, value)]
        for name, leaf in found:
            names = parts if name is None else (*parts, *(name if isinstance(name, tuple) else (name,)))
            path = canonical(*names)
            if path in leaves:
                raise RefusedError(f"{path!r} comes twice, in two spellings")
            leaves[path] = leaf
    if not leaves:
        raise RefusedError("it holds no arrays")
    return leaves
