"""Images are opened upright, in 8 bits and with their true colors; damaged ones are refused."""

import io
import tracemalloc

import numpy as np
import pytest
from helpers import encoded, png
from PIL import Image

from tcl_hf.data.images import open_image, why_unusable


def pixels_of(content):
    with open_image({"bytes": content, "path": None}) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = pixels_of(encoded(Image.fromarray(values), kind))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]  # value / 257, rounded
        assert (pixels == pixels[..., :1]).all()


def test_cmyk_palette_and_the_first_picture_of_an_animation_have_the_colors_they_show():
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    blue = Image.new("RGB", (16, 16), (10, 20, 220))
    contents = {
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "palette": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "animation": encoded(red, "GIF", save_all=True, append_images=[blue]),
    }
    for name, content in contents.items():
        assert (abs(pixels_of(content) - [200, 30, 40]) <= 3).all(), name


def test_a_photo_is_turned_upright():
    """The comments give the sides of the shown image at which the stored rows and columns begin, in EXIF's words."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 250  # the top left quarter is bright
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right: the first row is the top, the first column the right side
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: np.rot90(upright, 1),  # right, top: a viewer turns it by a quarter clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: np.rot90(upright, -1),  # left, bottom
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "WEBP"):
            seen = pixels_of(encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif, quality=95))
            assert seen.shape == upright.shape, (orientation, kind)
            assert (abs(seen - upright)[2:6, 2:14] < 30).all() and (abs(seen - upright)[10:, 18:] < 30).all(), (
                orientation
            )


def test_broken_exif_does_not_lose_a_photo():
    content = encoded(Image.new("RGB", (8, 8), (200, 30, 40)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    assert pixels_of(content).shape == (8, 8, 3)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    for side, error in ((20_000, Image.DecompressionBombError), (10_000, Image.DecompressionBombWarning)):
        content = encoded(Image.new("1", (side, side)), "PNG")
        tracemalloc.start()
        with pytest.raises(error, match=f"{side * side} pixels"):
            open_image(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        assert f"{side * side} pixels" in why_unusable({"image": content, "captions": ["a"]})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_damaged_pictures_are_refused_without_a_crash(kind):
    content = encoded(Image.open(io.BytesIO(png(1))).convert("RGB"), kind)
    rng = np.random.default_rng(0)
    reasons = []
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            damaged[place] = rng.integers(256)
        reasons.append(why_unusable({"image": bytes(damaged), "captions": ["a"]}))
    assert any(reasons)


def test_values_without_a_known_range_are_refused():
    content = encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match="mode F, whose range"):
        open_image(content)


def test_zero_bytes_are_not_looked_for_in_a_file(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    with pytest.raises(ValueError, match="zero bytes"):
        open_image({"bytes": b"", "path": "0.png"})
