"""Decoding, the resize of TensorFlow, the evaluation rules, and the random crop."""

import dataclasses
import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nfzoo.config import Preprocessing
from nfzoo.errors import DataError
from nfzoo.nn import create
from nfzoo.transforms import preprocess
from nfzoo.transforms.crops import distorted_box, random_box
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.preprocess import (
    evaluation_transform,
    normalize,
    normalize_batch,
    training_crop,
    training_transform,
)
from nfzoo.transforms.resize import tf_bicubic

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
GREY_LEVELS = 1e-3  # the reference is float32 in 0..255, whose steps are up to 1.5e-5
NORMALIZED = 1e-5  # a handful of float32 roundings of values around 2

PLAIN = Preprocessing(train_size=32, test_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SHORTEST = dataclasses.replace(PLAIN, resize="shortest-edge", crop=0.875)


@pytest.fixture(scope="module")
def china() -> np.ndarray:
    from sklearn.datasets import load_sample_image  # takes seconds

    return load_sample_image("china.jpg")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(REFERENCE / "eval_preprocess_china_64.npz"))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# -- the resize


def test_bicubic_is_tensorflows(china: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    pixels = tf_bicubic(china, 96, 96)[16:80, 16:80]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, golden["pixels"], rtol=0, atol=GREY_LEVELS)


