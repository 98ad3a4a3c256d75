"""Mixing and the whole augmentation: the same for any split of a batch, and shares that are true."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from nfzoo.config import Preprocessing
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.mixing import GENTLE, Augment, Draws, augment_batch, draw, mix, mix_labels, partners
from nfzoo.transforms.preprocess import normalize
from nfzoo.transforms.randaugment import OPERATIONS, rand_augment

SIZE, CLASSES = 20, 7
PREPROCESSING = Preprocessing(train_size=SIZE, test_size=SIZE)
PAPER = Augment(layers=4, magnitude=10, mixup=0.2, cutmix=True)
ROUNDING = 2e-7  # one float32 rounding of numbers up to 1


def batch(n: int = 8, channels: int = 3, seed: int = 0, *, integer: bool = True) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    if integer:
        pixels = torch.randint(0, 256, (n, channels, SIZE, SIZE), generator=g, dtype=torch.uint8)
    else:
        pixels = torch.rand(n, channels, SIZE, SIZE, generator=g) * 380 - 50  # bicubic overshoots
    return pixels, torch.arange(n) % CLASSES


def draws(augment: Augment, n: int = 8, **options: Any) -> Draws:
    return draw(augment, **{"seed": 3, "epoch": 1, "indices": np.arange(n) * 11, "offset": 0, "size": SIZE, **options})


def run(pixels: Tensor, labels: Tensor, random: Draws, augment: Augment) -> tuple[Tensor, Tensor]:
    return augment_batch(pixels, labels, random, augment, num_classes=CLASSES, preprocessing=PREPROCESSING)


# -- the random numbers


@pytest.mark.parametrize("part", [8, 4, 2])
@pytest.mark.parametrize("augment", [PAPER, Augment(mixup=0.4), Augment(cutmix=True), Augment(layers=2)])
@pytest.mark.parametrize("integer", [True, False])
def test_a_batch_is_its_parts(part: int, augment: Augment, integer: bool) -> None:
    pixels, labels = batch(integer=integer)
    indices = np.array([5, 900, 17, 3, 44, 1, 2_000_000, 8])
    whole = run(pixels, labels, draws(augment, indices=indices), augment)
    parts = []
    for start in range(0, 8, part):
        rows = slice(start, start + part)
        random = draws(augment, indices=indices[rows], offset=start)
        parts.append(run(pixels[rows], labels[rows], random, augment))
    for expected, found in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(expected, torch.cat(found))


def test_draws_follow_from_seed_epoch_and_index() -> None:
    first = draws(PAPER)
    for again in (draws(PAPER), draws(PAPER, indices=list(range(0, 88, 11)))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draws(PAPER, seed=4), draws(PAPER, epoch=2), draws(PAPER, indices=np.arange(8) * 11 + 1)):
        assert not torch.equal(first.operations, other.operations)
        assert not torch.equal(first.weights, other.weights)
    other = draws(PAPER, indices=np.arange(8) * 11 + np.arange(8) % 2)  # a pair's numbers are those of its first image
    assert torch.equal(first.weights, other.weights)
    assert torch.equal(first.operations[::2], other.operations[::2])
    assert not torch.equal(first.operations[1::2], other.operations[1::2])


def test_operations_are_uniform_and_signs_fair() -> None:
    random = draws(Augment(layers=4), 1500)
    frequency = torch.bincount(random.operations.flatten(), minlength=16) / 6000
    spread = 5 * (1 / 16 / 6000) ** 0.5  # five standard deviations
    assert len(frequency) == len(OPERATIONS) == 16
    assert (frequency - 1 / 16).abs().max() < spread
    assert random.signs.abs().eq(1).all()
    assert random.signs.float().mean().abs() < 5 / 6000**0.5
    assert random.centres.amin() == 0
    assert random.centres.amax() == SIZE - 1


@pytest.mark.parametrize("offset", [0, 2, 4, 98])
def test_half_of_a_batch_is_mixed_each_way(offset: int) -> None:
    random = draws(PAPER, 16, offset=offset)
    assert random.cut.sum() == 8
    assert torch.equal(random.cut.view(-1, 2)[:, 0], random.cut.view(-1, 2)[:, 1])
    assert not draws(Augment(mixup=0.2), offset=offset).cut.any()
    assert draws(Augment(cutmix=True), offset=offset).cut.all()


def test_mixup_ratios_are_beta_distributed() -> None:
    alpha = 0.2
    weights = draws(Augment(mixup=alpha), 4000).weights[::2]
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert abs(weights.mean() - 0.5) < 5 * (variance / 2000) ** 0.5
    assert abs(weights.var() - variance) < 0.02


def test_cutmix_weight_is_the_share_of_the_box() -> None:
    random = draws(Augment(cutmix=True), 200, size=31)
    top, left, bottom, right = random.boxes.unbind(1)
    assert ((top >= 0) & (top <= bottom) & (bottom <= 31) & (left >= 0) & (left <= right) & (right <= 31)).all()
    inside = mix(_marked(200, 31), random.cut, random.boxes, random.weights)[::2]
    torch.testing.assert_close(inside.mean((1, 2, 3)), random.weights[::2], rtol=0, atol=ROUNDING)


def test_cutmix_boxes_have_the_mean_area_of_their_definition() -> None:
    """Rows and columns are cut off alike, so that the mean area is that of a squared mean side, over all u."""
    weights = draws(Augment(cutmix=True), 6000, size=31).weights[::2]
    u, place = (np.arange(10_000)[:, None] + 0.5) / 10_000, np.arange(31)
    half = (np.sqrt(1 - u) * 31).astype(int) // 2
    side = np.minimum(place + half, 31) - np.maximum(place - half, 0)
    expected = ((side.mean(1) / 31) ** 2).mean()
    assert abs(weights.mean() - expected) < 5 * weights.std() / 3000**0.5  # five standard deviations


def _marked(n: int, size: int) -> Tensor:
    """Even rows are 1, odd ones 0, so that mixing leaves the mask of the even rows."""
    return (1 - torch.arange(n) % 2).float()[:, None, None, None].expand(n, 1, size, size)


@pytest.mark.parametrize(("n", "offset"), [(7, 0), (8, 3), (1, 1)])
def test_broken_pairs_are_refused(n: int, offset: int) -> None:
    for augment in (Augment(mixup=0.2), Augment(cutmix=True)):
        with pytest.raises(ConfigError, match=f"{n} images from row {offset} on would break one; let each process"):
            draws(augment, n, offset=offset)
    assert len(draws(Augment(layers=1), n, offset=offset).weights) == n


# -- mixing


def test_mixup_of_both_ends_and_the_middle() -> None:
    pixels, labels = batch(6, integer=False)
    weights = torch.tensor([1.0, 1, 0, 0, 0.5, 0.5])
    mixed = mix(pixels, torch.zeros(6, dtype=torch.bool), torch.zeros(6, 4, dtype=torch.long), weights)
    assert torch.equal(mixed[:2], pixels[:2])
    assert torch.equal(mixed[2:4], pixels[[3, 2]])
    assert torch.equal(mixed[4], mixed[5])
    targets = mix_labels(labels, weights, CLASSES)
    assert torch.equal(targets[:2], one_hot(labels[:2], CLASSES).float())
    assert torch.equal(targets[2:4], one_hot(labels[[3, 2]], CLASSES).float())
    assert targets[4, 4] == targets[4, 5] == 0.5


def test_mixing_is_the_sum_that_the_papers_give() -> None:
    pixels, labels = batch(16, integer=False)
    random = draws(Augment(mixup=0.4, cutmix=True), 16)
    mixed = mix(pixels, random.cut, random.boxes, random.weights)
    targets = mix_labels(labels, random.weights, CLASSES)
    for i in range(16):
        x, other, w = pixels[i], pixels[i ^ 1], random.weights[i]
        top, left, bottom, right = random.boxes[i].tolist()
        expected = w * x + (1 - w) * other
        if random.cut[i]:
            expected = other.clone()
            expected[:, top:bottom, left:right] = x[:, top:bottom, left:right]
        assert torch.equal(mixed[i], expected)
        hot = one_hot(labels, CLASSES).float()
        assert torch.equal(targets[i], w * hot[i] + (1 - w) * hot[i ^ 1])


def test_labels_sum_to_one_and_partners_of_one_class_keep_it() -> None:
    labels, random = torch.tensor([3, 3, 0, 6, 2, 2, 5, 1]), draws(PAPER)
    targets = mix_labels(labels, random.weights, CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(targets[:2, 3], torch.ones(2), rtol=0, atol=ROUNDING)
    assert torch.equal(partners(partners(labels)), labels)


def test_label_smoothing_comes_after_mixing() -> None:
    """The loss smooths mixed labels to `(1 - s) y + s / classes`, as in the released code."""
    labels, s = batch()[1], 0.1
    targets = mix_labels(labels, draws(PAPER).weights, CLASSES)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    smoothed = (1 - s) * targets + s / CLASSES
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets, label_smoothing=s), expected)


def test_mixing_compiles_whole() -> None:
    pixels, labels = batch()
    random = draws(PAPER)
    whole = {"fullgraph": True, "backend": "aot_eager"}
    inputs = (pixels, random.cut, random.boxes, random.weights)
    assert torch.equal(torch.compile(mix, **whole)(*inputs), mix(*inputs))
    targets = mix_labels(labels, random.weights, CLASSES)
    assert torch.equal(torch.compile(mix_labels, **whole)(labels, random.weights, CLASSES), targets)


# -- the whole


def test_without_augmentation_a_batch_is_only_normalized() -> None:
    for integer in (True, False):
        pixels, labels = batch(3, integer=integer)
        before = pixels.clone()
        images, targets = run(pixels, labels, draws(Augment(), 3), Augment())
        expected = torch.stack([normalize(p.permute(1, 2, 0).numpy(), PREPROCESSING) for p in pixels])
        assert torch.equal(images, expected)
        assert targets is labels
        assert torch.equal(pixels, before)


def test_randaugment_comes_last_on_clipped_whole_levels() -> None:
    for integer in (True, False):
        pixels, labels = batch(integer=integer)
        before, random = pixels.clone(), draws(PAPER)
        images, targets = run(pixels, labels, random, PAPER)
        mixed = mix(pixels, random.cut, random.boxes, random.weights).clamp(0, 255).floor().to(torch.uint8)
        levels = rand_augment(mixed, *random[:3], magnitude=10.0)
        assert torch.equal(images, run(levels, labels, draws(Augment()), Augment())[0])
        assert torch.equal(targets, mix_labels(labels, random.weights, CLASSES))
        assert images.dtype == targets.dtype == torch.float32
        assert torch.equal(pixels, before)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values stop at whatever would have to look at one."""
    pixels, labels = batch(32)
    images, targets = run(pixels.to("meta"), labels.to("meta"), draws(PAPER, 32), PAPER)
    assert images.device.type == targets.device.type == "meta"
    assert (images.shape, images.dtype) == ((32, 3, SIZE, SIZE), torch.float32)
    assert (targets.shape, targets.dtype) == ((32, CLASSES), torch.float32)


