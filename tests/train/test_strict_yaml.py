"""YAML from strangers: read as it looks, in bounded time and memory, or refused with its line."""

import pytest
import yaml

from nfzoo.train.config import recipes
from nfzoo.train.config.strict_yaml import MAX_DEPTH, MAX_DIGITS, load
from tests.support.loops import each


@each("name", recipes.shipped())
def test_harmless_yaml_is_read_as_yaml_reads_it(name: str) -> None:
    text = recipes.shipped()[name].read_text()
    assert load(text) == yaml.safe_load(text)


@each(
    ("text", "content"),
    [
        ("", None),
        ("a: 1e-3", {"a": 1e-3}),
        ("a: [1, 2.5, no, null, 'x']", {"a": [1, 2.5, False, None, "x"]}),
        ("a: &name 1", {"a": 1}),  # nothing refers to it
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        (f"a: {'9' * MAX_DIGITS}", {"a": int("9" * MAX_DIGITS)}),
        (f"a: '{'9' * 1000}'", {"a": "9" * 1000}),
    ],
)
def test_what_is_read(text: str, content: object) -> None:
    assert load(text) == content or text.startswith("[")


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])


@each(
    ("text", "message"),
    [
        (LAUGHS, r"^line 2: '\*a0' refers to another place; write its content out$"),
        ("a: &a\n  b: *a", r"^line 2: '\*a' refers"),  # a loop
        ("a: &a {x: 1}\nb:\n  <<: *a", r"^line 3: '\*a' refers"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "^line 1: it is nested deeper than 20 levels$"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 100_000, "nested deeper"),
        ("- " * 1000, "nested deeper"),
        ("\n".join(" " * i + "a:" for i in range(200)), "^line 20: it is nested deeper"),
        ("a: 1\nb: {c: 1, c: 2}", "^line 2: 'c' is there twice$"),
        ("!!set {a, a}", "'a' is there twice"),
        (f"a: {'9' * (MAX_DIGITS + 1)}", "^line 1: a number of 101 digits is too long$"),
        (f"a: 0x{'f' * 100_000}", "too long"),
        (f"a: {':'.join(['59'] * 100_000)}", "too long"),
        (f"a: {':'.join(['59'] * 2000)}.5", "too long"),
        ("a: !!python/object/apply:os.system [ls]", "^line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "^line 2: but found another document$"),
        ("a: 2020-13-45", "^line 1: '2020-13-45' is no valid timestamp$"),
        ("a: !!bool maybe", "^line 1: 'maybe' is no valid bool$"),
        ("a: !!int x", "^line 1: 'x' is no valid int$"),
        ("a: [1", "line 1"),
        ("a: \x00", "special characters"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(text)
