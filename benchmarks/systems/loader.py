"""How many images a second one processor core reads, decodes, crops and resizes for training.

    python -m benchmarks.systems.loader --output benchmarks/results     # about two minutes
    python -m benchmarks.systems.loader --appetite 1500                 # how many cores keep a GPU of 1500 images/s fed

Photographs of a given size are cut from scikit-learn's two and stored as JPEG in a folder, a tar file and (where
`datasets` is installed) a parquet file. One process with one thread runs over them. Everything is timed in turn, in
several rounds, by the seconds that the processor worked; shown are medians over the rounds. `simplejpeg` is timed where
it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from benchmarks.report import machine, publish
from nfzoo.config import Preprocessing, Resize
from nfzoo.data.images import ImageFolder, Images
from nfzoo.data.loader import training_batches
from nfzoo.data.tar.shards import TarShards
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.mixing import Augment
from nfzoo.transforms.preprocess import training_crop

PAGE = "loader.md"
CLASSES = 4
DECODED_BEFORE = 16  # images that are kept decoded, for timing what comes after


class Row(NamedTuple):
    """Median images a second of one way of doing one thing."""

    what: str
    rate: float


def photographs(count: int, width: int, height: int) -> list[bytes]:
    """JPEG files of quality 90 with four chroma samples in sixteen, each another part of a photograph."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    files = []
    for i in range(count):
        source = sources[i % len(sources)]
        w = int(source.width * rng.uniform(0.7, 1.0))
        h = min(source.height, round(w * height / width))
        left, top = int(rng.integers(source.width - w + 1)), int(rng.integers(source.height - h + 1))
        part = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=90, subsampling="4:2:0")
        files.append(file.getvalue())
    return files


def stored(files: list[bytes], folder: Path) -> dict[str, Images]:
    """The same images in every form that is there."""
    for label in range(CLASSES):
        (folder / "classes" / str(label)).mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i, content in enumerate(files):
            (folder / "classes" / str(i % CLASSES) / f"{i:05}.jpg").write_bytes(content)
            for ending, data in (("jpg", content), ("cls", str(i % CLASSES).encode())):
                member = tarfile.TarInfo(f"{i:05}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found: dict[str, Images] = {
        "folder": ImageFolder.scan(folder / "classes"),
        "tar": TarShards.index([folder / "images.tar"]),
    }
    if importlib.util.find_spec("datasets"):
        import datasets
        import pyarrow
        import pyarrow.parquet

        from nfzoo.data.hf_datasets import HFDataset

        datasets.disable_progress_bars()
        cells = [{"bytes": content, "path": None} for content in files]
        labels = [i % CLASSES for i in range(len(files))]
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), folder / "images.parquet")
        table = datasets.Dataset.from_parquet(str(folder / "images.parquet"), cache_dir=str(folder / "cache"))
        assert isinstance(table, datasets.Dataset)
        found["parquet"] = HFDataset.labelled(table, "the parquet file")
    return found


def epoch(images: Images, rule: Preprocessing, round: int, augment: Augment) -> None:
    for _ in training_batches(images, rule, epoch=round, seed=0, batch_size=min(16, len(images)), augment=augment):
        pass


def each(do: Callable[[int], object], count: int) -> None:
    """Do it for every image, and keep nothing: new memory would cost more than the work."""
    for i in range(count):
        do(i)


def ways(files: list[bytes], images: Mapping[str, Images], size: int) -> dict[str, Callable[[int], object]]:
    """Everything that is timed; each runs over all images once, in the round whose number it gets."""
    rules: dict[Resize, Preprocessing] = {
        "deepmind": Preprocessing(train_size=size, test_size=size),
        "shortest-edge": Preprocessing(train_size=size, test_size=size, resize="shortest-edge"),
    }
    decoded = [open_image(io.BytesIO(content)) for content in files[:DECODED_BEFORE]]
    found: dict[str, Callable[[int], object]] = {}
    count = len(files)
    for kind, rule in rules.items():
        for name, source in images.items():
            found[f"training batches: {name}, {kind}"] = lambda round, source=source, rule=rule: epoch(
                source, rule, round, Augment()
            )
        found[f"training batches: folder, {kind}, draft"] = lambda round, rule=rule: epoch(
            images["folder"], rule, round, Augment(draft=True)
        )
    found["read alone: folder"] = lambda _: each(lambda i: Path(str(images["folder"][i][0])).read_bytes(), count)
    for name in ("tar", "parquet"):
        if name in images:
            found[f"read alone: {name}"] = lambda _, source=images[name]: each(source.__getitem__, count)
    found["decode alone: Pillow"] = lambda _: each(lambda i: open_image(io.BytesIO(files[i])), count)
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg  # type: ignore[import-not-found]

        found["decode alone: simplejpeg"] = lambda _: each(lambda i: simplejpeg.decode_jpeg(files[i]), count)
    for kind, rule in rules.items():
        found[f"crop and resize alone: {kind}"] = lambda round, rule=rule: each(
            lambda i: training_crop(decoded[i % len(decoded)], rule, np.random.default_rng([round, i])), count
        )
    return found


