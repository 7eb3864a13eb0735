"""Views follow the paper's augmentation, and its operations move the image as far as the paper says."""

import io

import numpy as np
import pytest
import torch
from helpers import png
from PIL import Image

from tcl_hf.data.augmentation import RandomOperations, TCLAugmentation

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_views_are_normalised_and_of_the_right_size():
    augmentation = TCLAugmentation(24, MEAN, STD)
    views = augmentation(Image.open(io.BytesIO(png(0, (50, 70)))), 2)
    assert len(views) == 2
    for view in views:
        assert view.shape == (3, 24, 24) and view.dtype == torch.float32
        assert view.min() >= -2 and view.max() <= 2


def test_without_changes_a_view_is_the_resized_image():
    """With a crop of the whole image, and without jitter and operations, only a flip is possible."""
    augmentation = TCLAugmentation(20, MEAN, STD, crop_scale=(1.0, 1.0), color_jitter=False, num_operations=0)
    image = Image.open(io.BytesIO(png(3, (40, 40)))).convert("RGB")
    expected = torch.from_numpy(np.array(image.resize((20, 20), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    expected = (expected - 0.5) / 0.25
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        (view,) = augmentation(image.copy())
        flipped = torch.allclose(view, expected.flip(-1), atol=1e-6)
        assert flipped or torch.allclose(view, expected, atol=1e-6)
        seen.add(flipped)
    assert seen == {True, False}


def test_grey_and_transparent_images_give_views():
    augmentation = TCLAugmentation(16, MEAN, STD)
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        (view,) = augmentation(Image.new(mode, (30, 20)))
        assert view.shape == (3, 16, 16)


def test_a_large_jpeg_is_decoded_at_reduced_scale():
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1600, 1200)).save(file, "JPEG")
    image = Image.open(file)
    augmentation = TCLAugmentation(64, MEAN, STD, crop_scale=(0.9, 1.0), color_jitter=False, num_operations=0)
    (view,) = augmentation(image)
    assert image.size == (200, 150)  # At an eighth of the scale, the crops still have more than 64 pixels.
    assert view.shape == (3, 64, 64)


def arrow() -> Image.Image:
    """A white spot on black, right of and below the middle."""
    pixels = np.zeros((41, 41, 3), dtype=np.uint8)
    pixels[28:31, 30:33] = 255
    return Image.fromarray(pixels)


def spot(image: Image.Image) -> tuple[float, float]:
    """Row and column of the white spot."""
    weight = np.asarray(image)[..., 0].astype(float)
    weight[weight < 200] = 0
    rows, columns = np.indices(weight.shape)
    return (rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("name", "sign", "row", "column"),
    [
        ("identity", 1, 29, 31),
        ("translate_x", 1, 29, 24),
        ("translate_x", -1, 29, 38),
        ("translate_y", 1, 22, 31),
        ("shear_x", 1, 29, 31 + 0.21 * 29),
        ("shear_y", -1, 29 - 0.21 * 31, 31),
    ],
)
def test_operations_move_the_image_as_far_as_the_paper_says(name, sign, row, column):
    found = spot(RandomOperations().apply(arrow(), name, sign))
    assert found == pytest.approx((row, column), abs=0.6)


@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_turns_by_21_degrees_about_the_middle(sign):
    row, column = spot(RandomOperations().apply(arrow(), "rotate", sign))
    before = np.arctan2(-(29 - 20), 31 - 20)
    after = np.arctan2(-(row - 20), column - 20)
    assert np.degrees(after - before) == pytest.approx(sign * 21, abs=2)


def test_moved_images_are_filled_with_grey():
    for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        pixels = np.asarray(RandomOperations().apply(Image.new("RGB", (40, 40)), name, 1))
        assert (pixels == 128).any()


def test_brightness_and_sharpness_use_the_paper_s_factor():
    image = Image.new("RGB", (8, 8), (100, 50, 200))
    assert RandomOperations().apply(image, "brightness", 1).getpixel((0, 0)) == (136, 68, 255)
    assert RandomOperations().apply(image, "sharpness", 1).getpixel((4, 4)) == (100, 50, 200)


def test_autocontrast_and_equalize_spread_the_values():
    image = Image.fromarray(np.linspace(100, 150, 4096, dtype=np.uint8).reshape(64, 64)).convert("RGB")
    for name in ("autocontrast", "equalize"):
        pixels = np.asarray(RandomOperations().apply(image, name, 1))
        assert pixels.min() == 0 and pixels.max() == 255


def test_operations_are_drawn_evenly_and_applied_half_the_time(monkeypatch):
    names = []
    monkeypatch.setattr(RandomOperations, "apply", lambda self, image, name, sign: names.append(name) or image)
    torch.manual_seed(0)
    operations, image = RandomOperations(2), Image.new("RGB", (4, 4))
    for _ in range(2000):
        operations(image)
    assert 1870 < len(names) < 2130  # 4,000 draws, half of them applied: 2,000 +- 4 standard deviations
    counts = [names.count(name) for name in RandomOperations.NAMES]
    assert min(counts) > 145 and max(counts) < 255
