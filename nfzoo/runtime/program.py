"""What the programs of the command line share: their options, exit statuses, one line for an error, and JSON output."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import MOST
from nfzoo.errors import ConfigError, NfzooError, nearest, printable


class Parser(argparse.ArgumentParser):
    """Parse the options of a command as all commands of nfzoo do.

    Bad arguments raise a `ConfigError`. Options cannot be abbreviated; `--batch_size` is `--batch-size`. Texts keep
    their line breaks.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_dashes, words[:end]), *words[end:]], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], self._option_string_actions)}")
        return options

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _with_dashes(word: str) -> str:
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if option.startswith("--") else word


def count(text: str) -> int:
    """A whole number from 0 on, as the `type` of an option."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 to `config.MOST`, as the `type` of an option."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST}")
    return int(text)


def first(_: object = None) -> bool:
    """Whether this is the first of the processes that were launched, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def run(
    program: str,
    work: Callable[[], int | None],
    *,
    faults: tuple[type[Exception], ...] = (OSError,),
    speaks: Callable[[Exception], bool] = first,
) -> int:
    """Do the work and give the exit status: its own (0 for `None`), 2 for bad input, 1 for a fault, 130 for Ctrl-C.

    Args:
        program: what an error message begins with, such as `nfzoo evaluate`.
        faults: what is no fault of the input: the disk, a compiler.
        speaks: whether this process tells of an error, in one line on standard error.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise  # the reader went away: `nfzoo` makes nothing of it
    except (NfzooError, *faults) as error:
        if speaks(error):
            text = printable(" ".join(str(error).split())) or type(error).__name__
            print(f"{program}: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, NfzooError) else 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def check_output(path: Path, *, folder: bool = False) -> None:
    """Raise a `ConfigError` now where a file or folder could not be written after all the work."""
    given, path = path, path.resolve()
    if folder and path.exists() and not path.is_dir():
        raise ConfigError(f"{str(given)!r} is a file; give a folder")
    if not folder and path.is_dir():
        raise ConfigError(f"{str(given)!r} is a folder; give a file in it")
    places = (path, *path.parents) if folder else path.parents
    above = next(place for place in places if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{str(given)!r} cannot be written: {str(above)!r} is no folder that takes files")


def publish(target: str | None, fields: Mapping[str, Any], text: str) -> None:
    """Print a result and write it as JSON; with `-` as the target the JSON is printed instead."""
    written = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        print(written, end="")
        return
    print(text)
    if target is not None:
        with replaced(target) as scratch:
            scratch.write_text(written, encoding="utf-8")
        print(f"wrote {printable(target)}")
