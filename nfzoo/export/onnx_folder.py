"""The folder `onnx` beside a model's weights: an ONNX program where transformers.js looks for it, and a description."""

from __future__ import annotations

from pathlib import Path

import torch

from nfzoo.checkpoint.model_folder import ONNX_DATA, ONNX_FILE, ONNX_FOLDER, SHEET_FILE, WEIGHTS_FILE
from nfzoo.checkpoint.weight_files import stated_checksum
from nfzoo.errors import CheckpointError, ConfigError, shown
from nfzoo.export.onnx_program import PACKAGES, check_finite, quiet, write_onnx
from nfzoo.export.run import sheet
from nfzoo.files import read_json
from nfzoo.nn import NFNet
from nfzoo.runtime.output import json_text
from nfzoo.runtime.program import check_packages

INPUT = "pixel_values"
"""Name of the program's input, which transformers.js and optimum give images under."""

_WEIGHTS = "weights_crc32"
"""Key of `nfzoo.json`: the checksum of the weights that the program was made from."""


def check_onnx(model: NFNet) -> None:
    """Raise a `ConfigError` where no ONNX program can be written for the model's folder."""
    check_packages("ONNX", PACKAGES, "export")
    if not model.config.num_classes:
        raise ConfigError(
            "the ONNX program of a folder returns logits, and the model has no classifier (num_classes 0): "
            "`nfzoo export --format onnx` writes a program of its pooled features"
        )


@torch.no_grad()
def write_onnx_folder(model: NFNet, folder: Path, checksum: str | None) -> None:
    """Write the folded model in float32 as `model.onnx` into a folder, for any number of images of the test size.

    The input is `pixel_values` `(N, in_channels, S, S)`, as `model.preprocess` returns images, and the output `logits`.
    Weights of more than 1.5 GiB lie in `model.onnx_data`. `nfzoo.json` describes input and output.

    Args:
        checksum: of the weight file, which `nfzoo.json` states; `None` if there is none.

    Raises:
        ConfigError: see `check_onnx`.
        CheckpointError: if a weight is not finite.
    """
    check_onnx(model)
    check_finite(model)
    params = {name: p.detach().to("cpu", torch.float32) for name, p in model.named_parameters()}
    single = NFNet.from_params(model.description, params)
    folded = single if model.config.folded else single.for_inference()
    side = folded.preprocessing.test_size
    # torch.export would specialise on an example of one image, even where the number is dynamic.
    images = torch.zeros((2, folded.config.in_channels, side, side))
    with quiet():
        write_onnx(folded, images, None, folder / ONNX_FILE, input_name=INPUT)
    _rename_data(folder)
    fields = sheet(folded, "onnx", side, None)
    fields["input"]["name"] = INPUT
    text = json_text(fields | {"arithmetic": "float32", _WEIGHTS: checksum})
    (folder / SHEET_FILE).write_text(text, encoding="utf-8")


def _rename_data(folder: Path) -> None:
    """Rename the weights outside the program, which torch writes to `model.onnx.data`, as transformers.js expects."""
    import onnx

    written = folder / f"{ONNX_FILE}.data"
    if not written.exists():
        return
    program = onnx.load(folder / ONNX_FILE, load_external_data=False)
    for tensor in program.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = ONNX_DATA
    onnx.save(program, folder / ONNX_FILE)
    written.rename(folder / ONNX_DATA)


def onnx_files(folder: Path) -> list[str]:
    """Return the names of the files in a model folder's `onnx`, such as `onnx/model.onnx`; none without that folder.

    Raises:
        CheckpointError: unless `nfzoo.json` there says that they were made from the folder's weights.
    """
    programs = folder / ONNX_FOLDER
    if not programs.exists():
        return []
    remedy = "; write it anew with --with-onnx (with_onnx=True), or remove it"
    try:
        fields = read_json(programs / SHEET_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{programs / SHEET_FILE} cannot be read: {error}{remedy}") from error
    weights = folder / WEIGHTS_FILE
    made_from = fields.get(_WEIGHTS) if isinstance(fields, dict) else None
    if made_from is None:  # as of `nfzoo export`
        raise CheckpointError(f"{programs} does not say which weights it was made from{remedy}")
    if not weights.is_file() or made_from != stated_checksum(weights):
        raise CheckpointError(f"{programs} was made from other weights than those of {folder}{remedy}")
    names = sorted(path.name for path in programs.iterdir())
    others = sorted(set(names) - {ONNX_FILE, ONNX_DATA, SHEET_FILE})
    if ONNX_FILE not in names or others:
        what = f"holds {shown(others[0])}, which nfzoo did not write" if ONNX_FILE in names else f"lacks {ONNX_FILE}"
        raise CheckpointError(f"{programs} {what}{remedy}")
    return [f"{ONNX_FOLDER}/{name}" for name in names]
