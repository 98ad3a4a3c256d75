"""Programs that are loaded compute float32 logits; what runtimes print of themselves is discarded."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import pytest

from nfzoo.export.run import FORMATS
from nfzoo.export.runtimes import LOADERS, muted


def test_every_format_with_eight_bits_can_be_loaded() -> None:
    assert set(LOADERS) == {name for name, kind in FORMATS.items() if kind.write_int8}


def test_what_converters_print_is_discarded(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with muted():
        print("progress")
        print("progress", file=sys.stderr)
        os.write(1, b"from C++\n")
        os.write(2, b"from C++\n")
        logging.getLogger("converter").warning("a driver is absent")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    with pytest.raises(ValueError, match="of theirs"), muted():
        raise ValueError("of theirs")
    print("after")
    os.write(2, b"and after\n")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("before\nafter\n", "and after\n")
    assert logging.root.manager.disable == logging.NOTSET
