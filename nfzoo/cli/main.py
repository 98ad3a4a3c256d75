"""The `nfzoo` command: its help, and the way to its commands.

Exit statuses are those of `nfzoo.runtime.program.EXIT_STATUSES`.
"""

from __future__ import annotations

import importlib
import sys

from nfzoo import __version__
from nfzoo.errors import ConfigError, nearest
from nfzoo.runtime import program
from nfzoo.runtime.cpu import wait_briefly
from nfzoo.runtime.output import guarded

# Name -> (module, function, summary). A module is imported when its command is called.
COMMANDS = {
    "list": ("nfzoo.cli.list_models", "list_models", "the models of the zoo"),
    "info": ("nfzoo.cli.models", "info", "what a model costs, stage by stage"),
    "data": ("nfzoo.cli.data", "main", "what a data set holds, and what is wrong with it"),
    "train": ("nfzoo.train", "main", "train or fine-tune a model"),
    "find-lr": ("nfzoo.tuner.run", "main", "a learning rate for a training, by a short test"),
    "evaluate": ("nfzoo.evaluate", "main", "top-1 and top-5 accuracy on a folder of images"),
    "benchmark": ("nfzoo.benchmark.run", "main", "all ways to run a model here: time, accuracy, size"),
    "predict": ("nfzoo.cli.predict", "main", "what a model sees in a few images"),
    "bulk": ("nfzoo.bulk", "main", "labels or embeddings of very many images, as files"),
    "plot": ("nfzoo.cli.plot", "main", "the signal-propagation plot of a model, the curves of a run"),
    "compare": ("nfzoo.cli.compare", "main", "training runs side by side: options, curves, results"),
    "convert": ("nfzoo.cli.models", "convert", "weights of other frameworks to nfzoo's, and back"),
    "drill": ("nfzoo.drill.run", "main", "whether a run survives kills, full disks and power cuts, on this machine"),
    "push": ("nfzoo.cli.publish", "push", "a trained model onto the Hugging Face Hub"),
    "serve": ("nfzoo.serve.run", "main", "a model over HTTP: labels and features of images"),
    "space": ("nfzoo.cli.publish", "space", "a web page on which models label pictures"),
    "export": ("nfzoo.export.run", "main", "a model for other runtimes: ONNX, AOTInductor, torch.export, StableHLO"),
    "tpu-check": ("nfzoo.export.tpu_check", "main", "whether a model compiles for a TPU and fits it, without one"),
    "completion": ("nfzoo.cli.completion", "main", "completion of commands and options by the Tab key, for a shell"),
}

_EXAMPLES = """
examples:
  nfzoo info nfnet-f0
  nfzoo train --model nfnet-test --data digits --output runs/digits
  nfzoo predict runs/digits photos/
  nfzoo evaluate runs/pets --data pets/val
  nfzoo convert dm:F1 models/f1
  nfzoo push runs/pets me/pets
  nfzoo export runs/pets --format onnx --output pets-onnx

`nfzoo COMMAND --help` says more about each. All take --json and --quiet.
"""


@guarded()
def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    wait_briefly()
    try:
        if arguments and arguments[0] in COMMANDS:
            module, function, _ = COMMANDS[arguments[0]]
            status = getattr(importlib.import_module(module), function)(arguments[1:])
        else:
            status = program.run("nfzoo", lambda: _help(arguments))
    except KeyboardInterrupt:
        return 130
    return status


def _help(arguments: list[str]) -> int:
    summaries = "\n".join(f"  {name:<10} {summary}" for name, (_, _, summary) in COMMANDS.items())
    parser = program.Parser(
        prog="nfzoo",
        usage="nfzoo [-h] [--version] COMMAND ...",
        description="Normalizer-Free networks in PyTorch: NFNet, NF-ResNet and NF-RegNet.",
        epilog=f"commands:\n{summaries}\n{_EXAMPLES}{program.EXIT_STATUSES}",
    )
    parser.add_argument("--version", action="version", version=f"nfzoo {__version__}")
    _, words = parser.parse_known_args(arguments)
    if words:
        near = nearest(words[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command {words[0]!r}{near}")
    parser.print_help(sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
