"""Read pickled parameter trees without executing anything.

DeepMind's `F0_haiku.npz` … `F6_haiku.npz` are dill pickles, and a pickle is a program. This module runs such a program
on a machine of its own, which knows the instructions that trees of arrays are made of and no others. A global is a
name that stands for a function of this module, or it is refused: nothing is ever imported or looked up. Arrays are not
copied out of the file: the machine notes where their bytes lie.

It is no subclass of `pickle._Unpickler`, which copies every array, buffers whole frames, has instructions that are not
needed here, and is private to CPython. What can be asked of the machine is bounded: by `MOST_INSTRUCTIONS` (and with
it the stack and the memo), by the bytes that the file really has, and by the total of what its arrays declare.

The module is long because each instruction and each global that the versions below have written has its own check, and
because a reviewer should see in one place all that a file can do.

Source: the format as `pickletools` of the standard library documents it; globals as written by jax 0.2 to 0.10, haiku
0.0.4 to 0.0.17, numpy 1.19 to 2.4, dill 0.3 and 0.4.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfzoo.conversion.arrays import (
    BFLOAT16,
    FLOATS,
    Element,
    LazyArray,
    RefusedError,
    arranged,
    byte_count,
    checked_shape,
)

logger = logging.getLogger("nfzoo")

MOST_INSTRUCTIONS = 1_000_000  # the largest model of the zoo, pickled with protocol 2, takes 140,000
LONGEST_NAME = 255  # bytes; longer text can only be the bytes of an array, as protocol 2 writes them
MOST_NAMES = 32 << 20  # bytes of all names together
MOST_SHARING = 2  # times the file's bytes that its arrays may take, as one array can stand in many places


class PickledTree(NamedTuple):
    """Content of a pickle: its protocol, and `{key: LazyArray}` or `{module: {key: LazyArray}}` as the file has it."""

    protocol: int
    tree: dict[Any, Any]


def read_pickle(file: BinaryIO, size: int) -> PickledTree:
    """Return the tree in a pickle of `size` bytes, whose arrays are read later, from the same file.

    Raises:
        RefusedError: for anything that is not a tree of floating-point arrays, with the reason.
    """
    machine = _Machine(file, size)
    tree = machine.run()
    if not isinstance(tree, dict):
        raise RefusedError(f"it holds {_kind(tree)}, not a dictionary of parameters; save these alone")
    return PickledTree(machine.protocol, _lazy_arrays(tree, MOST_SHARING * size))


# ---------------------------------------------------------------- what a pickle can hold


class _Span(NamedTuple):
    """Bytes of the file; with `text`, they are the characters 0 to 255 in UTF-8, as protocol 2 writes bytes."""

    start: int
    length: int
    text: bool = False


class _Element:
    """Stands for a `numpy.dtype`."""

    def __init__(self, name: str) -> None:
        self.element = Element(name)

    def set_state(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", ">", "|"):
            raise RefusedError("a dtype has a state that is none")
        if order != "|":
            self.element = self.element._replace(order=order)


class _Array:
    """Stands for a `numpy.ndarray`: empty when it is made, then told its state."""

    def __init__(self, machine: _Machine) -> None:
        self.machine = machine
        self.element = Element("f4")
        self.array: LazyArray | None = None

    def set_state(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array has a state that is none")
        _, shape, element, fortran, raw = state
        if type(fortran) is not bool:
            raise RefusedError("an array has a state that is none")
        self.set(raw, element, shape, "F" if fortran else "C")

    def set(self, raw: object, element: object, shape: object, order: str, axes: tuple[int, ...] | None = None) -> None:
        """Set the content: the bytes are laid out in `shape`, then `axes` are permuted."""
        if self.array is not None:
            raise RefusedError("an array is given its content twice")
        if not isinstance(element, _Element):
            raise RefusedError(f"an array has {_kind(element)} for a dtype")
        shape = checked_shape(shape)
        self.element = element.element
        self.machine.check_bytes(raw, byte_count(shape, self.element))

        def read(element: Element = self.element) -> NDArray:
            array = arranged(element.decode(self.machine.fetch(raw, byte_count(shape, element))), shape, order)
            return array if axes is None else array.transpose(axes)

        self.array = LazyArray(shape if axes is None else tuple(shape[i] for i in axes), self.element.dtype, read)


class _Global(NamedTuple):
    """A name that a pickle may mention; `call` is what calling it means here, if it may be called."""

    name: str
    call: Callable[..., object] | None = None


def _lazy_arrays(tree: dict[Any, Any], limit: int) -> dict[Any, Any]:
    """Return the tree with `LazyArray` for its arrays, which may take `limit` bytes together; two levels at most."""
    declared = 0

    def lazy_array(value: object, where: str) -> LazyArray:
        nonlocal declared
        if not isinstance(value, _Array):
            raise RefusedError(f"{where} is {_kind(value)}, not an array")
        if value.array is None:
            raise RefusedError(f"{where} is an array without content")
        declared += byte_count(value.array.shape, value.element)
        if declared > limit:
            raise RefusedError(f"one array stands in many places, and all take more than {limit} bytes")
        return value.array

    out: dict[Any, Any] = {}
    seen: set[int] = set()
    for key, value in tree.items():
        name = ":".join(key) if isinstance(key, tuple) else key
        if isinstance(value, dict):
            if id(value) in seen or value is tree:
                raise RefusedError(f"{name} is a dictionary that stands in two places")
            seen.add(id(value))
            out[key] = {k: lazy_array(v, f"{name}:{k}") for k, v in value.items()}
        else:
            out[key] = lazy_array(value, name)
    return out


def _kind(value: object) -> str:
    """Say what a value is, for a message, in the words of the file's author."""
    if isinstance(value, _Global):
        return f"the global {value.name}"
    if value is None:
        return "None"
    return {_Array: "an array", _Element: "a dtype", _Span: "a string of bytes", _Mark: "a mark"}.get(
        type(value), f"a {type(value).__name__}"
    )


