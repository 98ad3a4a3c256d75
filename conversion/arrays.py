"""Arrays that stay in their file until they are read, and the checks of what a file claims about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfzoo.errors import ConversionError

MOST_AXES = 8
FLOATS = ("f2", "f4", "f8")
BFLOAT16 = "bfloat16"


class RefusedError(ConversionError):
    """A reason to refuse a file, still without the file's name."""


class LazyArray(NamedTuple):
    """One array of a file, which is not read yet.

    Attributes:
        shape: as declared, and checked against the bytes that are there.
        dtype: of what `read` returns: floating point, in this machine's byte order.
        read: reads the array from the file, which must still be open; a new array each time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], NDArray]


class Element(NamedTuple):
    """The type of an array's elements in a file: one of `FLOATS`, or `BFLOAT16`; `order` is `<` or `>`."""

    name: str
    order: str = "<"

    @property
    def size(self) -> int:
        """Return the bytes of one element."""
        return 2 if self.name == BFLOAT16 else int(self.name[1:])

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype that it is read as: float32 for bfloat16, whose values float32 holds exactly."""
        return np.dtype("f4" if self.name == BFLOAT16 else self.name)

    def decode(self, raw: NDArray[np.uint8]) -> NDArray:
        """Return the elements of these bytes in this machine's byte order."""
        if self.name == BFLOAT16:  # the upper half of a float32
            return (raw.view(f"{self.order}u2").astype(np.uint32) << 16).view(np.float32)
        return raw.view(self.order + self.name).astype(self.dtype, copy=False)


def checked_shape(shape: object) -> tuple[int, ...]:
    """Return `shape`; raise a `RefusedError` if it is no tuple of sizes."""
    if not isinstance(shape, tuple) or len(shape) > MOST_AXES:
        raise RefusedError(f"an array's shape is {_shown(shape)}, not a tuple of up to {MOST_AXES} integers")
    for n in shape:
        if type(n) is not int or n < 0:
            raise RefusedError(f"an array's shape holds {_shown(n)}, which is no length")
    return shape


def byte_count(shape: Sequence[int], element: Element) -> int:
    """Return the bytes that an array of this shape takes, in exact integers."""
    return math.prod(shape) * element.size


def arranged(flat: NDArray, shape: tuple[int, ...], order: str) -> NDArray:
    """Return the array of these elements, laid out row by row (`C`) or column by column (`F`)."""
    return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).transpose()


def _shown(value: object) -> str:
    """Return a value for a message, never all of something large or nested."""
    return str(value)[:40] if type(value) in (int, float, bool) else f"a {type(value).__name__}"
