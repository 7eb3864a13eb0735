"""Time decoding and two augmented views of JPEGs: `python benchmarks/data_pipeline.py [--images 8] [--rounds 30]`.

The package's pipeline is compared with a plain composition of PIL and torchvision with the same operations. They take
turns on one thread, and CPU seconds are measured, because other jobs on the machine disturb these least. The photos are
made from a seed: smooth random fields with noise, 500 x 375 pixels, JPEG quality 90. Both draw the same random numbers,
and the views are compared before they are timed. The benchmark prints images per second of one core, and the
milliseconds of each part in a view that has it.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as F

from tcl_hf.data import pixels as ours
from tcl_hf.data.augmentation import RandomOperations, TCLAugmentation
from tcl_hf.models.image_processing_tcl import TCLImageProcessor

MEAN, STD = TCLImageProcessor.image_mean, TCLImageProcessor.image_std
SIZE = 256
BICUBIC = transforms.InterpolationMode.BICUBIC


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG with roughly the spectrum of a photo: strong coarse shapes, weak fine ones, and noise."""
    random = np.random.default_rng(seed)
    pixels = random.normal(128, 5, (height, width, 3))
    for cells, strength in ((3, 60), (8, 35), (25, 20), (80, 12), (200, 6)):
        field = random.normal(0, strength, (cells, cells * width // height, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(field[..., channel]))
            pixels[..., channel] += np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# The plain composition


class PlainBlur:
    """Gaussian blur by PIL."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))


class PlainOperations:
    """Two of ten operations by torchvision and PIL, each applied with probability 0.5."""

    def __call__(self, image: Image.Image) -> Image.Image:
        for number in torch.randint(10, (2,)).tolist():
            applied, positive = (torch.rand(2) < 0.5).tolist()
            if applied:
                image = plain_operation(image, RandomOperations.NAMES[number], 1 if positive else -1)
        return image


def plain_operation(image: Image.Image, name: str, sign: int) -> Image.Image:
    """An operation as in the paper's code: x1.36, 0.21 as tangent, 7 pixels, 21 degrees, bilinear, filled with 128."""
    affine = {
        "shear_x": (1, -sign * 0.21, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, -sign * 0.21, 1, 0),
        "translate_x": (1, 0, sign * 7, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * 7),
    }
    fill = [128] * len(image.getbands())
    if name in affine:
        fillcolor = tuple(fill) if len(fill) > 1 else fill[0]
        return image.transform(
            image.size, Image.Transform.AFFINE, affine[name], Image.Resampling.BILINEAR, fillcolor=fillcolor
        )
    if name == "rotate":
        return F.rotate(image, sign * 21.0, transforms.InterpolationMode.BILINEAR, fill=fill)
    if name in ("brightness", "sharpness"):
        return getattr(F, f"adjust_{name}")(image, 1.36)
    return image if name == "identity" else getattr(F, name)(image)


class PlainAugmentation:
    """Views by the composition that a textbook would use."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        self.crop = transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=BICUBIC)
        self.rest = transforms.Compose(
            [
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([PlainBlur()], p=0.5),
                transforms.RandomHorizontalFlip(p=0.5),
                PlainOperations(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image, num_views: int) -> list[torch.Tensor]:
        image = image.convert("RGB")
        # All crops come first, in the order in which our pipeline draws them.
        crops = [self.crop(image) for _ in range(num_views)]
        return [self.rest(crop) for crop in crops]


# Timing


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def seeded(augmentation: Callable, file: bytes, seed: int) -> list[torch.Tensor]:
    """Two views of a JPEG under a seed."""
    torch.manual_seed(seed)
    with Image.open(io.BytesIO(file)) as image:
        return augmentation(image, 2)


def parts(file: bytes) -> dict[str, tuple[Callable[[], object], Callable[[], object], float]]:
    """For each part: the plain function, ours, and how often an image with two views has it."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    box = (60, 20, 390, 350)
    view = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    planes = ours.to_planes(view)
    operations, augmentation = RandomOperations(), TCLAugmentation(SIZE, MEAN, STD)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def decode() -> Image.Image:
        return Image.open(io.BytesIO(file)).convert("RGB")

    def crop() -> Image.Image:
        return F.resized_crop(image, box[1], box[0], box[3] - box[1], box[2] - box[0], [SIZE, SIZE], BICUBIC)

    # Our functions work in place, so each gets a copy, which costs a fifth of a millisecond at most and is timed.
    table = {
        "decode": (decode, decode, 1.0),
        "crop and resize": (crop, crop, 2.0),
        "to planes": (lambda: None, lambda: ours.to_planes(view), 2.0),
        "brightness": (lambda: F.adjust_brightness(view, 1.2), lambda: ours.change_brightness(planes.copy(), 1.2), 1.6),
        "contrast": (lambda: F.adjust_contrast(view, 1.2), lambda: ours.change_contrast(planes.copy(), 1.2), 1.6),
        "saturation": (lambda: F.adjust_saturation(view, 1.2), lambda: ours.change_saturation(planes.copy(), 1.2), 1.6),
        "hue": (lambda: F.adjust_hue(view, 0.05), lambda: ours.shift_hue(planes.copy(), 0.05), 1.6),
        "grey": (lambda: F.rgb_to_grayscale(view, 3), lambda: ours.luminance(planes), 0.4),
        "blur": (lambda: view.filter(ImageFilter.GaussianBlur(1.05)), lambda: ours.blur(planes.copy(), 1.05), 1.0),
        "flip": (lambda: F.hflip(view), lambda: np.ascontiguousarray(planes[..., ::-1]), 1.0),
    }
    for name in operations.NAMES[1:]:
        table[f"operation {name}"] = (
            partial(plain_operation, view, name, 1),
            lambda name=name: operations.apply(planes.copy(), name, 1),
            0.2,
        )
    table["to tensor, normalise"] = (lambda: to_tensor(view), lambda: augmentation.normalize(planes.copy()), 2.0)
    return table


def row(name: str, plain: list[float], own: list[float], scale: float, note: str = "") -> str:
    """A line of the table: medians with the range from the 10th to the 90th percentile, and the median ratio."""
    cells = []
    for values in (plain, own):
        low, *_, high = statistics.quantiles(values, n=10)
        cells.append(f"{statistics.median(values) * scale:.2f} ({low * scale:.2f}-{high * scale:.2f})")
    middle = statistics.median(own)
    ratio = f"{statistics.median(plain) / middle:.2f}" if min(plain) > 1e-5 else ""
    return f"| {name} | {note} | {cells[0]} | {cells[1]} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30, help="how often every image is augmented")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [photo(seed) for seed in range(args.images)]
    plain, own = PlainAugmentation(SIZE, MEAN, STD), TCLAugmentation(SIZE, MEAN, STD)
    furthest = max(
        float((a - b).abs().max())
        for seed, file in enumerate(files)
        for a, b in zip(seeded(plain, file, seed), seeded(own, file, seed), strict=True)
    )
    print(f"{len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1024:.0f} KiB, two views of {SIZE} pixels")
    print(f"largest difference between views of the same random numbers: {furthest:.1e} (a grey level is 0.014)")

    # A round augments all images with new seeds, by the plain pipeline and by ours in turn.
    rounds: list[tuple[float, float]] = []
    for number in range(args.rounds):
        seconds = [0.0, 0.0]
        for offset, file in enumerate(files):
            for which, augmentation in enumerate((plain, own)):
                seed = number * len(files) + offset
                seconds[which] += cpu_seconds(partial(seeded, augmentation, file, seed))
        rounds.append((seconds[0] / len(files), seconds[1] / len(files)))
    plain_seconds, own_seconds = map(list, zip(*rounds, strict=True))
    low, *_, high = statistics.quantiles([a / b for a, b in rounds], n=10)
    ratio = statistics.median(a / b for a, b in rounds)
    for name, values in (("plain", plain_seconds), ("ours", own_seconds)):
        rates = statistics.quantiles([1 / value for value in values], n=10)
        print(f"{name}: {rates[4]:.1f} images/s per core ({rates[0]:.1f} to {rates[-1]:.1f} in eight of ten rounds)")
    print(f"ratio: {ratio:.2f} ({low:.2f} to {high:.2f} in eight of ten rounds)\n")

    print("| part, CPU ms | times an image | plain: median (10-90 %) | ours | ratio |\n|---|---|---|---|---|")
    sums = [0.0, 0.0]
    for name, (plain_part, own_part, share) in parts(files[0]).items():
        plain_part(), own_part()
        pairs = [(cpu_seconds(plain_part), cpu_seconds(own_part)) for _ in range(args.rounds)]
        times = [list(values) for values in zip(*pairs, strict=True)]
        print(row(name, *times, scale=1e3, note=f"{share:g}"))
        sums = [total + share * statistics.median(values) for total, values in zip(sums, times, strict=True)]
    print(f"| sum over an image | | {sums[0] * 1e3:.1f} | {sums[1] * 1e3:.1f} | {sums[0] / sums[1]:.2f} |")
    print(row("measured, an image", plain_seconds, own_seconds, scale=1e3))


if __name__ == "__main__":
    main()
