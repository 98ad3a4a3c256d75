"""Export models to other runtimes: `nfzoo export MODEL --format FORMAT --output FOLDER`.

The model is folded first. The file `nfzoo.json` beside the program describes its input and output.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.checkpoint.model_folder import SHEET_FILE as SHEET
from nfzoo.config import MAX_SIZE, is_int
from nfzoo.errors import ConfigError
from nfzoo.export.edge import (
    EXECUTORCH_PACKAGES,
    LITERT_PACKAGES,
    write_executorch,
    write_executorch_int8,
    write_litert,
    write_litert_int8,
)
from nfzoo.export.onnx_program import (
    INPUT,
    OPENVINO_PACKAGES,
    OUTPUT,
    PACKAGES,
    check_finite,
    exported_program,
    quiet,
    write_onnx,
    write_openvino,
)
from nfzoo.export.quantize import accuracy_of_int8, calibration_batches, write_onnx_int8, write_openvino_int8
from nfzoo.nn import NFNet
from nfzoo.runtime import program
from nfzoo.runtime.device import usable_device
from nfzoo.runtime.output import escaped, json_text

_FLOAT32 = (torch.float32,)


class Format(NamedTuple):
    """Describe a format.

    Attributes:
        file: the program's file name in the output folder.
        write: `write(model, images, batch, path)`, which writes a folded model, traced on example images.
        write_int8: the same with batches of prepared images to calibrate with, or `None`.
        needs: packages that `write` imports.
        extra: the extra of nfzoo that brings them.
        beside: other files that `write` may leave in the folder.
        any_size: true if height and width are dynamic.
        one_batch: true if the number of images is fixed, which by default is 1.
        dtypes: what a model's parameters may be, and otherwise become float32; by default all.
    """

    file: str
    write: Callable[[NFNet, Tensor, int | None, Path], None]
    write_int8: Callable[[NFNet, Tensor, int | None, Path, Iterable[Tensor]], None] | None = None
    needs: tuple[str, ...] = ()
    extra: str = "export"
    beside: tuple[str, ...] = ()
    any_size: bool = False
    one_batch: bool = False
    dtypes: tuple[torch.dtype, ...] | None = None

    def fixed_batch(self, batch: int | None) -> int | None:
        """Return the fixed number of images of a program for which `batch` was asked, or `None`."""
        return 1 if batch is None and self.one_batch else batch


def write_torch(model: NFNet, images: Tensor, batch: int | None, path: Path) -> None:
    """Write a program of torch.export for images of other sizes too; load it by `torch.export.load(path).module()`."""
    count, channels, _, side = images.shape
    # torch.export would specialise on an example that is square or odd, or whose last map has one pixel. It would also
    # specialise on sides that a larger number than `step` divides.
    step = size_step(side)
    unit = max(2, step)
    height, width = (unit * (n // unit + 1) for n in (64, 96))
    program = exported_program(model, images.new_zeros((count, channels, height, width)), batch=batch, step=step)
    torch.export.save(program, path)


def size_step(size: int) -> int:
    """Return the number that divides an image's sides in a program for any size, made for `size` pixels.

    Multiples of the network's stride of 32 have the same padding everywhere. Other sizes make large programs.
    """
    return math.gcd(size, 32)


def write_aoti(model: NFNet, images: Tensor, batch: int | None, path: Path) -> None:
    """Compile a package for the model's device; load it by `torch._inductor.aoti_load_package(path)`."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(exported_program(model, images, batch=batch), package_path=str(path))


FORMATS: dict[str, Format] = {
    "onnx": Format(
        "model.onnx",
        write_onnx,
        write_onnx_int8,
        needs=PACKAGES,
        beside=("model.onnx.data",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),  # onnxruntime has no float64 convolution
    ),
    "aoti": Format("model.pt2", write_aoti),
    "torch": Format("model.pt2", write_torch, any_size=True),
    "openvino": Format(
        "model.xml",
        write_openvino,
        write_openvino_int8,
        needs=OPENVINO_PACKAGES,
        extra="openvino,export",
        beside=("model.bin",),
        dtypes=_FLOAT32,
    ),
    "litert": Format(
        "model.tflite",
        write_litert,
        write_litert_int8,
        needs=LITERT_PACKAGES,
        extra="litert",
        one_batch=True,
        dtypes=_FLOAT32,
    ),
    "executorch": Format(
        "model.pte",
        write_executorch,
        write_executorch_int8,
        needs=EXECUTORCH_PACKAGES,
        extra="executorch",
        one_batch=True,
        dtypes=_FLOAT32,
    ),
}
_INT8 = ", ".join(name for name, kind in FORMATS.items() if kind.write_int8)
STABLEHLO = "stablehlo"


