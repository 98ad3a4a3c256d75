"""Top labels or embeddings of many images, on one process or many: `nfzoo bulk MODEL --data SOURCE --output DIR`.

Results are written in parts of consecutive images. Processes share the missing parts, so a run can be killed at any
moment and resumed by any number of processes. Batches do not cross parts, so the content of a part does not depend on
the number of processes or loader workers.

The module is long because the options of a run, its parts and what ends a process belong together.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from nfzoo.checkpoint import part_files
from nfzoo.checkpoint.lock import locked
from nfzoo.checkpoint.part_files import Parts
from nfzoo.data.digits import DIGITS
from nfzoo.data.loader import BrokenImageError, load_batches
from nfzoo.data.source import fingerprint, open_all, source_text
from nfzoo.errors import ConfigError, DataError, NfzooError, shown
from nfzoo.nn import NFNet
from nfzoo.predict import (
    TOPK,
    check_finite,
    compute,
    embedding_columns,
    label_columns,
    set_columns,
    thresholds,
    weights_hash,
)
from nfzoo.runtime import program
from nfzoo.runtime.device import default_workers, precision, processes, share_of
from nfzoo.runtime.output import escaped

DTYPES = ("float32", "float16")
EXACT = 1e-5  # |logits - model's| / |model's| of another backend in float32
if TYPE_CHECKING:
    from accelerate import PartialState  # at run time, only after `choose_xla`

_Result = TypeVar("_Result")
_BROKEN_REMEDY = "mend or remove it, and run the same command to go on, or leave such images out with --skip-broken"
_PATIENCE = datetime.timedelta(days=7)  # the first process that finishes waits for the last


class Summary(NamedTuple):
    """The work of a run.

    Attributes:
        images: number of images that all processes of this run read, in `seconds`.
        written: number of parts that this run wrote, out of `parts`.
        broken: number of unreadable images in all parts.
    """

    images: int
    seconds: float
    written: int
    parts: int
    broken: int


def predict_all(
    model: NFNet,
    data: str,
    output: str | Path,
    *,
    part: str | None = None,
    embeddings: bool = False,
    topk: int | None = None,
    dtype: str = "float32",
    format: str | None = None,
    shard_size: int | None = None,
    size: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: torch.device | str | None = None,
    mixed_precision: str | None = None,
    compile: bool = False,
    backend: str = "torch",
    skip_broken: bool = False,
    overwrite: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> Summary:
    """Write the labels or embeddings of all images of `data` into a folder, or resume an earlier run there.

    Several processes (of Accelerate) share the work. The model runs in its folded form.

    Args:
        data, part: see `nfzoo.data.source.open_all`.
        output: the folder: see `nfzoo.checkpoint.part_files`.
        embeddings: write the pooled features `(N, F)` instead of labels.
        topk: number of labels, by default 5; of a multi-label model the most that are given, by default all that reach
            their thresholds.
        dtype: dtype of the embeddings, `float32` or `float16`.
        format: `jsonl` (default) or `parquet` for labels, `npz` (default) or `parquet` for embeddings.
        shard_size: number of images in a file; by default that of the run to resume, or else so many that each process
            has four files to write, but at most 4096.
        size: side of the input in pixels; by default the model's test size.
        batch_size: batch size of each process.
        workers: loader processes per process; by default as many as there are processors, up to 8.
        device: device of the computation; by default an accelerator if there is one.
        mixed_precision: see `device.precision`.
        compile: compile the blocks; every batch is then padded to one size.
        backend: `torch`, or on a CPU `openvino`, which computes the same to within 1e-5 of the logits' norm; every
            batch is then padded to one size.
        skip_broken: leave out unreadable images and name them in the manifest, instead of stopping.
        overwrite: replace the results of an earlier run.
        on_start: called when the processes have agreed on the work, before this one begins its parts.

    Raises:
        ConfigError: for a folder with the results of another run, and for incompatible options.
        DataError: for unreadable data; finished parts stay.
        CheckpointError: if the outputs are not finite.
    """
    # Options.
    for name, value in {"topk": topk, "shard_size": shard_size, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")
    if dtype not in DTYPES:
        raise ConfigError(f"embeddings have the dtype {' or '.join(DTYPES)}, not {dtype!r}")
    if not embeddings:
        model.config.check_classifier()
    if not embeddings and dtype != "float32":
        raise ConfigError(f"the dtype {dtype} applies to embeddings only; ask for embeddings, or leave it out")
    kind = "embeddings" if embeddings else "top-k"
    format = format or part_files.FORMATS[kind][0]
    part_files.check_format(kind, format)
    autocast = precision(mixed_precision)
    if backend not in ("torch", "openvino"):
        raise ConfigError(f"the backend is torch or openvino, not {shown(backend)}")
    if backend == "openvino" and compile:
        raise ConfigError("OpenVINO compiles the network itself: leave out the backend openvino or compile")
    folder, data = Path(output), source_text(data)
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"the results would lie in {str(folder)!r}, among the data; give a folder elsewhere")

    # The missing parts, which the first process determines.
    state = processes(cpu=str(device) == "cpu", patience=_PATIENCE)
    target = share_of(state, device)
    if backend == "openvino" and (target.type != "cpu" or autocast == "fp16"):
        raise ConfigError("the backend openvino is for the CPU, in float32 or bf16: give the device cpu")
    images = open_all(data, part=part)
    most = topk if model.multi_label else min(topk or TOPK, model.config.num_classes)
    size = size or model.preprocessing.test_size
    seen = fingerprint(images)

    def begin() -> tuple[str, Parts, list[int]]:
        lock.enter_context(locked(folder))
        earlier = None if overwrite else part_files.earlier_size(folder)
        chosen = shard_size or earlier or part_files.share_size(len(images), state.num_processes, batch_size)
        removed = () if overwrite else part_files.removed_since(folder, len(images), seen)
        parts = Parts(folder, len(images) + len(removed), chosen, format, removed)
        identity = {
            "weights": weights_hash(model),
            "data": seen,
            "images": parts.images,
            "results": f"embeddings, {dtype}" if embeddings else _kind(model, most),
            "shard_size": chosen,
            "format": format,
            "size": size,
            "mixed_precision": autocast,
        }
        facts = {"model": model.name, "source": data, **({"part_of_source": part} if part else {})}
        run = _run(state, target, batch_size, compile=compile, backend=backend)
        return seen, parts, part_files.start(parts, identity, facts, run, overwrite=overwrite)

    with contextlib.ExitStack() as lock:
        first, parts, missing = _agreed(state, begin)
        on_start()
        if first != seen:
            raise DataError(f"{data!r} holds other images for process {state.process_index} than for the first")

        # A model object of our own around the parameters, so that the caller's stays unchanged and on its device.
        own = missing[state.process_index :: state.num_processes]
        columns_of = _labels_of(model, most)
        if own:
            lean = model if model.config.folded else model.for_inference()
            model = NFNet.from_params(lean.description, dict(lean.named_parameters())).to(target)
        if own and backend == "openvino":
            low = autocast == "bf16"
            shape = {"batch": batch_size, "size": size, "dtype": "bf16" if low else None}
            model = model.optimize(**shape, backend=backend, tolerance=None if low else EXACT)
            autocast = "no"
        elif own and compile:
            model.compile_blocks()
        elif own and target.type == "cpu":
            model.prepack()

        # Part by part.
        if workers is None:
            workers = 0 if data == DIGITS else default_workers(state.num_processes)
        batches = {k: _batches(parts.rows(k), batch_size) for k in own}
        loaded = load_batches(images, model.preprocessing, size, [rows for k in own for rows in batches[k]], workers)
        begun = time.perf_counter()
        total = sum(len(parts.rows(k)) for k in missing)
        with _bar(total, state) as bar:
            for k in own:
                outputs: list[Tensor] = []
                broken: dict[str, str] = {}
                for rows in batches[k]:
                    pixels, _, problems = next(loaded)
                    if problems and not skip_broken:
                        row, problem = next(iter(problems.items()))
                        part_files.stop(parts, k, rows[row], lambda kept: fingerprint(images.subset(kept)))
                        raise BrokenImageError(f"{problem}; {_BROKEN_REMEDY}")
                    broken |= {images.name(rows[i]): problem for i, problem in problems.items()}
                    fill = batch_size - len(pixels) if compile or backend == "openvino" else 0
                    if fill:  # one shape needs one graph
                        pixels = torch.cat([pixels, pixels.new_zeros((fill, *pixels.shape[1:]))])
                    outputs.append(compute(model, pixels, target, autocast, embeddings=embeddings)[: len(rows)])
                    bar.update(min(len(rows) * state.num_processes, total - bar.n))
                names = [images.name(i) for i in parts.rows(k)]
                readable = [i for i, name in enumerate(names) if name not in broken]
                names = [names[i] for i in readable]
                results = check_finite(torch.cat(outputs)[readable], names)
                columns = embedding_columns(results, dtype) if embeddings else columns_of(results)
                part_files.write_part(parts, k, names, columns, broken)
        _wait_for_all(state)
        seconds = time.perf_counter() - begun
        unreadable = _agreed(state, lambda: part_files.finish(parts))
        return Summary(total, seconds, len(missing), len(parts), len(unreadable))


def _kind(model: NFNet, most: int | None) -> str:
    """Return what a run writes of each image."""
    if not model.multi_label:
        return f"top-{most}"
    return "labels at their thresholds" + ("" if most is None else f", at most {most}")


def _labels_of(model: NFNet, most: int | None) -> Callable[[Tensor], dict[str, Any]]:
    """Return the function from logits to the columns of a result file."""
    labels = model.labels or tuple(f"class {i}" for i in range(model.config.num_classes))
    if model.multi_label:
        return partial(set_columns, thresholds=thresholds(model), topk=most, labels=labels)
    divisor = model.temperature or 1.0
    return lambda logits: label_columns(logits / divisor, most or TOPK, labels)


def _batches(rows: range, batch_size: int) -> list[range]:
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


def _run(state: PartialState, device: torch.device, batch_size: int, *, compile: bool, backend: str) -> dict[str, Any]:
    from nfzoo import __version__

    versions = {"nfzoo": __version__, "torch": str(torch.__version__)}
    return {**versions, "device": device.type, "processes": state.num_processes, "batch_size": batch_size} | (
        ({"compile": True} if compile else {}) | ({"backend": backend} if backend != "torch" else {})
    )


# -- several processes


class _ElsewhereError(NfzooError):
    """An error of the first process, which reports it, raised in the others."""


def _agreed(state: PartialState, make: Callable[[], _Result]) -> _Result:
    """Call `make` in the first process; return its result, or raise its error, in every process."""
    from accelerate.utils import broadcast_object_list

    message: list[Any] = [None, None]  # result, error
    problem: Exception | None = None
    if state.is_main_process:
        try:
            message[0] = make()
        except (NfzooError, OSError) as error:
            problem, message[1] = error, str(error)
    _exchange(state, lambda: broadcast_object_list(message))
    if problem is not None:
        raise problem
    if message[1] is not None:
        raise _ElsewhereError(message[1])
    return message[0]


def _wait_for_all(state: PartialState) -> None:
    from accelerate.utils import gather_object

    _exchange(state, lambda: gather_object([True]))


def _exchange(state: PartialState, exchange: Callable[[], object]) -> None:
    """Communicate with the other processes, if there are any."""
    if state.num_processes == 1:
        return
    try:
        exchange()
    except RuntimeError as error:  # the connection ends with the process
        raise DataError("another process has ended early; run the same command again to go on") from error


def _bar(total: int, state: PartialState) -> tqdm:
    hidden = not (state.is_main_process and sys.stderr.isatty())
    return tqdm(desc="predict", total=total, unit="image", leave=False, disable=hidden)


# -- the command


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo bulk",
        description="Write the most probable labels of many images, or their embeddings, in parts of consecutive\n"
        "images. Run again to go on where a run was interrupted.\n\n"
        "examples:\n"
        "  nfzoo bulk nfnet-f0 --data photos --output labels\n"
        "  accelerate launch -m nfzoo.bulk nfnet-f0 --data 'laion/{000..146}.tar' --embeddings --output vectors",
    )
    add, count = parser.add_argument, program.positive_int
    add("model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weight file")
    add(
        "--data",
        required=True,
        metavar="SOURCE",
        help="a folder of images, at any depth; tar or parquet files, by folder or name such as 'x/{000..146}.tar'; "
        "a folder of IDX files; hub:ORG/NAME; fashion-mnist or digits",
    )
    add("--output", required=True, metavar="DIR", help="folder to write part-00000-of-….… and manifest.json to")
    add("--part", metavar="NAME", help="of a data set of the Hub that part alone (default: all parts)")
    add("--embeddings", action="store_true", help="the pooled features in front of the classifier, not labels")
    add("--dtype", choices=DTYPES, default="float32", help="of the embeddings (default: float32)")
    text = "labels for each image (default: 5; of a multi-label model all that reach their thresholds)"
    add("--topk", type=count, metavar="K", help=text)
    add("--format", choices=("jsonl", "npz", "parquet"), help="default: jsonl for labels, npz for embeddings")
    add(
        "--shard-size", type=count, metavar="N", help="images a file (default: a quarter of a process's share, to 4096)"
    )
    add("--size", type=count, metavar="N", help="side of the input in pixels (default: the model's)")
    add("--batch-size", type=count, default=32, metavar="N", help="images at a time per process (default: 32)")
    add(
        "--workers",
        type=program.nonnegative_int,
        metavar="N",
        help="loader processes per process (default: the processors, up to 8)",
    )
    add("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--mixed-precision", choices=("no", "bf16"), help="bf16 computes faster on newer devices (default: no)")
    add("--compile", action="store_true", help="compile the model; pays from some thousands of images on")
    text = "what computes: torch or, on a CPU, openvino, faster for many images; needs nfzoo[openvino] (default: torch)"
    add("--backend", choices=("torch", "openvino"), default="torch", help=text)
    add(
        "--skip-broken", action="store_true", help="leave images out that cannot be read, and name them in the manifest"
    )
    program.add_source_options(parser)
    add("--overwrite", action="store_true", help="replace the results that DIR holds")
    program.add_output_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 if all parts are written, 2 for bad input, 1 for a disk error, 130 for Ctrl-C."""
    started: list[bool] = []  # filled when this process begins its parts; it then reports its own errors
    return program.run_parsed(
        _parser(),
        argv,
        lambda options: _main(options, lambda: started.append(True)),
        reports=lambda error: not isinstance(error, _ElsewhereError) and (bool(started) or program.is_first_process()),
    )


def _main(options: argparse.Namespace, on_start: Callable[[], None]) -> None:
    from nfzoo import from_pretrained

    keywords = {name: value for name, value in vars(options).items() if name not in ("json", "quiet", "results")}
    source = {name: keywords.pop(name) for name in program.source_options(options)}
    model = from_pretrained(keywords.pop("model"), **source)
    summary = predict_all(model, keywords.pop("data"), keywords.pop("output"), on_start=on_start, **keywords)
    if not processes(cpu=options.device == "cpu").is_main_process:
        return
    output = escaped(options.output)
    if summary.written:
        rate = summary.images / max(summary.seconds, 1e-9)
        earlier = f", {summary.parts - summary.written:,} were there" if summary.written < summary.parts else ""
        print(
            f"wrote {summary.written:,} of {summary.parts:,} parts to {output}{earlier}: "
            f"{summary.images:,} images in {summary.seconds:.1f} s, {rate:,.1f} images/s"
        )
    else:
        print(f"all {summary.parts:,} parts are in {output} already")
    if summary.broken:
        print(f"{summary.broken:,} images cannot be read; {part_files.MANIFEST} names them")
    program.write_result(options, {"output": options.output, **summary._asdict()})


if __name__ == "__main__":
    sys.exit(main())