def test_the_golden_pixels_tell_resizes_apart(china: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    """Neither torch's bicubic (a = -0.75) nor Pillow's (antialiased) would pass the test above."""
    x = torch.from_numpy(china.astype(np.float32)).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(x, (96, 96), mode="bicubic")[0].permute(1, 2, 0).numpy()[16:80, 16:80]
    pillow = np.asarray(Image.fromarray(china).resize((96, 96), Image.Resampling.BICUBIC), np.float32)[16:80, 16:80]
    assert abs(theirs - golden["pixels"]).max() > 1
    assert abs(pillow - golden["pixels"]).max() > 1


def keys(d: float) -> float:
    d = abs(d)
    return 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def slow_line(values: np.ndarray, size: int) -> np.ndarray:
    """The definition, one output at a time, in float64."""
    out = []
    for i in range(size):
        x = (i + 0.5) * len(values) / size - 0.5
        low = math.floor(x)
        x = low + round((x - low) * 1024) / 1024
        taps = [j for j in range(low - 1, low + 3) if 0 <= j < len(values)]
        weights = [keys(x - j) for j in taps]
        out.append(sum(w * values[j] for w, j in zip(weights, taps, strict=True)) / sum(weights))
    return np.array(out)


@pytest.mark.parametrize(("length", "size"), [(1, 5), (2, 7), (3, 2), (5, 5), (17, 4), (16, 64), (64, 16)])
def test_bicubic_is_its_definition(length: int, size: int) -> None:
    column = noise(length, 1, 1)
    expected = slow_line(column[:, 0, 0].astype(float), size)
    np.testing.assert_allclose(tf_bicubic(column, size, 1)[:, 0, 0], expected, rtol=0, atol=GREY_LEVELS)
    row = column.swapaxes(0, 1)
    np.testing.assert_array_equal(tf_bicubic(row, 1, size)[0, :, 0], tf_bicubic(column, size, 1)[:, 0, 0])


def test_bicubic_keeps_constants_and_identity_and_overshoots() -> None:
    np.testing.assert_allclose(tf_bicubic(np.full((7, 9, 3), 77, np.uint8), 13, 4), 77, rtol=1e-6)
    pixels = noise(6, 8)
    np.testing.assert_array_equal(tf_bicubic(pixels, 6, 8), pixels)
    edge = np.repeat(np.array([0, 255], np.uint8), 8)[None, :, None]
    result = tf_bicubic(edge, 1, 64)
    assert result.min() < 0
    assert result.max() > 255  # not clamped


# -- the evaluation rules


def test_evaluation_is_deepminds(china: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    x = evaluation_transform(open_image(china), Preprocessing(train_size=64, test_size=64))
    assert x.shape == (3, 64, 64)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    np.testing.assert_allclose(x.permute(1, 2, 0), golden["normalized"], rtol=0, atol=NORMALIZED)


@pytest.mark.parametrize("shape", [(60, 101), (101, 60), (33, 33), (1, 1), (2, 90)])
def test_shortest_edge(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    x = evaluation_transform(image, SHORTEST)  # 32 / 0.875 is 36.57, the shorter edge becomes 36
    short, long = min(shape), max(shape)
    other = int(36 * long / short)
    size = (36, other) if shape[0] >= shape[1] else (other, 36)
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (round((n - 32) / 2) for n in resized.shape[:2])
    expected = resized[top : top + 32, left : left + 32] / np.float32(255)
    np.testing.assert_array_equal(x.permute(1, 2, 0), expected)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("rule", [PLAIN, SHORTEST])
def test_a_line_of_pixels_needs_no_gigabytes(shape: tuple[int, int], rule: Preprocessing) -> None:
    ramp = np.linspace(0, 255, 20_000).astype(np.uint8).reshape(shape)
    x = evaluation_transform(open_image(ramp), rule, size=512)
    assert x.shape == (3, 512, 512)
    assert abs(x.mean().item() - 0.5) < 0.01  # the centre of the ramp


def test_a_large_resized_image_has_a_smaller_aspect(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(3, 60))
    monkeypatch.setattr(preprocess, "_MOST_PIXELS", 100_000)
    for size, most in ((64, 20), (100, 10), (300, 1), (400, 1)):
        assert preprocess._shorter_edge(image, size).size == (most * size, size)


@pytest.mark.parametrize("rule", [PLAIN, SHORTEST])
def test_size_replaces_the_test_size(rule: Preprocessing) -> None:
    image = Image.fromarray(noise(50, 40))
    expected = evaluation_transform(image, dataclasses.replace(rule, test_size=20))
    assert torch.equal(evaluation_transform(image, rule, size=20), expected)
    for size in (0, -3, 1.5, True):
        with pytest.raises(DataError, match="positive number of pixels"):
            evaluation_transform(image, rule, size=size)  # type: ignore[arg-type]


def test_one_channel_and_the_wrong_number_of_channels() -> None:
    grey = Preprocessing(train_size=8, test_size=8, margin=0, mean=(0.5,), std=(0.25,))
    x = evaluation_transform(Image.new("L", (9, 7), 255), grey)
    torch.testing.assert_close(x, torch.full((1, 8, 8), 2.0))
    with pytest.raises(DataError, match=r"mode 'RGB'.*channels=1"):
        evaluation_transform(Image.new("RGB", (9, 7)), grey)
    with pytest.raises(DataError, match=r"mode 'RGBA'.*channels=3"):
        evaluation_transform(Image.new("RGBA", (9, 7)), PLAIN)
    with pytest.raises(DataError, match="1 or 3 channels, not 4"):
        open_image(Image.new("RGB", (9, 7)), channels=4)


def test_a_model_preprocesses_by_its_own_rule(china: np.ndarray) -> None:
    model = create("nfnet-test", num_classes=2, device="meta")
    expected = evaluation_transform(open_image(china), model.preprocessing, size=40)
    assert torch.equal(model.preprocess(china, size=40), expected)
    assert model.preprocess(china).shape == (3, 32, 32)
    grey = create("nfnet-test", in_channels=1, device="meta")
    assert grey.preprocess(china).shape == (1, 32, 32)


# -- the training transform


@pytest.mark.parametrize("rule", [PLAIN, SHORTEST])
def test_training_crop_is_drawn_from_the_generator(rule: Preprocessing) -> None:
    image = Image.fromarray(noise(60, 80))
    first, again, other = (training_transform(image, rule, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rule", [PLAIN, SHORTEST])
def test_flip(rule: Preprocessing) -> None:
    image = Image.fromarray(noise(60, 80))
    plain, mirrored = (
        training_transform(image, rule, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1), flip=flip, size=60)
        for flip in (0.0, 1.0)
    )
    assert torch.equal(plain.flip(2), mirrored)
    if rule is SHORTEST:  # the whole height, the largest square
        centre = normalize(np.asarray(image)[:, 10:70], rule)
    else:  # what evaluation keeps of it: 60 of 60 + 32 pixels
        centre = normalize(tf_bicubic(np.asarray(image)[11:50, 21:60], 60, 60), rule)
    assert torch.equal(plain, centre)
    rng = np.random.default_rng(0)
    flips = [
        torch.equal(training_transform(image, rule, rng, scale=(1, 1), ratio=(1, 1), size=60), mirrored)
        for _ in range(200)
    ]
    assert 70 < sum(flips) < 130  # four standard deviations around 100


@pytest.mark.parametrize("rule", [PLAIN, SHORTEST])
def test_the_crop_is_the_box_resized(rule: Preprocessing) -> None:
    image = Image.fromarray(noise(60, 80))
    crop = training_crop(image, rule, np.random.default_rng(4), flip=0, size=20)
    rng = np.random.default_rng(4)
    ranges: Any = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    if rule is PLAIN:
        part = image.crop(distorted_box(80, 60, rng, kept=20 / 52, **ranges))
        expected = tf_bicubic(np.asarray(part), 20, 20)
        assert crop.dtype == torch.float32
        assert crop.min() < 0  # not clamped
        assert crop.max() > 255
    else:
        part = image.crop(random_box(80, 60, rng, **ranges))
        expected = np.asarray(part.resize((20, 20), Image.Resampling.BICUBIC))
        assert crop.dtype == torch.uint8
    assert crop.is_contiguous()
    np.testing.assert_array_equal(crop.permute(1, 2, 0), expected)
    transformed = training_transform(image, rule, np.random.default_rng(4), flip=0, size=20)
    assert torch.equal(transformed, normalize(expected, rule))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_batch_is_normalised_as_each_image_is(dtype: type) -> None:
    levels = np.random.default_rng(0).uniform(-60, 320, (5, 9, 7, 3)) if dtype is np.float32 else noise(45, 7)
    images = levels.reshape(5, 9, 7, 3).astype(dtype)
    if dtype is np.uint8:
        images.reshape(-1)[:256] = np.arange(256)
    rule = Preprocessing(train_size=8, test_size=8)
    batch = normalize_batch(torch.from_numpy(images).permute(0, 3, 1, 2), rule)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([normalize(image, rule) for image in images]))


def test_distorted_boxes_have_tensorflows_distribution() -> None:
    """Of a square image and squares alone: heights uniform from a tenth of the area on, the whole image replaced."""
    rng, draws = np.random.default_rng(0), 20_000
    boxes = np.array(
        [distorted_box(100, 100, rng, scale=(0.08, 1.0), ratio=(1.0, 1.0), kept=0.875) for _ in range(draws)]
    )
    height = boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, 2] - boxes[:, 0] == height).all()
    counts = np.bincount(height, minlength=101)
    assert set(np.flatnonzero(counts)) == set(range(32, 100))  # 28 to 31 are drawn again; of 100 87 is left
    expected = np.full(68, draws / 69)
    expected[87 - 32] *= 2
    chi_square = ((counts[32:100] - expected) ** 2 / expected).sum()
    assert chi_square < 120  # 67 degrees of freedom: 67 on average, above 120 once in ten thousand
    small = boxes[height == 40]
    for place in (small[:, 0], small[:, 1]):
        assert (place.min(), place.max()) == (0, 60)
        assert 26 < place.mean() < 34  # four standard deviations around 30 for 290 boxes


def test_distorted_boxes_have_a_uniform_aspect() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array(
        [distorted_box(900, 900, rng, scale=(0.12, 0.3), ratio=(3 / 4, 4 / 3), kept=0.875) for _ in range(4000)]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    aspect = width / height
    assert abs(aspect.mean() - 25 / 24) < 0.011  # four standard deviations; a log-uniform one would have 1.014
    share = width * height / 900**2
    assert share.min() > 0.1199
    assert share.max() < 0.3001
    # The height is uniform between sqrt(0.12) and sqrt(0.3) of its greatest value, so the area is not.
    middle = (0.12 + 0.3 + math.sqrt(0.12 * 0.3)) / 3
    assert abs(share.mean() - middle) < 0.004


@pytest.mark.parametrize(
    ("size", "kept", "expected"),
    [
        ((80, 60), 0.75, (18, 8, 63, 53)),  # a whole square does not fit: the centre that evaluation keeps
        ((60, 60), 0.75, (8, 8, 53, 53)),  # the whole image is replaced too
        ((60, 60), 1.0, (0, 0, 60, 60)),
        ((1, 1), 0.5, (0, 0, 1, 1)),
        ((1, 1000), 0.5, (0, 500, 1, 501)),
    ],
)
def test_distorted_boxes_fall_back_to_the_centre(size: tuple[int, int], kept: float, expected: tuple[int, ...]) -> None:
    assert distorted_box(*size, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1), kept=kept) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 200), (33, 32), (500, 375)])
