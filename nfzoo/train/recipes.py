"""Read a training run from command-line arguments and YAML recipes."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from nfzoo.errors import ConfigError, NfzooError, nearest
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.transforms.mixing import Augment


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="nfzoo train",
        description="Train or fine-tune a model of the zoo.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        action="config",
        help="YAML file of options, or the name of one of nfzoo's; options after it override it.",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(argv: list[str] | None = None) -> TrainConfig:
    """A configuration from command-line arguments. A `ConfigError` for anything that does not fit."""
    arguments = _with_files(sys.argv[1:] if argv is None else argv)
    try:
        return _read(arguments)
    except ConfigError as error:
        raise ConfigError(_of_recipe(arguments, str(error))) from error


def _read(arguments: list[str]) -> TrainConfig:
    parser = _parser()
    try:
        namespace = parser.parse_args(arguments)
        if not isinstance(namespace.get("optim"), Namespace):
            raise ConfigError(f"optim must be a mapping of options such as lr, not {namespace.get('optim')!r}")
        fields = dict(parser.instantiate(namespace))
        fields.pop("recipe", None)
        return TrainConfig(**fields)
    except NfzooError:
        raise
    except Exception as error:  # jsonargparse raises many kinds; all mean that the arguments do not fit
        raise ConfigError(_reason(str(error))) from error


def _of_recipe(arguments: list[str], reason: str) -> str:
    """The reason, with the recipe file that gives the same one when it is read alone."""
    given = [a.partition("=") for a in arguments]
    files = [b[0] for a, b in itertools.pairwise(given) if a[0] == "--recipe" and not a[1]]
    files += [value for flag, equals, value in given if flag == "--recipe" and equals]
    for file in files:
        try:
            _read(["--recipe", file, "--model", "m", "--data", "d", "--output", "o"])
        except ConfigError as error:
            if str(error) == reason:
                return f"the recipe {file!r}: {reason}"
    return reason


def _reason(text: str) -> str:
    """An error of jsonargparse in one line; of a value that fits none of several types, what the first says."""
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(text.split())).replace("typing.", "")
    one = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', text)
    several = re.search(
        r'Parser key "([^"]+)": .*Union subtypes Subtypes: .*? Errors: - Expected an? (.+?) - .*Given value: (.*)$',
        text,
    )
    found = one or several
    if found is not None:
        return f"{found[1]}: expected {found[2]}, not {found[3]!r}"
    inside = re.search(
        r'^Parser key "([^"]+)": .*? Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*?) - ', text
    )
    if inside is not None:
        return f"{inside[1]}.{inside[2]}: expected {inside[3]}, not {inside[4]!r}"
    inner = re.search(r"Union subtypes Subtypes: .*? Errors: - (.*?)(?: - |$)", text)
    if inner is None:
        return text
    place = re.search(r'Parser key "([^"]+)"', text)
    return f"{place[1]}: {inner[1]}" if place else inner[1]


def shipped() -> dict[str, Path]:
    """The recipes that come with nfzoo: name -> YAML file."""
    folder = resources.files("nfzoo.recipes")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if f.name.endswith(".yaml")}


def _with_files(argv: list[str]) -> list[str]:
    """The arguments with the names of shipped recipes replaced by their files. A file of that name here comes first."""
    found = list(argv)
    for i, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag != "--recipe" or (not equals and i + 1 == len(found)):
            continue
        name = value if equals else found[i + 1]
        if Path(name).is_file():
            _check_file(Path(name))
            continue
        known = shipped()
        if name not in known and ("/" in name or name.endswith((".yaml", ".yml"))):
            inside = Path(name) / "train.yaml"
            hint = f"; did you mean {str(inside)!r}?" if inside.is_file() else ""
            kind = "is a folder, no recipe file" if Path(name).is_dir() else "is no recipe file"
            raise ConfigError(f"{name!r} {kind}{hint}")
        if name not in known:
            near = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
            raise ConfigError(f"there is no recipe {name!r}, neither a file nor one of nfzoo's{near}")
        if equals:
            found[i] = f"--recipe={known[name]}"
        else:
            found[i + 1] = str(known[name])
    return found


class _OnceLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)  # of a key that is no scalar, a list, which no set takes
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_file(path: Path) -> None:
    """Raise a `ConfigError` that names the file, for one that is not YAML or has options that there are not."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ConfigError(f"the recipe {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"the recipe {str(path)!r} holds {kind}, not options such as `model: nfnet-f0`")
    levels: list[tuple[str, Any, Any]] = [("", content, TrainConfig)]
    levels += [(f"{name}.", content.get(name), kind) for name, kind in (("optim", OptimConfig), ("augment", Augment))]
    for prefix, given, kind in levels:
        known = {f.name for f in dataclasses.fields(kind)}
        if given is not None and not isinstance(given, dict):
            raise ConfigError(
                f"the recipe {str(path)!r}: {prefix[:-1]} must be a mapping of options such as "
                f"{min(known)}, not {given!r}"
            )
        for key in given if isinstance(given, dict) else ():
            if str(key).partition(".")[0] not in known:
                near = nearest(str(key), known)
                raise ConfigError(
                    f"the recipe {str(path)!r} has the option {prefix + str(key)!r}, which there is not{near}"
                )
