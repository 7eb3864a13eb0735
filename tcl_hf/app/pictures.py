"""Pictures that strangers send: their size is read and limited before anything of them is decoded."""

import base64
import binascii
import io

from PIL import Image

from ..data.images import IMAGE_ERRORS, open_image
from .limits import Limits, RequestError

# The formats that are opened. Pillow has others, some of which start programs of the system (EPS) or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")


def read_picture(content: bytes, limits: Limits, place: str = "image") -> Image.Image:
    """The picture of a file, upright and in RGB.

    Raises:
        RequestError: 413 if the file or the picture is larger than the limits, 422 if it cannot be read.
    """
    if len(content) > limits.image_bytes:
        raise RequestError(
            413,
            f"{place}: a file of {len(content) / 1e6:.1f} MB is larger than {limits.image_bytes / 1e6:.1f} MB; send "
            "a smaller one.",
        )
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as header:
            width, height = header.size
        if width * height > limits.image_pixels:
            raise RequestError(
                413,
                f"{place}: {width} x {height} pixels are more than {limits.image_pixels / 1e6:g} million; send a "
                "smaller picture.",
            )
        return open_image(content).convert("RGB")
    except RequestError:
        raise
    except Image.DecompressionBombError as error:  # raised while the header is read
        raise RequestError(413, f"{place}: the picture has too many pixels ({error}).") from error
    except (*IMAGE_ERRORS, MemoryError) as error:
        raise RequestError(
            422, f"{place}: this is not a picture that can be read; send one as JPEG, PNG or WebP."
        ) from error


def from_base64(text: str, limits: Limits, place: str = "image") -> bytes:
    """The bytes of a file that is written as base64, with or without `data:image/...;base64,` before it.

    Raises:
        RequestError: 413 if there are more than the limits permit, 422 if it is not base64.
    """
    coded = text.partition(",")[2] if text.startswith("data:") else text
    if len(coded) > limits.image_bytes * 4 // 3 + 4:
        raise RequestError(
            413, f"{place}: the file is larger than {limits.image_bytes / 1e6:.1f} MB; send a smaller one."
        )
    try:
        return base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            422, f"{place}: {text[:40]!r} is not base64; encode the bytes of the file, or send it as a form."
        ) from error
