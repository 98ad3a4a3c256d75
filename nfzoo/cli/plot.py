"""Pictures of models and runs: `nfzoo plot signal MODEL`, `nfzoo plot curves RUN`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.analysis.figures import compared_curves, held_out_curve, read_metrics, signal_propagation, training_curves
from nfzoo.analysis.signal_propagation import SignalMetrics, open_branches, signal_metrics
from nfzoo.analysis.style import check_png
from nfzoo.errors import ConfigError
from nfzoo.model import init
from nfzoo.nn import NFNet, create
from nfzoo.predict import image_files
from nfzoo.runtime import program
from nfzoo.runtime.device import usable_device
from nfzoo.runtime.output import escaped
from nfzoo.train.run_folder import CURVES_FILE, METRICS_FILE
from nfzoo.variants import VARIANTS


class Signal(NamedTuple):
    """Statistics of a model's activations, and the input they were measured on.

    Attributes:
        model: its name.
        weights: `"trained"`, `"random"`, or `"random, branches silent"`: see `measure`.
        images: what went in, in words.
        input: `(N, C, H, W)` of what went in.
        blocks: after the stem, then after each residual block.
    """

    model: str
    weights: str
    images: str
    input: tuple[int, ...]
    blocks: list[SignalMetrics]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields, with `None` for numbers that are not finite."""
        rows = [{k: _number(v) for k, v in m._asdict().items() if v is not None} for m in self.blocks]
        return {**self._asdict(), "input": list(self.input), "blocks": rows}

    def title(self) -> str:
        """Return the title of the plot, in one line."""
        n, _, height, width = self.input
        return f"{self.model}, {self.weights} weights; {n} {self.images} of {height} x {width}"


def measure(
    source: str,
    *,
    trained: bool = False,
    silent: bool = False,
    images: Sequence[str | Path] = (),
    batch: int = 8,
    size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    require_hash: bool = False,
    allow_pickle: bool = False,
) -> Signal:
    """Measure the statistics of a model's activations at each depth on one batch, without noise.

    Args:
        source: a zoo name, a checkpoint folder, a weight file or a Hub repository.
        trained: take the trained weights; else fresh ones of the same architecture, with every residual branch at
            full strength: see `nfzoo.analysis.signal_propagation.open_branches`.
        silent: leave fresh weights as training starts from them, with silent branches.
        images: image files or folders of them, preprocessed as the model is evaluated; by default the batch is drawn
            from N(0, 1).
        batch: number of images.
        size: side of the input in pixels; by default that of the model's training.
        seed: of the weights and of the batch that are drawn.
        require_hash, allow_pickle: see `nfzoo.from_pretrained`.

    Raises:
        ConfigError: for a folded model, an unusable device, options that contradict each other.
        UnknownModelError, CheckpointError, DataError: for what cannot be read.
    """
    if trained and silent:
        raise ConfigError("trained weights are as they are; branches can be left silent only in random ones")
    target = usable_device(device)
    files = image_files(images)[:batch] if images else []
    model = _open(source, trained=trained, require_hash=require_hash, allow_pickle=allow_pickle)
    generator = torch.Generator().manual_seed(seed)
    cfg = model.config
    if trained:
        params, weights = dict(model.named_parameters()), "trained"
    else:
        fresh = init(cfg, generator=generator)
        params = fresh if silent else open_branches(cfg, fresh)
        weights = "random" if not silent else "random, branches silent"
    side = size or model.preprocessing.train_size
    if files:
        x, what = torch.stack([model.preprocess(f, size=side) for f in files]), "images"
    else:
        x, what = torch.randn((batch, cfg.in_channels, side, side), generator=generator), "Gaussian inputs"
    dtype = next(iter(params.values())).dtype
    blocks = signal_metrics(cfg, {k: p.detach().to(target) for k, p in params.items()}, x.to(target, dtype))
    return Signal(model.name or Path(source).resolve().name, weights, what, tuple(x.shape), blocks)


