"""The docstrings of functions begin with a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Whose functions are described in the imperative.
FOLDERS = ("nfzoo", "hub", "conversion")

NO_VERB = re.compile(
    r"""
    a | all | an | any | as | at | attention | batches | both | by | bytes | canonical | channel | clipped |
    collectives | column | convolution | convolutions | dropout | each | every | everything | exponential | feature
    | file | for | fraction | fresh | from | grey | halves | how | if | in | indices | it | its | kernels | key |
    learning | leaves | left | loader | logits | loss | mean | modes | moved | multiply-accumulates | no | none |
    number | of | on | one | only | output | padding | parameter | parameters | pooled | rows | row | same | scaled
    | shape | some | standard | standardised | statistics | text | that | the | their | there | these | this | those
    | to | training | turned | two | values | what | when | where | whether | which | who | whose | why | width |
    with | without | zero
    """,
    re.VERBOSE | re.IGNORECASE,
)


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of each function and method in a file, without properties."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
            continue
        if text := ast.get_docstring(node):
            yield node.name, text


def begins_with_verb(text: str) -> bool:
    """Return whether a docstring begins with a capitalised word that is not in `NO_VERB`."""
    word = re.match(r"[A-Z][a-z-]+(?=[\s,:.])", text)
    return word is not None and NO_VERB.fullmatch(word[0]) is None


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 80
    wrong = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in sorted(modules)
        for name, text in _docstrings(path)
        if not begins_with_verb(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_nouns_pronouns_and_formulas_are_told_from_verbs() -> None:
    for text in ("Return x.", "Clip, then decay.", "Draw from N(0, 1)."):
        assert begins_with_verb(text), text
    for text in ("The blocks.", "What is read.", "`x + 1`.", "One step.", "N(0, 1).", "2x2 pool."):
        assert not begins_with_verb(text), text


def test_a_long_module_says_why() -> None:
    for folder in ("nfzoo", "hub", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") > 350:
                assert re.search(r"\blong(er)?\b", ast.get_docstring(ast.parse(text)) or ""), path