def test_distorted_boxes_lie_inside(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = distorted_box(*size, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), kept=0.875)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_random_boxes_have_the_area_and_aspect_asked_for() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 300, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (400, 300)).all()
    share = width * height / 120_000
    assert share.min() > 0.079
    assert share.min() < 0.1
    assert share.max() > 0.9
    assert (width / height).min() > 0.74
    assert (width / height).max() < 1.35
    assert 0.4 < (boxes[:, 0] / (400 - width + 1e-9))[width < 400].mean() < 0.6  # anywhere, not only the centre


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((80, 60), (1, 1), (10, 0, 70, 60)),
        ((60, 80), (1, 1), (0, 10, 60, 70)),
        ((1, 1), (3 / 4, 4 / 3), (0, 0, 1, 1)),
        ((1, 1000), (3 / 4, 4 / 3), (0, 499, 1, 500)),
        ((1000, 1), (2, 2), (499, 0, 501, 1)),
    ],
)
def test_what_does_not_fit_becomes_the_central_crop(
    size: tuple[int, int], ratio: tuple[float, float], expected: tuple[int, ...]
) -> None:
    assert random_box(*size, np.random.default_rng(0), scale=(1, 1), ratio=ratio) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0, 1)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.1)},
        {"ratio": (0, 1)},
        {"ratio": (2, 1)},
        {"flip": 1.1},
        {"flip": -0.1},
        {"size": 0},
    ],
)
def test_training_options_are_checked(options: dict) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        training_transform(Image.new("RGB", (9, 9)), PLAIN, np.random.default_rng(0), **options)


