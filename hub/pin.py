"""Pin the public weights: write commit, size and sha256 of each weight file of the zoo, as the Hub states them today.

`python -m nfzoo.hub.pin` asks the Hub for a few hundred bytes of each repository of the table, and rewrites
`pins.json` beside this module. What nfzoo downloads is compared with it from then on. Whoever runs it reads what has
changed, and commits the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from nfzoo.checkpoint.atomic import replaced
from nfzoo.data.hf_datasets import is_unreachable
from nfzoo.errors import HubError
from nfzoo.hub.download import HTTP_ERROR
from nfzoo.hub.registry import COPIES, PINS, PUBLIC, Pin, Repository, read_pins
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped


class Answers(NamedTuple):
    """What the Hub said: repository -> pin, and repository -> why there is none."""

    pins: dict[str, Pin]
    failures: dict[str, str]


def ask(repositories: Sequence[Repository], *, revision: str = "main") -> Answers:
    """Ask the Hub for commit, size and sha256 of the weight file of each repository; nothing is downloaded.

    Where no server answers, no further repository is asked for.
    """
    pins: dict[str, Pin] = {}
    failures: dict[str, str] = {}
    silent: str | None = None
    for repository in repositories:
        if silent is not None:
            failures[repository.repo_id] = silent
            continue
        try:
            pins[repository.repo_id] = _ask(repository, revision)
        except GatedRepoError:
            failures[repository.repo_id] = "it asks for consent; log in with `hf auth login`"
        except RepositoryNotFoundError:
            failures[repository.repo_id] = "it does not exist, or is private"
        except EntryNotFoundError:
            failures[repository.repo_id] = f"it lacks {repository.weights_file}"
        except (HTTP_ERROR, OSError, HubError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            failures[repository.repo_id] = reason
            if is_unreachable(error):
                silent = "the Hub cannot be reached"
                failures[repository.repo_id] = f"{silent} ({reason})"
    return Answers(pins, failures)


def _ask(repository: Repository, revision: str) -> Pin:
    url = hf_hub_url(repository.repo_id, repository.weights_file, revision=revision)
    stated = get_hf_file_metadata(url)
    for what, value, digits in (("commit", stated.commit_hash, 40), ("sha256", stated.etag, 64)):
        if value is None or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise HubError(
                f"the server states no {what} of {repository.weights_file}, but {value!r}; ask the Hub itself"
            )
    if not stated.size:
        raise HubError(f"the server states the size {stated.size!r} of {repository.weights_file}")
    return Pin(stated.commit_hash, stated.size, stated.etag)


def changes(before: Mapping[str, Pin], after: Mapping[str, Pin]) -> list[str]:
    """Return a line for each repository whose pin has changed, with the old and the new values."""
    lines = []
    for repo_id, pin in sorted(after.items()):
        old = before.get(repo_id, Pin())
        pairs = [(key, a, b) for key, a, b in zip(Pin._fields, old, pin, strict=True) if a != b]
        if pairs:
            lines.append(f"{repo_id}: " + ", ".join(f"{key} {a or 'unknown'} -> {b}" for key, a, b in pairs))
    return lines


def write_pins(path: Path, pins: Mapping[str, Pin]) -> None:
    """Write the table of pins, whole or not at all."""
    text = json.dumps({repo_id: pin.to_dict() for repo_id, pin in sorted(pins.items())}, indent=2) + "\n"
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Pin what the Hub has: 0 if all is pinned, 1 if a repository failed or, with --check, differs."""
    parser = program.Parser(
        prog="python -m nfzoo.hub.pin",
        description="Write commit, size and sha256 of the zoo's public weights, as the Hub states them, into the\n"
        "table that downloads are compared with. A repository that fails keeps its row.\n\n"
        "Exit status: 0 if all are pinned, 1 if one failed or (with --check) has changed, 2 for bad input.",
    )
    parser.add_argument("--check", action="store_true", help="compare the table with the Hub, and write nothing")
    parser.add_argument("--file", type=Path, default=PINS, metavar="JSON", help=f"the table (default: {PINS})")
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _pin)


def _pin(options: argparse.Namespace) -> int:
    before = read_pins(options.file)
    if not options.check:
        program.check_writable(options.file)
    rows = [*PUBLIC.values(), *COPIES.values()]
    answers = ask(rows)
    changed = changes(before, answers.pins)
    for line in changed:
        print(escaped(line))
    for repo_id, reason in answers.failures.items():
        print(escaped(f"{repo_id}: left as it was, as {reason}"), file=sys.stderr)
    if changed and not options.check:
        write_pins(options.file, {**before, **answers.pins})
    counts = f"{len(changed)} {'differ' if options.check else 'were changed'} and {len(answers.failures)} failed"
    fields = {"repositories": len(rows), "changed": changed, "failed": dict(answers.failures)}
    program.write_result(options, fields, f"of {len(rows)} repositories, {counts}: {escaped(str(options.file))}")
    return 1 if answers.failures or (options.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
