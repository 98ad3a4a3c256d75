"""Read hostile and mutated files of every kind in a process of little memory.

`python -m tests.support.strangers corpus FOLDER` reads a corpus. `python -m tests.support.strangers fuzz FOLDER SEED
SECONDS KIND…` mutates good files of these kinds for so long. Both print, as JSON, the reads that ended otherwise than
in a result or the project's error; each has a few seconds.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from safetensors.torch import save_file

import nfzoo
from nfzoo.checkpoint.model_folder import load_checkpoint, read_description
from nfzoo.checkpoint.weight_files import read_index
from nfzoo.conversion.convert import read
from nfzoo.conversion.haiku import to_haiku
from nfzoo.conversion.timm import read_timm
from nfzoo.data.hf_datasets import HFDataset, open_parquet
from nfzoo.data.idx import read_idx
from nfzoo.data.tar.shards import TarShards
from nfzoo.errors import NfzooError
from nfzoo.model import costs
from nfzoo.train.config import recipes
from nfzoo.transforms.decode import open_image
from nfzoo.variants import VARIANTS

MEMORY = 512 << 20  # bytes beyond what the interpreter has mapped after it has read good files
SECONDS = 20  # that one file may take on a busy machine; the bounds are for one
CONFIG = VARIANTS["nfnet-test"].config
TIMM = {"architecture": "nf_regnet_b0", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 192, 192]}}


def _each_image(images: Any) -> None:
    for i in range(len(images)):
        open_image(images[i][0])


def _read_config(path: Path) -> None:
    description = read_description(path)
    costs(description.config, description.preprocessing.test_size)


def _read_timms(path: Path) -> None:
    (path.parent / "model.safetensors").write_bytes(b"")  # which is refused after the configuration
    read_timm(path.parent)


# Kind -> the name of its file and what reads it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pickle": ("w.pkl", read),
    "npz": ("w.npz", read),
    "torch": ("w.pt", lambda path: read(path, allow_pickle=True)),
    "safetensors": ("w.safetensors", load_checkpoint),
    "index": ("model.safetensors.index.json", read_index),
    "config": ("config.json", _read_config),
    "timm": ("config.json", _read_timms),
    "recipe": ("r.yaml", lambda path: recipes.parse(["--recipe", str(path)])),
    "tar": ("x.tar", lambda path: _each_image(TarShards.index([path]))),
    "idx": ("train-images-idx3-ubyte", lambda path: read_idx(path, 3)),
    "idx.gz": ("train-images-idx3-ubyte.gz", lambda path: read_idx(path, 3)),
    "parquet": ("x.parquet", lambda path: _each_image(HFDataset.labelled(open_parquet([path], "x"), "x"))),
}
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "ppm": "PPM", "tga": "TGA", "tif": "TIFF"}
FORMATS |= {"webp": "WEBP"} | ({"jp2": "JPEG2000"} if features.check("jpg_2000") else {})
FORMATS |= {"avif": "AVIF"} if features.check("avif") else {}
READERS |= {ending: (f"0.{ending}", open_image) for ending in FORMATS}


def good(folder: Path) -> dict[str, bytes]:
    """A good file of each kind."""
    model = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0), num_classes=5)
    model.save_pretrained(folder / "good")
    tree = to_haiku(model.config, model.state_dict())
    saved, zipped, table, shard = (io.BytesIO() for _ in range(4))
    torch.save(dict(model.state_dict()), saved)
    np.savez_compressed(zipped, **{f"{m}/{n}": a for m, d in tree.items() for n, a in d.items()})  # type: ignore[arg-type]
    picture = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    files: dict[str, bytes] = {}
    for ending, form in FORMATS.items():
        out = io.BytesIO()
        Image.fromarray(picture).save(out, form)
        files[ending] = out.getvalue()
    with tarfile.open(fileobj=shard, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("a.png", files["png"]),
            ("a.cls", b"1"),
            ("ü.jpg", files["jpg"]),
            ("ü.json", b'{"label": 0}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    import pyarrow
    from pyarrow import parquet

    cells = [{"bytes": files["png"], "path": None}, {"bytes": files["jpg"], "path": None}]
    parquet.write_table(pyarrow.table({"image": cells, "label": [0, 1]}), table)
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    return {
        **files,
        "pickle": pickle.dumps(tree, 4),
        "npz": zipped.getvalue(),
        "torch": saved.getvalue(),
        "safetensors": (folder / "good" / "model.safetensors").read_bytes(),
        "index": json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}).encode(),
        "config": (folder / "good" / "config.json").read_bytes(),
        "timm": json.dumps(TIMM).encode(),
        "recipe": b"model: nfnet-test\ndata: digits\noutput: run\nepochs: 2\noptim:\n  lr: 1e-3\n  nesterov: true\n",
        "tar": shard.getvalue(),
        "idx": (numbers := struct.pack(">HBB3I", 0, 8, 3, 2, 24, 36) + picture.tobytes()),
        "idx.gz": gzip.compress(numbers),
        "parquet": table.getvalue(),
    }


def _header(fields: dict[str, Any], size: int = 0) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def hostile(files: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(kind, name, content) of files that have to be refused."""
    for kind, data in files.items():
        yield kind, "empty", b""
        yield kind, "zeros", bytes(4096)
        yield kind, "ones", b"\xff" * 4096
        for k in range(1, 6):
            if kind not in ("recipe", "gif", "ppm", "tga", "pickle", "tif"):  # of which a beginning may be whole
                yield kind, f"cut at {k} of 6", data[: len(data) * k // 6]
    for kind in ("config", "index", "timm"):
        yield kind, "nested", b'{"a":' * 50_000
        yield kind, "brackets", b"[" * 1_000_000
        yield kind, "a key twice", b'{"x": 1, "x": 1,' + files[kind][1:]
        yield kind, "digits", b'{"format": ' + b"9" * 100_000 + b"}"
        yield kind, "no text", b"\xff\xfe" + files[kind]
    fields = json.loads(files["config"])
    for part, name, value in (
        *(("architecture", "depths", depths) for depths in ([1024] * 4, [10**30] * 4, [1 << 31, 1, 1, 1])),
        *(("architecture", name, 1e308) for name in ("bottleneck", "alpha", "se_ratio", "head_ratio")),
        ("architecture", "widths", [1 << 40] * 4),
        ("architecture", "num_classes", 1 << 62),
        *(("preprocessing", "crop", crop) for crop in (5e-324, 1e-4, -1, 1e308)),
        *(("preprocessing", size, 1 << 20) for size in ("train_size", "test_size", "margin")),
    ):
        changed = {**fields, part: {**fields[part], name: value}}
        yield "config", f"{name} of {value}", json.dumps(changed).encode()
    for name, content in {
        "nested": b"optim: {options: " + b"[" * 50_000,
        "aliases": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "long": b"model: x\n" + b"# comment\n" * 100_000,
        "no bool": b"resume: !!bool x\n",
        "no integer": b"epochs: !!int ''\n",
        "no time": b"epochs: !!timestamp x\n",
        "no number": b"epochs: !!float ''\n",
        "code": b"model: !!python/object/apply:os.system ['true']\n",
        "digits": b"epochs: " + b"9" * 60_000,
    }.items():
        yield "recipe", name, content
    for name, fields in {
        "far ahead": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        "of a size of its own": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
        "of eight bits": {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    }.items():
        yield "safetensors", name, _header(fields, 4)
    yield "safetensors", "a long header", struct.pack("<Q", 1 << 62) + b"{}"
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    yield "safetensors", "nested", struct.pack("<Q", 100_000) + b'{"a":' * 20_000
    yield (
        "safetensors",
        "a name twice",
        struct.pack("<Q", 2 * len(entry) + 3) + b"{" + entry + b"," + entry + b"}" + bytes(4),
    )
    for name, values in {
        "expanded": torch.zeros(1).expand(1 << 16, 1 << 16),
        "meta": torch.zeros(1, device="meta"),
    }.items():
        out = io.BytesIO()
        torch.save({"stem.conv0.weight": values}, out)
        yield "torch", name, out.getvalue()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(files["torch"])) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out_zip,
    ):
        for name in plain.namelist():
            out_zip.writestr(name, plain.read(name) + bytes(1 << 20))
    yield "torch", "packed", packed.getvalue()
    yield "torch", "code", pickle.dumps(print, 2)
    for ending, form in {
        "png": b"\x89PNG\r\n\x1a\n",
        "bmp": b"BM",
        "gif": b"GIF89a",
        "webp": b"RIFF",
        "jpg": b"\xff\xd8",
    }.items():
        yield ending, "a beginning", form + bytes(100)
    for name, mode in {"column.png": (1, 1 << 21), "row.png": (1 << 21, 1)}.items():
        out = io.BytesIO()
        Image.new("1", mode).save(out, "PNG")
        yield "png", name, out.getvalue()
    yield "ppm", "large", b"P6 60000 60000 255\n" + bytes(100)
    yield "bmp", "large", files["bmp"][:18] + struct.pack("<ii", 1 << 30, 1 << 30) + files["bmp"][26:]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change a file in a few places: bytes, numbers, pieces that are cut, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 | 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, -1, 1, 127, 128, 255, 256, 32767, 65535, 1 << 31, (1 << 31) - 1, 1 << 63))
                order = "little" if rng.random() < 0.5 else "big"
                out[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
            case 3:
                out[at : at + rng.randrange(1, 64)] = b""
            case 4:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.randrange(1, 600)]
            case 5:
                digits = rng.choice(
                    (b"9" * rng.choice((1, 20, 5000)), b"-1", b"1e999", b"null", b"[", b'"', b"\n", b"!!")
                )
                out[at : at + rng.randrange(3)] = digits
        if not out:
            break
    return bytes(out)