# ---------------------------------------------------------------- the machine


class _Mark:
    """Where a run of arguments on the stack begins."""


_MARK = _Mark()


class _Machine:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0
        self.protocol = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names = 0
        self.globals = self._globals()

    def run(self) -> object:
        self.file.seek(0)
        for _ in range(MOST_INSTRUCTIONS):
            at = self.position
            code = self.take(1)
            if at == 0 and code != b"\x80":
                raise RefusedError("it does not begin like a pickle of protocol 2 to 5")
            name, step = _INSTRUCTIONS.get(code[0], ("", None))
            if step is None:
                what = f"the instruction {_REFUSED[code[0]]}" if code[0] in _REFUSED else f"the byte 0x{code[0]:02x}"
                raise RefusedError(f"{what} at byte {at} has no place in a tree of arrays")
            try:
                if step(self):
                    if left := self.size - self.position:
                        logger.warning("%d bytes follow the end of the pickle and are not read", left)
                    return self.pop()
            except RefusedError as error:
                raise RefusedError(f"{error} ({name} at byte {at} of {self.size})") from None
        raise RefusedError(f"it has more than {MOST_INSTRUCTIONS} instructions")

    # -- the file

    def take(self, count: int) -> bytes:
        """Read the next bytes."""
        self.check_left(count)
        data = self.file.read(count)
        if len(data) != count:
            raise RefusedError("the file became shorter while it was read")
        self.position += count
        return data

    def skip(self, count: int, *, text: bool = False) -> _Span:
        """Skip the next bytes, and return where they lie."""
        self.check_left(count)
        span = _Span(self.position, count, text)
        self.position += count
        self.file.seek(self.position)
        return span

    def check_left(self, count: int) -> None:
        left = self.size - self.position
        if count > left:
            raise RefusedError(f"the file is cut off: {count} bytes should follow byte {self.position}, {left} do")

    def name(self, count: int) -> str:
        """Read the next bytes as a name."""
        self.names += count
        if self.names > MOST_NAMES:
            raise RefusedError(f"its names take more than {MOST_NAMES} bytes")
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError("a name is not UTF-8") from None

    def line(self) -> str:
        """Read the next line as a name."""
        data = self.file.readline(LONGEST_NAME + 1)
        if not data.endswith(b"\n"):
            raise RefusedError("the file is cut off, or a global's name is longer than any")
        self.file.seek(self.position)
        text = self.name(len(data))
        return text[:-1]

    # -- the bytes of arrays

    def check_bytes(self, raw: object, count: int) -> None:
        """Raise unless `raw` can be the `count` bytes of an array."""
        if isinstance(raw, _Span):
            least, most = ((raw.length + 1) // 2, raw.length) if raw.text else (raw.length, raw.length)
        elif isinstance(raw, bytes):
            least = most = len(raw)
        else:
            raise RefusedError(f"an array has {_kind(raw)} for its bytes")
        if not least <= count <= most:
            raise RefusedError(f"an array's shape and dtype take {count} bytes, and it comes with {most}")

    def fetch(self, raw: object, count: int) -> NDArray[np.uint8]:
        """Read the `count` bytes of an array from the file."""
        if isinstance(raw, bytes):
            return np.frombuffer(raw, np.uint8).copy()
        assert isinstance(raw, _Span)
        self.file.seek(raw.start)
        data = np.empty(raw.length, np.uint8)
        if self.file.readinto(data.data) != raw.length:  # type: ignore[attr-defined]
            raise RefusedError("the file became shorter while it was read")
        if not raw.text:
            return data
        try:
            encoded = data.tobytes().decode("utf-8").encode("latin1")
        except UnicodeError:
            raise RefusedError("an array's bytes are written as text that is none of protocol 2's") from None
        if len(encoded) != count:
            raise RefusedError(f"an array's shape and dtype take {count} bytes, and it comes with {len(encoded)}")
        return np.frombuffer(encoded, np.uint8).copy()

    # -- the stack

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise RefusedError("an instruction lacks its argument on the stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                items.reverse()
                return items
            items.append(item)
        raise RefusedError("an instruction lacks its mark on the stack")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_items(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def push_text(self, count: int) -> None:
        self.push(self.name(count) if count <= LONGEST_NAME else self.skip(count, text=True))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError(f"nothing was stored as number {index}")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict):
            raise RefusedError(f"items are put into {_kind(target)}, not into a dictionary")
        if len(items) % 2:
            raise RefusedError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple is checked part by part: to hash a nested one can take for ever.
            parts: tuple[Any, ...] = key if isinstance(key, tuple) and len(key) == 2 else (key,)
            if not all(isinstance(part, str) for part in parts):
                raise RefusedError(f"a key is {_kind(key)}, not a name")
            if key in target:
                raise RefusedError(f"the key {':'.join(parts)!r} comes twice")
            target[key] = value
        self.push(target)

    # -- globals

    def push_global(self, module: object, name: object) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "without a name"
        if full not in self.globals:
            raise RefusedError(f"the global {full[:200]} is refused")
        self.push(self.globals[full])

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or function.call is None:
            raise RefusedError(f"{_kind(function)} is called, and cannot be")
        if not isinstance(args, tuple):
            raise RefusedError(f"{function.name} is called with {_kind(args)} for arguments")
        try:
            value = function.call(*args)
        except TypeError:
            raise RefusedError(f"{function.name} is called with {len(args)} arguments that it does not take") from None
        self.push(value)

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, (_Array, _Element)):
            raise RefusedError(f"{_kind(target)} is given a state, and has none")
        target.set_state(state)
        self.push(target)

    def _globals(self) -> dict[str, _Global]:
        """Return everything that a pickle may name."""
        table: dict[str, Callable[..., object] | None] = {
            "numpy.ndarray": None,
            "numpy.dtype": _make_element,
            "ml_dtypes.bfloat16": None,
            "_codecs.encode": _encode,
            "collections.OrderedDict": _make_dict,
            "jax._src.array._reconstruct_array": self._jax_array,
            "jax._src.device_array.reconstruct_device_array": self._jax_array,
        }
        for core in ("numpy.core", "numpy._core"):
            table[f"{core}.multiarray._reconstruct"] = self._reconstruct
            table[f"{core}.multiarray.scalar"] = self._scalar
            table[f"{core}.numeric._frombuffer"] = self._from_buffer
        for mapping in ("FlatMapping", "FlatMap", "frozendict"):
            table[f"haiku._src.data_structures.{mapping}"] = _make_dict
        for dill in ("dill._dill", "dill.dill"):
            table[f"{dill}._create_array"] = self._dill_array
        return {name: _Global(name, call) for name, call in table.items()}

    def _reconstruct(self, kind: object, shape: object, code: object) -> _Array:
        _pinned(kind, "numpy.ndarray")
        return _Array(self)

    def _scalar(self, element: object, raw: object) -> _Array:
        array = _Array(self)
        array.set(raw, element, (), "C")
        return array

    def _from_buffer(self, raw: object, element: object, shape: object, order: object, axes: object = None) -> _Array:
        array = _Array(self)
        if order == "K":
            rank = len(checked_shape(shape))
            if not isinstance(axes, tuple) or not all(type(a) is int for a in axes) or sorted(axes) != [*range(rank)]:
                raise RefusedError("an array's axes are no permutation")
            array.set(raw, element, shape, "C", axes)
        elif order in ("C", "F"):
            array.set(raw, element, shape, str(order))
        else:
            raise RefusedError("an array has an order of axes that is none")
        return array

    def _dill_array(self, function: object, args: object, state: object, attributes: object = None) -> _Array:
        _pinned(function, "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
        if attributes:
            raise RefusedError("an array has attributes of its own")
        array = _Array(self)
        array.set_state(state)
        return array

    def _jax_array(self, function: object, args: object, state: object, kind: object) -> _Array:
        return self._dill_array(function, args, state)


def _pinned(value: object, *names: str) -> None:
    if not isinstance(value, _Global) or value.name not in names:
        raise RefusedError(f"an array is made by {_kind(value)}, not by {names[0]}")


def _make_element(spec: object, *flags: object) -> _Element:
    if isinstance(spec, _Global) and spec.name == "ml_dtypes.bfloat16":
        return _Element(BFLOAT16)
    if not isinstance(spec, str):
        raise RefusedError(f"a dtype is made of {_kind(spec)}")
    if spec.startswith("O"):
        raise RefusedError("an array of dtype object can hold anything")
    if spec not in FLOATS:
        raise RefusedError(f"an array of dtype {spec[:20]!r} is none of {', '.join(FLOATS)} and bfloat16")
    return _Element(spec)


def _encode(text: object, encoding: object) -> _Span | bytes:
    if encoding == "latin1" and isinstance(text, str):
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            pass
    elif encoding == "latin1" and isinstance(text, _Span) and text.text:
        return text
    raise RefusedError("_codecs.encode is called with something else than protocol 2's bytes")


def _make_dict(items: object = ()) -> dict[Any, Any]:
    if items == ():
        return {}
    if isinstance(items, dict):
        return items  # not a copy, of which a small pickle could ask for very many
    raise RefusedError(f"a dictionary is made of {_kind(items)}")


# ---------------------------------------------------------------- the instructions


def _number(machine: _Machine, form: str) -> int:
    return struct.unpack("<" + form, machine.take(struct.calcsize(form)))[0]


def _proto(m: _Machine) -> None:
    m.protocol = _number(m, "B")
    if not 2 <= m.protocol <= 5:
        raise RefusedError(f"it is of protocol {m.protocol}, not 2 to 5")


def _append(m: _Machine, items: list[Any]) -> None:
    target = m.pop()
    if not isinstance(target, list):
        raise RefusedError(f"items are put into {_kind(target)}, not into a list")
    target.extend(items)
    m.push(target)


def _global(m: _Machine) -> None:
    module = m.line()
    m.push_global(module, m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.push_global(module, name)


# `pickletools.code2op` describes each. A function that returns something ends the run.
_INSTRUCTIONS: Mapping[int, tuple[str, Callable[[_Machine], object]]] = {
    code[0]: (name, step)
    for code, name, step in (
        (b"\x80", "PROTO", _proto),
        (b"\x95", "FRAME", lambda m: m.check_left(_number(m, "Q"))),
        (b".", "STOP", lambda m: True),
        (b"(", "MARK", lambda m: m.push(_MARK)),
        (b"0", "POP", lambda m: m.pop() and None),
        (b"1", "POP_MARK", lambda m: m.pop_to_mark() and None),
        (b"N", "NONE", lambda m: m.push(None)),
        (b"\x88", "NEWTRUE", lambda m: m.push(True)),
        (b"\x89", "NEWFALSE", lambda m: m.push(False)),
        (b"K", "BININT1", lambda m: m.push(_number(m, "B"))),
        (b"M", "BININT2", lambda m: m.push(_number(m, "H"))),
        (b"J", "BININT", lambda m: m.push(_number(m, "i"))),
        (b"\x8a", "LONG1", lambda m: m.push(int.from_bytes(m.take(_number(m, "B")), "little", signed=True))),
        (b"G", "BINFLOAT", lambda m: m.push(struct.unpack(">d", m.take(8))[0])),
        (b"\x8c", "SHORT_BINUNICODE", lambda m: m.push_text(_number(m, "B"))),
        (b"X", "BINUNICODE", lambda m: m.push_text(_number(m, "I"))),
        (b"\x8d", "BINUNICODE8", lambda m: m.push_text(_number(m, "Q"))),
        (b"C", "SHORT_BINBYTES", lambda m: m.push(m.skip(_number(m, "B")))),
        (b"B", "BINBYTES", lambda m: m.push(m.skip(_number(m, "I")))),
        (b"\x8e", "BINBYTES8", lambda m: m.push(m.skip(_number(m, "Q")))),
        (b"\x96", "BYTEARRAY8", lambda m: m.push(m.skip(_number(m, "Q")))),
        (b")", "EMPTY_TUPLE", lambda m: m.push(())),
        (b"\x85", "TUPLE1", lambda m: m.push_items(1)),
        (b"\x86", "TUPLE2", lambda m: m.push_items(2)),
        (b"\x87", "TUPLE3", lambda m: m.push_items(3)),
        (b"t", "TUPLE", lambda m: m.push(tuple(m.pop_to_mark()))),
        (b"]", "EMPTY_LIST", lambda m: m.push([])),
        (b"a", "APPEND", lambda m: _append(m, [m.pop()])),
        (b"e", "APPENDS", lambda m: _append(m, m.pop_to_mark())),
        (b"}", "EMPTY_DICT", lambda m: m.push({})),
        (b"s", "SETITEM", lambda m: m.set_items([m.pop(), m.pop()][::-1])),
        (b"u", "SETITEMS", lambda m: m.set_items(m.pop_to_mark())),
        (b"q", "BINPUT", lambda m: m.put(_number(m, "B"))),
        (b"r", "LONG_BINPUT", lambda m: m.put(_number(m, "I"))),
        (b"\x94", "MEMOIZE", lambda m: m.put(len(m.memo))),
        (b"h", "BINGET", lambda m: m.get(_number(m, "B"))),
        (b"j", "LONG_BINGET", lambda m: m.get(_number(m, "I"))),
        (b"c", "GLOBAL", _global),
        (b"\x93", "STACK_GLOBAL", _stack_global),
        (b"R", "REDUCE", lambda m: m.reduce()),
        (b"b", "BUILD", lambda m: m.build()),
    )
}

# For messages alone.
_REFUSED = {
    code[0]: name
    for code, name in (
        (b"P", "PERSID"),
        (b"Q", "BINPERSID"),
        (b"i", "INST"),
        (b"o", "OBJ"),
        (b"\x81", "NEWOBJ"),
        (b"\x92", "NEWOBJ_EX"),
        (b"\x82", "EXT1"),
        (b"\x83", "EXT2"),
        (b"\x84", "EXT4"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x98", "READONLY_BUFFER"),
        (b"\x8b", "LONG4"),
        (b"\x8f", "EMPTY_SET"),
        (b"\x90", "ADDITEMS"),
        (b"\x91", "FROZENSET"),
        (b"2", "DUP"),
    )
}