def export(
    model: NFNet,
    folder: str | Path,
    *,
    format: str,
    size: int | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    int8: Iterable[Tensor] | None = None,
) -> Path:
    """Write a model's program and its `nfzoo.json` into a folder, both or neither, and return the program's path.

    Args:
        model: a trained or folded model, which is left as it is.
        format: a key of `FORMATS`; a float64 model becomes float32 in `onnx`, and any in `openvino`, `litert` and
            `executorch`.
        size: side of the images in pixels; by default that of the model's evaluation.
        batch: a fixed number of images; by default any number, and 1 in `litert` and `executorch`.
        device: device that `aoti` compiles for; by default the model's.
        int8: batches of prepared images, of `batch` each where that is fixed, with whose ranges the program is
            quantised (see `nfzoo.export.quantize`).

    Raises:
        ConfigError: if the format is unknown, a number is out of range, a device or package is missing, or the folder
            holds other files.
        CheckpointError: if a weight is not finite.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known; choose one of {', '.join(FORMATS)}")
    kind = FORMATS[format]
    if int8 is not None and kind.write_int8 is None:
        raise ConfigError(
            f"int8 is for {_INT8}, not {format}; nfzoo.export.quantize.quantize_torch quantises for torch.compile"
        )
    for name, value in (("size", size), ("batch", batch)):
        if value is not None and not is_int(value, 1, MAX_SIZE):
            raise ConfigError(f"{name} must be a positive integer up to {MAX_SIZE}, not {value!r}")
    program.check_packages(format, kind.needs, kind.extra)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; give a folder")
    if others := sorted(p.name for p in _entries(folder) if p.name not in (kind.file, *kind.beside, SHEET)):
        raise ConfigError(
            f"{str(folder)!r} holds other files, such as {others[0]!r}; give a folder of the export's own"
        )
    check_finite(model)
    if kind.dtypes and next(model.parameters()).dtype not in kind.dtypes:
        model = NFNet.from_params(model.description, {k: v.detach().float() for k, v in model.named_parameters()})
    folded = model if model.config.folded else model.for_inference()
    if device is not None:
        folded = NFNet.from_params(folded.description, {k: v.detach().clone() for k, v in folded.named_parameters()})
        folded = folded.to(usable_device(device))
    batch = kind.fixed_batch(batch)
    p = next(folded.parameters())
    side = size or folded.preprocessing.test_size
    # torch.export would specialise on an example of one image, even where the number is dynamic.
    images = torch.zeros((batch or 2, folded.config.in_channels, side, side), dtype=p.dtype, device=p.device)
    with replaced_folder(folder) as scratch, torch.no_grad():
        with quiet():
            if int8 is None or kind.write_int8 is None:
                kind.write(folded, images, batch, scratch / kind.file)
            else:
                kind.write_int8(folded, images, batch, scratch / kind.file, int8)
        arithmetic = str(p.dtype).removeprefix("torch.") if int8 is None else "int8"
        fields = sheet(folded, format, side, batch) | {"arithmetic": arithmetic}
        text = json_text(fields)
        (scratch / SHEET).write_text(text, encoding="utf-8")
    return Path(folder) / kind.file


def _entries(folder: str | Path) -> list[Path]:
    return list(Path(folder).iterdir()) if Path(folder).is_dir() else []


def sheet(model: NFNet, format: str, size: int, batch: int | None) -> dict[str, Any]:
    """Return the content of `nfzoo.json`: the program's input and output, preprocessing, labels and provenance.

    A shape is a list of numbers, and of names for dynamic dimensions. Of a model that has one, there is the
    `temperature` by which the program's logits are to be divided before the softmax; of a multi-label model, the
    `problem_type` and the `thresholds` of the logits' sigmoids.
    """
    from nfzoo import __version__

    kind = FORMATS[format]
    p = next(model.parameters())
    step = size_step(size)
    sides: list[int | str] = ["height", "width"] if kind.any_size else [size, size]
    dtype = str(p.dtype).removeprefix("torch.")
    description = model.description.to_dict()
    return {
        "library_name": "nfzoo",
        "program": format,
        "file": kind.file,
        "input": {"name": INPUT, "shape": [batch or "batch", model.config.in_channels, *sides], "dtype": dtype},
        "output": {"name": OUTPUT, "shape": [batch or "batch", model.config.num_classes], "dtype": dtype},
        "multiple": step if kind.any_size else None,
        "size": size,
        "device": p.device.type,
        **{key: description[key] for key in ("name", "architecture", "preprocessing", "labels", "provenance")},
        **{key: description[key] for key in ("temperature", "problem_type", "thresholds") if key in description},
        "versions": {"nfzoo": __version__, "torch": str(torch.__version__)},
    }


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo export",
        description="Write a model for another runtime, folded into plain convolutions.\n\n"
        "formats:\n"
        "  onnx       model.onnx, for any number of images; needs nfzoo[export]\n"
        "  aoti       model.pt2, compiled by torch's AOTInductor for this kind of machine\n"
        "  torch      model.pt2 of torch.export, for any number of images and other sizes\n"
        "  openvino   model.xml and model.bin, for any number of images; needs nfzoo[openvino,export]\n"
        "  litert     model.tflite, for one image or --batch; needs nfzoo[litert]\n"
        "  executorch model.pte for XNNPACK, for one image or --batch; needs nfzoo[executorch]\n"
        "  stablehlo  MLIR of the forward pass, with --training of the training step; needs nfzoo[xla]\n\n"
        "example:\n"
        "  nfzoo export runs/digits --format onnx --output exported",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weight file"
    )
    parser.add_argument("--format", required=True, choices=[*FORMATS, STABLEHLO], help="the kind of program")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--size", type=program.positive_int, metavar="N", help="side of the images in pixels (default: the model's)"
    )
    parser.add_argument(
        "--batch",
        type=program.positive_int,
        metavar="N",
        help="a fixed number of images (default: any; litert, executorch, stablehlo: 1)",
    )
    parser.add_argument("--device", help="what aoti compiles for, such as cuda (default: cpu)")
    parser.add_argument(
        "--int8",
        metavar="DATA",
        help="eight-bit arithmetic, its ranges taken from these images: digits, or a folder with one subfolder "
        "per class",
    )
    program.add_source_options(parser)
    parser.add_argument("--training", action="store_true", help="stablehlo: write the training step as well")
    program.add_output_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if the program is written, 2 for bad input, 1 if the disk or a compiler fails."""
    return program.run_parsed(_parser(), argv, _main, failures=(OSError, RuntimeError))


