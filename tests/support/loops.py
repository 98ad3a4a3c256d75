"""One test over many cases: as quick as a loop, and a failure names its case."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any


def each(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with each of the values, called as `pytest.mark.parametrize` is, within one test.

    The cases share their fixtures. The first that fails ends the test, and a note on its error holds the values.
    """
    arguments, rows = ([names], [(v,) for v in values]) if isinstance(names, str) else (list(names), list(values))
    assert rows, f"no values for {names}"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(test).parameters.values()
        fixtures = [p for p in parameters if p.name not in arguments]
        assert len(fixtures) == len(parameters) - len(arguments), f"{test.__name__} does not take {arguments}"

        def looped(**given: Any) -> None:
            for row in rows:
                case = dict(zip(arguments, row, strict=True))
                try:
                    test(**given, **case)
                except BaseException as error:  # pytest's own failures are no Exceptions
                    error.add_note(f"in the case {case}")
                    raise

        looped.__name__, looped.__qualname__, looped.__doc__ = test.__name__, test.__qualname__, test.__doc__
        looped.__module__ = test.__module__
        looped.__dict__.update(test.__dict__)  # marks
        looped.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]
        return looped

    return decorate