def measure(size: int, photo: tuple[int, int], count: int, rounds: int) -> list[Row]:
    """Median rates for photographs of one size."""
    files = photographs(count, *photo)
    with tempfile.TemporaryDirectory() as folder:
        todo = ways(files, stored(files, Path(folder)), size)
        seconds: dict[str, list[float]] = {name: [] for name in todo}
        for round in range(-1, rounds):  # the first one warms up
            for name, run in todo.items():
                start = time.process_time()
                run(round + 1)
                if round >= 0:
                    seconds[name].append(time.process_time() - start)
    return [Row(name, count / statistics.median(values)) for name, values in seconds.items()]


def decoders_agree(photo: tuple[int, int]) -> str:
    """How far simplejpeg's pixels are from Pillow's."""
    if not importlib.util.find_spec("simplejpeg"):
        return "simplejpeg is not installed"
    import simplejpeg  # type: ignore[import-not-found]

    most = max(
        int(np.abs(np.asarray(open_image(io.BytesIO(f))).astype(int) - simplejpeg.decode_jpeg(f)).max())
        for f in photographs(4, *photo)
    )
    return f"simplejpeg {simplejpeg.__version__}; its pixels differ from Pillow's by up to {most} grey levels"


def table(rows: list[Row], appetite: float | None) -> str:
    """Rates as a Markdown table; with an appetite, the cores that it takes."""
    head = "| | images/s a core | ms an image |" + (f" cores for {appetite:g} images/s |" if appetite else "")
    lines = [head, "| --- | ---: | ---: |" + (" ---: |" if appetite else "")]
    for row in rows:
        whole = row.what.startswith("training batches")
        cores = f" {math.ceil(appetite / row.rate) if whole else ''} |" if appetite else ""
        lines.append(f"| {row.what} | {row.rate:.0f} | {1000 / row.rate:.2f} |{cores}")
    return "\n".join(lines)


def page(options: argparse.Namespace, command: str) -> str:
    text = [
        "# Feeding a GPU",
        "",
        "Images a second that one processor core reads, decodes, crops and resizes for training: from JPEG photographs",
        f"of two sizes to {options.size} x {options.size} pixels, {options.images} of them, one process, one thread.",
        f"Everything in turn in {options.rounds} rounds, medians. Counted are the seconds the processor worked, so",
        "waiting for a disk or for neighbours is left out. `deepmind` is TensorFlow's bicubic, written in NumPy;",
        "`shortest-edge` is Pillow's. With `--augment.draft true` JPEG decoders leave out detail, where twice the",
        "training size remains; other pixels come of it, so that no recipe of the papers has it.",
        "",
        f"- on: {machine()}; Pillow {PIL.__version__}, NumPy {np.__version__}; {decoders_agree(options.photo[0])}",
        f"- command: `{command}`",
    ]
    for photo in options.photo:
        rows = measure(options.size, photo, options.images, options.rounds)
        text += ["", f"## Photographs of {photo[0]} x {photo[1]}", "", table(rows, options.appetite)]
    return "\n".join(text) + "\n"


def _photo(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500x375") from error
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500x375")
    return width, height


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems.loader", description="Images a second that one core prepares."
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="photographs of each size (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, after one more (default: 5)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="side of the result (default: 224)")
    parser.add_argument("--photo", type=_photo, nargs="+", default=[(500, 375), (2000, 1500)], metavar="WxH")
    parser.add_argument("--appetite", type=float, metavar="X", help="images/s that one GPU takes")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {PAGE} there")
    options = parser.parse_args(argv)
    if min(options.images, options.rounds, options.size) < 1 or (options.appetite or 1) <= 0:
        parser.error("numbers must be positive")
    if options.images < CLASSES:
        parser.error(f"at least {CLASSES} images are needed")
    torch.set_num_threads(1)
    given = sys.argv[1:] if argv is None else argv
    text = page(options, " ".join(["python -m benchmarks.systems.loader", *given]))
    publish(text, options.output, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
