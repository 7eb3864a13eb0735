"""A linear baseline for retrieval, fitted in a second: what a trained model must be compared with."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from ..data.images import open_image
from ..models.tokenization_tcl import clean_caption
from .metrics import retrieval_metrics


def ridge_baseline(
    train: list[dict], validation: list[dict], grid: int = 12, strength: float = 300.0
) -> dict[str, float]:
    """Recall in percent of ridge regression from coarse pixels and colours to words.

    An image is its pixels at `grid` x `grid` and its colour histogram; a text the words of its first caption,
    weighted by rarity. Scores are cosines between predicted and true words.

    Args:
        train, validation: records; the first caption of each is used.
        strength: ridge penalty.
    """
    images = torch.stack([_coarse(record["image"], grid) for record in [*train, *validation]])  # (N, F)
    images = (images - images[: len(train)].mean(0)) / (images[: len(train)].std(0) + 1e-3)
    captions = [clean_caption(record["captions"][0]).split() for record in [*train, *validation]]
    documents = Counter(word for words in captions[: len(train)] for word in set(words))
    column = {word: number for number, word in enumerate(sorted(documents))}
    texts = torch.zeros(len(captions), len(column))
    for row, words in enumerate(captions):
        for word in words:
            if word in column:
                texts[row, column[word]] = np.log(len(train) / documents[word])
    texts = torch.nn.functional.normalize(texts, dim=-1)

    known_images, known_texts = images[: len(train)], texts[: len(train)]
    mean = known_texts.mean(0)
    kernel = known_images @ known_images.T + strength * torch.eye(len(train))
    predicted = images[len(train) :] @ (known_images.T @ torch.linalg.solve(kernel, known_texts - mean))
    scores = torch.nn.functional.normalize(predicted, dim=-1) @ (texts[len(train) :]).T  # (I, T)
    # Texts without a known word score 0; a little noise breaks the ties as chance would.
    scores += 1e-6 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    return retrieval_metrics(scores, scores, torch.arange(len(validation)))


def _coarse(image: object, grid: int) -> Tensor:
    rgb = open_image(image).convert("RGB")
    pixels = np.asarray(rgb.resize((grid, grid)), dtype=np.float32).ravel() / 255
    levels = np.asarray(rgb.resize((32, 32)))[..., :] // 64  # 4 levels of each colour
    histogram = np.bincount((levels @ np.array([16, 4, 1])).ravel(), minlength=64) / 1024
    return torch.from_numpy(np.concatenate([pixels, np.sqrt(histogram).astype(np.float32)]))
