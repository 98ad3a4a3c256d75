"""Batches of images with some that cannot be read, and which models count as the same."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nfzoo.data.unlabelled import open_all
from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet
from nfzoo.outputs import Wanted, columns, load_batches, weights_hash
from tests.core.test_evaluate import LABELS, make_model
from tests.support.pictures import write_images


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_leaves_the_others_in_place(tmp_path: Path, workers: int) -> None:
    model = make_model()
    write_images(tmp_path, {"a": 5})
    (tmp_path / "a" / "1.png").write_bytes(b"")
    batches = [range(3), range(3, 5)]
    first, last = load_batches(open_all(str(tmp_path)), model.preprocessing, 48, batches, workers)
    for batch, (pixels, problems) in zip(batches, (first, last), strict=True):
        assert pixels.shape == (len(batch), 3, 48, 48)
        for place, i in enumerate(batch):
            readable = i != 1
            expected = model.preprocess(tmp_path / "a" / f"{i}.png", size=48) if readable else torch.zeros(3, 48, 48)
            assert torch.equal(pixels[place], expected)
        assert [place for place, _ in problems] == ([1] if 1 in batch else [])
        assert all(str(tmp_path / "a" / "1.png") in problem for _, problem in problems)


def test_the_hash_follows_all_that_the_results_depend_on(tmp_path: Path) -> None:
    model = make_model()
    first = weights_hash(model)
    again = NFNet.from_pretrained(model.save_pretrained(tmp_path / "model"))
    again.name, again.provenance = "another", {"data": "another"}
    assert weights_hash(again) == first
    with torch.no_grad():
        p = next(iter(again.parameters()))
        p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0))
    assert weights_hash(again) != first
    assert weights_hash(make_model(labels=LABELS[::-1])) != first
    assert weights_hash(make_model(labels=None)) != first
    assert weights_hash(model.for_inference()) != first
    other = make_model()
    other.preprocessing = dataclasses.replace(other.preprocessing, test_size=64)
    assert weights_hash(other) != first


def test_top_labels_come_in_the_order_of_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    found = columns(logits, ["a", "b"], Wanted(False, 2, "float32", ("x", "y", "z")))
    assert found["classes"].tolist() == [[1, 2], [0, 2]]
    assert found["labels"] == [["y", "z"], ["x", "z"]]
    assert torch.equal(torch.from_numpy(found["probabilities"]), logits.softmax(1).sort(descending=True).values[:, :2])


def test_half_precision_is_not_overflown() -> None:
    wanted = Wanted(True, 1, "float16", ())
    assert columns(torch.tensor([[65504.0]]), ["a"], wanted)["embeddings"].tolist() == [[65504.0]]
    with pytest.raises(ConfigError, match="7e\\+04 do not fit into float16; take --dtype float32"):
        columns(torch.tensor([[7e4]]), ["a"], wanted)
