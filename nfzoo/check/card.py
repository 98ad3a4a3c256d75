"""Write the card of a data set: `README.md` of a repository, with the metadata by which the Hub finds and loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfzoo.check.report import Report
from nfzoo.data.images import ImageFolder, Images
from nfzoo.data.source import HUB, split_options
from nfzoo.runtime.output import escaped, markdown_table, markdown_text

# The names of parts, as the `datasets` library reads them off folders.
_SPLITS = {
    **dict.fromkeys(("all", "train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_UPPER = ((10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M"), (10**9, "1B"))


def data_card(report: Report, *, name: str | None = None, license: str | None = None) -> str:
    """Return the card of checked data, as Markdown after a YAML header.

    Of a folder of images for each class, without folders in them, the header also has the names of the labels and the
    number of images of each split, which the `datasets` library compares with what it finds.

    Args:
        report: what `nfzoo.check.report.check` found.
        name: of the data; by default the folder's.
        license: the Hub's identifier of the licence; without one the card says that it is missing.

    Source: https://huggingface.co/docs/hub/datasets-cards
    """
    from huggingface_hub import DatasetCardData

    title = escaped(name or _name(report.source))
    images = len(report.facts.readable)
    multi_label = any(part.multi_label for part in report.facts.parts.values())
    kind = "multi-label" if multi_label else "multi-class"
    metadata = DatasetCardData(
        license=license,
        pretty_name=title,
        task_categories=["image-classification"],
        task_ids=[f"{kind}-image-classification"],
        size_categories=[size_category(images)],
        dataset_info=_info(report),
    )
    layout = report.layout.partition(",")[0]  # what follows is about training
    facts = [("images", f"{images:,}"), ("classes", f"{len(_classes(report)):,}"), ("layout", layout)]
    facts += [(side, f"{low:,} to {high:,} pixels, median {mid:,g}") for side, (low, mid, high) in report.sides.items()]
    facts += [("modes", ", ".join(f"{mode} {count:,}" for mode, count in report.facts.modes.items()))]
    if report.unreadable:
        facts.append(("cannot be read", f"{report.unreadable:,} images"))
    parts = list(report.counts)
    rows = [(label, *(f"{report.counts[part].get(label, 0):,}" for part in parts)) for label in _classes(report)]
    header = ("label", *("images" if part == "all" else part for part in parts))
    totals = ("in all", *(f"{len(report.facts.parts[part]):,}" for part in parts))
    said = (
        markdown_text(license)
        if license
        else "To be filled in by whoever publishes the data: `license:` in the header above."
    )
    sections = [
        f"# {markdown_text(title)}",
        f"Images for {kind} classification.",
        markdown_table(("", ""), map(_escaped, facts)),
        "## Labels",
        markdown_table(_escaped(header), map(_escaped, [*rows, totals])),
        "## Licence",
        said,
    ]
    return f"---\n{metadata.to_yaml().strip()}\n---\n\n" + "\n\n".join(sections) + "\n"


def size_category(images: int) -> str:
    """Return the Hub's name of a range of sizes, such as `1K<n<10K`."""
    lower = ""
    for most, shown in _UPPER:
        if images < most:
            return f"{lower}<n<{shown}" if lower else f"n<{shown}"
        lower = shown
    return f"n>{lower}"


def _name(source: str) -> str:
    if source.startswith(HUB):
        return source.removeprefix(HUB)
    return Path(split_options(source)[0]).resolve().name or source


def _classes(report: Report) -> list[str]:
    return sorted({label for counts in report.counts.values() for label in counts})


def _info(report: Report) -> dict[str, Any] | None:
    """Return `dataset_info` of a folder of images for each class, as `datasets` builds it; `None` for other layouts.

    The numbers are left out where nfzoo left out files, which `datasets` may read, and where files cannot be read.
    """
    if not all(map(_in_folders, report.facts.parts.values())):
        return None
    names = {str(i): label for i, label in enumerate(_classes(report))}
    label = {"name": "label", "dtype": {"class_label": {"names": names}}}
    info: dict[str, Any] = {"features": [{"name": "image", "dtype": "image"}, label]}
    splits = {_SPLITS.get(part.lower()): len(images) for part, images in report.facts.parts.items()}
    if None not in splits and len(splits) == len(report.facts.parts) and not report.warnings and not report.unreadable:
        info["splits"] = [{"name": name, "num_examples": count} for name, count in splits.items()]
    return info


def _in_folders(images: Images) -> bool:
    """Return whether the folder that each image lies in is its class, as `datasets` takes it; not one further below."""
    if not isinstance(images, ImageFolder) or images.multi_label or images.root != Path():
        return False
    return all(Path(images.name(i)).parent.name == images.classes[images.labels[i]] for i in range(len(images)))


def _escaped(cells: Sequence[str]) -> list[str]:
    return list(map(markdown_text, cells))