class LateError(BaseException):
    """A reader took too long; no reader catches it."""


def outcome(reader: Callable[[Path], object], path: Path, content: bytes) -> tuple[str, str]:
    """Return how reading a file ends: `read`, `refused`, or the name of another error, with its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    signal.alarm(SECONDS)
    try:
        reader(path)
        return "read", ""
    except NfzooError as error:
        return ("refused" if str(error) and "\n" not in str(error) else "several lines"), str(error)[:300]
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)


def main(command: str, folder: str, *rest: str) -> None:
    root = Path(folder)
    os.environ["HF_DATASETS_CACHE"], os.environ["HF_DATASETS_OFFLINE"] = str(root / "cache"), "1"

    def late(*_: object) -> None:
        raise LateError

    signal.signal(signal.SIGALRM, late)
    files = good(root)
    bad: list[tuple[str, ...]] = []
    for kind, content in files.items():
        name, reader = READERS[kind]
        found = outcome(reader, root / kind / name, content)
        if found[0] != ("read" if kind != "timm" else "refused"):
            bad.append((kind, "good", *found))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    count = 0
    if command == "corpus":
        for kind, title, content in hostile(files):
            count += 1
            name, reader = READERS[kind]
            found = outcome(reader, root / kind / name, content)
            if found[0] != "refused":
                bad.append((kind, title, *found))
    else:
        seed, seconds, *kinds = rest
        rng, end = random.Random(int(seed)), time.monotonic() + float(seconds)
        while time.monotonic() < end and len(bad) < 20:
            kind = kinds[count % len(kinds)]
            count += 1
            name, reader = READERS[kind]
            content = mutated(files[kind], rng)
            found = outcome(reader, root / kind / name, content)
            if found[0] not in ("read", "refused"):
                (root / f"found-{len(bad)}-{name}").write_bytes(content)
                bad.append((kind, f"number {count} of seed {seed}", *found))
    print(json.dumps({"count": count, "bad": bad}))


if __name__ == "__main__":
    main(*sys.argv[1:])
