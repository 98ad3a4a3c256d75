"""Images in parquet files and in data sets of the Hugging Face Hub, through the `datasets` library (extra `data`).

The module is long because a table can be wrong in many ways, each of which has its message.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nfzoo.data.images import UNLABELLED, Images, check_classes
from nfzoo.data.labels import numbered_classes
from nfzoo.errors import DataError
from nfzoo.files import open_regular

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category")

_ROWS, _MOST_BYTES = 256, 16 << 20  # of a table of paths and labels that are read at a time


@dataclass(frozen=True, eq=False)
class HFDataset(Images[Path | io.BytesIO]):
    """Images in a column of a table; one row is read at a time.

    Attributes:
        table: the image column, as encoded bytes and path; several tables may be concatenated in it.
        prefixes: the text before `row 17` in the names of images, for each of the concatenated tables.
        ends: end row of each of them.
        folders: where the files lie that a row may name. Others are not read: a table from elsewhere could name any.
        facts: the value of `stamp`.
    """

    table: datasets.Dataset
    prefixes: tuple[str, ...]
    ends: np.ndarray
    folders: tuple[Path, ...] = ()
    facts: str = ""

    @classmethod
    def labelled(
        cls,
        table: datasets.Dataset,
        source: str,
        classes: tuple[str, ...] | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        folders: Sequence[Path] = (),
        facts: str = "",
    ) -> HFDataset:
        """Return the images of a table with a column of images and one of class numbers or names.

        Args:
            table: a table whose images are encoded bytes or paths.
            source: the table's name in error messages.
            classes: the expected class names, if they are known.
            image, label: names of the columns; by default they are found by type and name.
            folders: where the files lie that a row may name; relative names start from the first that has such a file.
            facts: the value of `stamp`.

        Raises:
            DataError: if a column does not exist, or a label is missing or is not a class.
        """
        import datasets

        if not len(table):
            raise DataError(f"{source} is empty")
        image = _column(table, source, "image", image, datasets.Image, IMAGE_COLUMNS)
        label = _column(table, source, "label", label, datasets.ClassLabel, LABEL_COLUMNS)
        rows: Any = table.select_columns([label]).with_format("arrow")[:]
        column = rows.column(label)
        if column.null_count:
            raise DataError(f"{source} has {column.null_count:,} rows without a {label!r}; leave them out")
        numbers, names = _labels(column.to_numpy(), table.features[label], f"{source}, column {label!r},", classes)
        ends = np.array([len(table)])
        images = _images(table, source, image)
        return cls(np.arange(len(table)), numbers, names, images, (f"{source}, ",), ends, tuple(folders), facts)

    @classmethod
    def unlabelled(
        cls,
        tables: Mapping[str, datasets.Dataset],
        source: str,
        *,
        image: str | None = None,
        folders: Sequence[Path] = (),
        facts: str,
    ) -> HFDataset:
        """Return the images of several tables, one after the other.

        Args:
            tables: the text before `row 17` in the names of images -> table.
            source, image, folders: see `labelled`.
            facts: the value of `stamp`.

        Raises:
            DataError: if a table has no column of images, or there are no rows.
        """
        import datasets

        columns = [
            _images(table, source, _column(table, source, "image", image, datasets.Image, IMAGE_COLUMNS))
            for table in tables.values()
        ]
        ends = np.cumsum([len(table) for table in columns])
        if not ends[-1]:
            raise DataError(f"{source} is empty")
        table = datasets.concatenate_datasets(columns)
        labels = np.full(ends[-1], UNLABELLED)
        return cls(np.arange(ends[-1]), labels, (), table, tuple(tables), ends, tuple(folders), facts)

    def row_name(self, row: int) -> str:
        k = int(np.searchsorted(self.ends, row, side="right"))
        return f"{self.prefixes[k]}row {row - (int(self.ends[k - 1]) if k else 0)}"

    def stamp(self) -> str:
        return self.facts

    def read_row(self, row: int) -> Path | io.BytesIO:
        (cell,) = self.table[row].values()
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{self.row_name(row)} holds no image")
        if cell["bytes"] is None:
            return self._file(row, cell["path"])
        image = io.BytesIO(cell["bytes"])
        image.name = self.row_name(row)  # for messages of `open_image`
        return image

    def _file(self, row: int, path: str) -> Path:
        """Return the file that a row names; raise a `DataError` if it, or what it links to, lies elsewhere."""
        named = [(folder, folder / path) for folder in self.folders]  # an absolute path stays as it is
        inside = [file for folder, file in named if file.resolve().is_relative_to(folder.resolve())]
        if not inside:
            raise DataError(
                f"{self.row_name(row)} names the file {path!r}, which does not lie in the folder of the table; other "
                "files are not read: move it there, or write its bytes into the table"
            )
        return next((file for file in inside if file.exists()), inside[0])


def _column(
    table: datasets.Dataset, source: str, key: str, name: str | None, feature: type, usual: tuple[str, ...]
) -> str:
    """Return the column `name`; for `None`, the only column of type `feature`, or the first that has a usual name."""
    names = ", ".join(table.features)
    if name is not None:
        if name not in table.features:
            raise DataError(f"{source} has no column {name!r} for ?{key}=; its columns are {names}")
        return name
    typed = [name for name, kind in table.features.items() if isinstance(kind, feature)]
    named = [name for name in usual if name in table.features]
    choices = [name for name in named if name in typed] or (typed[:1] if len(typed) == 1 else named)
    if not choices:
        raise DataError(f"{source} has no column of {key}s with a usual name but {names}; add ?{key}=COLUMN")
    return choices[0]


def _images(table: datasets.Dataset, source: str, column: str) -> datasets.Dataset:
    """Return one column as encoded bytes and path, renamed to `image`."""
    import datasets

    try:
        images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's and datasets' own errors, of many kinds
        raise DataError(
            f"the column {column!r} of {source} holds no encoded images (bytes, or bytes and path) but "
            f"{table.features[column]}; name another with ?image=COLUMN"
        ) from error
    return images if column == "image" else images.rename_column(column, "image")


def _labels(
    values: np.ndarray, feature: Any, where: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers, int64, and the names of the classes."""
    names = getattr(feature, "names", None)
    if values.dtype.kind in "iu":
        numbers = values.astype(np.int64)
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0:
            raise DataError(f"{where} holds {low}, which means no label; take a part that has labels")
        if names is not None and classes is not None:
            check_classes(where, tuple(names), classes)
        known = tuple(names or ()) or classes or numbered_classes(high, len(numbers), where)
        if high >= len(known):
            raise DataError(f"{where} holds {high}, beyond the {len(known)} classes; labels count from 0")
        return numbers, known
    if all(isinstance(value, str) for value in values):
        known = classes or tuple(sorted(set(values)))
        strange = sorted(set(values) - set(known))
        if strange:
            raise DataError(f"{where} holds {', '.join(map(repr, strange[:5]))}, which the training images do not have")
        number = {name: i for i, name in enumerate(known)}
        return np.array([number[value] for value in values], np.int64), known
    raise DataError(f"{where} holds neither class numbers nor names but {feature}; name another with ?label=COLUMN")


