"""Images in parquet files and in data sets of the Hugging Face Hub, through the `datasets` library (extra `data`)."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfzoo.data.images import Indices, check_classes
from nfzoo.errors import DataError

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category")


@dataclass(frozen=True, eq=False)
class TableImages:
    """Images and labels in two columns of a table, of which one row is read at a time.

    Attributes:
        table: the image column alone, as stored bytes and path.
        source: what error messages call the table.
        rows: which rows count, in order.
    """

    table: datasets.Dataset
    source: str
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def wrap(
        cls,
        table: datasets.Dataset,
        source: str,
        classes: tuple[str, ...] | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
    ) -> TableImages:
        """The images of a table with a column of images (encoded bytes or paths) and one of class numbers or names.

        Args:
            classes: the class names to expect, where they are known already.
            image, label: names of the columns; by default they are found by their kind and name.

        Raises:
            DataError: if there are no such columns, or a label is missing or no class.
        """
        import datasets

        if not len(table):
            raise DataError(f"{source} is empty")
        image, label = _columns(table.features, source, image, label)
        rows: Any = table.select_columns([label]).with_format("arrow")[:]
        column = rows.column(label)
        if column.null_count:
            raise DataError(f"{source} has {column.null_count:,} rows without a {label!r}; leave them out")
        numbers, names = _labels(column.to_numpy(), table.features[label], f"{source}, column {label!r},", classes)
        try:
            pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's and datasets' own errors, of many kinds
            raise DataError(
                f"the column {image!r} of {source} holds no encoded images (bytes, or bytes and path) but "
                f"{table.features[image]}; name another with ?image=COLUMN"
            ) from error
        return cls(pictures, source, np.arange(len(table)), numbers, names)

    def subset(self, indices: Indices) -> TableImages:
        chosen = np.asarray(indices, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def relabelled(self, index: Indices) -> TableImages:
        return replace(self, labels=np.asarray(index, np.int64)[self.labels])

    def name(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.source}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Path | io.BytesIO, int]:
        label = int(self.labels[index])
        (cell,) = self.table[int(self.rows[index])].values()
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{self.name(index)} holds no image")
        if cell["bytes"] is None:
            return Path(cell["path"]), label
        picture = io.BytesIO(cell["bytes"])
        picture.name = self.name(index)  # for messages of `open_image`
        return picture, label


def _columns(features: Any, source: str, image: str | None, label: str | None) -> tuple[str, str]:
    import datasets

    there = ", ".join(features)
    for key, value in (("image", image), ("label", label)):
        if value is not None and value not in features:
            raise DataError(f"{source} has no column {value!r} for ?{key}=; its columns are {there}")
    found = []
    for key, value, kind, usual in (
        ("image", image, datasets.Image, IMAGE_COLUMNS),
        ("label", label, datasets.ClassLabel, LABEL_COLUMNS),
    ):
        named = [name for name in usual if name in features]
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        choices = (
            [value] if value else [name for name in named if name in typed] or (typed[:1] if len(typed) == 1 else named)
        )
        if not choices:
            raise DataError(
                f"{source} has no column of {key}s known by name; its columns are {there}: add ?{key}=COLUMN"
            )
        found.append(choices[0])
    return found[0], found[1]


def _labels(
    values: np.ndarray, feature: Any, where: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers int64, and the names of the classes."""
    names = getattr(feature, "names", None)
    if values.dtype.kind in "iu":
        numbers = values.astype(np.int64)
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0:
            raise DataError(f"{where} holds {least}, which stands for no class; take a part that has labels")
        found = tuple(names) if names is not None else None
        if found is not None and classes is not None:
            check_classes(where, found, classes)
        known = found or classes or tuple(map(str, range(most + 1)))
        if most >= len(known):
            raise DataError(f"{where} holds {most}, beyond the {len(known)} classes; labels count from 0")
        return numbers, known
    if all(isinstance(value, str) for value in values):
        known = classes or tuple(sorted(set(values)))
        strange = sorted(set(values) - set(known))
        if strange:
            raise DataError(f"{where} holds {', '.join(map(repr, strange[:5]))}, which the training images do not have")
        number = {name: i for i, name in enumerate(known)}
        return np.array([number[value] for value in values], np.int64), known
    raise DataError(f"{where} holds neither class numbers nor names but {feature}; name another with ?label=COLUMN")


def open_parquet(files: Sequence[Path], source: str) -> datasets.Dataset:
    """The rows of parquet files, mapped into memory from a copy in the cache of `datasets`.

    Raises:
        DataError: for files that are damaged or do not fit each other, and if `datasets` is not installed.
    """
    return _load(
        lambda load: load("parquet", data_files=[str(path) for path in files], split="train"),
        source,
        "check the files, and the space left for the cache of datasets",
    )


@functools.lru_cache(maxsize=4)  # opening asks the Hub anew
def open_hub(repository: str, config: str | None, revision: str | None, source: str) -> datasets.DatasetDict:
    """The parts of a data set on the Hub, downloaded once into the cache of `datasets`.

    Raises:
        DataError: for a data set that is not there, or not for you, and if `datasets` is not installed.
    """
    return _load(
        lambda load: load(repository, config, revision=revision),
        source,
        "check its name and configuration, and for one that asks for consent log in with `hf auth login`",
    )


def _load(call: Callable[[Callable[..., Any]], Any], source: str, remedy: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"{source} is read by the `data` extra: pip install 'nfzoo[data]'") from error
    try:
        return call(datasets.load_dataset)
    except Exception as error:  # of many libraries: datasets, the Hub's client, its transport, pyarrow
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
        text = " ".join(str(causes[-1]).split())[:300] or type(causes[-1]).__name__
        raise DataError(f"{source} cannot be opened ({text}); {remedy}") from error
