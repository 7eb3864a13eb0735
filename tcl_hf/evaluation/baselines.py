"""A linear baseline for retrieval, which a trained model should beat. Fitting it takes a second."""

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

    The features of an image are its pixels at `grid` x `grid` and its colour histogram; those of a text are the words
    of its first caption, weighted by rarity. Scores are cosines between predicted and true words.

    Args:
        train, validation: records; the first caption of each is used.
        strength: ridge penalty.
    """
    num_train = len(train)
    images = torch.stack([_coarse(record["image"], grid) for record in [*train, *validation]])  # (N, F)
    images = (images - images[:num_train].mean(0)) / (images[:num_train].std(0) + 1e-3)
    captions = [clean_caption(record["captions"][0]).split() for record in [*train, *validation]]
    documents = Counter(word for words in captions[:num_train] for word in set(words))
    column = {word: number for number, word in enumerate(sorted(documents))}
    texts = torch.zeros(len(captions), len(column))  # (N, W)
    for row, words in enumerate(captions):
        for word in words:
            if word in column:
                texts[row, column[word]] = np.log(num_train / documents[word])
    texts = torch.nn.functional.normalize(texts, dim=-1)

    train_images, train_texts = images[:num_train], texts[:num_train]
    mean = train_texts.mean(0)
    kernel = train_images @ train_images.T + strength * torch.eye(num_train)
    predicted = images[num_train:] @ (train_images.T @ torch.linalg.solve(kernel, train_texts - mean))
    scores = torch.nn.functional.normalize(predicted, dim=-1) @ (texts[num_train:]).T  # (I, T)
    # Texts without a known word have the score 0 with every image; a little noise breaks these ties at random.
    scores += 1e-6 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    return retrieval_metrics(scores, scores, torch.arange(len(validation)))


def _coarse(image: object, grid: int) -> Tensor:
    """Pixels at `grid` x `grid` and the square roots of a colour histogram with 4 levels a channel: (F,)."""
    rgb = open_image(image).convert("RGB")
    pixels = np.asarray(rgb.resize((grid, grid)), dtype=np.float32).ravel() / 255
    levels = np.asarray(rgb.resize((32, 32)))[..., :] // 64  # (32, 32, 3), from 0 to 3
    histogram = np.bincount((levels @ np.array([16, 4, 1])).ravel(), minlength=64) / 1024
    return torch.from_numpy(np.concatenate([pixels, np.sqrt(histogram).astype(np.float32)]))
