"""The pictures of a source, as an index takes them: files of a folder, records, or images in memory."""

import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import IMAGE_ERRORS
from ..data.pairs import load_pairs
from ..data.records import DataError
from ..data.sources import IMAGE_ENDINGS, find_files
from .storage import SearchError

# The ends of the names of picture files, in lower case. Those of HEIC cannot be read without the extra `heic`.
PICTURES = (*IMAGE_ENDINGS, ".jfif", ".heic", ".heif", ".jp2", ".ppm", ".pgm")
THUMBNAIL_QUALITY = 85


@dataclass
class Picture:
    """A picture that is to be in the index.

    Args:
        image_id: its key: the absolute path of a file, or a hash of the bytes.
        path: that of the file; None if it came as bytes.
        content: the bytes of a picture without a file.
        name: what the source calls it.
        source: the folder or source.
        caption: its captions, one a line; None if it has none.
        size: bytes of the file.
        modified: time of its last change in nanoseconds; 0 without a file.
    """

    image_id: str
    path: str | None
    content: bytes | None
    name: str
    source: str
    caption: str | None
    size: int
    modified: int

    def read(self) -> bytes:
        """The bytes of the picture."""
        if self.content is not None:
            return self.content
        assert self.path is not None
        return Path(self.path).read_bytes()


@dataclass
class Folder:
    """The pictures in a folder: sizes and times of change by path, and what cannot be listed or read, with reasons."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def pictures_in(folder: str, without: str = "") -> Folder:
    """The picture files in a folder and the folders in it, sorted by path. Hidden ones are left out.

    Args:
        without: a folder to leave out, which is that of the index.

    Raises:
        SearchError: if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise SearchError(f"{folder} is not a folder: name the folder of the pictures.")
    found, seen, waiting = Folder(), set(), [folder]
    while waiting:
        place = waiting.pop()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:  # A link that leads back.
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.path == without:
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.name.lower().endswith(PICTURES):
                        _take_file(entry, found)
        except OSError as error:
            found.unreadable[place] = error.strerror or str(error)
    found.files = dict(sorted(found.files.items()))
    return found


def is_picture_folder(source: str | os.PathLike) -> bool:
    """Whether a source is a folder with picture files in it, or one that has nothing else to read either."""
    if not os.path.isdir(source):
        return False
    try:
        return bool(pictures_in(os.path.abspath(source)).files) or find_files(os.fspath(source), "train") is None
    except DataError:
        return False


def _take_file(entry: os.DirEntry, found: Folder) -> None:
    """Note a file, or why it cannot be read."""
    try:
        if not entry.is_file():  # To open a pipe could wait for ever.
            raise OSError("not a regular file")
        status = entry.stat()
        found.files[entry.path] = (status.st_size, status.st_mtime_ns)
    except OSError as error:
        found.unreadable[entry.path] = error.strerror or str(error)


def file_picture(path: str, source: str, caption: str | None = None, name: str | None = None) -> Picture:
    """The picture of a file.

    Args:
        path: the file.
        source: the folder or source that it belongs to.
        caption: a text about it, if its source has one.
        name: its name in the source; that of the file if None.

    Raises:
        OSError: if it is not there, or is not a regular file.
    """
    path = os.path.abspath(path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"not a regular file: '{path}'")
    name = os.path.basename(path) if name is None else name
    return Picture(path, path, None, name, source, caption, status.st_size, status.st_mtime_ns)


def bytes_picture(content: bytes, source: str, caption: str | None = None, name: str = "") -> Picture:
    """The picture of the bytes of a file, whose key is their hash, so that equal ones are one picture.

    Args:
        content: the bytes.
        source, caption, name: as in `file_picture`.
    """
    return Picture(hash_of(content), None, content, name, source, caption, len(content), 0)


def hash_of(content: bytes) -> str:
    """The hash by which the content of pictures is compared."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def pictures_of(source: Any, name: str = "") -> Iterator[Picture | tuple[str, str]]:
    """The pictures of images or records in memory, or the id of one that cannot be taken, with the reason.

    Args:
        source: paths, bytes, PIL images, arrays (H, W, 3), or records with `image`, `captions` and `image_id`.
        name: the name of the source.
    """
    for number, item in enumerate(source):
        label, caption = str(number), None
        if isinstance(item, Mapping) and "image" in item:
            label = str(item.get("image_id", number))
            texts = [text for text in item.get("captions") or () if isinstance(text, str) and text.strip()]
            caption, item = "\n".join(texts) or None, item["image"]
        try:
            yield _picture(item, name, caption, label)
        except IMAGE_ERRORS as error:
            yield label, str(error)


def _picture(image: Any, source: str, caption: str | None, label: str) -> Picture:
    """The picture of an image in any form.

    Raises:
        OSError: for a file that is not there.
        ValueError: for something that is not an image.
    """
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str | os.PathLike):
        return file_picture(os.fspath(image), source, caption, label if caption is not None else None)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        image = file.getvalue()
    if not isinstance(image, bytes) or not image:
        raise ValueError(f"an image of type {type(image).__name__}" if image else "no image")
    return bytes_picture(image, source, caption, label)


def captions_beside(folder: str) -> Iterable[Mapping[str, Any]] | None:
    """The records of a list of captions in a folder of pictures; None if it has none."""
    files = find_files(folder, "train")
    return None if files is None else load_pairs(folder)


def thumbnail_of(image: Image.Image, side: int) -> bytes:
    """A JPEG of an image in RGB, whose longer side has at most so many pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()
