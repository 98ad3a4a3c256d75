"""Train and fine-tune from a Python program: `nfzoo.fit("nfnet-f0", data_set, output="runs/pets")`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from nfzoo.data.images import Images
from nfzoo.data.source import MEMORY, Split, hold_out, open_part
from nfzoo.errors import ConfigError, DataError, shown
from nfzoo.nn import NFNet
from nfzoo.train.config import TrainConfig
from nfzoo.train.config.recipes import python_options
from nfzoo.train.python.datasets import open_dataset, title_of
from nfzoo.train.run import prepared
from nfzoo.train.run_folder import public_data
from nfzoo.train.trainer import Result


def fit(
    model: str | os.PathLike[str] | NFNet,
    train: Any,
    validation: Any = None,
    *,
    output: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    callbacks: Sequence[object] = (),
    **options: Any,
) -> Result:
    """Train or fine-tune a model as `nfzoo train` does, on data of a Python program or by name.

        result = nfzoo.fit("nfnet-f0", ImageFolder("photos"), output="runs/photos", epochs=5, optim={"lr": 0.05})
        result.model.predict("photo.jpg")

    Data are

    - text, as `--data` takes it: a folder, tar or parquet files, `hub:ORG/NAME`, "digits";
    - a map-style data set of torch, such as torchvision's: `len(data)`, and `data[i]` gives (image, label);
    - a `Subset`, a `ConcatDataset`, or a list of such pairs;
    - a table of the `datasets` library, whose columns are found as those of `hub:ORG/NAME` are.

    An image is a PIL image, a uint8 array `(H, W)` or `(H, W, 1 | 3 | 4)`, a uint8 tensor `(H, W)` or `(1 | 3 | 4, H,
    W)`, or a path. nfzoo crops, augments and normalises it, so the data set's own transform has neither ToTensor nor
    Normalize. A label is the class's number, from 0 on, or its name. Labels are taken from a list `targets` or `labels`
    of the data set where it has one, and each item's own label is compared with it; otherwise all items are read once
    for their labels. An item that raises an error counts as a broken image: see the option `max_broken`.

    The loader's processes get the data set by a fork. Where processes are not forked (Windows, macOS, Python 3.14), it
    is pickled, and the program needs `if __name__ == "__main__":`. `workers=0` does without processes.

    Called once more with `resume=True`, an interrupted run goes on from its last checkpoint, on a CPU to the same bits,
    also after SIGKILL. It is refused with other data: of another length, with other labels or classes, with other names
    or sizes of files (of data sets with a list `samples`), or with other pixels in 64 of the images (of lists,
    `TensorDataset` and data sets with an array `data`). Other pixels elsewhere are not noticed. Neither is what a data
    set's own transform does; if that is random, a run does not repeat bit for bit.

    With `accelerate launch script.py`, each process runs the program, and all processes train one model together.

    Args:
        model: a name of the zoo, a Hub repository, a folder, or a model, which stays as it is. Where its classifier has
            another number of classes, training begins with a fresh one.
        train: the data to train on.
        validation: the data to evaluate on after each epoch. By default the part that data by name have for it, or
            else `validation_fraction` of each class of `train`.
        output: the folder to write, as of `nfzoo train`: the model, figures, and checkpoints.
        classes: the names of the classes, in the order of the labels' numbers. By default those of the data set's
            `classes`, or else the labels themselves.
        callbacks: `nfzoo.Callback` objects, which look at the run after each step or epoch and may end it. With
            `resume=True` a run that one of them ended goes on, and they are asked anew.
        options: the options of `nfzoo train`, as `nfzoo.train.TrainConfig` describes them, such as `epochs` and
            `batch_size`. Those of the optimizer are a mapping `optim`, such as `{"lr": 0.1, "clip": 0.01}`, and those
            of the augmentation a mapping `augment`.

    Returns:
        The folder, the accuracies of the epoch that it keeps, and as `model` its model.

    Raises:
        ConfigError: for an option that is unknown or does not fit.
        DataError: for data that cannot be read, or are none of the above.
        TrainingError: if training cannot go on, or a callback raised an error; the message names the checkpoint.
        Stopped: after SIGTERM or Ctrl-C; the run has saved where it was.
    """
    by_name = isinstance(train, str | os.PathLike) and validation is None
    if not isinstance(model, str | os.PathLike | NFNet):
        raise ConfigError(f"model must be a name, a folder or a model of nfzoo, not {shown(model)}")
    if "data" in options:
        raise ConfigError("the data are the second argument of fit, train; leave the option data out")
    if classes is not None and isinstance(train, str | os.PathLike):
        raise ConfigError("classes are the names of a data set's classes; of data by name, give the option class_names")
    config = TrainConfig(
        model=f"{MEMORY}{model.name or 'NFNet'}" if isinstance(model, NFNet) else os.fspath(model),
        data=os.fspath(train) if by_name else _record(train, validation),
        **python_options({**options, "output": output}),
    )
    if not by_name and config.label_files is not None:
        raise ConfigError("labels and class_names are for data by name alone; a data set tells its labels itself")

    def opened() -> Split:
        images = _open(train, config, classes=classes)
        if validation is None:
            return hold_out(images, config.validation_fraction)
        return Split(images, _open(validation, config, classes=classes, expected=images.classes))

    given = model if isinstance(model, NFNet) else None
    with prepared(config, opened=None if by_name else opened, model=given, callbacks=callbacks) as trainer:
        return trainer.fit()


def _record(train: Any, validation: Any) -> str:
    """Return how a run's record names data of a Python program: without folders."""
    names = [
        public_data(os.fspath(data)) if isinstance(data, str | os.PathLike) else title_of(data)
        for data in (train, validation)
    ]
    return f"{MEMORY}{names[0]}" + ("" if validation is None else f"?validation={quote(names[1], safe='')}")


def _open(
    data: Any, config: TrainConfig, *, classes: Sequence[str] | None, expected: tuple[str, ...] | None = None
) -> Images:
    """Return the images of data by name or of a data set; those to evaluate on have the `expected` classes."""
    if isinstance(data, str | os.PathLike):
        return open_part(os.fspath(data), expected, held_out=expected is not None)
    images = open_dataset(data, classes=classes, expected=expected, max_broken=config.max_broken)
    if config.workers != 0 and multiprocessing.get_start_method() != "fork":
        _check_pickles(images, title_of(data))
    return images


class _Nowhere:
    """A file that keeps nothing, as data in memory may be large."""

    def write(self, content: Any, /) -> int:
        return len(content)


def _check_pickles(images: Images, title: str) -> None:
    """Raise a `DataError` where images cannot be sent to the processes of a loader."""
    try:
        pickle.Pickler(_Nowhere(), pickle.HIGHEST_PROTOCOL).dump(images)
    except Exception as error:
        raise DataError(
            f"{title} cannot be pickled for the processes that load images ({type(error).__name__}: {error}); "
            "define its class at the top of a module and open files in __getitem__, or pass workers=0"
        ) from error
