"""Random views of an image as the paper's pre-training draws them: which change is made, how often, and how strongly.

Each view is a random crop, changed in colour, blurred, mirrored, and changed by further operations. The changes are
computed in `pixels`. For the same random choices, a view has the grey levels that PIL and torchvision give, bit for
bit. Pixels are `planes`, see `pixels`, until they are normalised.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from . import pixels


class RandomColors:
    """Colour jitter with probability 0.8, grey with 0.2, Gaussian blur with 0.5, as in the paper.

    The jitter changes brightness, contrast and saturation by up to 0.4 and hue by up to 0.1, in random order. The
    standard deviation of the blur is between 0.1 and 2 pixels. Random numbers are drawn in the order of torchvision's
    `RandomApply`, `ColorJitter` and `RandomGrayscale`.
    """

    CHANGES = (pixels.change_brightness, pixels.change_contrast, pixels.change_saturation, pixels.shift_hue)
    FACTORS = [0.6, 1.4]
    TURN = [-0.1, 0.1]  # shares of the circle of hues
    SIGMA = [0.1, 2.0]  # pixels

    def __call__(self, planes: np.ndarray) -> np.ndarray:
        """Change planes (3, H, W), in place where possible, and return them; those made grey are (1, H, W)."""
        if torch.rand(1) < 0.8:
            order, *amounts = ColorJitter.get_params(self.FACTORS, self.FACTORS, self.FACTORS, self.TURN)
            for number in order.tolist():
                planes = self.CHANGES[number](planes, amounts[number])
        if torch.rand(1) < 0.2:
            planes = pixels.luminance(planes)[None]
        if torch.rand(1) < 0.5:
            planes = pixels.blur(planes, torch.empty(()).uniform_(*self.SIGMA).item())
        return planes


class RandomOperations:
    """Draws `num_operations` of ten image operations, with replacement, and applies each with probability 0.5.

    The operations and their strengths are those of the paper's code at magnitude 7 of 10.
    """

    NAMES = (
        *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    )
    ENHANCEMENT = 0.7 * 1.8 + 0.1  # 1.36
    SHEAR = 0.7 * 0.3  # tangent of the angle
    TRANSLATION = round(0.7 * 10)  # pixels
    ROTATION = 0.7 * 30  # degrees
    FILL = 128  # grey level of what comes from outside the image

    def __init__(self, num_operations: int = 2):
        self.num_operations = num_operations

    def __call__(self, image: Any) -> Any:
        """Draw operations and apply them to planes or to an image; the result has the type of the argument."""
        for number in torch.randint(len(self.NAMES), (self.num_operations,)).tolist():
            applied, positive = (torch.rand(2) < 0.5).tolist()
            if applied:
                image = self.apply(image, self.NAMES[number], 1 if positive else -1)
        return image

    def apply(self, image: Any, name: str, sign: int) -> Any:
        """Apply one operation; `sign`, 1 or -1, is the direction of those that have one."""
        if isinstance(image, Image.Image):
            return pixels.to_image(self.apply(pixels.to_planes(image), name, sign))
        if name == "autocontrast":
            return pixels.autocontrast(image)
        if name == "equalize":
            return pixels.equalize(image)
        if name == "brightness":
            return pixels.change_brightness(image, self.ENHANCEMENT)
        if name == "sharpness":
            return pixels.sharpen(image, self.ENHANCEMENT)
        if name == "rotate":
            return pixels.rotate(image, sign * self.ROTATION, self.FILL)
        if name.endswith("_y"):  # with rows and columns exchanged, it is the operation along x
            exchanged = self.apply(image.transpose(0, 2, 1), name.removesuffix("_y") + "_x", sign)
            return exchanged.transpose(0, 2, 1)
        if name == "shear_x":
            return pixels.shear(image, -sign * self.SHEAR, self.FILL)
        if name == "translate_x":
            return pixels.translate(image, sign * self.TRANSLATION, self.FILL)
        return image  # identity


class TCLAugmentation:
    """Random views of an image, as the paper's pre-training draws them.

    Args:
        image_size: side of a view in pixels.
        image_mean, image_std: the normalisation of the image processor, one value per channel.
        crop_scale: range of the share of the image's area that is cropped (paper: 0.2 to 1; fine-tuning: 0.5 to 1).
        color_jitter: whether colours are changed, see `RandomColors`; ALBEF does without.
        flip: whether a view is mirrored with probability 0.5. False where texts name left and right.
        num_operations: number of further operations, see `RandomOperations`.
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

    def settings(self) -> dict[str, Any]:
        """The settings that views depend on, besides the image and the random numbers."""
        return {
            "image_size": self.image_size,
            "normalisation": [*self.mean.flatten().tolist(), *self.std.flatten().tolist()],
            "crop_scale": [float(share) for share in self.crop_scale],
            "color_jitter": self.colors is not None,
            "flip": self.flip,
            "num_operations": self.operations.num_operations,
        }

    def __call__(self, image: Image.Image, num_views: int = 1) -> list[Tensor]:
        """Draw `num_views` views (3, image_size, image_size) of an image.

        The crops are drawn before the image is decoded: a JPEG that is larger than all of them need is decoded at
        reduced scale.
        """
        width, height = image.size
        boxes = [RandomResizedCrop.get_params(image, list(self.crop_scale), [3 / 4, 4 / 3]) for _ in range(num_views)]
        smallest = min(min(box_height, box_width) for _, _, box_height, box_width in boxes)
        reduction = max(smallest / self.image_size, 1.0)
        image.draft("RGB", (int(width / reduction), int(height / reduction)))
        image = image.convert("RGB")
        scale_x, scale_y = image.width / width, image.height / height
        views = []
        for top, left, box_height, box_width in boxes:
            x1, x2 = (round(x * scale_x) for x in (left, left + box_width))
            y1, y2 = (round(y * scale_y) for y in (top, top + box_height))
            view = image.crop((x1, y1, x2, y2)).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            views.append(self._augment(pixels.to_planes(view)))
        return views

    def _augment(self, planes: np.ndarray) -> Tensor:
        """Draw the changes after the crop, and normalise."""
        if self.colors is not None:
            planes = self.colors(planes)
        if self.flip and torch.rand(1) < 0.5:
            planes = np.ascontiguousarray(planes[..., ::-1])
        return self.normalize(self.operations(planes))

    def normalize(self, planes: np.ndarray) -> Tensor:
        """Return pixels (3, H, W) of planes: less the mean, divided by the standard deviation."""
        shares = torch.from_numpy(np.ascontiguousarray(planes)).mul_(1 / 255)
        return shares.sub(self.mean).div_(self.std)  # grey planes (1, H, W) become three channels here
