"""The pixel kernels of the augmentation: they give the numbers of PIL and torchvision, bit for bit.

Where PIL is slow (hue, blur, sharpness, shear) the numbers are computed on whole arrays. In all functions, `planes` are
red, green and blue (3, H, W), or grey (1, H, W), as float32 that hold whole grey levels from 0 to 255.
"""

import math
from functools import lru_cache

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def to_planes(image: Image.Image) -> np.ndarray:
    """Return the planes of an RGB or a grey image."""
    planes = np.empty((len(image.getbands()), image.height, image.width), np.float32)
    for plane, band in zip(planes, image.split(), strict=True):
        plane[:] = np.asarray(band)
    return planes


def to_image(planes: np.ndarray) -> Image.Image:
    """Return the RGB or grey image of planes."""
    bands = [Image.fromarray(plane) for plane in planes.astype(np.uint8)]
    return Image.merge("RGB", bands) if len(bands) == 3 else bands[0]


# Colours


def luminance(planes: np.ndarray) -> np.ndarray:
    """Return the grey levels (H, W) of planes (3, H, W): PIL's `convert("L")`."""
    # Every sum is a whole number below 2**24, which float32 holds exactly.
    red, green, blue = planes
    return np.floor((19595 * red + 38470 * green + 7471 * blue + 32768) * 2**-16)


def blend(start: np.ndarray | float, planes: np.ndarray, factor: float) -> np.ndarray:
    """Compute `start + factor * (planes - start)`, cut to grey levels, in place: PIL's `Image.blend`."""
    planes -= start
    planes *= factor
    planes += start
    if factor > 1:
        np.clip(planes, 0, 255, out=planes)
    return np.floor(planes, out=planes)


def change_brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    """Multiply planes by a factor, in place: torchvision's `adjust_brightness` of a PIL image."""
    planes *= factor
    if factor > 1:
        np.minimum(planes, 255, out=planes)
    return np.floor(planes, out=planes)


def change_contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """Scale the distance of planes from their mean grey, in place: torchvision's `adjust_contrast` of a PIL image."""
    return blend(int(luminance(planes).mean(dtype=np.float64) + 0.5), planes, factor)


def change_saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """Scale the distance of pixels from their own grey, in place: torchvision's `adjust_saturation` of a PIL image."""
    return blend(luminance(planes), planes, factor)


