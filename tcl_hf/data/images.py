"""`open_image` opens the image of a record in any of its forms; `why_unusable` checks a whole record."""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from functools import lru_cache
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..models.image_processing_tcl import upright
from ..models.tokenization_tcl import clean_caption
from .captions import usable_captions
from .roots import OUTSIDE

with contextlib.suppress(ImportError):  # the extra `heic`
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Whatever is raised while one image is opened or decoded is the fault of that image and ends nothing else: decoders
# raise errors of many classes for damaged files, among them KeyError, IndexError, RuntimeError and MemoryError.
IMAGE_ERRORS = (Exception,)
# The formats that are read. Others need a program beside Pillow (EPS runs Ghostscript), or are not those of pictures.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF")


@lru_cache(maxsize=1)
def _readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that Pillow reads here; HEIF needs the extra `heic`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(image: object) -> Image.Image:
    """Open the image of a record: its bytes, a path, a dictionary of both, or an image already open.

    The image is turned upright according to its EXIF orientation. It can be converted to RGB, because 16-bit grey is
    scaled to 8 bits. An animation gives its first picture. Pixels are decoded later, unless the image has to be turned
    or scaled.

    Raises:
        ValueError: if the image is missing, lies outside of its root, or the range of its values is not known.
        OSError: if it cannot be read, is not in one of `FORMATS`, or its path is not that of a regular file. (To open a
            pipe or a device could wait for ever, and immune to signals.)
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
    elif isinstance(image, str | os.PathLike):
        if str(image).startswith(OUTSIDE):
            path = str(image).removeprefix(OUTSIDE)
            raise ValueError(f"an image outside of image_root, and allow_outside_root is not set: '{path}'")
        if not stat.S_ISREG(os.stat(image).st_mode):
            raise OSError(f"not a regular file: '{os.fspath(image)}'")
    else:
        raise ValueError(f"an image of type {type(image).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(image, formats=_readable_formats())
        if opened.format == "AVIF":
            opened.load()
    except UnidentifiedImageError as error:
        name = f": '{image}'" if isinstance(image, str | os.PathLike) else ""
        raise OSError(f"a file in none of the formats {', '.join(FORMATS)}, or damaged{name}") from error
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
