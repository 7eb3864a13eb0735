"""Inputs of pipelines: which are several, images with their texts as records, and images from any source."""

import base64
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import repeat
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from ..models.image_processing_tcl import upright

Record = Mapping[str, Any]


class _Pairs(Dataset):
    """Records of images and texts in two sequences; an image of a dataset is opened when its turn comes."""

    def __init__(self, images: Sequence[Any], texts: Sequence[Any], text_name: str):
        self.images, self.texts, self.text_name = images, texts, text_name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Record:
        return {"image": self.images[number], self.text_name: self.texts[number]}


def are_several(given: Any) -> bool:
    """Whether an input is several images, texts or records, and not one."""
    if isinstance(given, np.ndarray | Tensor):
        return given.ndim in (1, 4)  # texts, or images
    one = (str, bytes, os.PathLike, Image.Image, Mapping)
    return isinstance(given, Iterable | Dataset) and not isinstance(given, one)


def paired(
    images: Any, texts: Any, text_name: str, many_images: bool, many_texts: bool
) -> Record | list[Record] | Dataset | Iterator[Record]:
    """The records of images with their texts; a single image or text goes with all.

    Lists give a list. Where one of both is a dataset's, the result is a dataset, and where it is an iterator, an
    iterator, so that an image is opened when its turn comes.

    Args:
        text_name: the name of the text in a record.
        many_images, many_texts: whether there are several.

    Raises:
        ValueError: if there are not as many texts as images.
    """
    if not many_images and not many_texts:
        return {"image": images, text_name: texts}
    images, texts = _indexed(images) if many_images else images, _indexed(texts) if many_texts else texts
    several = [given for given, many in ((images, many_images), (texts, many_texts)) if many]
    if not all(isinstance(given, Sized) for given in several):
        pairs = zip(
            images if many_images else repeat(images),
            texts if many_texts else repeat(texts),
            strict=many_images and many_texts,
        )
        return ({"image": image, text_name: text} for image, text in pairs)
    number = len(several[0])
    if len(several[-1]) != number:
        raise ValueError(
            f"{number} images and {len(several[-1])} texts cannot be paired: pass as many texts as images, or a single "
            f"image or {text_name}."
        )
    records = _Pairs(images if many_images else [images] * number, texts if many_texts else [texts] * number, text_name)
    if all(isinstance(given, list) for given in several):
        return [records[row] for row in range(number)]
    return records


def _indexed(several: Any) -> Any:
    """Several inputs in a list, unless they are a dataset's, which are read one by one, or an iterator's."""
    lazy = isinstance(several, Dataset) or not isinstance(several, Sized)
    return several if lazy or (isinstance(several, Sequence) and not isinstance(several, tuple)) else list(several)


def open_image(image: Any, timeout: float | None = None) -> Image.Image:
    """Open an image from any source, upright and in RGB, with the pixels of training.

    Raises:
        ValueError: if it cannot be opened.
    """
    if image is None:
        raise ValueError("The record has no image: pass a PIL image, a path, a URL or a base64 text as 'image'.")
    if isinstance(image, Mapping):  # as `datasets` gives images that it does not decode
        image = image.get("bytes") or image.get("path") or image
    try:
        return upright(_loaded(image, timeout)).convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {image!r:.80} cannot be opened: {error}") from error


def _loaded(image: Any, timeout: float | None = None) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray | Tensor):
        return _picture(image.detach().cpu().numpy() if isinstance(image, Tensor) else image)
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if not isinstance(image, str | os.PathLike):
        raise TypeError(f"it is of type {type(image).__name__}, and neither an image, a path, a URL, base64 nor bytes.")
    if isinstance(image, os.PathLike) or os.path.isfile(image):
        return Image.open(image)
    if image.startswith(("http://", "https://")):
        try:
            return load_image(image, timeout=timeout)
        except Exception as error:  # those of the library for HTTP, which differs between versions of transformers
            raise OSError(error) from error
    try:
        return Image.open(io.BytesIO(base64.b64decode(image.split(",")[-1] if image.startswith("data:") else image)))
    except (OSError, ValueError) as error:
        raise ValueError("it is neither a file, nor a URL, nor a picture in base64.") from error


def _picture(pixels: np.ndarray) -> Image.Image:
    """The image of an array (H, W), (H, W, channels) or (channels, H, W)."""
    if pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16):
        return Image.fromarray(pixels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and pixels.shape[-1] == 4 and pixels.shape[0] not in (1, 3):
        pixels = pixels[..., :3]  # Transparency is dropped, as in training.
    return to_pil_image(pixels)