def folders_of_hub(repository: str) -> tuple[Path, ...]:
    """Return the folders of the local caches into which the files of a data set on the Hub are downloaded."""
    import datasets.config
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache, paths = Path(constants.HF_HUB_CACHE), datasets.config
    own = cache / repo_folder_name(repo_id=repository, repo_type="dataset")
    shared = cache / "blobs"  # to which files in it may be links
    return own, shared, Path(paths.DOWNLOADED_DATASETS_PATH), Path(paths.EXTRACTED_DATASETS_PATH)


def open_parquet(files: Sequence[Path], source: str) -> datasets.Dataset:
    """Return the rows of parquet files, memory-mapped from a copy in the cache of `datasets`.

    Raises:
        DataError: if files are damaged, if their columns differ, or if `datasets` is not installed.
    """

    def opened(load: Callable[..., Any]) -> Any:
        for path in files:
            _check_rows(path)
        return load("parquet", data_files=[str(path) for path in files], split="train")

    return _load(
        opened,
        source,
        "check the files, and the space left for the cache of datasets",
    )


def _check_rows(path: Path) -> None:
    """Raise a `ValueError` for more rows than bytes: equal rows are counted, and would fill the disk."""
    from pyarrow.parquet import ParquetFile

    with open_regular(path) as file:
        rows, size = ParquetFile(file).metadata.num_rows, os.fstat(file.fileno()).st_size
    if rows > size:
        raise ValueError(f"{path.name} states {rows:,} rows in {size:,} bytes")


