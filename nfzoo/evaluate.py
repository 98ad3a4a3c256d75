"""Top-1 and top-5 accuracy on labelled images: `accelerate launch -m nfzoo.evaluate MODEL --data FOLDER`.

Every image counts once with any number of processes: their integer counts are added before the division.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nfzoo.config import Preprocessing
from nfzoo.data.images import DIGITS, Digits, ImageFolder, Images
from nfzoo.data.labels import match_classes
from nfzoo.data.loader import BrokenImageError, evaluation_batches
from nfzoo.data.source import HELD_OUT, Part, open_held_out, open_split
from nfzoo.errors import CheckpointError, DataError
from nfzoo.model import apply
from nfzoo.nn import NFNet
from nfzoo.runtime import program
from nfzoo.runtime.device import backend, default_workers, processes, share_of
from nfzoo.runtime.distributed import gather
from nfzoo.runtime.output import escaped

if TYPE_CHECKING:
    from accelerate import PartialState  # at run time, only after `choose_xla`

logger = logging.getLogger("nfzoo")

EVALUATION_FILE = "evaluation.json"


class Score(NamedTuple):
    """Top-1 and top-5 accuracy over `images` images, shares in [0, 1], the mean loss, and the macro F1 if asked for."""

    images: int
    top1: float
    top5: float
    loss: float
    f1: float | None = None


def score(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    classes: int | None = None,
) -> Score:
    """Score a function from images to logits `(N, classes)`, over the batches of all processes together.

    An image counts as correct in the top k if fewer than k classes rank before its own. Among equal logits the lower
    index ranks first. An image with a NaN among its logits is never correct. The loss is the cross-entropy. All values
    are NaN if there are no images.

    Args:
        classes: number of classes, to compute the macro F1 too: the mean of `2 * right / (predicted + own)` over the
            classes that occur among labels or predictions, each with its numbers of right predictions, of predictions
            and of images of its own. Source: scikit-learn's `f1_score(average="macro")`.
    """
    return scores([logits], batches, device=device, classes=classes)[0]


@torch.no_grad()
def scores(
    functions: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    classes: int | None = None,
) -> list[Score]:
    """Score several functions as `score` does, in one pass over the batches."""
    sums = [_Sums(device, classes) for _ in functions]
    target = backend(device)
    for images, labels in batches:
        images, labels = target.images(images), labels.to(device)
        for logits, each in zip(functions, sums, strict=True):
            each.add(logits(images).float(), labels)
    return [each.score() for each in sums]


class _Sums:
    """What one process adds up for a `Score`."""

    def __init__(self, device: torch.device | str, classes: int | None) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # right in the top 1 and 5; seen
        self.by_class = torch.zeros(2, classes or 0, dtype=torch.int64, device=device)  # right; predicted and own
        self.losses: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add logits `(N, classes)` and labels `(N,)`."""
        own = outputs.gather(1, labels[:, None])
        index = torch.arange(outputs.shape[1], device=outputs.device)
        behind = (outputs < own) | ((outputs == own) & (index >= labels[:, None]))
        rank = (~behind).sum(1)
        self.counts += torch.stack([(rank < 1).sum(), (rank < 5).sum(), rank.new_tensor(len(labels))])
        if classes := self.by_class.shape[1]:
            hot, predicted = F.one_hot(labels, classes), F.one_hot(outputs.argmax(1), classes)
            self.by_class += torch.stack([(hot * (rank < 1)[:, None]).sum(0), (hot + predicted).sum(0)])
        self.losses.append(F.cross_entropy(outputs, labels, reduction="sum"))

    def score(self) -> Score:
        """Return the score of all processes together."""
        from accelerate.utils import reduce

        # Thousands of losses are added in float64, which Apple's GPUs do not have.
        wide = torch.float32 if self.counts.device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=wide, device=self.counts.device)
        loss = torch.stack(self.losses).to(wide).sum() if self.losses else zero
        right, right5, seen = reduce(self.counts, reduction="sum").tolist()  # type: ignore[union-attr]
        total = float(reduce(loss, reduction="sum"))  # type: ignore[arg-type]
        f1 = None
        if self.by_class.shape[1]:
            hits, occurred = reduce(self.by_class, reduction="sum").cpu().double()  # type: ignore[union-attr]
            f1 = float((2 * hits / occurred)[occurred > 0].mean())
        if not seen:
            return Score(0, float("nan"), float("nan"), float("nan"), f1)
        return Score(seen, right / seen, right5 / seen, total / seen, f1)


