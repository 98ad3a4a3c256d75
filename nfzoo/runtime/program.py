"""Options, exit statuses, error messages and JSON output that all commands share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import MAX_SIZE
from nfzoo.errors import ConfigError, NfzooError, nearest
from nfzoo.runtime.output import escaped, guarded, json_text, without_bars

PRINTED = "-"
"""The value of `--json` for standard output."""

EXIT_STATUSES = """
exit status:
  0    done
  1    a failure, such as a full disk; a result that says no: findings of `data check`, a model that does
       not fit of `tpu-check`, runs that did not survive of `drill`, no rate of `find-lr`
  2    bad input, such as an option, a file or a name; one line on standard error says what to do
  130  Ctrl-C
  141  the reader of the output went away
  143  SIGTERM; other signals that end a command add their number to 128 too
"""

_wanted: ContextVar[bool] = ContextVar("_wanted", default=False)  # see `parser_of`


class Parser(argparse.ArgumentParser):
    """An argument parser with the conventions of all commands.

    Bad arguments raise a `ConfigError`. Options cannot be abbreviated. `--batch_size` means `--batch-size`. Help texts
    keep their line breaks. `add_output_options` adds `--json` and `--quiet`.
    """

    json_takes_a_word = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})
        self.color = False  # newer Pythons colour help, by characters that `guarded` would show

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        if _wanted.get():
            raise _FoundError(self)
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(_with_dashes, words[:end])
        if not self.json_takes_a_word:
            after = [*words[1:], ""]
            words[:end] = [
                f"--json={PRINTED}" if word == "--json" and after[i] != PRINTED else word
                for i, word in enumerate(words[:end])
            ]
        return super().parse_known_args(words, namespace)

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


class _FoundError(BaseException):
    """The parser that `parser_of` looks for; no command catches it."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(command: Callable[[list[str]], int]) -> Parser:
    """Return the parser of a command, which is called up to the point where it would read its arguments."""
    token = _wanted.set(True)
    try:
        command([])
    except _FoundError as found:
        return found.parser
    finally:
        _wanted.reset(token)
    raise TypeError(f"{command!r} reads its arguments by no Parser")


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


def add_output_options(parser: argparse.ArgumentParser, *, word_is_file: bool = False) -> None:
    """Add `--json` and `--quiet`, options of all commands.

    Args:
        word_is_file: whether the word after `--json` is its file, as in `--json FILE`. Elsewhere the word may be a
            model or an image, which would be overwritten, and a file is given as in `--json=FILE` alone.
    """
    assert isinstance(parser, Parser)
    parser.json_takes_a_word = word_is_file
    metavar = "FILE" if word_is_file else "=FILE"
    text = f"print the result as JSON, and nothing else; with {'' if word_is_file else '='}FILE, write it there as well"
    parser.add_argument("--json", nargs="?", const=PRINTED, default=None, metavar=metavar, help=text)
    text = "print results, warnings and errors alone: no progress, and not what was written"
    parser.add_argument("--quiet", action="store_true", default=False, help=text)


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
    if path.exists() and not (path.is_file() or path.is_dir()):  # which a rename would replace
        raise ConfigError(f"{str(path)!r} is a device or a pipe; give a {'folder' if folder else 'file'}")
    parent = next(p for p in ((target, *target.parents) if folder else target.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written: {str(parent)!r} is no folder that takes files")


def check_packages(what: str, packages: Iterable[str], extra: str) -> None:
    """Raise a `ConfigError` unless packages are installed.

    Args:
        what: what needs them, such as `ONNX`.
        packages: names by which they are imported.
        extra: the extra of nfzoo that brings them.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'nfzoo[{extra}]'")


@contextlib.contextmanager
def speaking(options: argparse.Namespace) -> Iterator[None]:
    """Send what a command says besides its result to where `--json` and `--quiet` want it.

    In the block, standard output is for notes. They go to standard error where the result is printed as JSON, and
    nowhere with `--quiet`, which hides progress bars too. `write_result` prints to the standard output of before.

    Raises:
        ConfigError: if the file of `--json` cannot be written.
    """
    if options.json not in (None, PRINTED):
        check_writable(Path(options.json))
    options.results = sys.stdout
    with contextlib.ExitStack() as stack:
        if options.quiet:
            stack.enter_context(without_bars())
            notes = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(notes))
        elif options.json == PRINTED:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def run_parsed(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int | None],
    **options: Any,
) -> int:
    """Read the arguments, call `work` with them within `speaking`, and return the exit status.

    Args:
        options: those of `run`.
    """

    def parsed() -> int | None:
        namespace = parser.parse_args(argv)
        with speaking(namespace):
            return work(namespace)

    return run(parser.prog, parsed, **options)


def write_result(options: argparse.Namespace, fields: Any, text: str | None = None) -> None:
    """Print a result as text, or as JSON where `--json` says so, or write the JSON to a file besides.

    With `--quiet` and a file nothing is printed. JSON has `null` for numbers that are not finite.

    Args:
        options: those of `add_output_options`, within `speaking`.
        fields: ready for JSON.
        text: `None` where notes have said it all.
    """
    target = options.json
    if target == PRINTED:
        print(json_text(_finite(fields)), end="", file=options.results, flush=True)
        return
    if text is not None and not (options.quiet and target is not None):
        print(text, file=options.results)
    if target is not None:
        with replaced(target) as scratch:
            scratch.write_text(json_text(_finite(fields)), encoding="utf-8")
        print(f"wrote {escaped(target)}")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
