"""What a loss of power may leave: flushed content and names always, all else by itself."""

import random
import tempfile
from pathlib import Path

from nfzoo.drill.power_cut import SHARES, Journal
from nfzoo.drill.shim import Call, Operation
from tests.support.loops import each

ROOT = Path("/w")


def call(operation: Operation, number: int, path: str = "", *, fd: int = 3, offset: int = 0, data: bytes = b"") -> Call:
    name, _, target = path.partition(">")
    return Call(
        operation, fd, number, offset, f"/w{name}" if name else "", data, f"/w{target}" if target else "", 0, number
    )


# A file is written, flushed, renamed; then its folder is flushed.
SAVE = [
    call(Operation.OPEN, 1, "/.f", offset=7),
    call(Operation.WRITE, 2, data=b"0123456789"),
    call(Operation.SYNC, 3, offset=1, data=b"0123456789"),
    call(Operation.RENAME, 4, "/.f>/f"),
    call(Operation.OPEN, 4, "", fd=4)._replace(path="/w"),
    call(Operation.SYNC, 5, fd=4),
]


def left(calls: list[Call], cut: int, kind: str, tmp_path: Path, seed: int = 0) -> dict[str, bytes]:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    Journal(ROOT, calls).write(folder, cut, SHARES[kind](random.Random(seed)))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_flushed_is_left_and_nothing_else(tmp_path: Path) -> None:
    assert [left(SAVE, cut, "nothing", tmp_path) for cut in range(1, 7)] == [{}] * 5 + [{"f": b"0123456789"}]


def test_without_a_loss_all_is_left(tmp_path: Path) -> None:
    states = [{}, {".f": b""}, *[{".f": b"0123456789"}] * 2, *[{"f": b"0123456789"}] * 2]
    assert [left(SAVE, cut, "everything", tmp_path) for cut in range(1, 7)] == states


def test_a_name_can_come_before_the_content(tmp_path: Path) -> None:
    unflushed = [one for one in SAVE if one.number != 3]
    assert left(unflushed, 5, "names alone", tmp_path) == {"f": b""}
    assert left(SAVE, 5, "names alone", tmp_path) == {"f": b"0123456789"}  # flushed before


def test_a_rename_is_whole_and_parts_of_a_write_are_its_beginning(tmp_path: Path) -> None:
    seen = set()
    for seed in range(40):
        found = left([one for one in SAVE if one.number != 3], 5, "parts", tmp_path, seed)
        assert len(found) <= 1
        seen |= {(name, b"0123456789".startswith(content)) for name, content in found.items()}
    assert seen == {(".f", True), ("f", True)}


def test_names_that_stay(tmp_path: Path) -> None:
    journal = Journal(ROOT, SAVE)
    assert [journal.renamed(cut, flushed=False) for cut in (4, 5)] == [set(), {"f"}]
    assert [journal.renamed(cut, flushed=True) for cut in (5, 6)] == [set(), {"f"}]


@each("operation", [Operation.UNLINK, Operation.RENAME])
def test_what_happens_past_the_library_is_found(operation: Operation, tmp_path: Path) -> None:
    """A file that was renamed, and written to, without a call that was seen."""
    calls = [
        call(Operation.OPEN, 1, "/tmp", offset=7),
        call(Operation.OPEN, 1, "/f", offset=7, fd=5),
        call(Operation.SYNC, 2, fd=5, offset=1, data=b"mapped"),
        call(operation, 3, "/f>/g" if operation is Operation.RENAME else "/f"),
    ]
    name = operation.name.lower()
    (tmp_path / name).mkdir()
    assert left(calls, 3, "everything", tmp_path / name) == {"f": b"mapped"}
    assert left(calls, 4, "everything", tmp_path / name) == ({"g": b"mapped"} if name == "rename" else {})


def test_folders_move_with_what_they_hold(tmp_path: Path) -> None:
    calls = [
        call(Operation.MKDIR, 1, "/a"),
        call(Operation.OPEN, 2, "/a/f", offset=7),
        call(Operation.TRUNCATE, 3, offset=3),
        call(Operation.RENAME, 4, "/a>/b"),
        call(Operation.UNLINK, 5, "/b/f"),
        call(Operation.RMDIR, 6, "/b"),
    ]
    assert left(calls, 5, "everything", tmp_path) == {"b/f": bytes(3)}
    assert left(calls, 7, "everything", tmp_path) == {}