class Labelled(NamedTuple):
    """Images whose labels are indices of the model's outputs.

    Attributes:
        dataset, split: names for the result; `split` is `None` if the data have no parts.
        matched_by: the table of names that matched the classes, see `match_classes`.
    """

    images: Images
    dataset: str
    split: str | None
    matched_by: str


def open_labelled(source: str, classes: int, labels: Sequence[str] | None, *, held_out: float = HELD_OUT) -> Labelled:
    """Open the images of a source (see `nfzoo.data.source`) for a model with `classes` outputs named `labels`.

    A source with a held-out part, such as a folder with `train/` and `val/`, gives that part. `"digits"` gives the
    share `held_out` that training does not see. Any other source gives all images.

    Raises:
        DataError: see `open_split` and `match_classes`.
    """
    if source == DIGITS:
        digits = open_split(DIGITS, validation_fraction=held_out).validation
        part = Part(digits, DIGITS, "held out", "the digits")
    else:
        part = open_held_out(source)
    names = part.images.classes
    numbered = not isinstance(part.images, ImageFolder) and names == tuple(map(str, range(len(names))))
    if numbered and len(names) <= classes and not {*names} & {*(labels or ())}:
        index, matched_by = tuple(range(len(names))), "numbers"  # unnamed classes are numbers of outputs
    else:
        index, matched_by = match_classes(names, classes, labels, source=part.source)
    return Labelled(part.images.relabelled(index), part.dataset, part.split, matched_by)