@lru_cache(maxsize=1)
def _hue_tables() -> tuple[np.ndarray, np.ndarray]:
    """Tabulate PIL's hue of every colour, and how much a hue takes away from each channel.

    Returns:
        Hues (8 * 256 * 256), by the order of the channels (see `shift_hue`), the largest channel minus the smallest,
        and the middle one minus the smallest.
        Shares (3, 256), in 255ths, of the saturation that each hue takes away from red, green and blue.
    """
    largest, middle = np.indices((256, 256), dtype=np.uint8)
    middle = np.minimum(middle, largest)
    hues = np.zeros((8, 256, 256), np.uint8)
    for rank in ((2, 1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (1, 0, 2), (0, 1, 2)):
        colours = np.stack([(np.zeros_like(middle), middle, largest)[place] for place in rank], axis=-1)
        order = (rank[0] >= rank[1]) + 2 * (rank[1] >= rank[2]) + 4 * (rank[2] >= rank[0])
        hues[order] = np.asarray(Image.fromarray(colours).convert("HSV"))[..., 0]
    full = np.full((1, 256), 255, np.uint8)
    pure = Image.merge("HSV", [Image.fromarray(band) for band in (np.arange(256, dtype=np.uint8)[None], full, full)])
    return hues.ravel(), 255 - to_planes(pure.convert("RGB"))[:, 0]


def shift_hue(planes: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue of planes by a share of the circle, in place: torchvision's `adjust_hue` of a PIL image.

    Hue and saturation are rounded to 8 bits on the way, as in PIL.
    """
    all_hues, shares = _hue_tables()
    red, green, blue = colours = planes.astype(np.uint8).reshape(3, -1)
    value, smallest = colours.max(axis=0), colours.min(axis=0)
    order = (red >= green).view(np.uint8)
    order += 2 * (green >= blue).view(np.uint8)
    order += 4 * (blue >= red).view(np.uint8)
    middle = red ^ green ^ blue ^ value ^ smallest  # the channel that is neither the largest nor the smallest
    chroma = value - smallest
    index = np.zeros((len(red), 8), np.uint8)  # the bytes of 64-bit numbers, lowest first
    index[:, 0], index[:, 1], index[:, 2] = middle - smallest, chroma, order
    hues = all_hues.take(index.view("<i8")[:, 0]).astype(np.intp)
    largest = value.astype(np.float32)
    saturation = np.floor(chroma.astype(np.float32) * 255 / np.maximum(largest, 1)) * largest
    steps = int(np.int32(turn * 255))  # truncated as in torchvision; hues wrap around at 256
    for share, plane in zip(np.roll(shares, -steps, axis=1), planes.reshape(3, -1), strict=True):
        # value * (1 - saturation / 255 * share / 255), rounded; equal to PIL's result in all 2**24 cases.
        share.take(hues, out=plane, mode="clip")
        plane *= saturation
        plane *= -1 / 255**2
        plane += largest
        np.rint(plane, out=plane)
    return planes


# Blur


def _box(sigma: float) -> tuple[int, int, int]:
    """Return PIL's box for a Gaussian blur by three box blurs: radius, and weights of inner and outermost pixels.

    Weights are in units of 2**-24. They are computed in single precision, because PIL's are.
    """
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = int(whole + share)
    inner = int(np.float32(2**24) / (2 * (whole + share) + 1))
    return radius, inner, (2**24 - (2 * radius + 1) * inner) // 2


def blur(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Blur planes, in place, by `sigma` pixels: PIL's `GaussianBlur`, which is three box blurs in each direction."""
    radius, inner, outer = _box(sigma)
    pad = radius + 1
    channels, height, width = planes.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.uint32)
    padded[:, pad:-pad, pad:-pad] = planes
    # In the flat array a neighbour is a fixed step away, across as well as down, and sums run over contiguous memory.
    # The sums overwrite the padding, which is therefore renewed before each pass.
    flat = padded.reshape(-1)
    sums = np.empty((2, flat.size), np.uint32)
    for step, lines in ((1, padded), (width + 2 * pad, padded.transpose(0, 2, 1))):
        length = flat.size - 2 * pad * step
        neighbours = [flat[start * step : start * step + length] for start in range(2 * pad + 1)]
        total, far = sums[:, :length]
        for _ in range(3):
            lines[..., :pad] = lines[..., pad : pad + 1]
            lines[..., -pad:] = lines[..., -pad - 1 : -pad]
            if radius:
                np.add(neighbours[1], neighbours[2], out=total)
                for neighbour in neighbours[3:-1]:
                    total += neighbour
                total *= inner
            else:
                np.multiply(neighbours[1], inner, out=total)
            np.add(neighbours[0], neighbours[-1], out=far)
            far *= outer
            total += far
            total += 2**23  # one half, so that the shift rounds
            np.right_shift(total, 24, out=neighbours[pad])
    planes[:] = padded[:, pad:-pad, pad:-pad]
    return planes


# Operations


def autocontrast(planes: np.ndarray) -> np.ndarray:
    """Return planes whose grey levels reach from 0 to 255: torchvision's `autocontrast` of a PIL image."""
    return to_planes(F.autocontrast(to_image(planes)))


def equalize(planes: np.ndarray) -> np.ndarray:
    """Return planes whose grey levels are about equally frequent: torchvision's `equalize` of a PIL image."""
    return to_planes(F.equalize(to_image(planes)))


def rotate(planes: np.ndarray, angle: float, fill: int) -> np.ndarray:
    """Return planes turned by `angle` degrees around their centre: torchvision's bilinear `rotate` of a PIL image."""
    return to_planes(F.rotate(to_image(planes), angle, InterpolationMode.BILINEAR, fill=[fill] * len(planes)))


def sharpen(planes: np.ndarray, factor: float) -> np.ndarray:
    """Scale the distance of planes from their smoothed version, in place: torchvision's `adjust_sharpness`."""
    inside = planes[:, 1:-1, 1:-1]  # PIL does not smooth the border
    columns = planes[:, :-2] + planes[:, 1:-1] + planes[:, 2:]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * inside
    blend(np.floor(total / 13 + 0.5), inside, factor)
    return planes


@lru_cache(maxsize=4)
def _shear_positions(height: int, width: int, tangent: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute where the pixels of a sheared image come from: x' = x + tangent * y, for the centres of pixels.

    Returns:
        The column of the left neighbour of each row's first pixel (H,).
        The share of the right neighbour (H, W). Within a row it differs only by rounding, which changes PIL's result.
        Whether a pixel comes from outside the image (H, W).
    """
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    source = columns + tangent * rows
    outside = (source < 0) | (source >= width)
    source -= 0.5
    left = np.floor(source)
    return left[:, 0].astype(np.int64), source - left, outside


def shear(planes: np.ndarray, tangent: float, fill: int) -> np.ndarray:
    """Return planes with rows moved by `tangent` times their distance from the top: PIL's bilinear `transform`."""
    channels, height, width = planes.shape
    left, share, outside = _shear_positions(height, width, tangent)
    pad = max(-left.min(), left.max() + 1, 1)
    padded = np.empty((channels, height, width + 2 * pad), planes.dtype)
    padded[..., :pad], padded[..., pad:-pad], padded[..., -pad:] = planes[..., :1], planes, planes[..., -1:]
    starts = np.arange(height) * (width + 2 * pad) + pad + left
    # A row that moves only starts elsewhere in the flat image, and is as contiguous as before.
    windows = np.lib.stride_tricks.sliding_window_view(padded.reshape(channels, -1), width + 1, axis=1)
    sheared = np.empty(planes.shape, np.float32)
    for channel in range(channels):
        rows = windows[channel, starts]  # (H, W + 1)
        moved = np.subtract(rows[:, 1:], rows[:, :-1], dtype=np.float64)  # double precision as in PIL
        moved *= share
        moved += rows[:, :-1]
        np.copyto(moved, fill, where=outside)
        sheared[channel] = np.floor(moved, out=moved)
    return sheared


def translate(planes: np.ndarray, shift: int, fill: int) -> np.ndarray:
    """Return planes whose pixel x of a row is pixel `x + shift` of the given ones, or `fill` outside of them."""
    moved = np.full_like(planes, fill)
    width = planes.shape[-1]
    moved[..., max(-shift, 0) : width - max(shift, 0)] = planes[..., max(shift, 0) : width - max(-shift, 0)]
    return moved
