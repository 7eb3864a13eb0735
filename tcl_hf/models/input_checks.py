"""Checks that rows of texts and images belong together, for every model that reads both.

Tensors of other numbers of rows would often broadcast, or share out the tokens of one text among several images, and
give wrong scores without an error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_fusion_rows(
    num_texts: int,
    length: int | None,
    attention_mask: Tensor | None,
    images_of_layers: Sequence[int],
    image_mask: Tensor | None,
    image_index: Tensor | None,
    text_index: Tensor | None,
    token_index: Tensor | None,
    training: bool,
) -> None:
    """Refuse texts, images and their indices that do not belong together; a model that is compiled checks nothing.

    Args:
        num_texts, length: texts, and the tokens of each; None where others are cached before them.
        images_of_layers: the number of images that each fusion layer reads.
        image_mask: the states of images that count (B, P).
        training: whether a training step must not wait for the device to check values, see `check_index`.

    Raises:
        ValueError: naming what does not fit.
    """
    if torch.compiler.is_compiling():  # Sizes may be symbols, and the checks would fix them.
        return
    check_mask(attention_mask, num_texts, length)
    num_images = set(images_of_layers)
    if len(num_images) > 1:
        raise ValueError(f"A text has sets of {' and '.join(map(str, sorted(num_images)))} images: pass equally many.")
    if token_index is not None and token_index.shape[0] != num_texts:
        raise ValueError(
            f"token_index has {token_index.shape[0]} rows, but there are {num_texts} texts: pass one each."
        )
    if image_mask is not None and {image_mask.shape[0]} != num_images:
        raise ValueError(f"image_mask has {image_mask.shape[0]} rows: pass one for each image, {max(num_images)}.")
    rows = num_texts
    if text_index is not None:
        rows = text_index.shape[0]
        check_index("text_index", text_index, rows, num_texts, "texts", training)
    for images in num_images:
        if image_index is not None:
            check_index("image_index", image_index, rows, images, "images", training)
        elif images == 0 or rows % images:
            raise ValueError(
                f"There are {rows} texts about {images} images, which cannot be shared out evenly among neighbouring "
                "texts: pass image_index, the image of each text."
            )


def check_mask(attention_mask: Tensor | None, num_texts: int, length: int | None) -> None:
    """Refuse a mask (N, L) of other texts.

    Raises:
        ValueError: naming both shapes.
    """
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    rows, columns = attention_mask.shape
    if rows != num_texts or (length is not None and columns != length):
        texts = f"({num_texts}, {columns if length is None else length})"
        raise ValueError(
            f"attention_mask ({rows}, {columns}) does not belong to texts {texts}: pass a number for each token."
        )


def check_index(
    name: str, index: Tensor, rows: int, number: int, of: str, training: bool = False, rows_of: str = "texts"
) -> None:
    """Refuse an index (N,) that has other than `rows` entries, or one that is not from 0 to `number - 1`.

    Values are not read from another device in training, because a step would wait for them.

    Args:
        name: of the index, for the error.
        index: (N,).
        rows, rows_of: how many entries there must be, and of what.
        number, of: how many things the index chooses from, and what they are.
        training: whether the model is in training mode.

    Raises:
        ValueError: naming the index and the value.
    """
    if torch.compiler.is_compiling():
        return
    if index.ndim != 1 or index.shape[0] != rows:
        raise ValueError(f"{name} {tuple(index.shape)} must have one entry for each of {rows} {rows_of}.")
    if isinstance(index, FakeTensor) or index.device.type == "meta":
        return
    if (index.device.type != "cpu" and training) or not index.numel():
        return
    values = index.cpu().numpy()
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest >= number:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{name} names number {wrong} of {number} {of}: choose numbers from 0 to {number - 1}.")