class Evaluation(NamedTuple):
    """The score of a model on a data set, ready for a model card.

    Attributes:
        model: name of the model, or of its folder.
        dataset, split, matched_by: see `Labelled`.
        classes: number of classes in the data.
        images: number of images that count.
        skipped: number of unreadable images that were left out.
        top1, top5, loss: see `Score`.
        size: side of the input in pixels.
        resize: the rule of the resize, in words.
        nfzoo, torch: versions.
        date: the caller's, never today's, so that a repeated evaluation gives an equal result.
    """

    model: str
    dataset: str
    split: str | None
    matched_by: str
    classes: int
    images: int
    skipped: int
    top1: float
    top5: float
    loss: float
    size: int
    resize: str
    nfzoo: str
    torch: str
    date: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`, without fields that are `None`."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def evaluate(
    model: NFNet,
    data: str,
    *,
    name: str | None = None,
    size: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: torch.device | str | None = None,
    skip_broken: bool = False,
    date: str | None = None,
) -> Evaluation:
    """Score a model on labelled images. Several processes (of Accelerate) share the images and return one result.

    Args:
        data: see `open_labelled`.
        name: name of the model in the result; by default its own.
        size: side of the input in pixels; by default the model's test size.
        batch_size: batch size of each process.
        workers: loader processes per process; by default as many as there are processors, up to 8.
        device: device to which the model is moved; by default an accelerator if there is one.
        skip_broken: leave out unreadable images and log their names, instead of stopping.

    Raises:
        DataError: for data that are unreadable or do not fit the model.
        CheckpointError: if the outputs are not finite.
        ConfigError: for a device that is not available.
    """
    from nfzoo import __version__

    model.config.check_classifier()
    # The images, with labels of this model.
    state = processes(cpu=str(device) == "cpu")
    target = share_of(state, device)
    trained = model.provenance or {}
    held_out = trained.get("validation_fraction") if trained.get("data") == Path(data).name else None
    labelled = open_labelled(data, model.config.num_classes, model.labels, held_out=held_out or HELD_OUT)
    if held_out and data != DIGITS and labelled.split is None and state.is_main_process:
        logger.warning("%s was trained on most of these images: this is no held-out accuracy", name or model.name)
    images = labelled.images
    if workers is None:
        workers = 0 if isinstance(images, Digits) else default_workers(state.num_processes)

    # This process's share of the images, by the trained form, which gives the same bits as in training.
    model = model.to(target)
    params, dtype = dict(model.named_parameters()), next(model.parameters()).dtype
    broken: list[str] = []
    batches = evaluation_batches(
        images,
        model.preprocessing,
        batch_size=batch_size,
        rank=state.process_index,
        world=state.num_processes,
        size=size,
        workers=workers,
        broken=broken if skip_broken else None,
    )
    try:
        shown = _with_bar(batches, len(images), state)
        result = score(lambda x: apply(model.config, params, x.to(dtype)), shown, device=target)
    except BrokenImageError as error:
        raise BrokenImageError(f"{error}; leave such images out with --skip-broken") from error

    # The result of all processes.
    problems = sorted(gather(broken))
    if state.is_main_process:
        for problem in problems:
            logger.warning("left out: %s", problem)
    if not result.images:
        raise DataError(f"none of the {len(images)} images can be read, such as: {problems[0]}")
    if not np.isfinite(result.loss):
        raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
    return Evaluation(
        model=name or model.name or "model",
        dataset=labelled.dataset,
        split=labelled.split,
        matched_by=labelled.matched_by,
        classes=len(images.classes),
        images=result.images,
        skipped=len(problems),
        top1=result.top1,
        top5=result.top5,
        loss=result.loss,
        size=size or model.preprocessing.test_size,
        resize=resize_rule(model.preprocessing),
        nfzoo=__version__,
        torch=str(torch.__version__),
        date=date,
    )


def resize_rule(preprocessing: Preprocessing) -> str:
    """Describe the evaluation resize."""
    if preprocessing.resize == "deepmind":
        return f"deepmind, margin {preprocessing.margin} pixels"
    return f"{preprocessing.resize}, crop {preprocessing.crop:g}"


def _with_bar(
    batches: Iterator[tuple[Tensor, Tensor]], total: int, state: PartialState
) -> Iterator[tuple[Tensor, Tensor]]:
    hidden = not (state.is_main_process and sys.stderr.isatty())
    with tqdm(desc="evaluate", total=total, unit="image", leave=False, disable=hidden) as bar:
        for images, labels in batches:
            yield images, labels
            bar.update(min(len(labels) * state.num_processes, total - bar.n))


def table(result: Evaluation) -> str:
    """Return an evaluation as lines of text."""
    rows = [
        ("model", result.model),
        ("data", result.dataset if result.split is None else f"{result.dataset}, {result.split}"),
        ("images", f"{result.images:,}" + (f" ({result.skipped:,} cannot be read)" if result.skipped else "")),
        ("classes", f"{result.classes:,}, matched by {result.matched_by}"),
        ("input", f"{result.size} x {result.size} pixels ({result.resize})"),
        ("top-1", f"{result.top1:7.2%}"),
        ("top-5", f"{result.top5:7.2%}"),
        ("loss", f"{result.loss:7.4f}"),
    ]
    return "\n".join(f"{key + ':':<9} {escaped(value)}" for key, value in rows)


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo evaluate",
        description="Top-1 and top-5 accuracy of a model on a folder of images.\n\n"
        "examples:\n"
        "  nfzoo evaluate nfnet-f0 --data imagenet/val --json evaluation.json\n"
        "  accelerate launch -m nfzoo.evaluate runs/pets --data pets/val",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weight file")
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="one subfolder of images per class, named as the model's labels (ImageNet's: or by WordNet id); or with "
        "such folders in train/ and val/, of which val/ is taken; or tar shards, parquet files, hub:ORG/NAME; or "
        "'digits', those that training holds out",
    )
    add("--size", type=program.positive_int, metavar="N", help="side of the input in pixels (default: the model's)")
    images = "images at a time per process (default: 32)"
    add("--batch-size", type=program.positive_int, default=32, metavar="N", help=images)
    workers = "loader processes per process (default: the processors, up to 8)"
    add("--workers", type=program.nonnegative_int, metavar="N", help=workers)
    add("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--json", metavar="PATH", help="write the result there as JSON too; - prints it instead")
    add("--skip-broken", action="store_true", help="leave images out that cannot be read, and name and count them")
    program.add_source_options(parser)
    add("--date", type=_date, metavar="YYYY-MM-DD", help="the day to note in the result (default: none)")
    return parser


def _date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2026-01-31") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 for a result, 2 for bad input, 1 for a disk error."""
    return program.run("nfzoo evaluate", lambda: _main(_parser().parse_args(argv)))


def _main(options: argparse.Namespace) -> None:
    from nfzoo import from_pretrained

    if options.json not in (None, "-"):
        program.check_writable(Path(options.json))
    model = from_pretrained(options.model, **program.source_options(options))
    evaluation = evaluate(
        model,
        options.data,
        name=model.name or Path(options.model).resolve().name,
        size=options.size,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        skip_broken=options.skip_broken,
        date=options.date,
    )
    if processes(cpu=options.device == "cpu").is_main_process:
        program.write_result(options.json, evaluation.to_dict(), table(evaluation))


if __name__ == "__main__":
    sys.exit(main())