# -- decoding


def only_pixel(source: Any, channels: int = 3) -> Any:
    image = open_image(source, channels=channels)
    assert image.mode == ("RGB" if channels == 3 else "L")
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (9, 255), (9, 9, 9)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 300, (1, 1, 1)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: object, expected: tuple) -> None:
    image = Image.new(mode, (3, 2), colour)  # type: ignore[arg-type]
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    for source in (image, path, str(path), io.BytesIO(path.read_bytes())):
        assert only_pixel(source) == expected
    assert only_pixel(path, 1) == Image.new("RGB", (1, 1), expected).convert("L").getpixel((0, 0))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm", "a.tga", "a.jp2"])
def test_formats(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / name)
    assert np.abs(np.subtract(only_pixel(tmp_path / name), (200, 100, 50))).max() <= 3  # JPEG and WebP round


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    opened = open_image(tmp_path / "p.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    corner = np.full((16, 32, 3), 255, np.uint8)
    corner[:8, :8] = 0
    image = Image.fromarray(corner)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    opened = open_image(path)
    np.testing.assert_array_equal(opened, expected)
    np.testing.assert_array_equal(open_image(opened), expected)
    assert opened.size == ((32, 16) if orientation < 5 else (16, 32))


def test_broken_metadata_costs_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.jpg", exif=b"Exif\0\0not a directory of tags at all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only_pixel(tmp_path / "a.jpg") == (255, 255, 255)


def test_the_callers_image_stays_as_it_is() -> None:
    image = Image.new("RGB", (2, 2), "red")
    image.info["exif"] = b""
    opened = open_image(image)
    opened.putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.info == {"exif": b""}


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (1, 1), (1, 1, 3)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = noise(*shape, *(() if len(shape) == 3 else (1,))).reshape(shape)
    expected = np.broadcast_to(array.reshape(*shape[:2], -1), (*shape[:2], 3))
    np.testing.assert_array_equal(open_image(array), expected)
    np.testing.assert_array_equal(open_image(array[::-1, ::-1]), expected[::-1, ::-1])  # strides


def test_array_with_alpha() -> None:
    assert only_pixel(np.zeros((2, 2, 4), np.uint8)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"must be uint8.*not float32.*255 \* array"),
        (np.zeros((4, 4, 3), np.int64), "must be uint8.*not int64"),
        (np.zeros((3, 8, 8), np.uint8), r"not \(3, 8, 8\).*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), r"not \(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), r"not \(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"not \(8,\)"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_image(array)


def test_other_types_are_refused() -> None:
    for source in (torch.zeros(3, 4, 4), None, 3):
        with pytest.raises(DataError, match=f"not a {type(source).__name__}"):
            open_image(source)  # type: ignore[arg-type]


def test_bad_files(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(jpeg, "JPEG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    Image.new("I", (2, 2), 70_000).save(tmp_path / "int.tif")
    for name, message in {
        "cut.png": "cannot be decoded",
        "cut.jpg": "cannot be decoded",
        "text.jpg": "no image of a known format",
        "page.eps": "no image of a known format",
        "empty.png": "is empty",
        "absent.png": "does not exist",
        "": "is a folder",
        "float.tif": "floating-point",
        "int.tif": "32-bit",
        "nul\0.png": "cannot be decoded",
    }.items():
        path = tmp_path / name
        with pytest.raises(DataError, match=message) as caught:
            open_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_cut_of_a_file_is_refused_or_read() -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(whole, "PNG")
    data, refused = whole.getvalue(), 0
    for length in range(0, len(data), 7):
        try:
            open_image(io.BytesIO(data[:length]))
        except DataError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(data), 7))


def test_large_images(tmp_path: Path) -> None:
    Image.new("L", (10_000, 10_000), 9).save(tmp_path / "large.png")  # Pillow warns from 89 megapixels on
    grey = dataclasses.replace(PLAIN, mean=(0.0,), std=(1.0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = evaluation_transform(open_image(tmp_path / "large.png", channels=1), grey)
    torch.testing.assert_close(x, torch.full((1, 32, 32), 9 / 255))
    header = b"P5 20000 20000 255\n"
    (tmp_path / "bomb.pgm").write_bytes(header)
    with pytest.raises(DataError, match=r"bomb\.pgm is too large"):
        open_image(tmp_path / "bomb.pgm")
