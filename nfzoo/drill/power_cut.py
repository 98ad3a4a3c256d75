"""Compute what a loss of power may leave of a folder, from the calls that were made there.

What was flushed is there. Everything else may be there or not, each write and each name by itself, as POSIX allows: a
flushed file keeps its content but needs a flush of its folder to keep its name, and a name may come before the content.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from nfzoo.drill.shim import Call, Operation


@dataclass(eq=False)
class Inode:
    """A file, or a folder, which has entries."""

    entries: dict[str, Inode] | None = None
    content: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class Change:
    """What one call changed: content of a file, or names in folders."""

    number: int
    owners: tuple[Inode, ...]
    """Inodes of which a flush makes the change durable."""
    apply: Callable[[float], None]
    """Apply a share of the change; only a write can be applied in part."""
    torn: bool = False
    """Whether it can be applied in part."""
    name: str = ""
    """What a file or folder was renamed to."""
    flushed: float = float("inf")
    """Number of the call that made it durable."""


class Journal:
    """The calls below a folder as changes to an empty one.

    Args:
        root: the folder.
        calls: all calls below it from the start on, in their order.

    Raises:
        LookupError: if a call that changed the folder is missing.
    """

    def __init__(self, root: Path, calls: Iterable[Call]) -> None:
        self.changes: list[Change] = []
        self._lock = threading.Lock()  # trials run in threads
        self._inodes = [Inode({})]
        self._live: dict[PurePath, Inode] = {PurePath(root): self._inodes[0]}
        self._open: dict[tuple[int, int], Inode] = {}  # by process and descriptor
        self._numbered: dict[int, Inode] = {}  # of the inodes' numbers, which can be used anew
        for call in calls:
            self._add(call)

    # ------------------------------------------------------------ what was done

    def _add(self, call: Call) -> None:
        path, live, opened = PurePath(call.path), self._live, (call.process, call.descriptor)
        match call.operation:
            case Operation.OPEN | Operation.CREATE:
                known = self._numbered.get(call.offset)
                earlier = next((old for old, inode in live.items() if inode is known), path)
                if earlier != path:  # it was renamed by a call that the library did not see
                    self._rename(call.number, earlier, path)
                elif path not in live:
                    self._enter(call.number, path, self._new())
                self._open[opened] = self._numbered[call.offset] = live[path]
            case Operation.WRITE:
                self._write(call.number, self._open[opened], call.offset, call.data)
            case Operation.TRUNCATE:
                self._resize(call.number, self._open[opened], call.offset)
            case Operation.SYNC:
                flushed = self._open[opened]
                if call.offset:  # a file, which may have been written to past the library
                    self._resize(call.number, flushed, len(call.data))
                    self._write(call.number, flushed, 0, call.data)
                for change in self.changes:
                    if flushed in change.owners:
                        change.flushed = min(change.flushed, call.number)
            case Operation.MKDIR:
                self._enter(call.number, path, self._new({}))
            case Operation.RENAME:
                self._rename(call.number, path, PurePath(call.target))
            case Operation.UNLINK | Operation.RMDIR:
                self._remove(call.number, path)
            case Operation.LINK:
                self._enter(call.number, PurePath(call.target), live[path])
            case Operation.CHMOD:
                pass

    def _new(self, entries: dict[str, Inode] | None = None) -> Inode:
        self._inodes.append(Inode(entries))
        return self._inodes[-1]

    def _enter(self, number: int, path: PurePath, inode: Inode) -> None:
        folder = self._live[path.parent]
        self._live[path] = inode

        def apply(_: float) -> None:
            _entries(folder)[path.name] = inode

        self._change(number, (folder,), apply)

    def _remove(self, number: int, path: PurePath) -> None:
        folder = self._live[path.parent]
        del self._live[path]

        def apply(_: float) -> None:
            _entries(folder).pop(path.name, None)

        self._change(number, (folder,), apply)

    def _rename(self, number: int, old: PurePath, new: PurePath) -> None:
        inode, source, target = self._live[old], self._live[old.parent], self._live[new.parent]
        moved = {path: found for path, found in self._live.items() if path == old or old in path.parents}
        for path in moved:
            del self._live[path]
        self._live |= {new / path.relative_to(old): found for path, found in moved.items()}

        def apply(_: float) -> None:
            if _entries(source).get(old.name) is inode:
                del _entries(source)[old.name]
            _entries(target)[new.name] = inode

        self._change(number, (source, target), apply, name=new.name)

    def _write(self, number: int, inode: Inode, offset: int, data: bytes) -> None:
        def apply(share: float) -> None:
            part, content = data[: int(len(data) * share)], inode.content
            content.extend(bytes(max(0, offset + len(part) - len(content))))
            content[offset : offset + len(part)] = part

        self._change(number, (inode,), apply, torn=True)

    def _resize(self, number: int, inode: Inode, length: int) -> None:
        def apply(_: float) -> None:
            del inode.content[length:]
            inode.content.extend(bytes(length - len(inode.content)))

        self._change(number, (inode,), apply)

    def _change(
        self,
        number: int,
        owners: tuple[Inode, ...],
        apply: Callable[[float], None],
        *,
        torn: bool = False,
        name: str = "",
    ) -> None:
        self.changes.append(Change(number, owners, apply, torn, name))

    # ------------------------------------------------------------ what is left of it

    def write(self, folder: Path, call: int, share: Callable[[Change], float]) -> None:
        """Write into `folder`, which is empty, what is left if power is lost before the call of this number.

        Args:
            share: how much of a change that was not flushed is left, from 0 to 1.
        """
        with self._lock:
            for inode in self._inodes:
                inode.content.clear()
                if inode.entries is not None:
                    inode.entries.clear()
            for change in self.changes:
                if change.number < call:
                    left = 1.0 if change.flushed < call else share(change)
                    if left:
                        change.apply(left)
            _write_tree(self._inodes[0], folder)

    def renamed(self, call: int, *, flushed: bool) -> set[str]:
        """Return the names that renames before a call gave; with `flushed`, those that a loss of power leaves."""
        found = (change for change in self.changes if change.name and change.number < call)
        return {change.name for change in found if not flushed or change.flushed < call}


SHARES: dict[str, Callable[[random.Random], Callable[[Change], float]]] = {
    "nothing": lambda rng: lambda change: 0.0,
    "everything": lambda rng: lambda change: 1.0,
    "names alone": lambda rng: lambda change: 0.0 if change.torn else 1.0,
    "some": lambda rng: lambda change: float(rng.random() < 0.5),
    "parts": lambda rng: lambda change: rng.random() if change.torn else float(rng.random() < 0.5),
}
"""What is left of changes that were not flushed."""


def _entries(inode: Inode) -> dict[str, Inode]:
    assert inode.entries is not None, "a name in a file"
    return inode.entries


def _write_tree(inode: Inode, path: Path) -> None:
    for name, child in _entries(inode).items():
        if child.entries is None:
            (path / name).write_bytes(child.content)
        else:
            (path / name).mkdir()
            _write_tree(child, path / name)
