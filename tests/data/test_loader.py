"""Batches that are the same with any number of workers and processes, and after an interruption."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.config import Preprocessing, Resize
from nfzoo.data.images import UNLABELLED, ImageFolder, Images
from nfzoo.data.loader import (
    BrokenImageError,
    TrainingBatch,
    balanced_order,
    epoch_order,
    evaluation_batches,
    load_batches,
    training_batches,
)
from nfzoo.data.tar.shards import TarShards
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.mixing import GENTLE, Augment
from nfzoo.transforms.preprocess import evaluation_transform, training_crop
from tests.support.pictures import write_images, write_shard

PREPROCESSING = Preprocessing(train_size=16, test_size=16, margin=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 10, "dog": 6})


def epoch_of(images: Images, **options: Any) -> list[TrainingBatch]:
    return list(training_batches(images, PREPROCESSING, **{"epoch": 0, "seed": 0, "batch_size": 4, **options}))


def together(batches: list[TrainingBatch]) -> TrainingBatch:
    """Batches one after the other."""
    return TrainingBatch(
        torch.cat([batch.pixels for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
        batches[0].offset,
        tuple(message for batch in batches for message in batch.broken),
    )


def assert_same(first: TrainingBatch, second: TrainingBatch) -> None:
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.pixels, second.pixels)
    assert first.broken == second.broken


def test_workers_do_not_change_an_epoch(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    alone, helped = (together(epoch_of(data, epoch=3, seed=1, workers=workers)) for workers in (0, 2))
    assert_same(alone, helped)


def test_epochs_and_seeds_differ(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    first = together(epoch_of(data))
    assert_same(first, together(epoch_of(data)))
    assert not torch.equal(first.pixels, together(epoch_of(data, epoch=1)).pixels)
    assert not torch.equal(first.pixels, together(epoch_of(data, seed=1)).pixels)


def test_order_is_a_permutation() -> None:
    assert sorted(epoch_order(100, seed=0, epoch=0)) == list(range(100))


def test_a_balanced_epoch_has_equally_many_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 2, 5], [60, 7, 36]))  # two classes have no images
    length = len(labels)
    for epoch in range(3):
        samples = balanced_order(labels, seed=1, epoch=epoch)
        assert len(samples) == length
        assert len(set(samples.tolist())) == length
        assert sorted(np.bincount(labels[samples % length])[[0, 2, 5]].tolist()) == [34, 34, 35]
        # An image comes again once all others of its class have come as often.
        repeats = np.bincount(samples % length, minlength=length)
        for label in (0, 2, 5):
            assert np.ptp(repeats[labels == label]) <= 1
        again = samples[samples >= length]
        assert set(labels[again % length]) == {2}
        assert {s - length for s in again.tolist()} <= set(samples.tolist())
    orders = [balanced_order(labels, seed=seed, epoch=2).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    seen = set[int]().union(*(balanced_order(labels, seed=1, epoch=e).tolist() for e in range(20)))
    assert set(range(length)) <= seen
    # With equally many images of each class, no image comes twice.
    assert sorted(balanced_order(np.arange(12) % 3, seed=0, epoch=0).tolist()) == list(range(12))


def test_images_that_come_again_are_cropped_anew(tmp_path: Path) -> None:
    data = ImageFolder.scan(write_images(tmp_path / "pets", {"cat": 14, "dog": 2}))
    options: dict[str, Any] = {"balanced": True, "epoch": 2, "seed": 3}
    found = together(epoch_of(data, **options))
    assert found.labels.bincount().tolist() == [8, 8]
    assert found.labels.tolist() == data.labels[found.indices.numpy() % 16].tolist()
    for row, sample in enumerate(found.indices.tolist()):
        image = open_image(data[sample % 16][0])
        crop = training_crop(image, PREPROCESSING, np.random.default_rng([3, 2, sample]))
        assert torch.equal(found.pixels[row], crop)
    dogs = {pixels.numpy().tobytes() for pixels, label in zip(found.pixels, found.labels, strict=True) if label}
    assert len(dogs) == 8
    # Neither processes and accumulation nor an interruption change what comes, nor do images that cannot be read.
    halves = [epoch_of(data, **options, rank=rank, world=2, accumulation=2) for rank in (0, 1)]
    parts = [part for step in range(4) for half in halves for part in half[2 * step : 2 * step + 2]]
    assert_same(found, together(parts))
    rest = together(epoch_of(data, **options, start=8, workers=2))
    assert torch.equal(rest.pixels, found.pixels[8:])
    damage(tmp_path / "pets", "dog/1.png")
    stand_in = together(epoch_of(ImageFolder.scan(tmp_path / "pets"), **options))
    expected = [s - 15 if s % 16 == 15 else s for s in found.indices.tolist()]
    assert stand_in.indices.tolist() == expected


@pytest.mark.parametrize(("resize", "dtype"), [("deepmind", torch.float32), ("shortest-edge", torch.uint8)])
def test_batches_are_crops_in_grey_levels(folder: Path, resize: Resize, dtype: torch.dtype) -> None:
    data, rule = ImageFolder.scan(folder), dataclasses.replace(PREPROCESSING, resize=resize)
    augment = Augment(scale=(0.3, 0.9), ratio=(0.8, 1.2), flip=0.7)
    batches = list(training_batches(data, rule, epoch=2, seed=3, batch_size=5, size=12, augment=augment))
    assert len(batches) == 3
    for number, batch in enumerate(batches):
        assert batch.indices.tolist() == epoch_order(16, seed=3, epoch=2)[number * 5 : number * 5 + 5].tolist()
        assert batch.labels.tolist() == data.labels[batch.indices].tolist()
        assert (batch.offset, batch.broken) == (0, ())
        for pixels, index in zip(batch.pixels, batch.indices.tolist(), strict=True):
            expected = training_crop(
                open_image(data[index][0]),
                rule,
                np.random.default_rng([3, 2, index]),
                scale=augment.scale,
                ratio=augment.ratio,
                flip=augment.flip,
                size=12,
            )
            assert pixels.dtype == dtype
            assert torch.equal(pixels, expected)
    assert batches[0].pixels.max() > 100


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_processes_and_steps_share_each_global_batch(folder: Path, world: int, accumulation: int) -> None:
    data = ImageFolder.scan(folder)
    whole = epoch_of(data, batch_size=12) if accumulation == 3 else epoch_of(data, batch_size=4)
    size = len(whole[0].labels)
    ranks = [epoch_of(data, batch_size=size, rank=r, world=world, accumulation=accumulation) for r in range(world)]
    assert [len(batches) for batches in ranks] == [len(whole) * accumulation] * world
    for k, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[k * accumulation : (k + 1) * accumulation]]
        assert [part.offset for part in parts] == list(range(0, size, size // len(parts)))
        assert_same(batch, together(parts))


# -- resuming


def sources(folder: Path, tmp_path: Path) -> dict[str, Images]:
    rng = np.random.default_rng(1)
    for k in range(3):
        write_shard(tmp_path / f"{k}.tar", {f"{k}{i}": int(rng.integers(3)) for i in range(11 - k)}, seed=k)
    return {"folder": ImageFolder.scan(folder), "tar": TarShards.index(sorted(tmp_path.glob("*.tar")))}


def run(images: Images, processes: int, epochs: dict[int, tuple[int, int]], **options: Any) -> list[TrainingBatch]:
    """The global batches that several processes see together, of the epochs from a first sample to a last."""
    seen = []
    for epoch, (start, stop) in epochs.items():
        ranks = [
            epoch_of(images, epoch=epoch, start=start, rank=rank, world=processes, **options)
            for rank in range(processes)
        ]
        steps = options.get("accumulation", 1)
        for k in range((stop - start) // 4):
            seen.append(together([part for rank in ranks for part in rank[k * steps : (k + 1) * steps]]))
    return seen


@pytest.mark.parametrize("source", ["folder", pytest.param("tar", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_two_interrupted_epochs_are_uninterrupted_ones(
    folder: Path, tmp_path: Path, source: str, before: int, after: int
) -> None:
    images = sources(folder, tmp_path)[source]
    full = len(images) // 4 * 4
    expected = run(images, before, {0: (0, full), 1: (0, full)})
    assert len(expected) == 2 * (full // 4)
    assert not torch.equal(expected[0].indices, expected[full // 4].indices)
    # Stopped after two batches of the first epoch and, taken up again, after one of the second.
    found = run(images, before, {0: (0, 8)})
    found += run(images, after, {0: (8, full), 1: (0, 4)}, workers=2)
    found += run(images, before, {1: (4, full)}, workers=1)
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_a_run_is_resumed_with_another_accumulation_and_batch(folder: Path) -> None:
    images = ImageFolder.scan(folder)
    whole = together(epoch_of(images))
    rest = together(run(images, 2, {0: (4, 16)}, accumulation=2))
    assert torch.equal(rest.indices, whole.indices[4:])
    assert torch.equal(rest.pixels, whole.pixels[4:])
    larger = together(epoch_of(images, start=4, batch_size=6))
    assert torch.equal(larger.indices, whole.indices[4:])


def test_the_end_of_an_epoch_is_no_start(folder: Path) -> None:
    images = ImageFolder.scan(folder)
    assert epoch_of(images, start=13) == epoch_of(images, start=16) == []
    for start in (-1, 17):
        with pytest.raises(ConfigError, match=f"sample {start} .* epoch of 16"):
            epoch_of(images, start=start)


# -- images that cannot be read


def damage(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next(folder: Path, workers: int) -> None:
    good = together(epoch_of(ImageFolder.scan(folder)))
    damage(folder, "cat/8.png", "cat/9.png", "dog/5.png")  # images 8, 9 and 15
    data = ImageFolder.scan(folder)
    found = together(epoch_of(data, workers=workers))
    stand_in: dict[int, int] = {8: 10, 9: 10, 15: 0}
    turns: list[int] = good.indices.tolist()
    expected = [stand_in.get(i, i) for i in turns]
    assert found.indices.tolist() == expected
    assert found.labels.tolist() == data.labels[expected].tolist()
    same = torch.tensor([i not in stand_in for i in turns])
    assert torch.equal(found.pixels[same], good.pixels[same])
    turn = turns.index(8)
    crop = training_crop(open_image(data[10][0]), PREPROCESSING, np.random.default_rng([0, 0, 8]))
    assert torch.equal(found.pixels[turn], crop)
    assert len(found.broken) == 3  # each is told of once
    assert {Path(message.split(" ")[0]).relative_to(folder).as_posix() for message in found.broken} == {
        "cat/8.png",
        "cat/9.png",
        "dog/5.png",
    }


def test_replacements_do_not_depend_on_the_processes(folder: Path) -> None:
    damage(folder, "cat/0.png", "cat/3.png", "dog/1.png")
    data = ImageFolder.scan(folder)
    for one, other in zip(run(data, 1, {0: (0, 16)}), run(data, 2, {0: (0, 16)}, accumulation=2), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_ends_the_pass(folder: Path, workers: int) -> None:
    damage(folder, *(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")))
    with pytest.raises(BrokenImageError, match=r"none of the images can be read, such as: .*\.png"):
        epoch_of(ImageFolder.scan(folder), workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_a_broken_image(folder: Path, workers: int) -> None:
    damage(folder, "dog/3.png")
    data = ImageFolder.scan(folder)
    with pytest.raises(BrokenImageError, match=r"3\.png"):
        list(evaluation_batches(data, PREPROCESSING, batch_size=3, workers=workers))
    broken: list[str] = []
    seen = [y for _, y in evaluation_batches(data, PREPROCESSING, batch_size=3, workers=workers, broken=broken)]
    assert sorted(torch.cat(seen).tolist()) == [0] * 10 + [1] * 5
    assert len(broken) == 1
    assert "3.png" in broken[0]


# -- evaluation and prediction


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_leave_the_others_in_their_rows(folder: Path, workers: int) -> None:
    damage(folder, "cat/1.png")
    batches = [range(3), range(10, 12)]
    data = ImageFolder.scan(folder)
    loaded = list(load_batches(data, PREPROCESSING, 12, batches, workers))
    for rows, (pixels, labels, broken) in zip(batches, loaded, strict=True):
        assert pixels.shape == (len(rows), 3, 12, 12)
        for i, row in enumerate(rows):
            readable = row != 1
            image = open_image(data[row][0]) if readable else None
            assert torch.equal(
                pixels[i], evaluation_transform(image, PREPROCESSING, size=12) if image else torch.zeros(3, 12, 12)
            )
            assert labels[i] == (data.labels[row] if readable else UNLABELLED)
        assert list(broken) == ([1] if 1 in rows else [])
        assert all(str(data.name(1)) in problem for problem in broken.values())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(folder: Path, world: int) -> None:
    data = ImageFolder.scan(folder)
    seen = [
        y
        for rank in range(world)
        for _, y in evaluation_batches(data, PREPROCESSING, batch_size=3, rank=rank, world=world)
    ]
    assert sorted(torch.cat(seen).tolist()) == list(data.labels)


def test_evaluation_inputs_are_those_of_the_transform(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    inputs = torch.cat([x for x, _ in evaluation_batches(data, PREPROCESSING, batch_size=3)])
    for i, x in enumerate(inputs):
        assert torch.equal(x, evaluation_transform(open_image(data[i][0]), PREPROCESSING))
    assert len(inputs) == 16


# -- bad input


def test_unfillable_batches_are_refused(folder: Path) -> None:
    data = ImageFolder.scan(folder)
    with pytest.raises(DataError, match="do not fill a batch of 17"):
        epoch_of(data, batch_size=17)
    with pytest.raises(ConfigError, match="batch_size 4 does not divide among 3 processes; make it a multiple of 3"):
        epoch_of(data, world=3)
    with pytest.raises(ConfigError, match=r"among 2 processes and 3 accumulated steps.*multiple of 6"):
        epoch_of(data, world=2, accumulation=3)


@pytest.mark.parametrize("change", [{"scale": (0.5, 2.0)}, {"scale": (0.9, 0.1)}, {"ratio": (0, 1)}, {"flip": 2}])
def test_augmentation_is_checked(change: dict) -> None:
    with pytest.raises(ConfigError):
        Augment(**change)
    assert GENTLE.flip == 0


def test_draft_decodes_large_photographs_smaller_and_leaves_others(tmp_path: Path) -> None:
    photo = Image.linear_gradient("L").convert("RGB").resize((300, 200))
    for suffix in ("jpg", "png"):
        (tmp_path / suffix / "a").mkdir(parents=True)
        photo.save(tmp_path / suffix / "a" / f"photo.{suffix}", quality=95)
    for suffix in ("jpg", "png"):
        data = ImageFolder.scan(tmp_path / suffix)
        path = data[0][0]
        given = {"scale": (0.9, 1.0), "flip": 0.0}
        plain, draft, small, large = (
            epoch_of(data, batch_size=1, size=size, augment=Augment(**given, draft=on))[0].pixels.float()
            for on, size in ((False, 32), (True, 32), (False, 101), (True, 101))
        )
        assert torch.equal(plain, draft) == (suffix == "png")  # 64 pixels of 200 suffice: a half
        assert (plain - draft).abs().mean() < 6
        assert torch.equal(small, large)  # 202 do not
        sizes = [open_image(path, min_side=least).size for least in (None, 201, 200, 101, 100, 51, 50, 25, 1)]
        drafted = [(300, 200)] * 4 + [(150, 100)] * 2 + [(75, 50)] + [(38, 25)] * 2
        assert sizes == (drafted if suffix == "jpg" else [(300, 200)] * 9)
