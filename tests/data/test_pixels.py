"""The pixel kernels give the numbers of PIL and torchvision, bit for bit."""

import numpy as np
import pytest
from data_pipeline import plain_operation
from helpers import photo
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from tcl_hf.data import pixels
from tcl_hf.data.augmentation import RandomOperations
from tcl_hf.data.pixels import to_image, to_planes


def noise(width: int = 61, height: int = 83) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = {
    "photo": photo(),
    "noise": noise(),
    "black and white": noise().convert("1").convert("RGB"),
    "pure colours": noise(30, 30).point(lambda value: 255 * (value > 127)).resize((60, 60), Image.Resampling.NEAREST),
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
def test_changes_by_a_factor_equal_torchvision(name, change):
    fast = pixels.sharpen if change == "sharpness" else getattr(pixels, f"change_{change}")
    for factor in FACTORS:
        expected = getattr(F, f"adjust_{change}")(IMAGES[name], factor)
        assert_same(fast(to_planes(IMAGES[name]), factor), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_hue_equals_torchvision(name):
    for turn in (-0.5, -0.1, -0.0731, -0.001, 0.0, 0.003, 0.05, 0.1, 0.5):
        assert_same(pixels.shift_hue(to_planes(IMAGES[name]), turn), F.adjust_hue(IMAGES[name], turn))


def test_hue_equals_torchvision_for_every_red_and_green():
    """Every red and green with every eighth blue, from a start that differs between them: two million colours."""
    red, green = np.indices((256, 256), dtype=np.uint8)
    for start in range(0, 256, 8):
        image = Image.fromarray(np.stack([red, green, start + (red ^ green) % 8], axis=-1).astype(np.uint8))
        turn = (start - 128) / 1280
        assert_same(pixels.shift_hue(to_planes(image), turn), F.adjust_hue(image, turn))


@pytest.mark.parametrize("name", IMAGES)
def test_luminance_equals_grey_of_torchvision(name):
    assert_same(pixels.luminance(to_planes(IMAGES[name]))[None].repeat(3, 0), F.rgb_to_grayscale(IMAGES[name], 3))


@pytest.mark.parametrize("name", IMAGES)
def test_blur_equals_pil(name):
    """Over the range of sigmas that are drawn, at the sigma where the box grows (1.41), and beyond."""
    for sigma in (*np.linspace(0.1, 2.0, 39).tolist(), 2**0.5, 3.3, 6.0):
        expected = IMAGES[name].filter(ImageFilter.GaussianBlur(sigma))
        assert_same(pixels.blur(to_planes(IMAGES[name]), sigma), expected)
        grey = IMAGES[name].convert("L")
        assert_same(pixels.blur(to_planes(grey), sigma), grey.filter(ImageFilter.GaussianBlur(sigma)))


# Operations, against PIL's affine transform and torchvision


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RandomOperations.NAMES)
@pytest.mark.parametrize("image", IMAGES)
def test_operations_equal_pil_and_torchvision(image, name, sign):
    image = IMAGES[image]
    assert_same(RandomOperations().apply(to_planes(image), name, sign), plain_operation(image, name, sign))
    grey = image.convert("L")
    assert_same(RandomOperations().apply(to_planes(grey), name, sign), plain_operation(grey, name, sign))


@pytest.mark.parametrize("size", [256, 384])
@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear_of_large_views_equals_pil(name, size):
    """At these sizes, many products would be whole numbers without rounding."""
    for image in (photo(size, size), noise(size, size)):
        assert_same(RandomOperations().apply(to_planes(image), name, 1), plain_operation(image, name, 1))