def parquet_rows(path: Path, file: BinaryIO) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    """Return the names of the columns of a parquet file, and an iterator over its rows with their numbers from 1 on.

    Columns other than of text, whole numbers, truth values and lists of these have `None` in each row.

    Raises:
        DataError: if `pyarrow` is not installed.
        ValueError: now or later, for a damaged file, and for cells that are too long for paths and labels.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise DataError(f"{str(path)!r} is read by the `data` extra: pip install 'nfzoo[data]'") from error
    try:
        _check_rows(path)
        table = ParquetFile(file)
        schema = table.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from error

    def rows() -> Iterator[tuple[int, list[Any]]]:
        number = 0
        try:
            for batch in table.iter_batches(_ROWS, columns=[field.name for field in schema if _is_plain(field.type)]):
                if batch.nbytes > _MOST_BYTES:
                    raise ValueError(f"{_ROWS} rows take {batch.nbytes:,} bytes, too many for paths and labels")
                columns = dict(zip(batch.schema.names, (column.to_pylist() for column in batch.columns), strict=True))
                for i in range(batch.num_rows):
                    number += 1
                    yield number, [columns[name][i] if name in columns else None for name in schema.names]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    return list(schema.names), rows()


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean))


@functools.lru_cache(maxsize=4)  # each opening asks the Hub
def open_hub(repository: str, config: str | None, revision: str | None, source: str) -> datasets.DatasetDict:
    """Return the parts of a data set on the Hub, downloaded once into the cache of `datasets`.

    Raises:
        DataError: if the data set does not exist or is not accessible, or if `datasets` is not installed.
    """

    def opened(load: Callable[..., Any]) -> Any:
        reason = _unreachable(repository)
        if reason is None:
            return load(repository, config, revision=revision)
        try:  # the library would try for half a minute before it looks into its cache
            with _offline():
                return load(repository, config, revision=revision)
        except Exception as error:
            raise DataError(
                f"{source} is not whole in the cache, and the Hub cannot be reached ({reason}): check the connection"
            ) from error

    remedy = "check its name and configuration; log in with `hf auth login` if it asks for consent"
    return _load(opened, source, remedy)


def is_unreachable(error: Exception) -> bool:
    """Return whether an error of the Hub's client says that no server has answered, so that a second try is in vain."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")


def _unreachable(repository: str) -> str | None:
    """Ask the Hub for a data set once; return the reason where no server answers."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, "README.md", repo_type="dataset"))
    except Exception as error:
        return str(error) if is_unreachable(error) else None  # `datasets` says what else is wrong
    return None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    import datasets.config
    from huggingface_hub import constants

    settings: tuple[Any, ...] = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _load(call: Callable[[Callable[..., Any]], Any], source: str, remedy: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"{source} is read by the `data` extra: pip install 'nfzoo[data]'") from error
    try:
        return call(datasets.load_dataset)
    except DataError:
        raise
    except Exception as error:  # of many libraries: datasets, the Hub's client, its transport, pyarrow
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
        text = " ".join(str(causes[-1]).split())[:300] or type(causes[-1]).__name__
        raise DataError(f"{source} cannot be opened ({text}); {remedy}") from error