def test_one_channel() -> None:
    grey = Preprocessing(train_size=SIZE, test_size=SIZE, mean=(0.5,), std=(0.25,))
    images, targets = augment_batch(*batch(8, 1), draws(PAPER), PAPER, num_classes=CLASSES, preprocessing=grey)
    assert images.shape == (8, 1, SIZE, SIZE)
    assert images.isfinite().all()
    assert targets.shape == (8, CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": -1}, r"layers must be a whole number from 0 \(none\) to 16, not -1"),
        ({"layers": 2.0}, "layers must be a whole number"),
        ({"layers": True}, "layers must be a whole number"),
        ({"layers": 17}, "layers must be a whole number"),
        ({"magnitude": -0.5}, "magnitude must be from 0 to 20, not -0.5"),
        ({"magnitude": 20.1}, "magnitude must be"),
        ({"magnitude": float("nan")}, "magnitude must be"),
        ({"mixup": -0.1}, "mixup must be the alpha of a Beta distribution, or 0 for none; not -0.1"),
        ({"mixup": float("inf")}, "mixup must be"),
        ({"mixup": float("nan")}, "mixup must be"),
        ({"cutmix": 1}, "cutmix must be true or false, not 1"),
        ({"scale": (0.5, 0.2)}, "scale must be two rising"),
        ({"scale": (0.5, 1.2)}, "scale must be two rising"),
        ({"ratio": (0.0, 1.0)}, "ratio must be two rising"),
        ({"ratio": (1.0,)}, "ratio must be two rising"),
        ({"flip": 1.5}, "flip must be a probability"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**change)


def test_what_counts_as_mixing() -> None:
    assert PAPER.mixes
    assert Augment(mixup=0.1).mixes
    assert Augment(cutmix=True).mixes
    assert not Augment(layers=4).mixes
    assert not GENTLE.mixes
    assert GENTLE.flip == 0


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(8, 3, SIZE, SIZE, dtype=torch.float64), torch.zeros(8, dtype=torch.long), "uint8 or float32, not"),
        (torch.zeros(8, 1, SIZE, SIZE), torch.zeros(8, dtype=torch.long), "for 8 images of 3 channels, not for pixels"),
        (torch.zeros(6, 3, SIZE, SIZE), torch.zeros(6, dtype=torch.long), "for 8 images of 3 channels"),
        (torch.zeros(8, 3, SIZE, SIZE), torch.zeros(7, dtype=torch.long), r"with labels \(7,\)"),
    ],
)
def test_bad_batches(pixels: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(pixels, labels, draws(PAPER), PAPER)


def test_sets_of_labels_are_mixed_by_their_shares() -> None:
    sets = torch.tensor([[True, True, False], [False, True, False], [False, False, False], [True, False, True]])
    weights = torch.tensor([0.25, 0.25, 0.6, 0.6])
    found = mix_labels(sets, weights, 3)
    expected = [[0.25, 1.0, 0.0], [0.75, 1.0, 0.0], [0.4, 0.0, 0.4], [0.6, 0.0, 0.6]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[0, 1] == 1  # a label of both, to the bit
    pixels, preprocessing = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), Preprocessing(train_size=8, test_size=8)
    for augment in (Augment(), Augment(mixup=0.2, cutmix=True)):
        draws = draw(augment, seed=0, epoch=0, indices=range(4), offset=0, size=8)
        _, targets = augment_batch(pixels, sets, draws, augment, num_classes=3, preprocessing=preprocessing)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets, mix_labels(sets, draws.weights, 3))
    with pytest.raises(DataError, match="with labels"):
        augment_batch(pixels, sets, draws, augment, num_classes=4, preprocessing=preprocessing)