def _main(options: argparse.Namespace) -> None:
    from nfzoo import from_pretrained

    if options.format != "aoti" and options.device is not None:
        raise ConfigError(f"--device is for aoti; {options.format} runs wherever its runtime does")
    kind = FORMATS.get(options.format)
    if options.int8 is not None and (kind is None or kind.write_int8 is None):
        raise ConfigError(f"--int8 is for {_INT8}, not {options.format}")
    if options.format != STABLEHLO and options.training:
        raise ConfigError(f"--training is for {STABLEHLO}; {options.format} is for inference")
    batch = kind.fixed_batch(options.batch) if kind else options.batch
    program.check_writable(Path(options.output), folder=True)
    model = from_pretrained(options.model, **program.source_options(options))
    if options.format == STABLEHLO:
        from nfzoo.export.stablehlo import export_stablehlo

        # The training step needs the trained form, and both programs share one set of weights.
        chosen = model if options.training or model.config.folded else model.for_inference()
        written = export_stablehlo(
            chosen, Path(options.output), size=options.size, batch=batch or 1, training=options.training
        )
    else:
        path = export(
            model,
            options.output,
            format=options.format,
            size=options.size,
            batch=batch,
            device=options.device,
            int8=None if options.int8 is None else calibration_batches(model, options.int8, options.size, batch),
        )
        names = (path.name, *FORMATS[options.format].beside, SHEET)
        written = [path.with_name(name) for name in names if path.with_name(name).exists()]
    for path in written:
        print(f"wrote {escaped(str(path))}")
    said = None
    if options.int8 is not None:
        said = accuracy_of_int8(model, written[0], options.int8, options.size, batch, format=options.format)
    fields = {"format": options.format, "written": list(map(str, written)), "int8": said}
    program.write_result(options, fields, said and escaped(said))


if __name__ == "__main__":
    sys.exit(main())
