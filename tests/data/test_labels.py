"""The ImageNet classes: their number, their order, and that a label means one class."""

import re
from pathlib import Path

import numpy as np
import pytest

from nfzoo.data.labels import class_weights, few_images, histogram, imagenet, imagenet_wnids, match_classes
from nfzoo.errors import DataError


def test_a_thousand_classes_in_the_order_of_the_challenge() -> None:
    wnids = imagenet_wnids()
    assert len(wnids) == len(set(wnids)) == 1000
    assert list(wnids) == sorted(wnids)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)


def test_no_two_labels_are_alike() -> None:
    labels = imagenet()
    assert len(labels) == 1000
    assert len({label.casefold() for label in labels}) == 1000
    assert all(label == label.strip() and label.isprintable() and "/" not in label for label in labels)


@pytest.mark.parametrize(
    ("index", "wnid", "label"),
    [
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (65, "n01751748", "sea snake"),
        (134, "n02012849", "crane (bird)"),
        (207, "n02099601", "golden retriever"),
        (264, "n02113186", "Cardigan Welsh corgi"),
        (281, "n02123045", "tabby"),
        (388, "n02510455", "giant panda"),
        (474, "n02963159", "cardigan"),
        (517, "n03126707", "crane (machine)"),
        (638, "n03710637", "maillot"),
        (639, "n03710721", "tank suit"),
        (980, "n09472597", "volcano"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_known_classes(index: int, wnid: str, label: str) -> None:
    assert (imagenet_wnids()[index], imagenet()[index]) == (wnid, label)


def test_the_notice_goes_with_the_names() -> None:
    import nfzoo

    notice = (Path(nfzoo.__file__).parent / "assets" / "README.md").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice


@pytest.mark.parametrize(
    ("names", "classes", "labels", "index", "matched_by"),
    [
        (("b", "a"), 3, ("a", "b", "c"), (1, 0), "labels"),
        (("10", "2"), 11, (*"ABCDEFGHI", "10", "2"), (9, 10), "labels"),  # a label that is a number stays one
        (("10", "2", "07"), 11, None, (10, 2, 7), "numbers"),
        (("a", "b", "c"), 3, None, (0, 1, 2), "sorted order"),
        (("n01443537", "n15075141"), 1000, None, (1, 999), "WordNet ids"),
        (("n01443537", "n15075141"), 1000, imagenet(), (1, 999), "WordNet ids"),
        (("goldfish", "crane (machine)"), 1000, imagenet_wnids(), (1, 517), "ImageNet labels"),
        (("n15075141", "n01443537"), 1000, imagenet_wnids(), (999, 1), "labels"),
        (imagenet_wnids(), 1000, tuple(f"foreign {i}" for i in range(1000)), tuple(range(1000)), "WordNet ids"),
        (tuple(f"x{i:04}" for i in range(1000)), 1000, None, tuple(range(1000)), "sorted order"),
    ],
)
def test_folders_are_matched(
    names: tuple[str, ...], classes: int, labels: tuple[str, ...] | None, index: tuple[int, ...], matched_by: str
) -> None:
    assert match_classes(names, classes, labels, source="x") == (index, matched_by)


@pytest.mark.parametrize(
    ("names", "classes", "labels", "message"),
    [
        (("cat", "dig", "dog"), 2, ("cat", "dog"), "1 of the 3 folders in x are no classes of the model: 'dig'; did"),
        (("cow",), 2, ("cat", "dog"), r"'cow'.*its classes are 'cat', 'dog'"),
        (("n01443537", "n99999999"), 1000, imagenet(), "1 of the 2 folders in x .*: 'n99999999'"),
        (("n01443537",), 1000, tuple(f"foreign {i}" for i in range(1000)), "'n01443537'.*'foreign 0'.* and 995 more"),
        (("n01443537", "cat"), 1000, None, "1000 classes without names"),
        (("a", "b"), 3, None, "the 2 folders 'a', 'b'; name the folders after the model's outputs, 0 to 2"),
        (("0", "3"), 3, None, "0 to 2"),
        (("1", "01"), 3, None, "'1' and '01' in x are the same class"),
        (("a",), 3, ("a", "b", "a"), "more than one class 'a'"),
    ],
)
def test_folders_that_are_no_classes_are_named(
    names: tuple[str, ...], classes: int, labels: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        match_classes(names, classes, labels, source="x")


# -- numbers of images, and weights


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.random.default_rng(0).choice(5, 300, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    counts = dict(zip("abcde", np.bincount(labels).tolist(), strict=True))
    found = class_weights("balanced", counts)
    assert found is not None
    golden = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert found == pytest.approx(golden.tolist(), rel=1e-12)
    assert sum(w * n for w, n in zip(found, counts.values(), strict=True)) / 300 == pytest.approx(1)


def test_weights_by_name() -> None:
    counts = {"cat": 3, "dog": 0, "eel": 5}
    assert class_weights("none", counts) is None
    assert class_weights({"eel": 2.5, "dog": 0.0}, counts) == (1.0, 0.0, 2.5)
    for given, message in (
        ("balanced", "class 'dog' has no image"),
        ({"dig": 1.0}, "name 'dig', which is no class of the data; did you mean 'dog'"),
        (dict.fromkeys(counts, 0.0), "all class_weights are 0"),
    ):
        with pytest.raises(DataError, match=message):
            class_weights(given, counts)


def test_numbers_of_images_in_words() -> None:
    counts = {f"c{i:02}": 5 + i for i in range(25)}
    few = dict(list(counts.items())[:3])
    assert histogram(few) == "c00 5, c01 6, c02 7"
    assert histogram(counts) == "25 classes from c00 5 to c24 29, median 17"
    assert few_images(few) == "3 classes have fewer than ten images to train on: c00 5, c01 6, c02 7"
    assert few_images({"a": 10, "b": 9}) == "1 class has fewer than ten images to train on: b 9"
    assert few_images({"a": 10}) == ""
    assert few_images(dict.fromkeys(map(str, range(12)), 0)).endswith("9 0 and 2 more")
