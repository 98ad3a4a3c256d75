"""Find a learning rate and an AGC threshold: `nfzoo find-lr`, `accelerate launch -m nfzoo.tuner`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nfzoo.analysis.figures import new_figure
from nfzoo.analysis.style import check_png
from nfzoo.checkpoint.atomic import replaced
from nfzoo.errors import ConfigError, TrainingError
from nfzoo.runtime import program
from nfzoo.runtime.distributed import gather
from nfzoo.runtime.output import escaped
from nfzoo.train.config import TrainConfig
from nfzoo.train.config.recipes import parse
from nfzoo.tuner.curves import Curve, Suggestion, in_words, lowest, suggest, suggested_lr
from nfzoo.tuner.figures import rate_curves
from nfzoo.tuner.range_test import STEPS, find_rates

_NOT_OF_A_TEST = ("--resume", "--resume-from", "--print-config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 when a rate is found, 2 for bad input, 1 when none lowers the loss or the disk gave out."""
    return program.run("nfzoo find-lr", lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _parser() -> program.Parser:
    parser = program.Parser(
        prog="nfzoo find-lr",
        description="Find the learning rate of a training run by a range test: steps of the run at rates that rise,\n"
        "for one AGC threshold or for each of several. It takes the options and recipes of nfzoo train,\n"
        "but --output and --overwrite are its own, and it writes no run. It suggests half the rate at which\n"
        "the smoothed loss is lowest, without AGC a quarter. Of several thresholds it takes that with the\n"
        "lowest loss, which is no sure sign.\n\n"
        "examples:\n"
        "  nfzoo find-lr --model nfnet-test --data digits --output found.yaml --plot lr.png\n"
        "  nfzoo train --recipe found.yaml --output runs/digits\n"
        "  accelerate launch --num_processes 2 -m nfzoo.tuner --recipe nfnet-f0-finetune --data photos",
    )
    text = "AGC thresholds to compare, null for none, as in 0.01,0.04,0.16,null (default: the run's own)"
    parser.add_argument("--clips", type=_clips, metavar="X,X", help=text)
    parser.add_argument(
        "--steps", type=program.positive_int, default=STEPS, metavar="N", help=f"steps of a test (default: {STEPS})"
    )
    text = "first rate (default: a thousandth of the rate that nfzoo train takes)"
    parser.add_argument("--start-lr", type=float, metavar="X", help=text)
    parser.add_argument("--end-lr", type=float, metavar="X", help="last rate (default: a hundred times that rate)")
    text = "write the run with the rate and threshold that were found, for nfzoo train --recipe"
    parser.add_argument("--output", type=Path, metavar="YAML", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a recipe that is at YAML")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the loss over the rate")
    program.add_output_options(parser, word_is_file=True)
    return parser


def _clips(text: str) -> list[float | None]:
    clips: list[float | None] = []
    for word in text.split(","):
        try:
            clip = None if word.strip() == "null" else float(word)
        except ValueError:
            clip = math.nan
        if clip is not None and not 0 < clip < math.inf:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no threshold; give positive numbers and null, as in 0.1,null"
            )
        if clip in clips:
            raise argparse.ArgumentTypeError(f"{word!r} is there twice")
        clips.append(clip)
    return clips


def _main(arguments: list[str]) -> None:
    options, rest = _parser().parse_known_args(arguments)
    with program.speaking(options):
        _find(options, rest)


def _find(options: argparse.Namespace, rest: list[str]) -> None:
    for word in rest:
        if (name := word.partition("=")[0].replace("_", "-")) in _NOT_OF_A_TEST:
            raise ConfigError(f"{name} is of nfzoo train; a range test begins anew and writes no run; leave it out")
    _check_targets(options)
    config = parse([*rest, "--output", "a test writes none"])
    clips = options.clips or [config.optim.clip]
    _say(f"{config.model} on {config.data}: {options.steps} steps for each of {len(clips)} threshold(s)")
    config, curves = find_rates(
        config,
        clips,
        start=options.start_lr,
        end=options.end_lr,
        steps=options.steps,
        report=lambda curve: _say(_line(curve)),
    )
    found = suggest(curves)
    _say(f"batch size {config.batch_size}, which the rate goes with")
    if program.is_first_process():
        _write(options, config, curves, found)
    gather([found])  # a launcher ends all processes as soon as one has failed
    if found is None:
        raise TrainingError("at no rate did the loss fall; raise --end-lr or --steps, or look at the data and the run")


def _check_targets(options: argparse.Namespace) -> None:
    """Raise a `ConfigError` for what could not be written after the work."""
    if options.output is not None:
        if options.output.suffix.lower() not in (".yaml", ".yml"):
            raise ConfigError(
                f"--output {str(options.output)!r} must end in .yaml; a range test writes a recipe, no run"
            )
        program.check_writable(options.output)
        if options.output.exists() and not options.overwrite:
            raise ConfigError(f"{str(options.output)!r} is there already; --overwrite replaces it")
    if options.plot is not None:
        check_png(options.plot)
        program.check_writable(options.plot)
        new_figure(1, 1)


def _say(text: str) -> None:
    if program.is_first_process():
        print(escaped(text), flush=True)


def _line(curve: Curve) -> str:
    lr, best = suggested_lr(curve), lowest(curve)
    advice = "the loss did not fall" if lr is None else f"suggested rate {lr:.2g}"
    if lr is not None and best == len(curve.rates) - 1:
        advice += ", and the loss still fell at the end: try a higher --end-lr"
    return (
        f"threshold {in_words(curve.clip):>5}  lowest loss {curve.smoothed[best]:.3f} at {curve.rates[best]:.2g}, "
        f"ended at {curve.rates[-1]:.2g}  {advice}"
    )


def _write(options: argparse.Namespace, config: TrainConfig, curves: Sequence[Curve], found: Suggestion | None) -> None:
    written = []
    if found is not None and options.output is not None:
        with replaced(options.output) as scratch:
            scratch.write_text(recipe(config, found), encoding="utf-8")
        written.append(str(options.output))
    if options.plot is not None:
        rate_curves(curves, found, options.plot)
        written.append(str(options.plot))
    text = "nothing found" if found is None else f"found: --optim.lr {found.lr:g} --optim.clip {in_words(found.clip)}"
    program.write_result(options, as_dict(config, curves, found), text)
    for path in written:
        _say(f"wrote {path}")


def recipe(config: TrainConfig, found: Suggestion) -> str:
    """Return a run with the rate and threshold that were found, as a recipe without `output`."""
    options = yaml.safe_load(
        dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=found.lr, clip=found.clip)).to_yaml()
    )
    del options["output"]
    return "# optim.lr and optim.clip were found by nfzoo find-lr.\n" + yaml.safe_dump(options, sort_keys=False)


def as_dict(config: TrainConfig, curves: Sequence[Curve], found: Suggestion | None) -> dict[str, Any]:
    """Return the result, ready for JSON."""
    tests = [
        {
            **{key: _finite(value) for key, value in curve._asdict().items()},
            "suggested_lr": suggested_lr(curve),
        }
        for curve in curves
    ]
    chosen = {"lr": None, "clip": None} if found is None else found._asdict()
    facts = {"model": config.model, "data": config.data, "seed": config.seed, "batch_size": config.batch_size}
    return {**facts, "found": found is not None, **chosen, "tests": tests}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
