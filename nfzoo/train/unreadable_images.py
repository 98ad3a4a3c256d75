"""The images of a training run that cannot be read, counted over all its processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from nfzoo.data.loader import BrokenImageError
from nfzoo.errors import DataError
from nfzoo.runtime.distributed import gather

logger = logging.getLogger("nfzoo")


class BrokenImages:
    """What is wrong with each of them, in words that name it. More than `limit` end the run.

    Attributes:
        known: those that all processes know of.
        own: those that this process met since, some of which may be known.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.known: set[str] = set()
        self.own: set[str] = set()

    def replace(self, messages: Iterable[str]) -> None:
        """Count those of a training batch, in whose place others stand; a `BrokenImageError` beyond the limit."""
        for message in messages:
            if message in self.known | self.own:
                continue
            self.own.add(message)
            self._check()
            logger.warning("not readable, and replaced: %s", message)

    def leave_out(self, messages: Iterable[str]) -> None:
        """Count those of an evaluation, which goes without them; a `BrokenImageError` beyond the limit."""
        for message in messages:
            if message not in self.known | self.own:
                logger.warning("left out: %s", message)
                self.own.add(message)
        self._check()

    def unknown(self) -> int:
        """How many of this process's own are not known to all."""
        return len(self.own - self.known)

    def check(self, unknown: int) -> None:
        """A `DataError` where the known ones, and the sum of all processes' `unknown`, are beyond the limit."""
        if len(self.known) + unknown > self.limit:
            raise DataError(self._text(len(self.known) + unknown))

    def gathered(self) -> list[str]:
        """Those of all processes, sorted; all of them call this together."""
        return sorted(self.known.union(gather(sorted(self.own))))

    def share(self) -> None:
        """Make all of them known to all processes, which call this together."""
        self.known = set(self.gathered())
        self.own.clear()

    def _check(self) -> None:
        if len(self.known | self.own) > self.limit:
            raise BrokenImageError(self._text(len(self.known | self.own)))

    def _text(self, count: int) -> str:
        names = "; ".join(sorted(self.known | self.own)[-3:])
        if self.limit == 0:
            return f"{names}; --max-broken N lets training go on with up to N such images"
        return f"{count} images cannot be read, and max_broken is {self.limit}; such as: {names}"
