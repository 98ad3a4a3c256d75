"""Make a corpus of hostile and broken parameter files (`corpus`), and run `nfzoo convert` over it under caps.

`python -m tests.support.hostile FOLDER` converts the files of FOLDER/good, then those of FOLDER/files, and prints, as
JSON, how each of these was refused. It grants them little memory beyond what the good ones took, gives each a few
seconds, and notes every audit event that an attack would cause.
"""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, Any]

MEMORY = 256 << 20  # bytes beyond what the interpreter has mapped after its imports
SECONDS = 20
DANGEROUS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.putenv",
    "subprocess.Popen",
    "pickle.find_class",
    "marshal.loads",
    "exec",
    "compile",
    "code.__new__",
    "socket.connect",
    "ctypes.dlopen",
    "builtins.input",
)


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def P(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts)


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def dtype(kind: str) -> bytes:
    """A dtype without a state, in this machine's byte order."""
    return glob("numpy", "dtype") + text(kind) + b"\x89\x88\x87R"


FOUR = b"K\x04\x85"  # the shape (4,)


def raw_array(shape: bytes, data: bytes, kind: bytes | None = None, fortran: bytes = b"\x89") -> bytes:
    """The instructions for one array, whose shape and data can be any instructions."""
    plain = dtype("f4") + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    head = glob("numpy.core.multiarray", "_reconstruct") + glob("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    return head + b"(K\x01" + shape + (plain if kind is None else kind) + fortran + data + b"tb"


def in_tree(value: bytes) -> bytes:
    """`{"NFNet/~/linear": {"b": value}}`."""
    return P(b"}", text("NFNet/~/linear"), b"}", text("b"), value, b"ss.")


def some(count: int) -> bytes:
    """Bytes for an array."""
    return b"B" + struct.pack("<I", count) + b"\0" * count


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(literal: str, data: bytes = b"") -> bytes:
    padded = literal.encode() + b" " * (-(len(literal) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


def archive(files: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as out:
        for name, data in files:
            out.writestr(name, data)
    return buffer.getvalue()


def corpus(tree: Tree, canary: Path) -> Iterator[tuple[str, bytes, str]]:
    """(name, content, what the refusal has to say), around `tree`, a good one of nfnet-test."""
    touch = f"touch {canary}"

    def changed(change: Callable[[Tree], object], protocol: int = 4) -> bytes:
        copy: Tree = {m: dict(d) for m, d in tree.items()}
        change(copy)
        return pickle.dumps(copy, protocol)

    # -- calls
    attacks = {
        "posix.system": Calls(os.system, touch),
        "builtins.eval": Calls(eval, f"__import__('os').system({touch!r})"),
        "builtins.exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "builtins.open": Calls(open, str(canary), "w"),
        "builtins.getattr": Calls(getattr, "", "join"),
        "builtins.__import__": Calls(__import__, "antigravity"),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "_pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "shutil.rmtree": Calls(shutil.rmtree, str(canary)),
        "numpy.load": Calls(np.load, str(canary), None, True),
    }
    for name, attack in attacks.items():
        shown = {"builtins.open": r"\w*io.open", "numpy.load": r"numpy\.\S*load"}.get(name, name)
        yield name, pickle.dumps(attack, 4), f"global {shown} is refused"
    bomb = Calls(os.system, touch)
    for protocol in (2, 4, 5):
        yield (
            f"among the weights, {protocol}",
            changed(lambda t: t["NFNet/~/linear"].update(b=bomb), protocol),
            "posix.system",
        )
    yield "as a module", changed(lambda t: t.update(extra=bomb)), "global posix.system is refused"
    yield "as a key", pickle.dumps({Calls(os.getpid): {}}, 4), "global posix.getpid is refused"
    yield (
        "in an object array",
        changed(lambda t: t["NFNet/~/linear"].update(b=np.array([bomb], object))),
        "dtype object",
    )
    yield "nested calls", pickle.dumps(Calls(OrderedDict, [("a", bomb)]), 4), "posix.system"
    yield "types.FunctionType", P(glob("types", "FunctionType"), b")R."), "types.FunctionType is refused"
    yield (
        "copyreg",
        pickle.dumps(Calls(vars(copyreg)["_reconstructor"], object, object, None), 2),
        "copy_?reg._reconstructor is refused",
    )
    yield "protocol 0", pickle.dumps(bomb, 0), "neither a pickle"
    yield "protocol 1", pickle.dumps(tree, 1), "neither a pickle"
    yield "protocol 9", b"\x80\x09}.", "protocol 9"
    yield "a dotted global", P(glob("numpy", "ndarray.__class__"), b"."), "numpy.ndarray.__class__ is refused"
    yield "a global of numbers", P(b"K\x01K\x02\x93."), "without a name"
    yield (
        "dill, a function",
        P(glob("dill._dill", "_create_function"), b")R."),
        "dill._dill._create_function is refused",
    )
    yield "dill, a module", P(glob("dill._dill", "_import_module"), text("os"), b"\x85R."), "dill._dill._import_module"
    yield (
        "dill, another constructor",
        in_tree(glob("dill._dill", "_create_array") + b"(" + glob("numpy", "dtype") + b"))tR"),
        "made by the global numpy.dtype",
    )
    yield (
        "jax, another constructor",
        in_tree(glob("jax._src.array", "_reconstruct_array") + b"(" + glob("_codecs", "encode") + b"))}tR"),
        "made by the global _codecs.encode",
    )
    yield (
        "another class of array",
        in_tree(glob("numpy.core.multiarray", "_reconstruct") + glob("numpy", "dtype") + b")C\x01b\x87R"),
        "made by the global numpy.dtype",
    )
    yield (
        "dill, attributes",
        in_tree(
            glob("dill._dill", "_create_array")
            + b"("
            + glob("numpy.core.multiarray", "_reconstruct")
            + b"))}"
            + text("__class__")
            + b"NstR"
        ),
        "attributes of its own",
    )
    yield "an array is called", in_tree(raw_array(b"K\x01\x85", some(4)) + b")R"), "an array is called"
    yield "a class is called", P(glob("numpy", "ndarray"), b")R."), "numpy.ndarray is called"
    yield "another codec", P(glob("_codecs", "encode"), text("x"), text("zip"), b"\x86R."), "_codecs.encode is called"
    yield "too many arguments", P(glob("_codecs", "encode"), b"(NNNNtR."), "called with 4 arguments"
    yield "arguments in a list", P(glob("_codecs", "encode"), b"]R."), "a list for arguments"

    # -- instructions that trees do not need
    for name, code in {
        "PERSID": b"Pid\n.",
        "BINPERSID": b"NQ.",
        "EXT1": b"\x82\x01.",
        "EXT2": b"\x83\x01\x01.",
        "EXT4": b"\x84\x01\x01\x01\x01.",
        "INST": b"(ios\nsystem\n.",
        "OBJ": b"(o.",
        "NEWOBJ": b"))\x81.",
        "NEWOBJ_EX": b"))}\x92.",
        "NEXT_BUFFER": b"\x97.",
        "LONG4": b"\x8b\xff\xff\xff\x7f",
        "EMPTY_SET": b"\x8f.",
        "DUP": b"N2.",
    }.items():
        yield f"instruction {name}", P(code), f"instruction {name} "
    yield "no instruction", P(b"\xff."), "the byte 0xff"
    yield "a state for a dictionary", P(b"}}b."), "a dict is given a state"

    # -- bombs
    yield "memo bomb", P(b"Nr\xff\xff\xff\x7f."), "holds None"
    yield (
        "memo bomb, many",
        P(b"".join(b"Nr" + struct.pack("<I", 1 << 31 | i) for i in range(300_000)), b"."),
        "instructions|None",
    )
    yield "marks", P(b"(" * 3_000_000), "more than 1000000 instructions"
    yield "nothing but numbers", P(b"K\x01" * 1_500_000), "more than 1000000 instructions"
    yield "deep tuples", P(b"N", b"\x85" * 900_000, b"."), "holds a tuple"
    yield "deep dictionaries", P(b"}" * 400_000, b"."), "no arrays"
    yield (
        "a key that takes for ever",
        P(b"}", b"N", b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60)), b"Ns."),
        "a key is a tuple",
    )
    keys = 60_000
    inner = b"}(" + b"".join(text(f"k{i}") + b"h\x00" for i in range(keys)) + b"u"
    outer = b"".join(text(f"m{i}") + b"h\x01" for i in range(keys))
    shared = raw_array(b"K\x00\x85", some(0)) + b"q\x000" + inner + b"q\x010"
    yield "the square of dictionaries", P(shared, b"}(", outer, b"u."), "stands in two places"
    big = raw_array(b"J" + struct.pack("<i", 1 << 20) + b"\x85", some(1 << 22)) + b"q\x000"
    yield (
        "one array, everywhere",
        P(big, b"}(", b"".join(text(f"m{i}") + b"h\x00" for i in range(5000)), b"u."),
        "many places",
    )
    copies = b"".join(glob("haiku._src.data_structures", "FlatMap") + b"h\x01\x85R" for _ in range(9_000))
    yield "copies of dictionaries", P(shared, copies, b"h\x01."), "many places|no model|nothing|is of k0"
    yield "names of 100 MB", P(b"".join(text("x" * 250) for _ in range(400_000)), b"."), "names take more"

    # -- sizes that are not there
    for name, code in {
        "BINBYTES": b"B\xff\xff\xff\xff",
        "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 62),
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", (1 << 64) - 1),
        "BINUNICODE": b"X\xff\xff\xff\xff",
        "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 40),
        "FRAME": b"\x95" + struct.pack("<Q", 1 << 63),
    }.items():
        yield f"gigantic {name}", P(code, b"}."), "cut off"
    for name, shape, told in (
        ("negative", b"J\xff\xff\xff\xff\x85", "holds -1"),
        ("huge", b"\x8a\x09" + b"\0" * 8 + b"\x01\x85", "take 73786976294838206464 bytes"),
        ("huge product", b"(" + b"J\xff\xff\xff\x7f" * 8 + b"t", "and it comes with 16"),
        ("too small", b"K\x03\x85", "take 12 bytes, and it comes with 16"),
        ("too large", b"K\x05\x85", "take 20 bytes, and it comes with 16"),
        ("empty", b"K\x00\x85", "take 0 bytes"),
        ("a float", b"G" + struct.pack(">d", 4.0) + b"\x85", "holds 4.0"),
        ("a bool", b"\x88K\x04\x86", "holds True"),
        ("a string", text("4"), "a str"),
        ("a list", b"]", "a list"),
        ("of 200 axes", b"(" + b"K\x01" * 200 + b"t", "up to 8"),
    ):
        yield f"a shape that is {name}", in_tree(raw_array(shape, some(16))), told
    yield "an order that is none", in_tree(raw_array(FOUR, some(16), fortran=b"K\x07")), "a state that is none"
    yield "a list for bytes", in_tree(raw_array(FOUR, b"]")), "a list for its bytes"
    yield "text for bytes", in_tree(raw_array(FOUR, text("abcd" * 4))), "a str for its bytes"
    yield (
        "long text that is no bytes",
        in_tree(raw_array(b"K\x40\x85", glob("_codecs", "encode") + text("€" * 100) + text("latin1") + b"\x86R")),
        "none of protocol 2|comes with|differs",
    )
    yield "no dtype", in_tree(raw_array(FOUR, some(16), kind=b"N")), "None for a dtype"
    yield (
        "a dtype of no order",
        in_tree(raw_array(FOUR, some(16), kind=dtype("f4") + b"K\x01b")),
        "a dtype has a state",
    )
    yield (
        "an array made twice",
        in_tree(raw_array(FOUR, some(16))[:-1] + b"b(K\x01K\x01\x85N\x89Ntb"),
        "content twice",
    )
    yield "an array of nothing", in_tree(raw_array(b")", some(4)).partition(b"(K\x01")[0]), "without content"
    yield (
        "axes that are none",
        in_tree(
            glob("numpy._core.numeric", "_frombuffer")
            + b"("
            + some(16)
            + glob("numpy", "dtype")
            + text("f4")
            + b"\x89\x88\x87RK\x04\x85"
            + text("K")
            + b"K\x07\x85tR"
        ),
        "no permutation",
    )
    for kind in ("i8", "u1", "b1", "c8", "S4", "U4", "V4", "M8", "f16", "f8,f8", "O8"):
        told = "dtype object" if kind == "O8" else f"dtype '{kind}'"
        yield (
            f"dtype {kind}",
            in_tree(raw_array(b"K\x01\x85", some(4), kind=dtype(kind))),
            told,
        )
    yield (
        "records",
        changed(lambda t: t["NFNet/~/linear"].update(b=np.zeros(3, [("a", "f4"), ("b", "f8")]))),
        "dtype 'V12'",
    )

    # -- dictionaries
    yield "a dictionary in itself", P(b"}q\x00", text("a"), b"h\x00s."), "two places"
    yield (
        "a dictionary in itself, deeper",
        P(b"}", text("a"), b"}q\x00", text("b"), b"h\x00ss."),
        "is a dict, not an array",
    )
    yield "three levels", pickle.dumps({"params": tree}, 4), "is a dict, not an array"
    for name, key in {
        "an int": 1,
        "None": None,
        "bytes": b"a" * 9,
        "a tuple of three": ("a", "b", "c"),
        "a float": 0.5,
    }.items():
        yield f"a key that is {name}", pickle.dumps({key: {}}, 4), "a key is"
    yield "a key twice", P(b"}(", text("a"), b"}", text("a"), b"}u."), "comes twice"
    yield "two spellings", pickle.dumps({"a/b": np.zeros(1, "f4"), "a:b": np.zeros(1, "f4")}, 4), "two spellings"
    yield "a string for an array", changed(lambda t: t["NFNet/~/linear"].update(b="weights")), "is a str, not an array"
    yield "a list for a tree", pickle.dumps([tree], 4), "is a dict|into a list|holds a list"
    yield "an empty tree", pickle.dumps({}, 4), "no arrays"
    yield "items into a number", P(b"K\x01(NNu."), "not into a dictionary"
    yield "items into a tuple", P(b")Na."), "not into a list"
    yield "a key without value", P(b"}(Nu."), "no value"
    yield "nothing on the stack", P(b"."), "lacks its argument"
    yield "a call of nothing", P(b"R."), "lacks its argument"
    yield "items without a mark", P(b"}Nu."), "lacks its mark"
    yield "a mark for a result", P(b"(."), "lacks its argument"
    yield "nothing in the memo", P(b"h\x05."), "nothing was stored"
    yield "a name that is no UTF-8", P(b"\x8c\x02\xff\xfe."), "not UTF-8"
    yield "a global that is no UTF-8", P(b"c\xff\xfe\nx\n."), "not UTF-8"
    yield "a global without an end", P(b"c" + b"a" * 5000), "cut off"

    # -- numbers
    for bad in (np.nan, np.inf, -np.inf):
        data = changed(lambda t, bad=bad: t["NFNet/~/linear"].update(b=np.full(10, bad, np.float32)))
        yield f"weights that are {bad}", data, "not finite"

    # -- trees of no model, or of another
    yield "no module of DeepMind's", pickle.dumps({"ResNet/~/conv": {"w": np.zeros(2, "f4")}}, 4), "of ResNet, not of"
    yield "an array too few", changed(lambda t: t["NFNet/~/linear"].pop("b")), "linear.b, which is missing"
    yield "an array too many", changed(lambda t: t.update(extra={"w": np.zeros(2, "f4")})), "not of one of"
    yield (
        "a kernel of another shape",
        changed(lambda t: t["NFNet/~/final_conv"].update(w=np.zeros((1, 1, 128, 255), "f4"))),
        "nearest: nfnet-test differs in 1",
    )
    yield (
        "no classes",
        changed(lambda t: t["NFNet/~/linear"].update(w=np.zeros((256, 0), "f4"), b=np.zeros(0, "f4"))),
        "of no model of the zoo",
    )

    # -- cut off
    whole = pickle.dumps(tree, 4)
    older = pickle.dumps(tree, 2)
    zipped = archive([(f"{m}/{n}.npy", npy(a)) for m, d in tree.items() for n, a in d.items()])
    for name, data in (("protocol 4", whole), ("protocol 2", older), ("npz", zipped)):
        for k in range(12):
            cut = 1 + (len(data) - 2) * k // 11
            yield f"{name}, cut to {cut}", data[:cut], "cut off|end|neither|empty"
    yield "a byte of npz changed", zipped[:5000] + bytes([zipped[5000] ^ 1]) + zipped[5001:], "damaged"

    # -- archives
    zeros = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000,), }") + b"\0" * 4_000_000
    yield "zip bomb", archive([(f"{i}.npy", zeros) for i in range(40)], zipfile.ZIP_DEFLATED), "more than 20 times"
    small = bytearray(archive([("a.npy", zeros)], zipfile.ZIP_DEFLATED))
    at = small.rfind(b"PK\x01\x02")
    small[at + 24 : at + 28] = struct.pack("<I", 4096)
    yield "zip bomb that lies", bytes(small), "comes with|declares|damaged"
    yield "object array in npz", archive([("a.npy", npy(np.array([Calls(os.system, touch)], object)))]), "dtype object"
    yield "records in npz", archive([("a.npy", npy(np.zeros(2, [("a", "f4")])))]), "header that numpy writes for no"
    yield "integers in npz", archive([("a.npy", npy(np.zeros(2, int)))]), "dtype '<i8'"
    yield "npz in npz", archive([("a.npz", zipped)]), "no .npy array"
    yield "npz called npy in npz", archive([("a.npy", zipped)]), "does not begin like"
    yield "pickle in npz", archive([("a.npy", pickle.dumps(Calls(os.system, touch)))]), "does not begin like"
    yield "torch's archive", archive([("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", b"")]), "no .npy array"
    yield "a tree in npz", archive([("a.npy", npy(np.array({"w": 1}, object)))]), "dtype object"
    yield "code in a header", archive([("a.npy", header(f"__import__('os').system({touch!r})"))]), "header"
    yield "a header of brackets", archive([("a.npy", header("(" * 3000))]), "header"
    yield "a header of 60 kB", archive([("a.npy", header("{'descr': '<f4', " + " " * 60_000 + "}"))]), "header"
    for shape in ("(-1,)", "(99999999999999999999999,)", "(1e9,)", "[2]", "(True,)"):
        literal = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        yield f"npz of shape {shape}", archive([("a.npy", header(literal, b"\0" * 8))]), "header"
    literal = "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 999999999999), }"
    yield "npz of huge shape", archive([("a.npy", header(literal, b"\0" * 8))]), "and it comes with 8"
    yield (
        "npz, a version of npy that is none",
        archive([("a.npy", b"\x93NUMPY\x09\x00" + b"\0" * 80)]),
        "does not begin",
    )
    yield "npz of bzip2", archive([("a.npy", npy(np.zeros(4, "f4")))], zipfile.ZIP_BZIP2), "packed as numpy"
    flagged = bytearray(archive([("a.npy", npy(np.zeros(4, "f4")))]))
    flagged[flagged.rfind(b"PK\x01\x02") + 8] |= 1
    yield "npz encrypted", bytes(flagged), "encrypted"
    twice = archive([("a.npy", npy(np.zeros(4, "f4"))), ("b.npy", npy(np.zeros(4, "f4")))]).replace(b"b.npy", b"a.npy")
    yield "npz, a name twice", twice, "twice"
    yield "npz, empty", archive([]), "no arrays"
    end = bytearray(archive([("a.npy", npy(np.zeros(4, "f4")))]))
    end[-10:-6] = struct.pack("<I", 1 << 31)
    yield "npz, a list of 2 GB", bytes(end), "list of files takes"
    yield "npz, 64 bit", zipped[:-22] + b"PK\x06\x07" + b"\0" * 16 + zipped[-22:], "more than 4 GiB"

    # -- names, each of an array that all share
    one = raw_array(FOUR, some(16)) + b"r" + struct.pack("<I", 99) + b"0"
    for count, told in ((65_000, "differs in 650.. arrays, such as"), (66_000, "more than 65,536 arrays")):
        names = b"".join(text(f"{i:06}") + b"j" + struct.pack("<I", 99) for i in range(count))
        yield f"{count} names", P(b"}", one, text("NFNet/~/" + "m" * 240), b"}(", names, b"us."), told

    # -- other files
    yield "empty", b"", "it is empty"
    yield "text", b"weights, please\n", "neither a pickle"
    yield "an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "neither a pickle"
    yield "gzip", b"\x1f\x8b\x08" + b"\0" * 50, "neither a pickle"
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + b"\0" * 50, "neither a pickle"
    yield "npy", npy(np.zeros(3, "f4")), "neither a pickle"
    yield "PK and no more", b"PK\x03\x04", "cut off"
    yield "an instruction and no more", b"\x80", "cut off"


def main(folder: str) -> None:
    from nfzoo import ConversionError
    from nfzoo.conversion.convert import convert

    root = Path(folder)
    seen: list[str] = []
    quiet = [True]
    sys.addaudithook(lambda event, _: None if quiet[0] or event not in DANGEROUS else seen.append(event))

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for path in sorted((root / "good").iterdir()):  # imports what is imported late, which runs code, too
        convert(path, root / "models" / path.name)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    results = {}
    for path in sorted((root / "files").iterdir()):
        seen.clear()
        start = time.monotonic()
        signal.alarm(SECONDS)
        quiet[0] = False
        try:
            convert(path, root / "out" / path.name)
            outcome = ["accepted", ""]
        except ConversionError as error:
            outcome = ["ConversionError", str(error)]
        except BaseException as error:
            outcome = [type(error).__name__, str(error)[:500]]
        finally:
            quiet[0] = True
            signal.alarm(0)
        results[path.name] = [*outcome, sorted(set(seen)), time.monotonic() - start]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
