"""Read YAML that somebody else may have written, and refuse what is read otherwise than it looks, or takes for ever."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_TEXT = 1 << 16  # bytes of a file; PyYAML takes seconds for a megabyte
MAX_DEPTH = 20
MAX_DIGITS = 100

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, and refuses what `load` says."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"'*{self.peek_event().anchor}' refers to another place; write its content out",
                problem_mark=mark,
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it is nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)  # of a key that is no scalar, a list, which no set takes
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a tag that does not fit
            problem = f"{str(node.value)[:40]!r} is no valid {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_scalar(self, node: yaml.Node) -> Any:
        if node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} digits is too long"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_scalar(node)  # type: ignore[arg-type]


_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def load(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: says in which line, for what is no YAML; a key that is there twice in a mapping, of which YAML takes
            the last; an alias such as `*name`, by some dozens of which a text stands for more than any memory holds;
            more than `MAX_DEPTH` levels; and numbers of more than `MAX_DIGITS` digits.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ValueError(reason) from error