def _open(source: str, *, trained: bool, **options: Any) -> NFNet:
    if not trained and source in VARIANTS and not Path(source).exists():
        return create(source, device="meta")  # the architecture alone
    from nfzoo import from_pretrained

    return from_pretrained(source, **options)


def _number(value: object) -> object:
    if isinstance(value, Tensor):
        value = float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(prog="nfzoo plot", description="Pictures of models and of training runs.")
    commands = parser.add_subparsers(dest="command", metavar="PICTURE", required=True)
    sub = commands.add_parser(
        "signal",
        help="how the statistics of a model's activations evolve with depth",
        description="Draw the signal-propagation plot of arXiv 2101.08692: over the residual blocks, the averages\n"
        "over channels of the squared mean, of the variance, and of the variance of the residual branch.\n"
        "Random weights have every residual branch at full strength; as training starts, branches are silent.\n\n"
        "examples:\n"
        "  nfzoo plot signal nfnet-f0\n"
        "  nfzoo plot signal runs/pets --trained --images pets/val",
    )
    sub.add_argument("model", metavar="MODEL", help="a zoo name, a checkpoint folder, a weight file, a Hub repository")
    program.add_source_options(sub)
    sub.add_argument("--trained", action="store_true", help="the trained weights (default: random ones)")
    sub.add_argument("--silent", action="store_true", help="random weights as training starts from them")
    sub.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="images or folders of them (default: Gaussian noise)"
    )
    sub.add_argument(
        "--batch-size", type=program.positive_int, default=8, metavar="N", help="number of images (default: 8)"
    )
    sub.add_argument(
        "--size", type=program.positive_int, metavar="N", help="side in pixels (default: that of training)"
    )
    sub.add_argument(
        "--seed", type=program.nonnegative_int, default=0, metavar="N", help="of what is drawn at random (default: 0)"
    )
    sub.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, mps (default: cpu)")
    sub.add_argument(
        "--output", type=Path, default=Path("signal.png"), metavar="PNG", help="the picture (default: signal.png)"
    )
    program.add_output_options(sub, word_is_file=True)
    sub = commands.add_parser(
        "curves",
        help="loss and accuracy over the epochs of a training run",
        description="Draw loss and accuracy over the epochs that a training run has done so far;\n"
        "of several runs, those of the held-out images, in one picture.\n\n"
        "examples:\n"
        "  nfzoo plot curves runs/pets\n"
        "  nfzoo plot curves runs/a runs/b --output both.png",
    )
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"the folder of a run, or its {METRICS_FILE}")
    text = f"the picture (default: {CURVES_FILE} in the folder of the run, of several here)"
    sub.add_argument("--output", type=Path, metavar="PNG", help=text)
    program.add_output_options(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 when the picture is drawn, 2 for bad input, 1 when the disk gave out."""

    def work(options: argparse.Namespace) -> None:
        (_signal if options.command == "signal" else _curves)(options)

    return program.run_parsed(_parser(), argv, work)


def _signal(options: argparse.Namespace) -> None:
    check_png(options.output)
    signal = measure(
        options.model,
        trained=options.trained,
        silent=options.silent,
        images=options.images,
        batch=options.batch_size,
        size=options.size,
        seed=options.seed,
        device=options.device,
        **program.source_options(options),
    )
    signal_propagation(signal.blocks, options.output, title=signal.title())
    print(f"wrote {escaped(str(options.output))}")
    program.write_result(options, signal.to_dict())


def _curves(options: argparse.Namespace) -> None:
    files = {str(run): run / METRICS_FILE if run.is_dir() else run for run in options.runs}
    metrics = next(iter(files.values()))
    output = options.output or (metrics.parent / CURVES_FILE if len(files) == 1 else Path(CURVES_FILE))
    if len(files) == 1:
        training_curves(metrics, output)
    else:
        compared_curves([(name, held_out_curve(read_metrics(path))) for name, path in files.items()], output)
    print(f"wrote {escaped(str(output))}")
    program.write_result(options, {"output": str(output), "runs": list(files)})


if __name__ == "__main__":
    sys.exit(main())
