"""For the same random choices, views equal those of PIL and torchvision; changes are as frequent as in the paper."""

import io

import numpy as np
import pytest
import torch
from data_pipeline import PlainAugmentation
from helpers import photo
from PIL import Image

from tcl_hf.data import pixels
from tcl_hf.data.augmentation import RandomColors, TCLAugmentation

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("kind", ["photo", "grey"])
def test_views_equal_the_plain_composition(kind):
    """Equal within 2e-6, a seven-thousandth of a grey level, with the same random numbers in the same order."""
    image = photo(150, 120).convert("L") if kind == "grey" else photo(150, 120)
    augment = TCLAugmentation(48, MEAN, STD)
    for seed in range(150):
        torch.manual_seed(seed)
        expected, expected_next = PlainAugmentation(48, MEAN, STD)(image, 2), torch.rand(4)
        torch.manual_seed(seed)
        views, after = augment(image.copy(), 2), torch.rand(4)
        assert torch.equal(after, expected_next)
        for view, other in zip(views, expected, strict=True):
            assert view.is_contiguous()
            torch.testing.assert_close(view, other, atol=2e-6, rtol=0)


def test_colours_change_as_often_as_in_the_paper(monkeypatch):
    """4,000 draws have shares within four standard deviations, all 24 orders of the jitter, and uniform amounts."""
    seen: dict[str, list] = {"grey": [], "blur": [], "order": [], "amounts": []}

    def note(number: int):
        def change(planes, amount):
            seen["order"].append(number)
            seen["amounts"].append((number, amount))
            return planes

        return change

    monkeypatch.setattr(RandomColors, "CHANGES", [note(number) for number in range(4)])
    monkeypatch.setattr(pixels, "luminance", lambda planes: seen["grey"].append(1) or planes[0])
    monkeypatch.setattr(pixels, "blur", lambda planes, sigma: seen["blur"].append(sigma) or planes)
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
    """Check by the test of Kolmogorov and Smirnov at p = 0.001."""
    ordered = (np.sort(values) - low) / (high - low)
    assert ordered[0] >= 0 and ordered[-1] <= 1
    assert np.abs(ordered - np.arange(len(ordered)) / len(ordered)).max() < 1.95 / len(ordered) ** 0.5


def test_a_jpeg_decoded_at_reduced_scale_gives_nearly_the_view_of_full_scale():
    """Measured: 0.6 to 1.2 grey levels in the mean, where each pixel of full scale has independent noise (sigma 6)."""
    file = io.BytesIO()
    photo(1024, 768).save(file, "JPEG", quality=90)
    augment = TCLAugmentation(128, (0, 0, 0), (1, 1, 1), (0.5, 1.0), False, False, 0)
    for seed in range(5):
        torch.manual_seed(seed)
        (reduced,) = augment(jpeg := Image.open(file))
        assert jpeg.width < 1024
        torch.manual_seed(seed)
        (full,) = augment(Image.open(file).convert("RGB"))
        assert (reduced - full).abs().mean() < 1.5 / 255
