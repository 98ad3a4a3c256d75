"""RandAugment's operations: what TensorFlow and Pillow compute, and laws that hold for any image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nfzoo.errors import DataError
from nfzoo.transforms import randaugment
from nfzoo.transforms.randaugment import OPERATIONS, SIGNED, apply_operation, cutout, rand_augment
from tests.support.loops import each

with np.load(Path(__file__).resolve().parents[1] / "reference" / "randaugment_china.npz") as arrays:
    GOLDEN = dict(arrays)

EVERY = pytest.mark.parametrize("name", OPERATIONS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Grey levels with all values and flat places."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    x[..., : shape[-2] // 3, : shape[-1] // 2] = 13
    return x


def to_batch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].contiguous()


# -- against other implementations


def test_golden_data_have_every_operation_but_cutout() -> None:
    assert {k.rpartition("_")[0] for k in GOLDEN if k != "image"} == set(OPERATIONS) - {"Cutout"}
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 16


@each("key", sorted(set(GOLDEN) - {"image"}))
def test_operation_matches_tensorflow(key: str) -> None:
    """To the bit, the geometric ones too."""
    name, _, magnitude = key.rpartition("_")
    result = apply_operation(name, to_batch(GOLDEN["image"]), float(magnitude))
    assert torch.equal(result, to_batch(GOLDEN[key]))


@each("seed", range(4))
def test_operation_matches_pillow(seed: int) -> None:
    x = noise(1, 3, 24, 31, seed=seed) // (seed + 1) + 20 * seed
    image = Image.fromarray(x[0].permute(1, 2, 0).contiguous().numpy())
    for name, expected in (
        ("Equalize", ImageOps.equalize(image)),
        ("AutoContrast", ImageOps.autocontrast(image)),
        ("Invert", ImageOps.invert(image)),
        ("Posterize", ImageOps.posterize(image, 2)),
        ("Solarize", ImageOps.solarize(image, 128)),
    ):
        difference = apply_operation(name, x, 5.0).int() - to_batch(np.asarray(expected)).int()
        # Pillow stretches in float64: one level off where float32 falls short of a whole number.
        assert difference.abs().max() <= (1 if name == "AutoContrast" else 0), name


def test_solarize_threshold_is_taken_in_eight_bits() -> None:
    """As TensorFlow did when the papers' networks were trained: 256 becomes 0 and 384 becomes 128."""
    x = noise(2, 3, 8, 9)
    assert torch.equal(apply_operation("Solarize", x, 10.0), 255 - x)
    assert torch.equal(apply_operation("Solarize", x, 15.0), apply_operation("Solarize", x, 5.0))


@each("centre", [(0, 0), (15, 21), (7, 11), (2, 20)])
@each("level", [0.0, 0.1, 0.2, 1.5])
def test_cutout_is_a_square_about_its_centre(centre: tuple[int, int], level: float) -> None:
    x = noise(1, 3, 16, 22)
    half, expected = int(40 * level), x.clone()
    for row in range(16):
        for column in range(22):
            if -half <= row - centre[0] < half and -half <= column - centre[1] < half:
                expected[:, :, row, column] = 128
    assert torch.equal(cutout(x, level, torch.tensor([centre])), expected)


