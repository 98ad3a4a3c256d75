"""Options, exit statuses, error messages and JSON output that all commands share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import MAX_SIZE
from nfzoo.errors import ConfigError, NfzooError, nearest
from nfzoo.runtime.output import escaped, guarded, json_text


class Parser(argparse.ArgumentParser):
    """An argument parser with the conventions of all commands.

    Bad arguments raise a `ConfigError`. Options cannot be abbreviated. `--batch_size` means `--batch-size`. Help texts
    keep their line breaks.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})
        self.color = False  # newer Pythons colour help, by characters that `guarded` would show

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_dashes, words[:end]), *words[end:]], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._near(unknown[0].partition('=')[0])}")
        return options

    def _near(self, word: str) -> str:
        """Return options like an unknown one: those of groups that end so, such as `--optim.lr`, before all others."""
        if not word.startswith("-"):
            return ""
        known = [name for parser in (self, *self._inner()) for name in parser._option_string_actions]
        inner = [name for name in known if name.endswith(f".{word.lstrip('-')}")]
        if inner:
            return f"; did you mean {' or '.join(map(repr, inner))}?"
        bare = {name.lstrip("-"): name for name in known if name.startswith("--")}
        near = difflib.get_close_matches(word.lstrip("-").lower(), bare, n=3)
        return f"; did you mean {' or '.join(repr(bare[name]) for name in near)}?" if near else ""

    def _inner(self) -> list[argparse.ArgumentParser]:
        """Return the parsers of subcommands, such as those of `nfzoo plot`."""
        actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for action in actions for parser in action.choices.values()]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"there is no {value!r} but {', '.join(map(str, action.choices))}{near}"
            )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _with_dashes(word: str) -> str:
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if option.startswith("--") else word


def nonnegative_int(text: str) -> int:
    """Read a non-negative integer, as the `type` of an option."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999999")
    return int(text)


def positive_int(text: str) -> int:
    """Read an integer from 1 to `config.MAX_SIZE`, as the `type` of an option."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_SIZE}")
    return int(text)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add `--require-hash` and `--allow-pickle`, options of all commands that load models."""
    text = "refuse a downloaded model if the server states no hash to check it against"
    parser.add_argument("--require-hash", action="store_true", help=text)
    text = "also read weights in a pickle of torch's (.bin, .pt, .pth), if you trust who made it"
    parser.add_argument("--allow-pickle", action="store_true", help=text)


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords that these options are to `nfzoo.from_pretrained`."""
    return {"require_hash": options.require_hash, "allow_pickle": options.allow_pickle}


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add `--labels` and `--class-names`, options of commands that take the labels of images from a table."""
    text = (
        "CSV, TSV or parquet file with the columns path (from the folder of the data on), label, and split if it has "
    )
    text += "parts; others by name: labels.csv?path=file&label=breed (default: a folder is a class); sets of "
    text += "labels, for multi-label models: see --task of nfzoo train"
    parser.add_argument("--labels", metavar="FILE", help=text)
    text = "text file with the name of a class in each line (default: the labels, sorted)"
    parser.add_argument("--class-names", metavar="FILE", help=text)


def is_first_process() -> bool:
    """Return true in the first of the launched processes, which reports for all."""
    return os.environ.get("RANK", "0") == "0"


def reports_here(error: BaseException) -> bool:
    """Return whether this process reports an error: the first does, and one that alone meets it."""
    return is_first_process() or (isinstance(error, NfzooError) and error.of_one_process)


@guarded()
def run(
    program: str,
    work: Callable[[], int | None],
    *,
    failures: tuple[type[Exception], ...] = (OSError,),
    reports: Callable[[BaseException], bool] = reports_here,
) -> int:
    """Call `work` and return the exit status: 0 for `None`, an error's `exit_status`, 1 for a failure, 130 for Ctrl-C.

    Args:
        program: the beginning of an error message, such as `nfzoo evaluate`.
        failures: exceptions that bad input does not cause, such as those of a full disk or a compiler.
        reports: returns true if this process has to print the error, in one line on standard error.
    """
    try:
        try:
            return work() or 0
        finally:
            sys.stdout.flush()  # a reader that is gone is known here at the latest, and not when Python exits
    except (NfzooError, KeyboardInterrupt, BrokenPipeError, *failures) as error:
        return report(program, error, reports=reports)
    finally:
        leave_processes()


def report(program: str, error: BaseException, *, reports: Callable[[BaseException], bool] = reports_here) -> int:
    """Print the error that ends a command, and return the exit status; see `run`."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of the output, such as `head`, has what it wants. Python flushes once more when it exits.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    status = error.exit_status if isinstance(error, NfzooError) else 1
    if reports(error):
        text = escaped(" ".join(str(error).split())) or type(error).__name__
        print(f"{program}: {'' if status > 128 else 'error: '}{text}", file=sys.stderr)
    return status


def leave_processes() -> None:
    """Destroy the process group, if there is one, at the end of a program."""
    distributed = sys.modules.get("torch.distributed")  # commands that do not use torch do not import it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a DDP wrapper in a cycle of references would outlive the group, and may end the process
        distributed.destroy_process_group()


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise a `ConfigError` if this file or folder cannot be written; call it before long work."""
    target = path.resolve()
    if folder and target.exists() and not target.is_dir():
        raise ConfigError(f"{str(path)!r} is a file; give a folder")
    if not folder and target.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder; give a file in it")
    parent = next(p for p in ((target, *target.parents) if folder else target.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written: {str(parent)!r} is no folder that takes files")


def write_result(target: str | None, fields: Mapping[str, Any], text: str) -> None:
    """Print a result as text, and write it as JSON to the file `target`. For `-`, print the JSON instead."""
    written = json_text(fields)
    if target == "-":
        print(written, end="")
        return
    print(text)
    if target is not None:
        with replaced(target) as scratch:
            scratch.write_text(written, encoding="utf-8")
        print(f"wrote {escaped(target)}")
