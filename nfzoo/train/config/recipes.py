"""Read a training run from command-line arguments and YAML recipes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from nfzoo.checkpoint.run_state import newest_options
from nfzoo.errors import ConfigError, nearest, shown
from nfzoo.files import nearest_path, read_text
from nfzoo.runtime import program
from nfzoo.train.config import strict_yaml
from nfzoo.train.config.train_config import STARTING, DistillationConfig, OptimConfig, TrainConfig
from nfzoo.train.run_folder import RUN_FILE, STATES
from nfzoo.transforms.mixing import Augment

Fields = dict[str, Any]  # arguments of `TrainConfig`; those of its groups are dictionaries of their own

_GROUPS: dict[str, type] = {"optim": OptimConfig, "augment": Augment, "distillation": DistillationConfig}
_OPTIMIZER_OPTIONS = "--optim.options."
_REQUIRED = ("model", "data", "output")
_METAVARS = {int: "N", float: "X", bool: "BOOL", str: "TEXT", dict: "YAML", tuple: "[X,X]"}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """Read a training run from command-line arguments, in which options override the recipes before them.

    Raises:
        ConfigError: for an unknown option or recipe, and for a value that does not fit; names the recipe it comes from.
    """
    return parse_command(argv)[0]


def parse_command(argv: list[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Read a training run as `parse` does, and the options that are of the command and not of the run: `--json`."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser(arguments).parse_args(arguments, argparse.Namespace(fields={}, recipes=[]))
    fields: Fields = options.fields
    if fields.get("resume") and "output" in fields and not {"model", "data"} <= fields.keys():
        fields = _of_the_run(fields)
    missing = [name for name in _REQUIRED if name not in fields]
    try:
        if options.print_config:
            config = _train_config({**dict.fromkeys(missing, "x"), **fields}, options.allow_import)
            recipe = yaml.safe_load(config.to_yaml())
            recipe |= dict.fromkeys(missing)
            with program.speaking(options):
                program.write_result(options, recipe, yaml.safe_dump(recipe, sort_keys=False).removesuffix("\n"))
            raise SystemExit(0)
        if missing:
            options_missing = ", ".join(f"--{name}" for name in missing)
            raise ConfigError(f"missing {options_missing}; give what is missing as an option or in a recipe")
        return _train_config(fields, options.allow_import), options
    except ConfigError as error:
        for name, content in options.recipes:  # that which is refused for the same reason when it is read alone
            try:
                _train_config({**dict.fromkeys(_REQUIRED, "x"), **content}, options.allow_import)
            except ConfigError as same:
                if str(same) == str(error):
                    raise ConfigError(f"the recipe {name!r}: {error}") from error
        raise


def python_options(options: Fields) -> Fields:
    """Check names and types of options that a Python program gives, as those of recipes and of the command line.

    Paths become text. The groups `optim` and `augment` may be mappings, or an `OptimConfig` and an `Augment`.

    Raises:
        ConfigError: for an option that is unknown or of the wrong type.
    """
    made = {name: value for name, value in options.items() if isinstance(value, _GROUPS.get(name, ()))}
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items() if k not in made}
    return {**_converted(TrainConfig, plain), **made}


def shipped() -> dict[str, Path]:
    """Return the recipes that come with nfzoo: name -> YAML file."""
    folder = resources.files("nfzoo.recipes")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if f.name.endswith(".yaml")}


def _train_config(fields: Fields, allow_import: bool) -> TrainConfig:
    groups = {name: _GROUPS[name](**value) for name, value in fields.items() if name in _GROUPS and value is not None}
    config = TrainConfig(**{**fields, **groups})
    if config.optim.is_foreign and not allow_import:  # an import runs the module, and a recipe may be somebody else's
        raise ConfigError(
            f"optim.name {config.optim.name!r} is neither sgd, adamw, nor an optimizer of torch such as "
            "torch.optim.Adam; to import it, pass --allow-import, which is no part of a recipe"
        )
    return config


def _of_the_run(fields: Fields) -> Fields:
    """Return the options of the run in the output folder, with those that are given in the place of its own.

    Raises:
        ConfigError: if there is no run.
    """
    output = Path(fields["output"])
    content = newest_options(output / STATES)  # of before the first epoch's end, too
    if content is not None:
        own = {name: value for name, value in content.items() if name not in (*STARTING, "output")}
        try:
            own = _converted(TrainConfig, own)
        except ConfigError as error:
            raise ConfigError(
                f"the run in {str(output)!r} has options that this nfzoo does not take: {error}"
            ) from error
    elif (output / RUN_FILE).is_file():
        own = _read(output / RUN_FILE)
    else:
        missing = " and ".join(f"--{name}" for name in ("model", "data") if name not in fields)
        near = "" if output.exists() else nearest_path(output)
        raise ConfigError(f"{str(output)!r} holds no run to go on with{near}; a new one needs {missing} as well")
    _update(own, fields)
    return own


# ---------------------------------------------------------------- options


def _parser(arguments: list[str]) -> program.Parser:
    parser = program.Parser(
        prog="nfzoo train",
        description="Train or fine-tune a model of the zoo. An option overrides the recipes before it; BOOL is true\n"
        "or false, and null is the default of an option that has no other value.",
        argument_default=argparse.SUPPRESS,
    )
    text = "YAML file of options, or the name of one of nfzoo's; options after it override it"
    parser.add_argument("--recipe", action=_Recipe, metavar="NAME", help=text)
    text = "print all options as a recipe, and do nothing else"
    parser.add_argument("--print-config", action="store_true", default=False, help=text)
    text = "import the module of an optimizer that is not torch's, which runs it"
    parser.add_argument("--allow-import", action="store_true", default=False, help=text)
    program.add_output_options(parser, word_is_file=True)
    for name, kind in get_type_hints(TrainConfig).items():
        group = _GROUPS.get(name)
        for inner, inner_kind in ({"": kind} if group is None else {"": dict, **get_type_hints(group)}).items():
            key = f"{name}.{inner}" if inner else name
            first = _first_kind(inner_kind)
            variadic = get_args(first)[1:] == (...,)
            metavar = (
                "N,N"
                if variadic
                else "|".join(get_args(first))
                if get_origin(first) is Literal
                else _METAVARS[get_origin(first) or first]
            )
            text = _documented(group, inner) if group and inner else _documented(TrainConfig, name)
            parser.add_argument(f"--{key.replace('_', '-')}", action=_Option, dest=key, metavar=metavar, help=text)
    for flag in {a.partition("=")[0] for a in arguments if a.startswith(_OPTIMIZER_OPTIONS)}:
        key = flag.removeprefix("--").replace("-", "_")
        parser.add_argument(flag.replace("_", "-"), action=_Option, dest=key, help=argparse.SUPPRESS)
    return parser


class _Option(argparse.Action):
    """Set one field, such as `epochs` or `optim.lr`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        name, *inner = self.dest.split(".", 2)
        content = values
        if len(inner) == 2:  # optim.options.betas
            options = namespace.fields.get(name, {}).get(inner[0], {})
            content = {**options, inner[1]: _load(values)}
        _update(namespace.fields, _converted(TrainConfig, {name: {inner[0]: content} if inner else content}))


