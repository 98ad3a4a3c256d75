"""Errors of nfzoo. Those for bad input give the value and the remedy; commands then exit with status 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def without_credentials(text: str) -> str:
    """Return a text whose addresses, such as a mirror's or a proxy's, have neither user nor password.

    >>> without_credentials("https://me:secret@mirror.org/F1 is not there")
    'https://mirror.org/F1 is not there'
    """
    return re.sub(r"(?<=://)[^/\s'\"]*@", "", text)


class NfzooError(Exception):
    """Base of all errors below, whose messages hold no credentials.

    Attributes:
        exit_status: exit status of a command that this error ends. From 129 on, a signal ended the command, and the
            message reports no error.
        of_one_process: whether one of several processes may meet it alone, and then reports it itself.
    """

    exit_status = 2
    of_one_process = False

    def __init__(self, *args: object, **options: object) -> None:
        shown = (without_credentials(value) if isinstance(value, str) else value for value in args)
        super().__init__(*shown, **options)


class ConfigError(NfzooError, ValueError):
    """A configuration that no model can be built from."""


class UnknownModelError(NfzooError, LookupError):
    """A name that is not in the zoo."""


class CheckpointError(NfzooError, ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


class ConversionError(NfzooError, ValueError):
    """Foreign weights that do not fit a model."""


class HubError(NfzooError):
    """A repository that cannot be written: the Hub refuses it, or cannot be reached."""


class DataError(NfzooError, ValueError):
    """A data set or an image that cannot be read, or does not fit the model."""


class TrainingError(NfzooError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""

    exit_status = 1


class LostError(TrainingError):
    """Another process of the run, or one that loads its images, has ended or does not answer."""

    of_one_process = True


class Stopped(NfzooError):
    """A signal stopped a command, which left nothing half done; a training has saved a checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_status = 128 + number


def shown(value: object) -> str:
    """Return a value as a message shows it: plain ones whole, and of others, such as a model, the class."""
    plain = value is None or isinstance(value, str | int | float | list | tuple | dict)
    return repr(value)[:200] if plain else f"an object of the class {type(value).__name__}"


def _likeness(name: str, known: str) -> float:
    return difflib.SequenceMatcher(None, known, name.lower()).ratio()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'a' or 'b'?`, or "" if no known name is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    best = max((_likeness(name, one) for one in near), default=0.0)
    near = [one for one in near if _likeness(name, one) > best - 0.25]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
