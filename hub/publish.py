"""Publish a checkpoint folder on the Hub: weights, configuration, card and the run's files as one commit."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypedDict, Unpack

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nfzoo.analysis.figures import read_metrics
from nfzoo.checkpoint.model_folder import (
    ONNX_DATA,
    ONNX_FILE,
    ONNX_FOLDER,
    SHEET_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    texts,
    weight_files,
)
from nfzoo.checkpoint.state_dicts import check_values
from nfzoo.checkpoint.weight_files import stated_checksum
from nfzoo.errors import CheckpointError, ConversionError, HubError, NfzooError
from nfzoo.evaluate import EVALUATION_FILE
from nfzoo.export.onnx_folder import onnx_files, write_onnx_folder
from nfzoo.files import nearest_path, read_json, read_text
from nfzoo.hub.card import model_card
from nfzoo.hub.download import HTTP_ERROR
from nfzoo.hub.results import emissions, eval_results
from nfzoo.nn import NFNet
from nfzoo.train.config import strict_yaml
from nfzoo.train.run_folder import CURVES_FILE, METRICS_FILE, RUN_FILE, public_data, public_model

logger = logging.getLogger("nfzoo")

CARD_FILE = "README.md"
LICENSE = "apache-2.0"

# What training and evaluation write beside a model.
_EXTRAS = (CURVES_FILE, EVALUATION_FILE, METRICS_FILE, RUN_FILE)


class Bundle(NamedTuple):
    """The files of a repository, each with its path on disk or its content, and the text of the card."""

    files: dict[str, Path | bytes]
    card: str

    def sizes(self) -> dict[str, int]:
        """Return file name -> bytes."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def bundle(
    folder: str | os.PathLike[str], repo_id: str, *, license: str = LICENSE, onnx: str | Path | None = None
) -> Bundle:
    """Collect the files that `push` uploads.

    A `README.md` in the folder is the card; otherwise one is written.

    Args:
        onnx: an empty folder, in which an ONNX program is written for the repository; by default it gets the one of
            `folder`, if there is one.

    Raises:
        CheckpointError: for a folder that holds no sound model, or an ONNX program of other weights.
        HubError: for a name that no repository can have.
    """
    folder = Path(folder)
    check_name(repo_id)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}{nearest_path(folder)}")
    description, params = load_checkpoint(folder)
    try:
        check_values(params)
    except ConversionError as error:
        raise CheckpointError(f"the weights in {folder} are not to be published: {error}") from error
    if onnx is None:
        programs = {name: folder / name for name in onnx_files(folder)}
    else:
        checksum = stated_checksum(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else None
        write_onnx_folder(NFNet.from_params(description, params), Path(onnx), checksum)
        programs = {f"{ONNX_FOLDER}/{path.name}": path for path in sorted(Path(onnx).iterdir())}
    extras = [name for name in _EXTRAS if (folder / name).is_file()]
    evaluation = _evaluation(folder / EVALUATION_FILE) if EVALUATION_FILE in extras else None
    if evaluation is not None:
        _check_evaluation(evaluation, folder)
    results = {} if evaluation is None else eval_results(repo_id, description, evaluation)
    if (folder / CARD_FILE).is_file():
        try:
            card = read_text(folder / CARD_FILE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / CARD_FILE} is not text: {error}") from error
    else:
        carbon = emissions(folder, description)
        options = {"license": license, "evaluation": evaluation, "emissions": carbon}
        card = model_card(description, repo_id, files=[*extras, *programs], **options)
    _check_card(card, folder / CARD_FILE)
    files: dict[str, Path | bytes] = {name: folder / name for name in (*weight_files(folder), *extras)}
    files |= {name: text.encode() for name, text in texts(description).items()}  # folders of old versions lack some
    files |= results
    if RUN_FILE in files:
        run = _public_run(folder / RUN_FILE)
        _warn_unfinished(folder, run.get("epochs"))
        files[RUN_FILE] = yaml.safe_dump(run, sort_keys=False).encode()
    return Bundle({**files, **programs, CARD_FILE: card.encode()}, card)


def _check_evaluation(evaluation: dict[str, Any], folder: Path) -> None:
    """Raise a `CheckpointError` for an evaluation of other weights, such as those of before a run went on."""
    stated, weights = evaluation.get("weights"), folder / WEIGHTS_FILE
    if stated is not None and weights.is_file() and stated != stated_checksum(weights):
        raise CheckpointError(
            f"{folder / EVALUATION_FILE} is of other weights than those of {folder}; evaluate anew, or remove it"
        )


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        evaluation = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(evaluation, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return evaluation


def check_name(repo_id: str) -> None:
    """Raise a `HubError` for a name that no repository can have."""
    try:
        validate_repo_id(repo_id)
        organised = "/" in repo_id
    except HFValidationError:
        organised = False
    if not organised:
        raise HubError(f"{repo_id!r} is no name of a repository: write ORGANISATION/NAME")


@contextmanager
def refusals(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises while it writes a repository into a `HubError`."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "; log in with `hf auth login`, with a token that may write there" if status in (401, 403) else ""
        raise HubError(f"the Hub refused {repo_id!r}: {' '.join(str(error).split())}{hint}") from error
    except (HTTP_ERROR, HFValidationError, OSError, ValueError, RuntimeError) as error:
        # The client wraps what goes wrong while a large file is sent in a RuntimeError.
        reasons = dict.fromkeys(str(e) or type(e).__name__ for e in (error, error.__cause__) if e is not None)
        raise HubError(
            f"{repo_id!r} could not be published: {' '.join(' '.join(reasons).split())}; "
            "check the connection and try again"
        ) from error


def _public_run(path: Path) -> dict[Any, Any]:
    """Return a run's options without its output folder, and other paths without their folders: all are private."""
    try:
        run = strict_yaml.load(read_text(path, strict_yaml.MOST_TEXT))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not YAML: {error}") from error
    if not isinstance(run, dict):
        raise CheckpointError(f"{path} must hold the options of a run")
    for key in ("output", "augmented_sheet"):
        run.pop(key, None)
    named = {"model": public_model, "teacher": public_model, "data": public_data}
    named |= dict.fromkeys(("labels", "validation_labels", "class_names"), lambda path: PurePath(path).name)
    for key, public in named.items():
        if run.get(key) is not None:
            run[key] = public(str(run[key]))
    return run


def _warn_unfinished(folder: Path, epochs: Any) -> None:
    """Warn if the metrics of a run end before its last epoch, be it interrupted or stopped by patience."""
    try:
        done = read_metrics(folder / METRICS_FILE)[-1]["epoch"]
        unfinished = done < epochs
    except (OSError, NfzooError, LookupError, TypeError, ValueError):
        return  # without figures nothing is known
    if unfinished:
        logger.warning("the model of %s has been trained for %d of %d epochs", folder, done, epochs)


def _check_card(card: str, source: Path) -> None:
    try:
        metadata = ModelCard(card).data.to_dict()
    except Exception as error:  # the YAML reader and the card's checks raise many things
        raise CheckpointError(f"the metadata of {source} cannot be read: {error}") from error
    missing = [key for key in ("license", "library_name") if not metadata.get(key)]
    if missing:
        raise CheckpointError(
            f"the metadata of {source} lacks {' and '.join(missing)}; without that file one is written"
        )


class PushOptions(TypedDict, total=False):
    """Options of `push`, `push_deepmind` and `NFNet.push_to_hub`.

    Attributes:
        private: make a new repository private; its organisation's default by default.
        token: as in `from_pretrained`; it must allow writing.
        revision: a branch to commit to, created if it does not exist; the main one by default.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: "Upload NAME with nfzoo" by default.
        license: the Hub's identifier of the licence of the weights; `apache-2.0` by default.
        with_onnx: also publish `onnx/model.onnx`, made for the repository: see `nfzoo.export.onnx_folder`. One in the
            folder is published in any case, and refused if it was made from other weights.
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    license: str
    with_onnx: bool


def push(folder: str | os.PathLike[str], repo_id: str, **options: Unpack[PushOptions]) -> str:
    """Publish a checkpoint folder as one commit of a Hub repository; return the commit's URL.

    A repository that does not exist is created. The ONNX program of an earlier push is replaced or deleted.

    Args:
        repo_id: `organisation/name`.
        options: see `PushOptions`.

    Raises:
        CheckpointError: for a folder that holds no sound model, or an ONNX program of other weights; nothing is sent.
        ConfigError: for `with_onnx` without the packages of `nfzoo[export]`, or of a model without classifier.
        HubError: where the Hub refuses or cannot be reached.
        TypeError: for an unknown option; nothing is sent.
    """
    unknown = sorted(options.keys() - PushOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"push has no option {unknown[0]!r}; it has {', '.join(PushOptions.__annotations__)}")
    license, with_onnx = options.get("license", LICENSE), options.get("with_onnx", False)
    with collected(folder, repo_id, license=license, with_onnx=with_onnx) as content:
        return _send(content, repo_id, options)


@contextlib.contextmanager
def collected(
    folder: str | os.PathLike[str], repo_id: str, *, license: str = LICENSE, with_onnx: bool = False
) -> Iterator[Bundle]:
    """Yield the `bundle` of a folder; an ONNX program that is made for it is removed when the block ends."""
    if not with_onnx:
        yield bundle(folder, repo_id, license=license)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield bundle(folder, repo_id, license=license, onnx=scratch)


def _send(content: Bundle, repo_id: str, options: PushOptions) -> str:
    """Publish files as one commit; return its URL."""
    revision, create_pr = options.get("revision"), options.get("create_pr", False)
    api = HfApi(token=options.get("token"))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
        for name, file in content.files.items()
    ]
    with refusals(repo_id):
        api.create_repo(repo_id, private=options.get("private"), exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations += [CommitOperationDelete(name) for name in _stale_onnx(api, repo_id, content, revision)]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=options.get("commit_message") or f"Upload {repo_id.rpartition('/')[2]} with nfzoo",
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def _stale_onnx(api: HfApi, repo_id: str, content: Bundle, revision: str | None) -> list[str]:
    """Return the files of nfzoo's ONNX program in the repository that new weights leave behind, to be deleted."""
    names = [f"{ONNX_FOLDER}/{name}" for name in (ONNX_FILE, ONNX_DATA, SHEET_FILE)]
    there = [n for n in names if n not in content.files and api.file_exists(repo_id, n, revision=revision)]
    sheet = f"{ONNX_FOLDER}/{SHEET_FILE}"
    if sheet in there:
        logger.warning(
            "removing %s of %s, which is of earlier weights; with_onnx publishes a new one", names[0], repo_id
        )
    if sheet in (*there, *content.files):
        return there
    if there:
        logger.warning("%s of %s stays, which nfzoo did not write, and may be of other weights", there[0], repo_id)
    return []


def deepmind_repositories(organisation: str) -> list[tuple[str, str, str]]:
    """List what `push_deepmind` publishes: source for `nfzoo convert`, zoo name, repository."""
    return [(f"dm:F{n}", f"nfnet-f{n}", f"{organisation}/nfnet-f{n}") for n in range(7)]


def push_deepmind(organisation: str, **options: Unpack[PushOptions]) -> Iterator[str]:
    """Fetch, convert and publish DeepMind's F0 to F6 as `ORGANISATION/nfnet-f0` and so on; yield the commits' URLs.

    A model that fails does not stop the others.

    Args:
        options: see `PushOptions`.

    Raises:
        HubError: after the last of them, if any failed; it says which and why.
    """
    from nfzoo.conversion.convert import convert

    failed = []
    for source, _, repo_id in deepmind_repositories(organisation):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            try:
                convert(source, folder)
                url = push(folder, repo_id, **options)
            except NfzooError as error:
                failed.append(f"{repo_id}: {error}")
            else:
                yield url
    if failed:
        raise HubError(f"{len(failed)} of DeepMind's models were not published: " + "; ".join(failed))
