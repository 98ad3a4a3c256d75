"""Fetch a model repository of the Hub into the local cache, and check its files.

The cache is the Hub's own and shared with its other libraries. Files that it holds are used without a question to the
network, whatever the revision; `force_download` asks, and fetches what has changed. The Hub's client accepts a body of
the right length whose bytes are wrong. So each file is hashed when it is used, and compared with the name that the
cache gives it: the sha256 of large files, git's sha1 of small ones. Where a mirror or a proxy answers, that name may be
no hash. A warning then says that nothing was checked, or the file is refused if the caller requires a hash.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nfzoo.checkpoint.model_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from nfzoo.checkpoint.weight_files import read_index
from nfzoo.conversion.timm import PICKLED_FILE
from nfzoo.conversion.timm_config import is_timm
from nfzoo.data.hf_datasets import is_unreachable
from nfzoo.errors import CheckpointError, without_credentials
from nfzoo.files import read_json
from nfzoo.hub.cached import as_hash, file_hash, other_file, remove, stated_hash
from nfzoo.hub.registry import HAIKU_FILE, Layout, Repository

logger = logging.getLogger("nfzoo")

RETRY_SECONDS = 1.0

# What the Hub's client raises when a connection fails: the base class of its HTTP library (httpx, httpx2), which is no
# OSError.
HTTP_ERROR: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")


class UnreachableError(CheckpointError):
    """A repository from which no model can be had now: it, its file or the Hub is not there, or refuses to answer.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = without_credentials(reason)


class Fetched(NamedTuple):
    """The files of a model in the cache.

    Attributes:
        path: the snapshot folder, with `config.json` and a weight file; of the layout `haiku` the file.
        layout: whose files they are.
        commit: of the repository.
        sha256: of the weight file, if it is known.
    """

    path: Path
    layout: Layout
    commit: str
    sha256: str | None