def test_the_grey_of_a_colour() -> None:
    """TensorFlow's is floor((2989 r + 5870 g + 1140 b) 511 / 5100000), of which Color here leaves nine tenths."""
    unit, close = 5_100_000, 200  # float32 errs by less than 4e-5 of a grey level
    rgb = noise(1, 3, 300, 400).long()
    exact = ((2989 * rgb[:, 0] + 5870 * rgb[:, 1] + 1140 * rgb[:, 2]) * 511)[:, None]
    tenfold = 9 * (exact // unit) + rgb
    clear = (exact % unit > close) & (unit - exact % unit > close) & (tenfold % 10 != 0)
    assert clear.float().mean() > 0.7
    assert torch.equal((tenfold // 10)[clear], apply_operation("Color", rgb.to(torch.uint8), 0.0)[clear].long())


# -- laws


@pytest.mark.parametrize("magnitude", [5.0, 10.0, 15.0])
def test_five_is_no_change_where_the_scale_says_so(magnitude: float) -> None:
    x = noise(1, 3, 12, 12)
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert torch.equal(apply_operation(name, x, magnitude), x) == (magnitude == 5)


@EVERY
def test_batch_is_its_images_one_by_one(name: str) -> None:
    x = noise(5, 3, 20, 27)
    x[1] = 77  # constant
    x[2] = x[2] // 4 + 100  # of few levels
    centres = torch.tensor([[0, 0], [3, 26], [19, 1], [10, 10], [5, 20]])
    for magnitude, sign in ((3.0, 1), (15.0, -1)):
        whole = apply_operation(name, x, magnitude, sign=sign, centres=centres)
        for i in range(5):
            alone = apply_operation(name, x[i : i + 1], magnitude, sign=sign, centres=centres[i : i + 1])
            assert torch.equal(whole[i : i + 1], alone)


@EVERY
def test_one_channel_is_treated_like_three_equal_ones(name: str) -> None:
    grey = noise(2, 1, 17, 20)
    alone = apply_operation(name, grey, 13.0)
    if name == "Color":
        assert torch.equal(alone, grey)
    else:
        assert torch.equal(
            apply_operation(name, grey.expand(2, 3, 17, 20).contiguous(), 13.0), alone.expand(2, 3, -1, -1)
        )


@pytest.mark.parametrize(
    ("name", "axis"), [("Rotate", 3), ("ShearX", 3), ("ShearY", 2), ("TranslateX", 3), ("TranslateY", 2)]
)
def test_sign_mirrors_a_movement(name: str, axis: int) -> None:
    x = noise(1, 3, 40, 33)
    magnitude = 1.3  # nothing falls halfway between two pixels
    there, back = (apply_operation(name, x.flip(i), magnitude, sign=s) for i, s in ((axis, 1), (axis, -1)))
    mirrored = {s: apply_operation(name, x, magnitude, sign=s).flip(axis) for s in (1, -1)}
    assert torch.equal(there, mirrored[-1])
    assert torch.equal(back, mirrored[1])
    assert not torch.equal(there, back)


def test_shear_and_translation_take_from_the_side_they_say() -> None:
    x = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10)
    assert torch.equal(apply_operation("TranslateX", x, 0.3)[..., :7], x[..., 3:])
    assert (apply_operation("TranslateX", x, 0.3)[..., 7:] == 128).all()
    assert torch.equal(apply_operation("TranslateY", x, 0.3, sign=-1)[..., 3:, :], x[..., :7, :])
    assert torch.equal(apply_operation("ShearX", x, 10.0)[0, 0, 2], torch.tensor([*range(21, 30), 128]).byte())
    assert torch.equal(
        apply_operation("ShearY", x, 10.0)[..., 2], torch.tensor([*range(12, 100, 10), 128]).byte()[None, None]
    )


@each("name", OPERATIONS)
@each("shape", [(1, 3, 1, 1), (2, 1, 2, 9), (1, 3, 30, 3)])
@each("magnitude", [0.0, 0.9, 20.0])
def test_every_size_and_strength(name: str, shape: tuple[int, ...], magnitude: float) -> None:
    x = noise(*shape)
    before = x.clone()
    for sign in (1, -1):
        result = apply_operation(name, x, magnitude, sign=sign)
        assert result.shape == x.shape
        assert result.dtype == torch.uint8
    assert torch.equal(x, before)


# -- the whole


def plan(n: int, layers: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    operations = torch.randint(0, 16, (n, layers), generator=g)
    signs = 2 * torch.randint(0, 2, (n, layers), generator=g) - 1
    return operations, signs, torch.randint(0, size, (n, layers, 2), generator=g)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_images_go_through_their_own_layers(chunk: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randaugment, "_CHUNK", chunk)
    x, (operations, signs, centres) = noise(40, 3, 16, 16), plan(40, layers, 16)
    before = x.clone()
    result = rand_augment(x, operations, signs, centres, 1.3)
    assert torch.equal(x, before)
    for i in range(40):
        one = x[i : i + 1]
        for layer in range(layers):
            name, sign = OPERATIONS[int(operations[i, layer])], int(signs[i, layer])
            one = apply_operation(name, one, 1.3, sign=sign, centres=centres[i, layer][None])
        assert torch.equal(result[i : i + 1], one)


def test_signs_matter_to_the_signed_alone() -> None:
    x = noise(16, 3, 16, 16)
    operations, centres = torch.arange(16)[:, None], torch.full((16, 1, 2), 5)
    there, back = (rand_augment(x, operations, torch.full((16, 1), s), centres, 1.5) for s in (1, -1))
    changed = (there != back).flatten(1).any(1)
    assert {OPERATIONS[i] for i in changed.nonzero().flatten()} == set(SIGNED)


@pytest.mark.parametrize("x", [noise(2, 4, 8, 8), noise(2, 3, 8, 8).float(), noise(3, 8, 8)])
def test_other_images_are_refused(x: Tensor) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images \(n, 1 or 3, H, W\), not"):
        rand_augment(x, *plan(len(x), 1, 8), 5.0)
