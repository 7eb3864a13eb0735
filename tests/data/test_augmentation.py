"""Views are those of PIL and torchvision, bit for bit, for the same random choices."""

import io

import numpy as np
import pytest
import torch
from data_pipeline import PlainAugmentation, plain_operation
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from tcl_hf.data import augmentation as ours
from tcl_hf.data.augmentation import RandomColors, RandomOperations, TCLAugmentation
from tcl_hf.data.pixels import to_image, to_planes

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
NEAREST, BILINEAR, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def photo(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    """Smooth random fields and a little noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), BICUBIC)
    pixels = np.asarray(coarse) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noise(width: int = 61, height: int = 83) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = {
    "photo": photo(),
    "noise": noise(),
    "black and white": noise().convert("1").convert("RGB"),
    "pure colours": noise(30, 30).point(lambda value: 255 * (value > 127)).resize((60, 60), NEAREST),
    "one colour": Image.new("RGB", (20, 30), (200, 100, 30)),
    "row": noise(40, 1),
    "pixel": noise(1, 1),
}
FACTORS = (0.0, 0.6, 0.7123, 0.99, 1.0, 1.01, 1.36, 1.4)


def assert_same(planes: np.ndarray, image: Image.Image) -> None:
    assert np.array_equal(to_planes(to_image(planes)), planes)  # whole grey levels from 0 to 255
    np.testing.assert_array_equal(np.asarray(to_image(planes)), np.asarray(image))


@pytest.mark.parametrize("name", IMAGES)
def test_planes_are_the_channels(name):
    image = IMAGES[name]
    assert np.array_equal(to_planes(image), np.asarray(image).transpose(2, 0, 1))
    assert np.array_equal(to_image(to_planes(image)), np.asarray(image))
    grey = image.convert("L")
    assert np.array_equal(to_planes(grey)[0], np.asarray(grey))
    assert to_image(to_planes(grey)).mode == "L"


# Colours, against torchvision on PIL images


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "sharpness"])
def test_changes_by_a_factor_are_torchvision_s(name, change):
    fast = ours.sharpen if change == "sharpness" else getattr(ours, f"change_{change}")
    for factor in FACTORS:
        expected = getattr(F, f"adjust_{change}")(IMAGES[name], factor)
        assert_same(fast(to_planes(IMAGES[name]), factor), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_hue_is_torchvision_s(name):
    for turn in (-0.5, -0.1, -0.0731, -0.001, 0.0, 0.003, 0.05, 0.1, 0.5):
        assert_same(ours.shift_hue(to_planes(IMAGES[name]), turn), F.adjust_hue(IMAGES[name], turn))


def test_hue_is_torchvision_s_for_every_red_and_green():
    """65,536 pairs with every eighth blue, which differs from pair to pair: two million colours."""
    red, green = np.indices((256, 256), dtype=np.uint8)
    for start in range(0, 256, 8):
        image = Image.fromarray(np.stack([red, green, start + (red ^ green) % 8], axis=-1).astype(np.uint8))
        turn = (start - 128) / 1280
        assert_same(ours.shift_hue(to_planes(image), turn), F.adjust_hue(image, turn))


@pytest.mark.parametrize("name", IMAGES)
def test_luminance_is_torchvision_s_grey(name):
    assert_same(ours.luminance(to_planes(IMAGES[name]))[None].repeat(3, 0), F.rgb_to_grayscale(IMAGES[name], 3))


@pytest.mark.parametrize("name", IMAGES)
def test_blur_is_pil_s(name):
    """Over the range drawn, the sigma where its box grows (1.41) and more."""
    for sigma in (*np.linspace(0.1, 2.0, 39).tolist(), 2**0.5, 3.3, 6.0):
        expected = IMAGES[name].filter(ImageFilter.GaussianBlur(sigma))
        assert_same(ours.blur(to_planes(IMAGES[name]), sigma), expected)
        grey = IMAGES[name].convert("L")
        assert_same(ours.blur(to_planes(grey), sigma), grey.filter(ImageFilter.GaussianBlur(sigma)))


# Operations, against PIL's affine transform and torchvision


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RandomOperations.NAMES)
@pytest.mark.parametrize("image", IMAGES)
def test_operations_are_pil_s(image, name, sign):
    image = IMAGES[image]
    assert_same(RandomOperations().apply(to_planes(image), name, sign), plain_operation(image, name, sign))
    grey = image.convert("L")
    assert_same(RandomOperations().apply(to_planes(grey), name, sign), plain_operation(grey, name, sign))


@pytest.mark.parametrize("size", [256, 384])
@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_large_views_shear_as_pil_s(name, size):
    """Where many products are whole numbers but for rounding."""
    for image in (photo(size, size), noise(size, size)):
        assert_same(RandomOperations().apply(to_planes(image), name, 1), plain_operation(image, name, 1))


# Whole views, against the plain composition, from the same seed


@pytest.mark.parametrize("kind", ["photo", "grey"])
def test_views_are_those_of_the_plain_composition(kind):
    """To 2e-6, a seven-thousandth of a grey level; and as many random numbers are drawn, in the same order."""
    image = photo(150, 120).convert("L") if kind == "grey" else photo(150, 120)
    augmentation = TCLAugmentation(48, MEAN, STD)
    for seed in range(150):
        torch.manual_seed(seed)
        expected, expected_next = PlainAugmentation(48, MEAN, STD)(image, 2), torch.rand(4)
        torch.manual_seed(seed)
        views, after = augmentation(image.copy(), 2), torch.rand(4)
        assert torch.equal(after, expected_next)
        for view, other in zip(views, expected, strict=True):
            assert view.is_contiguous()
            torch.testing.assert_close(view, other, atol=2e-6, rtol=0)


def test_colours_change_as_often_as_the_paper_says(monkeypatch):
    """4,000 draws: shares within four standard deviations, all 24 orders of the jitter, amounts over their ranges."""
    seen: dict[str, list] = {"grey": [], "blur": [], "order": [], "amounts": []}

    def note(number: int):
        def change(planes, amount):
            seen["order"].append(number)
            seen["amounts"].append((number, amount))
            return planes

        return change

    monkeypatch.setattr(RandomColors, "CHANGES", [note(number) for number in range(4)])
    monkeypatch.setattr(ours, "luminance", lambda planes: seen["grey"].append(1) or planes[0])
    monkeypatch.setattr(ours, "blur", lambda planes, sigma: seen["blur"].append(sigma) or planes)
    torch.manual_seed(0)
    colors, number = RandomColors(), 4000
    for _ in range(number):
        colors(np.zeros((3, 2, 2), np.float32))
    for share, count in ((0.8, len(seen["order"]) / 4), (0.2, len(seen["grey"])), (0.5, len(seen["blur"]))):
        assert abs(count - share * number) < 4 * (number * share * (1 - share)) ** 0.5
    orders = list(zip(*[iter(seen["order"])] * 4, strict=True))
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert sum((count - len(orders) / 24) ** 2 / (len(orders) / 24) for count in counts) < 49.7  # chi-square, p 0.001
    for change, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4), (3, -0.1, 0.1)):
        amounts = np.array([amount for which, amount in seen["amounts"] if which == change])
        assert_uniform(amounts, low, high)
    assert_uniform(np.array(seen["blur"]), 0.1, 2.0)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """By Kolmogorov and Smirnov, p 0.001."""
    ordered = (np.sort(values) - low) / (high - low)
    assert ordered[0] >= 0 and ordered[-1] <= 1
    assert np.abs(ordered - np.arange(len(ordered)) / len(ordered)).max() < 1.95 / len(ordered) ** 0.5


def test_a_view_of_a_jpeg_decoded_at_reduced_scale_is_nearly_that_of_full_scale():
    """Measured: 0.6 to 1.2 grey levels in the mean, where every full pixel has noise of its own (sigma 6)."""
    file = io.BytesIO()
    photo(1024, 768).save(file, "JPEG", quality=90)
    augmentation = TCLAugmentation(128, (0, 0, 0), (1, 1, 1), (0.5, 1.0), False, False, 0)
    for seed in range(5):
        torch.manual_seed(seed)
        (reduced,) = augmentation(jpeg := Image.open(file))
        assert jpeg.width < 1024
        torch.manual_seed(seed)
        (full,) = augmentation(Image.open(file).convert("RGB"))
        assert (reduced - full).abs().mean() < 1.5 / 255
