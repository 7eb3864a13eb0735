"""Random views of an image: crop, colours, blur, flip and further operations, as the paper's pre-training draws them.

Where PIL is slow (hue, blur, sharpness, shear) the same numbers are computed on whole arrays: the grey levels of a view
are those that PIL and torchvision give, bit for bit, for the same random choices. Inside, `planes` are red, green and
blue (3, H, W), or grey (1, H, W), float32, and hold whole grey levels from 0 to 255.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from .pixels import (
    blur,
    change_brightness,
    change_contrast,
    change_saturation,
    luminance,
    sharpen,
    shear,
    shift_hue,
    to_image,
    to_planes,
    translate,
)


class RandomColors:
    """Colour jitter with probability 0.8, grey with 0.2, Gaussian blur with 0.5, as the paper has them.

    The jitter is that of brightness, contrast and saturation by up to 0.4 and of hue by up to 0.1, in random order;
    the blur's standard deviation is between 0.1 and 2 pixels. Random numbers are drawn as torchvision's
    `RandomApply`, `ColorJitter` and `RandomGrayscale` draw them.
    """

    CHANGES = (change_brightness, change_contrast, change_saturation, shift_hue)
    FACTORS = [0.6, 1.4]
    TURN = [-0.1, 0.1]
    SIGMA = [0.1, 2.0]

    def __call__(self, planes: np.ndarray) -> np.ndarray:
        """Change planes (3, H, W), in place where that is possible; grey ones come back as (1, H, W)."""
        if torch.rand(1) < 0.8:
            order, *amounts = ColorJitter.get_params(self.FACTORS, self.FACTORS, self.FACTORS, self.TURN)
            for number in order.tolist():
                planes = self.CHANGES[number](planes, amounts[number])
        if torch.rand(1) < 0.2:
            planes = luminance(planes)[None]
        if torch.rand(1) < 0.5:
            planes = blur(planes, torch.empty(()).uniform_(*self.SIGMA).item())
        return planes


class RandomOperations:
    """Draw `num_operations` of ten image operations, with replacement; apply each with probability 0.5.

    The operations and their strengths are those of the paper's code at magnitude 7 of 10.
    """

    NAMES = (
        *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    )
    ENHANCEMENT = 0.7 * 1.8 + 0.1  # 1.36
    SHEAR = 0.7 * 0.3  # as tangent
    TRANSLATION = round(0.7 * 10)  # pixels
    ROTATION = 0.7 * 30  # degrees
    FILL = 128

    def __init__(self, num_operations: int = 2):
        self.num_operations = num_operations

    def __call__(self, image: Any) -> Any:
        """Draw and apply operations to planes, or to an RGB image; the like of it comes back."""
        for number in torch.randint(len(self.NAMES), (self.num_operations,)).tolist():
            applied, positive = (torch.rand(2) < 0.5).tolist()
            if applied:
                image = self.apply(image, self.NAMES[number], 1 if positive else -1)
        return image

    def apply(self, image: Any, name: str, sign: int) -> Any:
        """Apply one operation; `sign` is the direction of those that have one."""
        if isinstance(image, Image.Image):
            return to_image(self.apply(to_planes(image), name, sign))
        if name == "autocontrast":
            return to_planes(F.autocontrast(to_image(image)))
        if name == "equalize":
            return to_planes(F.equalize(to_image(image)))
        if name == "brightness":
            return change_brightness(image, self.ENHANCEMENT)
        if name == "sharpness":
            return sharpen(image, self.ENHANCEMENT)
        if name == "rotate":
            angle, fill = sign * self.ROTATION, [self.FILL] * len(image)
            return to_planes(F.rotate(to_image(image), angle, InterpolationMode.BILINEAR, fill=fill))
        if name.endswith("_y"):  # what is done to rows in the direction of x
            turned = self.apply(image.transpose(0, 2, 1), name.removesuffix("_y") + "_x", sign)
            return turned.transpose(0, 2, 1)
        if name == "shear_x":
            return shear(image, -sign * self.SHEAR, self.FILL)
        if name == "translate_x":
            return translate(image, sign * self.TRANSLATION, self.FILL)
        return image  # identity


class TCLAugmentation:
    """Random views of an image, as the paper's pre-training draws them.

    Args:
        image_size: pixels of a side of the view.
        image_mean, image_std: normalisation, that of the image processor.
        crop_scale: range of the cropped share of the image's area (paper: 0.2 to 1; fine-tuning: 0.5 to 1).
        color_jitter: jitter of brightness, contrast, saturation (0.4) and hue (0.1), grey, and blur, which ALBEF
            does without.
        flip: mirror every other view; not where left and right have names.
        num_operations: further operations drawn, see `RandomOperations`.
    """

    def __init__(
        self,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        crop_scale: Sequence[float] = (0.2, 1.0),
        color_jitter: bool = True,
        flip: bool = True,
        num_operations: int = 2,
    ):
        self.image_size, self.crop_scale, self.flip = image_size, crop_scale, flip
        self.colors = RandomColors() if color_jitter else None
        self.operations = RandomOperations(num_operations)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (image_mean, image_std))

    def __call__(self, image: Image.Image, num_views: int = 1) -> list[Tensor]:
        """Draw views (3, image_size, image_size) of an image.

        The crops are drawn first: a JPEG larger than all of them need is decoded at reduced scale.
        """
        width, height = image.size
        boxes = [
            RandomResizedCrop.get_params(image, scale=list(self.crop_scale), ratio=[3 / 4, 4 / 3])
            for _ in range(num_views)
        ]
        smallest = min(min(box_height, box_width) for _, _, box_height, box_width in boxes)
        reduction = max(smallest / self.image_size, 1.0)
        image.draft("RGB", (int(width / reduction), int(height / reduction)))
        image = image.convert("RGB")
        scale_x, scale_y = image.width / width, image.height / height
        views = []
        for top, left, box_height, box_width in boxes:
            box = (
                round(left * scale_x),
                round(top * scale_y),
                round((left + box_width) * scale_x),
                round((top + box_height) * scale_y),
            )
            view = image.crop(box).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            views.append(self._augment(to_planes(view)))
        return views

    def _augment(self, planes: np.ndarray) -> Tensor:
        """Draw what follows the crop, and normalise."""
        if self.colors is not None:
            planes = self.colors(planes)
        if self.flip and torch.rand(1) < 0.5:
            planes = np.ascontiguousarray(planes[..., ::-1])
        return self.normalize(self.operations(planes))

    def normalize(self, planes: np.ndarray) -> Tensor:
        """Pixels (3, H, W) of planes, less the mean, over the standard deviation."""
        pixels = torch.from_numpy(np.ascontiguousarray(planes)).mul_(1 / 255)
        return pixels.sub(self.mean).div_(self.std)  # grey becomes three channels here
