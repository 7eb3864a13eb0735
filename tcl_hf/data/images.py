"""Opening the image of a record, whatever form it has."""

import io
import os
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # that put an image of this EXIF orientation upright (`ImageOps.exif_transpose` decodes every image to see)


def open_image(image: object) -> Image.Image:
    """Open the image of a record: its bytes, a path, a dictionary of both, or an image already open.

    It comes upright, as its EXIF orientation says, and can be converted to RGB: 16-bit grey is scaled to 8 bit. Of an
    animation it is the first picture. Pixels are decoded later, except where it has to be turned or scaled.

    Raises:
        ValueError: if there is none, or its values have no known range.
        OSError: if it can not be read.
        DecompressionBombWarning: if it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million); from twice as
            many, a `DecompressionBombError`. Nothing has been decoded then.
    """
    if isinstance(image, Image.Image):
        return image.copy()  # the caller's stays as it is
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image == b"":
        raise ValueError("an image of zero bytes")
    if not image:
        raise ValueError("no image")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    elif not isinstance(image, str | os.PathLike):
        raise ValueError(f"an image of type {type(image).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(image)
        if opened.format == "AVIF":
            opened.load()
    except RuntimeError as error:  # of AVIF only; other formats raise OSError
        raise OSError(str(error)) from error
    if opened.mode in ("I", "F"):
        raise ValueError(f"an image of mode {opened.mode}, whose range of values is not known")
    turn = _TURNS.get(_orientation(opened))
    return _in_8_bit(opened) if turn is None else _in_8_bit(opened).transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, also where it can not be read: that is no reason to lose a picture."""
    if "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1


def _in_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bit, which Pillow would clip; others as they are."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def why_unusable(record: dict) -> str | None:
    """What is wrong with a record: no readable image, or no text; None if it can be used."""
    try:
        for source in record["images"] if "images" in record else [record.get("image")]:
            with open_image(source) as image:
                image.load()
    except IMAGE_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    if "question" in record:
        return None if (record["question"] or "").strip() else "no question"
    if not any(isinstance(text, str) and text.strip() for text in record.get("captions") or ()):
        return "no caption"
    return None