class _Recipe(argparse.Action):
    """Set the fields of a recipe."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        content = _read(_find(values))
        for name in STARTING:
            if content.get(name):  # files written before hold `false`
                value = str(content[name]).lower()
                raise ConfigError(
                    f"the recipe {values!r} has {name}: {value}, which is no part of a recipe; remove the line, and "
                    f"pass --{name.replace('_', '-')} {value} where it is meant"
                )
        namespace.recipes.append((values, content))
        _update(namespace.fields, content)


def _update(fields: Fields, new: Fields) -> None:
    for name, value in new.items():
        old = fields.get(name)
        fields[name] = {**old, **value} if name in _GROUPS and old and value else value


def _documented(cls: type, name: str) -> str:
    """Return what the docstring of a dataclass says about a field, with the default value, for `--help`."""
    match = re.search(rf"^        {name}: (.*(?:\n            .*)*)", cls.__doc__ or "", re.MULTILINE)
    text = " ".join(match[1].split()).rstrip(".") if match else ""
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    if default is None or default is dataclasses.MISSING:
        return text.replace("%", "%%")
    return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})".replace("%", "%%")


# ---------------------------------------------------------------- values


def _first_kind(kind: Any) -> Any:
    """Return `int` of `int | None`."""
    return kind if get_origin(kind) in (None, Literal, tuple, dict) else get_args(kind)[0]


def _converted(cls: type, content: Fields, prefix: str = "") -> Fields:
    """Check names and types of fields, from YAML or from the text of options."""
    kinds = get_type_hints(cls)
    fields: Fields = {}
    for key, value in content.items():
        name, _, inner = str(key).partition(".")
        if name not in kinds:
            inner_ones = [
                f"{group}.{name}" for group, cls in _GROUPS.items() if not prefix and name in get_type_hints(cls)
            ]
            near = f"; did you mean {' or '.join(map(repr, inner_ones))}?" if inner_ones else nearest(str(key), kinds)
            raise ConfigError(f"there is no option {prefix + str(key)!r}{near}")
        value = _value(prefix + name, kinds[name], {inner: value} if inner else value)
        old = fields.get(name)
        if name in fields and not (name in _GROUPS and old and value and old.keys().isdisjoint(value)):
            raise ConfigError(f"{prefix + name} is there twice, the second time as {prefix + str(key)}")
        _update(fields, {name: value})
    return fields


def _value(name: str, kind: Any, value: Any) -> Any:
    optional, kind = kind != _first_kind(kind), _first_kind(kind)
    origin = get_origin(kind) or kind
    if isinstance(value, np.generic):  # of a Python program, as a search over numbers gives it
        value = value.item()
    if origin is tuple and get_args(kind)[1:] == (...,) and value not in (None, "null"):
        return _whole_numbers(name, value)
    if isinstance(value, str) and origin not in (str, Literal):
        value = _load(value)
    if value is None or (optional and value == "null"):
        return None  # the dataclass refuses it where there has to be a value
    if name in _GROUPS:
        if not isinstance(value, dict):
            options = min(get_type_hints(_GROUPS[name]))
            raise ConfigError(f"{name} must be a mapping of options such as {options}, not {value!r}")
        return _converted(_GROUPS[name], value, f"{name}.")
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
        return tuple(_value(name, inner, v) for inner, v in zip(get_args(kind), value, strict=True))
    if origin is Literal and value is False and "no" in get_args(kind):
        return "no"  # which YAML reads as false
    if origin is Literal and value in get_args(kind):
        return value
    if origin is float and type(value) is int:
        return float(value)
    if type(value) is origin and origin is not tuple:
        return value
    if origin is dict and optional and isinstance(value, str):  # `dict | str`
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    words[tuple] = f"a list of {len(get_args(kind))} numbers"
    words[Literal] = f"one of {', '.join(map(str, get_args(kind)))}"
    raise ConfigError(f"{name} must be {words[origin]}, not {shown(value)}")


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Convert a list of whole numbers, or text such as `128,160` or `[128, 160]`."""
    items: Any = value
    if isinstance(value, str):  # not as YAML, to which 128:160 is one number in base 60
        words = [word.strip() for word in value.strip().removeprefix("[").removesuffix("]").split(",")]
        items = [int(word) if word.isdecimal() else word for word in words]
    if not isinstance(items, list | tuple) or not all(type(item) is int for item in items):
        raise ConfigError(f"{name} must be whole numbers such as 128,160, not {value!r}")
    return tuple(items)


