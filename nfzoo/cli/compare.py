"""Training runs side by side: `nfzoo compare RUN RUN …`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nfzoo.analysis.figures import METRICS, compared_curves, held_out_curve, metric_of, new_figure, read_metrics
from nfzoo.analysis.style import check_png
from nfzoo.errors import ConfigError, DataError
from nfzoo.files import read_text
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped, table
from nfzoo.train.config import default_augment, strict_yaml
from nfzoo.train.run_folder import METRICS_FILE, RUN_FILE

_OWN = ("output",)  # options that differ between any two runs


class Run(NamedTuple):
    """A training run: its name, its options under dotted names, and the figures of its epochs."""

    name: str
    options: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def held_out(self) -> list[tuple[int, float, float | None]]:
        """Epoch, first metric and loss on held-out images, of the averaged weights where the run has them."""
        return held_out_curve(self.rows)

    def figures(self) -> dict[str, Any]:
        """Return the best and the last figures, JSON-ready, with `None` for what was not measured."""
        last, held_out = self.rows[-1], self.held_out
        best = max(held_out, key=lambda point: point[1], default=None)  # the first of equal ones
        metric = metric_of(self.rows)
        return {
            "epochs": last["epoch"],
            f"best_{metric}": best and best[1],
            "best_epoch": best and best[0],
            metric: held_out[-1][1] if held_out else None,
            "loss": held_out[-1][2] if held_out else None,
            "train_loss": last.get("train_loss"),
        }


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder. A folder of figures alone, without `train.yaml`, has no options.

    Raises:
        DataError: for files that are missing or damaged.
    """
    rows = read_metrics(folder / METRICS_FILE)
    path = folder / RUN_FILE
    try:
        options = strict_yaml.load(read_text(path, strict_yaml.MOST_TEXT))
    except FileNotFoundError:
        options = {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise DataError(f"{path} must hold options such as `model: nfnet-f0`, not {options!r}")
    if "augment" in options and options["augment"] is None:  # as the run took it
        options["augment"] = dataclasses.asdict(default_augment(options.get("data", "")))
    return Run(name, _flat(options), rows)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        value = list(value) if isinstance(value, tuple) else value
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the values of each option in which runs differ, `None` where a run lacks it."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    values = {name: [run.options.get(name) for run in runs] for name in names if name not in _OWN}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def main(argv: list[str] | None = None) -> int:
    """Print how training runs differ in options and results: `nfzoo compare`."""
    parser = program.Parser(
        prog="nfzoo compare",
        description="Show in which options training runs differ, and what came of it: the best and the last accuracy\n"
        "on held-out images, of the averaged weights where a run has them.\n\n"
        "example: nfzoo compare runs/a runs/b runs/c --output compared.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a training run; at least two")
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw loss and accuracy of the runs over each other")
    program.add_output_options(parser, word_is_file=True)
    return program.run_parsed(parser, argv, _compare)


def _compare(options: argparse.Namespace) -> None:
    folders = [path.parent if path.name == METRICS_FILE else path for path in options.runs]
    if len({folder.resolve() for folder in folders}) < 2:
        raise ConfigError("a comparison needs at least two different runs; give their folders")
    if options.output is not None:
        check_png(options.output)
        program.check_writable(options.output)
        new_figure(1, 1)
    if options.json is not None and Path(options.json).name == METRICS_FILE:
        raise ConfigError(f"--json {options.json!r} would replace a run's figures; give --json=FILE, or --json last")
    last = [folder.resolve().name for folder in folders]
    counts = Counter(last)
    runs = [
        read_run(folder, name if counts[name] == 1 else str(folder)) for folder, name in zip(folders, last, strict=True)
    ]
    different, figures = differences(runs), [run.figures() for run in runs]
    metrics = {metric_of(run.rows): run.name for run in runs}
    if len(metrics) > 1:
        raise ConfigError(
            f"{metrics['map']!r} is a run of several labels an image and {metrics['accuracy']!r} is not: they have no "
            "metric in common"
        )
    (metric,) = metrics
    if options.output is not None:
        curves = [(run.name, run.held_out) for run in runs]
        compared_curves(curves, options.output, metric=metric)
    fields = {
        "runs": [
            {"name": run.name, "options": {name: row[i] for name, row in different.items()}, **figures[i]}
            for i, run in enumerate(runs)
        ]
    }
    program.write_result(options, fields, _text(runs, different, figures, metric))
    if options.output is not None:
        print(f"wrote {escaped(str(options.output))}")


def _text(
    runs: Sequence[Run], different: Mapping[str, Sequence[Any]], figures: Sequence[Mapping[str, Any]], metric: str
) -> str:
    rows = [("", *(run.name for run in runs))]
    rows += [(name, *map(_value, values)) for name, values in different.items()]
    for key, words, form in (
        ("epochs", "epochs done", "{:,}"),
        (f"best_{metric}", f"best {METRICS[metric]}", "{:.2%}"),
        ("best_epoch", "in epoch", "{:,}"),
        (metric, f"last {METRICS[metric]}", "{:.2%}"),
        ("loss", "last loss", "{:.4f}"),
        ("train_loss", "last training loss", "{:.4f}"),
    ):
        rows.append((words, *("-" if row[key] is None else form.format(row[key]) for row in figures)))
    if not different:
        rows.insert(1, ("no option differs", *("" for _ in runs)))
    return table(rows, "<" + ">" * len(runs))


def _value(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
