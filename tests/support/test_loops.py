"""The loop over cases runs each, keeps fixtures and names the one that fails."""

from __future__ import annotations

import inspect

import pytest

from tests.support.loops import each


def test_a_failure_names_its_case_and_the_others_run():
    seen = []

    @each("a", [1, 2])
    @each(("b", "c"), [(3, 4), (5, 6)])
    def check(fixture, a, b, c):
        seen.append((fixture, a, b, c))
        assert (a, b) != (2, 3)

    assert list(inspect.signature(check).parameters) == ["fixture"]
    with pytest.raises(AssertionError) as caught:
        check(fixture=0)
    assert seen == [(0, 1, 3, 4), (0, 1, 5, 6), (0, 2, 3, 4)]
    assert caught.value.__notes__ == ["in the case {'b': 3, 'c': 4}", "in the case {'a': 2}"]


def test_no_cases_and_wrong_names_are_refused():
    with pytest.raises(AssertionError, match="no values"):
        each("a", [])
    with pytest.raises(AssertionError, match="does not take"):
        each("a", [1])(lambda b: None)
