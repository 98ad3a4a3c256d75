"""Texts are alike if their words agree, and their numbers to the last digit that is shown."""

import pytest

from tests.support.documents import assert_alike


def test_numbers_may_differ_in_their_last_place() -> None:
    assert_alike("loss 0.124  of  1,438 at 2.1e-07", "loss 0.123 of 1,438 at 2.0e-07")
    for other in ("loss 0.125 of 1,438", "loss 0.123 of 1,439", "gain 0.123 of 1,438", "loss 0.123"):
        with pytest.raises(AssertionError):
            assert_alike(other, "loss 0.123 of 1,438")


def test_numbers_of_a_machine_may_be_any() -> None:
    assert_alike("accuracy 97.10%", "accuracy 95.30%", any_numbers=True)
    with pytest.raises(AssertionError):
        assert_alike("accuracy 97.10%", "loss 95.30%", any_numbers=True)