class Source:
    """One repository at one revision, as `from_pretrained` was asked for it."""

    def __init__(
        self,
        repository: Repository,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        require_hash: bool = False,
        allow_pickle: bool = False,
        instead: str = "",
    ) -> None:
        self.repository = repository
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.token = token
        self.local = local_files_only or constants.HF_HUB_OFFLINE
        self.force = force_download
        self.require_hash = require_hash
        self.allow_pickle = allow_pickle
        self._instead = instead  # what else was meant, perhaps, where there is no such repository
        self._reached = False  # whether the Hub has answered
        self._unchecked: list[str] = []  # names of files that no hash is known of

    def __str__(self) -> str:
        revision = self.repository.revision
        at = "" if revision == "main" else f" at revision {revision!r}"
        return f"the Hub repository {self.repository.repo_id!r}{at}"

    def fetch(self) -> Fetched:
        """Return the files of the model, fetched if the cache lacks them, and checked.

        Raises:
            UnreachableError: for a missing or private repository or file, and a connection or server that fails.
            CheckpointError: for damaged files, and those of other libraries; with `require_hash` also for files that no
                hash is known of.
        """
        try:
            fetched = self._fetch()
        except GatedRepoError as error:
            raise UnreachableError(
                f"{self} asks for consent: accept its terms on its page, then log in with `hf auth login`",
                "it asks for consent",
            ) from error
        except RevisionNotFoundError as error:
            raise UnreachableError(
                f'{self} does not exist; revision="main" takes the newest (there is also no such folder here'
                f"{self._instead})",
                "it has no such revision",
            ) from error
        except RepositoryNotFoundError as error:
            raise UnreachableError(
                f"{self} does not exist, or is private: check its name, or log in with `hf auth login` (there is also "
                f"no such folder here{self._instead})",
                "it does not exist, or is private",
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            reason = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
            why = f"the Hub cannot be reached{reason}: check the connection, then call again"
            if self.local:
                why = "offline mode or local_files_only keeps it from being fetched"
            raise UnreachableError(
                f"{self} is not whole in the cache, and {why}{self._instead}",
                "it is not whole in the cache, and must not be fetched" if self.local else "the Hub cannot be reached",
            ) from error
        except EntryNotFoundError as error:
            raise UnreachableError(
                f"{self} lacks {self._lacking}: it holds no nfzoo model (if it was mended since, "
                "force_download=True looks again)",
                f"it lacks {self._lacking}",
            ) from error
        except (HFValidationError, HTTP_ERROR, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            message = f"{self} could not be read: {reason}; call again to try again"
            if isinstance(error, HTTP_ERROR | ConnectionError | TimeoutError):
                raise UnreachableError(message, reason) from error
            raise CheckpointError(message) from error  # a body of another length, a disk that is full
        if self._unchecked:
            logger.warning(
                "%s of %s could not be checked: the server states no hash, as a mirror or a proxy may; "
                "require_hash=True (--require-hash) refuses such files",
                " and ".join(self._unchecked),
                self,
            )
        return fetched

    @property
    def _lacking(self) -> str:
        return HAIKU_FILE if self.repository.layout == "haiku" else f"{CONFIG_FILE} or {WEIGHTS_FILE}"

    def _fetch(self) -> Fetched:
        if self.repository.layout == "haiku":
            return self._fetch_haiku()
        try:
            config = self._file(CONFIG_FILE, self.repository.revision)
        except EntryNotFoundError as error:
            if self.repository.layout is not None or not self._may_hold_haiku(error):
                raise
            try:
                return self._fetch_haiku()
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                raise error from None
        names = [WEIGHTS_FILE]  # the first that is there counts
        try:
            fields = read_json(config)
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE} in {self} is not JSON: {error}") from error
        own = isinstance(fields, dict) and fields.get("library_name") == "nfzoo"
        layout = "nfzoo" if own else "timm" if is_timm(fields) else None
        if layout is None or self.repository.layout not in (None, layout):
            expected = "an nfzoo model or one" if self.repository.layout is None else "a model"
            raise CheckpointError(f"{self} does not hold {expected} in timm's layout, says its {CONFIG_FILE}")
        if self.repository.sha256 is None:
            if layout != "timm":
                names.append(INDEX_FILE)
            elif self.allow_pickle:
                names.append(PICKLED_FILE)  # timm's files until 2023
        commit = config.parent.name  # both files of one commit, wherever the branch goes meanwhile
        for name in names:
            try:
                weights = self._file(name, commit)
            except EntryNotFoundError as error:
                unreachable = isinstance(error, LocalEntryNotFoundError) and not self.local
                if layout == "timm" and not unreachable and not self.allow_pickle:
                    raise CheckpointError(
                        f"{self} lacks {WEIGHTS_FILE}; if it has {PICKLED_FILE}, a pickle of torch's, "
                        "allow_pickle=True (--allow-pickle) reads that"
                    ) from error
                if unreachable or name == names[-1]:
                    raise
            else:
                if name == INDEX_FILE:
                    self._fetch_shards(weights, commit)
                return Fetched(config.parent, layout, commit, stated_hash(weights))
        raise AssertionError("the loop returns or raises")

    def _may_hold_haiku(self, error: EntryNotFoundError) -> bool:
        """Return whether DeepMind's file may be where `config.json` is not; without a Hub, whether the cache has it."""
        if not isinstance(error, LocalEntryNotFoundError):
            return True
        repo, revision = self.repository.repo_id, self.repository.revision
        return isinstance(try_to_load_from_cache(repo, HAIKU_FILE, self.cache_dir, revision), str)

    def _fetch_haiku(self) -> Fetched:
        weights = self._file(HAIKU_FILE, self.repository.revision)
        return Fetched(weights, "haiku", weights.parent.name, stated_hash(weights))

    def _fetch_shards(self, index: Path, commit: str) -> None:
        for name in sorted(set(read_index(index).values())):
            try:
                self._file(name, commit)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                raise CheckpointError(f"{self} lacks {name}, which its {INDEX_FILE} names") from error

    def _file(self, name: str, revision: str) -> Path:
        """Return one file from the cache or the network, checked.

        What the network gave is fetched once more if it is damaged, or if the connection or the server failed.
        """
        path = self._cached(name, revision) if self.local or not self.force else None
        linked = path is not None and path.is_symlink()
        if self.require_hash and not linked and not self.local:
            path = None  # a cache without links states no hash: the Hub has to
        if path is not None:
            damage = self._damage(path, stated_hash(path))
            if damage is None:
                return self._accepted(path, stated_hash(path)) if linked or self.require_hash else path
            if self.local:
                raise CheckpointError(
                    f"{damage}; with a connection, and without offline mode or local_files_only, it is fetched again"
                )
            logger.warning("%s; fetching it again", damage)
            remove(path)
        for last in (False, True):
            try:
                path, stated = self._download(name, revision)
            except (HTTP_ERROR, OSError) as error:
                if last or not _may_pass(error) or isinstance(error, LocalEntryNotFoundError):
                    raise
                logger.warning("%s; trying again", " ".join(str(error).split()) or type(error).__name__)
                time.sleep(RETRY_SECONDS)
                continue
            damage = self._damage(path, stated)
            if damage is None:
                return self._accepted(path, stated)
            remove(path)
            if last:
                raise CheckpointError(f"{damage}. It was so twice and was deleted; a proxy or mirror may be at fault")
            logger.warning("%s; fetching it again", damage)
        raise AssertionError("the loop returns or raises")

    def _accepted(self, path: Path, stated: str | None) -> Path:
        """Return a file that is not damaged; note it if no hash is known of it, or refuse it if one is required."""
        if stated is None and (self.repository.sha256 is None or path.name != self.repository.weights_file):
            if self.require_hash:
                raise CheckpointError(
                    f"{path.name} of {self} cannot be checked: the server states no hash, as a mirror or a proxy may; "
                    "ask the Hub itself, or leave out require_hash (--require-hash) to take the file as it is"
                )
            self._unchecked.append(path.name)
        return path

    def _damage(self, path: Path, stated: str | None) -> str | None:
        """Return how a file differs from what is known of it, in size or hash; `None` if it does not."""
        repository, known = self.repository, None
        if path.name == repository.weights_file:
            known, size = repository.sha256, path.stat().st_size
            if repository.size not in (None, size):
                return f"{path.name} of {self} is damaged: it has {size:,} bytes, not {repository.size:,}"
        for expected in dict.fromkeys((known, stated)):
            if expected is not None and (actual := file_hash(path, expected)) != expected:
                return f"{path.name} of {self} is damaged: its hash is {actual}, not {expected}"
        return None

    def _cached(self, name: str, revision: str) -> Path | None:
        path = try_to_load_from_cache(self.repository.repo_id, name, cache_dir=self.cache_dir, revision=revision)
        if isinstance(path, str):
            return Path(path)
        if path is _CACHED_NO_EXIST and name != CONFIG_FILE:  # at a commit, where nothing changes any more
            raise EntryNotFoundError(f"{name} is not there, says the cache")
        if self.local:
            raise LocalEntryNotFoundError(f"{name} is not in the cache")
        return None

    def _download(self, name: str, revision: str) -> tuple[Path, str | None]:
        """Return a file after asking the Hub for it, and the hash that the Hub states."""
        repo = self.repository.repo_id
        pinned = name == self.repository.weights_file and self.repository.sha256 is not None
        if self.force or pinned or not self._reached:
            # Where the Hub does not answer, its client falls back to the cache without a word, or tries for half a
            # minute.
            try:
                metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=self.token)
            except (HTTP_ERROR, OSError) as error:
                if is_unreachable(error):
                    raise LocalEntryNotFoundError("the Hub cannot be reached") from error
                if self.force:
                    raise
            else:
                known = self.repository
                if pinned and (other := other_file(metadata, known.size, known.sha256)):
                    raise CheckpointError(f"{name} of {self} is another file than nfzoo knows: {other}")
            self._reached = True
        path = Path(hf_hub_download(repo, name, revision=revision, cache_dir=self.cache_dir, token=self.token))
        stated = stated_hash(path)
        if stated is None:  # a cache without links, as on Windows: only the Hub knows
            url = hf_hub_url(repo, name, revision=path.parent.name)
            stated = as_hash(get_hf_file_metadata(url, token=self.token).etag)
        return path, stated


def _may_pass(error: Exception) -> bool:
    """Return whether a second request can succeed. Newer clients than 1.0 have repeated some of them already."""
    if isinstance(error, HfHubHTTPError):  # a 4xx answer is final, a 5xx may pass
        response = getattr(error, "response", None)
        return response is not None and response.status_code >= 500
    # The client's words for a body of the wrong length.
    return isinstance(error, HTTP_ERROR) or "Consistency check failed" in str(error)
