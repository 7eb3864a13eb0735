"""The image processors of TCL: pixels for inference, as the original makes them, of images in any mode."""

import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

# The transpositions that put an image upright, by its EXIF orientation. Pillow's `ImageOps.exif_transpose` is not used,
# because it decodes every image first.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow finds an orientation: EXIF, and XMP by the names that its plugins give it.
_HOLDS_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp"}


def upright(image: Image.Image) -> Image.Image:
    """An image turned according to its EXIF orientation, of which `convert("RGB")` gives the pixels to train on.

    16-bit grey is scaled to 8 bits, which Pillow would clip. Pixels are decoded only for an image that is turned or
    scaled. Training and inference both use this function, so that they see the same pixels.

    Raises:
        ValueError: if the range of its values is not known.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode}, whose range of values is not known")
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16"):
        scaled = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(scaled) if turn is None else Image.fromarray(scaled).transpose(turn)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _HOLDS_ORIENTATION:  # so that it is not turned again
        turned.info.pop(name, None)
    return turned


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, from 1 to 8; where EXIF has none, that of its XMP, as editors write it.

    It is 1 (upright) if these data cannot be read, because the image itself can be good. A TIFF is turned by Pillow
    when it is decoded.
    """
    if image.format == "TIFF" or not image.info.keys() & _HOLDS_ORIENTATION:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1


class _Pixels:
    """Images are resized to a square, bicubically, and normalised with CLIP's mean and std."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 256, "width": 256}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> Any:
        """As of the backend, with the pixels of training: see `upright`. Transparency is dropped, as in training."""
        if isinstance(image, Image.Image):
            image = upright(image).convert("RGB") if do_convert_rgb else upright(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)  # type: ignore[misc]


class TCLImageProcessor(_Pixels, TorchvisionBackend):
    """Resize to a square, bicubically, and normalise with CLIP's mean and std, on tensors (any device).

    The pixels of a photo differ from those of [`TCLImageProcessorPil`] by one grey level at most (0.015 when
    normalised); those of noise that is resized in one direction only, by up to four.
    """


class TCLImageProcessorPil(_Pixels, PilBackend):
    """Resize to a square, bicubically, and normalise with CLIP's mean and std, by PIL: bit for bit as the original."""


__all__ = ["TCLImageProcessor", "TCLImageProcessorPil"]
