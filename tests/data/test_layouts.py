"""Folders as the data sets of other libraries have them: read as what they are, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfzoo.data.source import open_held_out, open_split
from nfzoo.errors import DataError


def make(root: Path, *names: str) -> str:
    """A folder of these files; `train/cat+dog` stands for two images of each class."""
    for name in names:
        folder, _, last = name.rpartition("/")
        files = [f"{folder}/{c}/{i}.png".lstrip("/") for c in last.split("+") for i in "01"] if "+" in last else [name]
        for file in files:
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".jpg", ".png", ".JPEG"):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
            else:
                path.write_bytes(b"x")
    return str(root)


# The layout's user -> its files, and the classes, the numbers of training and held-out images, and the part's name.
READ = {
    "torchvision, timm": (["train/cat+dog", "val/cat+dog"], (4, 4, "val")),
    "fastai, with its own files": (["train/cat+dog", "valid/cat+dog", "models/a.pth", "labels.csv"], (4, 4, "valid")),
    "datasets, validation before test": (["train/cat+dog", "test/cat+dog", "validation/cat+dog"], (4, 4, "validation")),
    "capital letters": (["Train/cat+dog", "Test/cat+dog"], (4, 4, "Test")),
    "MNIST as files": (["training/cat+dog", "testing/cat+dog"], (4, 4, "testing")),
    "torchvision's ImageNet": (["train/cat+dog", "val/cat+dog", "meta.bin", "devkit.tar.gz"], (4, 4, "val")),
    "Kaggle, tests without classes": (["train/cat+dog", "val/cat+dog", "test/1.jpg"], (4, 4, "val")),
    "a class called train": (["cat+dog", "train/0.png", "train/1.png"], (3, 3, None)),
    "folders in classes": (["cat/a/0.png", "cat/b/1.png", "dog/c/0.png", "dog/1.png"], (2, 2, None)),
}


@pytest.mark.parametrize("user", READ)
def test_layouts_that_are_read(tmp_path: Path, user: str) -> None:
    files, (train, held_out, part) = READ[user]
    source = make(tmp_path / "data", *files)
    split = open_split(source)
    assert split.train.classes == split.validation.classes
    assert split.train.classes == (("cat", "dog", "train") if "train/0.png" in files else ("cat", "dog"))
    assert (len(split.train), len(split.validation)) == (train, held_out)
    assert open_held_out(source).split == part


# The layout's user -> its files, and what the message says.
REFUSED = {
    "Kaggle's training_set": (["training_set/cat+dog", "test_set/cat+dog"], "'test_set', 'training_set' .* are parts"),
    "Intel's scenes": (
        ["seg_train/x/cat+dog", "seg_test/x/cat+dog", "seg_pred/1.jpg"],
        "'seg_test', 'seg_train' .* are parts",
    ),
    "COCO": (
        ["train2017/1.jpg", "train2017/2.jpg", "val2017/1.jpg", "val2017/2.jpg"],
        "'train2017', 'val2017' .* are parts",
    ),
    "Stanford Cars": (["cars_train/0.jpg", "cars_test/0.jpg"], "'cars_test', 'cars_train' .* are parts"),
    "iNaturalist": (["train_mini/cat+dog", "val/cat+dog"], "'train_mini', 'val' .* are parts"),
    "no part for training": (["val/cat+dog", "test/cat+dog"], "'test', 'val' .* are parts"),
    "no part held out": (["train/cat+dog"], "has train/, but none of val, .*give '.*train'"),
    "Kaggle": (["train/cat+dog", "test/1.jpg"], "the images in test/ are of no class; .*give '.*train'"),
    "two parts for training": (["train/cat+dog", "training/cat+dog", "val/cat+dog"], "has train/ and training/"),
    "Oxford pets": (
        ["images/a.jpg", "annotations/trimaps/a.png"],
        "'annotations', 'images' .* annotations and no classes",
    ),
    "Food-101": (["images/cat+dog", "meta/train.txt"], "annotations and no classes; .*give '.*images'"),
    "YOLO's detection": (["images/train/0.jpg", "labels/train/0.txt"], "'images', 'labels' .* no classes"),
    "Roboflow's detection": (
        ["train/images/0.jpg", "train/labels/0.txt", "valid/images/0.jpg"],
        "'images', 'labels' .* no classes",
    ),
    "VOC": (["JPEGImages/0.jpg", "Annotations/0.xml", "SegmentationClass/0.png"], "no classes"),
    "words in one": (["TrainData/cat+dog", "TestData/cat+dog"], "'TestData', 'TrainData' .* are parts"),
    "Market-1501": (
        ["bounding_box_train/0.jpg", "bounding_box_test/0.jpg", "query/0.jpg", "gt_bbox/0.jpg", "gt_query/0.jpg"],
        "'bounding_box_test', 'bounding_box_train' .* are parts",
    ),
    "parts in classes": (["cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png"], "'test', 'train'"),
    "masks in classes": (
        ["a/images/0.png", "a/masks/0.png", "b/images/0.png", "b/masks/0.png"],
        "every class folder .* has the subfolders 'images', 'masks'",
    ),
    "a flat part": (
        ["train/cat+dog", "val/0.jpg", "test/cat+dog"],
        "images in val/ .* are of no class; .* hold out test/",
    ),
    "masks": (["images/0.jpg", "masks/0.png"], "'images', 'masks' .* no classes"),
    "a folder around it": (["flowers/cat+dog"], "one class alone, 'flowers', .*give '.*flowers'"),
    "a table of labels": (["images/0.jpg", "images/1.jpg", "train.csv"], "alone, 'images', .*'train.csv' .* --labels"),
    "datasets' metadata": (["0.jpg", "metadata.csv"], "'metadata.csv' may hold labels: give it as --labels"),
    "datasets on disk": (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "`save_to_disk`"),
    "a clone from the Hub": (["README.md", "data/train-0.parquet"], "'train-0.parquet' is read if you give the folder"),
    "tfds": (["train.tfrecord-00000-of-00002"], "is a TFRecord file"),
    "CIFAR": (["cifar-10-batches-py/data_batch_1"], "'data_batch_1' is a file of arrays"),
    "MNIST": (["train-images-idx3-ubyte.gz"], "has the images of train alone"),
    "EMNIST": (["emnist-mapping-ubyte"], "is a file of arrays"),
    "LMDB": (["train/data.mdb", "val/data.mdb"], "'data.mdb' is an LMDB database"),
    "an archive": (["data.zip"], "'data.zip' is an archive that is not read; unpack it"),
    "HDF5": (["data.h5"], "'data.h5' is a file of arrays or records"),
    "tiny ImageNet": (
        ["train/cat+dog", "val/images/0.JPEG", "val/val_annotations.txt"],
        "1 classes where 2 are expected",
    ),
    "no classes": (["0.jpg", "1.jpg"], "has no subfolders"),
}


@pytest.mark.parametrize("user", REFUSED)
def test_layouts_that_are_refused(tmp_path: Path, user: str) -> None:
    files, message = REFUSED[user]
    with pytest.raises(DataError, match=message):
        open_split(make(tmp_path / "data", *files))


def test_a_link_to_nothing_is_no_missing_class(tmp_path: Path) -> None:
    source = make(tmp_path / "data", "cat+dog")
    (tmp_path / "data" / "eel").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"eel' is a link to .*nowhere', which does not exist"):
        open_split(source)


@pytest.mark.parametrize(
    ("files", "warning"),
    [
        (["fold1/cat+dog", "fold2/cat+dog"], "all have the same subfolders, 'cat', 'dog'"),
        (["benign/0.png", "benign/1.png", "masks/0.png", "masks/1.png"], "masks is taken for a class"),
    ],
)
def test_what_may_be_no_classes_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: list[str], warning: str
) -> None:
    open_split(make(tmp_path / "data", *files))
    assert warning in caplog.text


def test_images_beside_the_classes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = open_split(make(tmp_path / "data", "cat+dog", "loose.jpg"))
    assert len(split.train) + len(split.validation) == 4
    assert "left out: 1 in" in caplog.text
    assert "loose.jpg" in caplog.text