def _load(text: str) -> Any:
    """Read YAML; text that is none stays text, which is then refused as a value."""
    try:
        return strict_yaml.load(text)
    except ValueError:
        return text


# ---------------------------------------------------------------- files


def _find(name: str) -> Path:
    """Return the file of a recipe: a file of that name comes before nfzoo's recipe."""
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if name in known:
        return known[name]
    if "/" in name or name.endswith((".yaml", ".yml")):
        inside = path / RUN_FILE
        hint = f"; did you mean {str(inside)!r}?" if inside.is_file() else nearest_path(path)
        raise ConfigError(f"{name!r} {'is a folder, no recipe file' if path.is_dir() else 'is no recipe file'}{hint}")
    near = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
    raise ConfigError(f"there is no recipe {name!r}, neither a file nor one of nfzoo's{near}")


def _read(path: Path) -> Fields:
    """Read a recipe.

    Raises:
        ConfigError: names the file, for one that is not YAML and for an option that is unknown or of the wrong type.
    """
    try:
        content = strict_yaml.load(read_text(path, strict_yaml.MOST_TEXT))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"the recipe {str(path)!r} holds {kind}, not options such as `model: nfnet-f0`")
    try:
        return _converted(TrainConfig, content)
    except ConfigError as error:
        raise ConfigError(f"the recipe {str(path)!r}: {error}") from error
