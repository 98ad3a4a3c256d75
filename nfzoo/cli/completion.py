"""Completion by the Tab key: `nfzoo completion bash`, `zsh` or `fish` prints a script for that shell.

The script is static: it holds the names of commands, options, models and recipes. A shell then need not start Python,
which would import torch for seconds. The package shtab writes it from the parsers of all commands.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfzoo.errors import ConfigError
from nfzoo.runtime import program

SHELLS = ("bash", "zsh", "fish")

_REST = {"find-lr": "train"}  # a command that takes the options of another as well
_MODELS = ("--model", "--teacher")
_FILES = ("FILE", "=FILE", "PATH", "DIR", "FOLDER", "IMAGE", "RUN", "PNG", "YAML", "OUT", "SOURCE")
_FILE_OPTIONS = ("--data", "--output", "--labels", "--validation-labels", "--class-names", "--augmented-sheet")


def main(argv: list[str] | None = None) -> int:
    """Print a completion script: `nfzoo completion SHELL`."""
    parser = program.Parser(
        prog="nfzoo completion",
        description="Print a script by which a shell completes commands, options, models, recipes and files.\n\n"
        "examples:\n"
        "  nfzoo completion bash > ~/.local/share/bash-completion/completions/nfzoo\n"
        "  nfzoo completion zsh > ~/.zfunc/_nfzoo          with `fpath+=(~/.zfunc)` before compinit in ~/.zshrc\n"
        "  nfzoo completion fish > ~/.config/fish/completions/nfzoo.fish",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _completion)


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ConfigError("completion needs shtab: pip install 'nfzoo[completion]'") from error
    script = shtab.complete(_whole_parser(shtab), options.shell)
    program.write_result(options, {"shell": options.shell, "script": script}, script.removesuffix("\n"))


def _whole_parser(shtab: Any) -> program.Parser:
    """Return one parser that has those of all commands."""
    from nfzoo.cli.main import COMMANDS
    from nfzoo.train.config.recipes import shipped
    from nfzoo.variants import VARIANTS

    known = {"models": tuple(VARIANTS), "recipes": tuple(sorted(shipped()))}
    complete = {kind: _names_or_files(kind, names) for kind, names in known.items()} | {"files": shtab.FILE}
    whole = program.Parser(prog="nfzoo")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    parsers: dict[str, program.Parser] = {}
    for name, (module, function, _) in COMMANDS.items():
        parsers[name] = program.parser_of(getattr(importlib.import_module(module), function))
    for name, (_, _, summary) in COMMANDS.items():
        parents = [parsers[name]]
        if name in _REST:  # its own options come first, and are not there twice
            parents.insert(0, parsers[_REST[name]])
        one = commands.add_parser(name, help=summary, parents=parents, add_help=False, conflict_handler="resolve")
        _say_what_follows(one, complete)
    return whole


def _say_what_follows(parser: argparse.ArgumentParser, complete: Mapping[str, Any]) -> None:
    """Give each argument of a parser the attributes by which shtab completes its value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _say_what_follows(inner, complete)
        elif action.choices is None and action.nargs != 0:
            words = str(action.metavar or "")
            if "|" in words or words == "BOOL":
                action.choices = words.split("|") if "|" in words else ("true", "false")
            elif kind := _kind(action):
                action.complete = complete[kind]  # type: ignore[attr-defined]


def _kind(action: argparse.Action) -> str | None:
    options = action.option_strings
    if "--recipe" in options:
        return "recipes"
    if action.metavar == "MODEL" or any(option in _MODELS for option in options):
        return "models"
    if action.metavar in _FILES or action.type is Path or any(option in _FILE_OPTIONS for option in options):
        return "files"
    return None


def _names_or_files(kind: str, names: Sequence[str]) -> dict[str, Any]:
    """Return what shtab takes to complete one of some names or a file."""
    function, words = f"_nfzoo_{kind}", " ".join(names)
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}\n',
            "zsh": f"{function}() {{\n  _alternative '{kind}:{kind}:({words})' 'files:file:_files'\n}}\n",
            "fish": f"function {function}\n  string join \\n {words}\n  __fish_complete_path (commandline -ct)\nend\n",
        },
    }
