"""The pages on range tests and on lengths of runs are what their recorded figures say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.claims import learning_rates, run_lengths
from nfzoo.tuner.curves import lowest, suggested_lr
from tests.support.loops import each

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


@each(("name", "page"), [("find-lr", learning_rates.page), ("run-lengths", run_lengths.page)])
def test_a_page_follows_from_its_record(name: str, page: Callable) -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("- on: ", "- command: "))]

    written = (RESULTS / f"{name}.md").read_text()
    assert lines(page(learning_rates.read(RESULTS / f"{name}.jsonl"), "")) == lines(written)


def test_the_rule_is_the_one_with_the_least_regret() -> None:
    rows = learning_rates.read(RESULTS / "find-lr.jsonl")
    for (_, clip), curve in learning_rates.tests(rows).items():
        rule = learning_rates.RULES["that, a quarter" if clip is None else "that, halved"]
        assert suggested_lr(curve) == rule(curve)
        assert 0 < lowest(curve) < len(curve.rates)
