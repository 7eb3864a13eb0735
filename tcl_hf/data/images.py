"""`open_image` opens the image of a record in any of its forms; `why_unusable` checks a whole record."""

import contextlib
import hashlib
import io
import os
import warnings
from typing import Any

from PIL import Image

from ..models.image_processing_tcl import upright
from ..models.tokenization_tcl import clean_caption
from .captions import usable_captions

with contextlib.suppress(ImportError):  # the extra `heic`
    from pillow_heif import register_heif_opener

    register_heif_opener()

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(image: object) -> Image.Image:
    """Open the image of a record: its bytes, a path, a dictionary of both, or an image already open.

    The image is turned upright according to its EXIF orientation. It can be converted to RGB, because 16-bit grey is
    scaled to 8 bits. An animation gives its first picture. Pixels are decoded later, unless the image has to be turned
    or scaled.

    Raises:
        ValueError: if the image is missing, or the range of its values is not known.
        OSError: if it cannot be read.
        DecompressionBombWarning: if it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million). For more than
            twice that number it is a `DecompressionBombError`. Both are raised before anything is decoded.
    """
    if isinstance(image, Image.Image):
        return upright(image.copy())  # A copy, because callers close what they get and may shrink it while decoding.
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
    except RuntimeError as error:  # Only AVIF raises it; for a damaged file of another format Pillow raises OSError.
        raise OSError(str(error)) from error
    return upright(opened)


def identity_of(image: dict[str, Any] | None) -> str:
    """A hash by which the image of a record is told from others: of its bytes, or of its path, size and time of change.

    Names and numbers do not tell images apart: base names repeat in folders, and numbers begin anew in each shard.
    """
    if image is None:
        return "missing"
    if image.get("bytes") is not None:
        return hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()
    path = str(image.get("path"))
    try:
        status = os.stat(path)
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        stamp = "missing"
    return hashlib.blake2b(f"{os.path.abspath(path)} {stamp}".encode(errors="replace"), digest_size=16).hexdigest()


def why_unusable(record: dict) -> str | None:
    """Return the reason why a record cannot be used: it has no readable image, or no text. None if it can be used."""
    try:
        for source in record["images"] if "images" in record else [record.get("image")]:
            with open_image(source) as image:
                image.load()
    except IMAGE_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    if "question" in record:
        return None if (record["question"] or "").strip() else "no question"
    try:
        usable_captions(record, clean_caption)  # of "..." or "?" nothing is left
    except ValueError as error:
        return str(error)
    return None
