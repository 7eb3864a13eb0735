"""Baselines for retrieval that a trained model should beat: linear maps, fitted in seconds.

One reads coarse pixels and words. The others read frozen features: those of the encoders that a run started from. What
training adds to the encoders is the distance to these.

Shapes: I images, T texts, N samples, Dv and Dt widths of the image and text features, D of the shared space.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data.images import IMAGE_ERRORS, open_image
from ..data.kept_states import plain_view_of
from ..models.encoders import eval_mode
from ..models.modeling_tcl import TCLModel
from ..models.processing_tcl import MAX_TOKENS, TCLProcessor
from ..models.tokenization_tcl import clean_caption
from .metrics import retrieval_metrics
from .shares import in_batches

SMALLEST_STD = 1e-6  # features that vary less are constants, which standardising leaves at 0

# --- Coarse pixels and words -------------------------------------------------------------------------------------


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


# --- Frozen features ---------------------------------------------------------------------------------------------


@dataclass
class FrozenFeatures:
    """Features of images and texts by encoders that are not trained.

    Args:
        image: features of the images (I, Dv).
        text: features of the texts (T, Dt).
        image_of_text: the image to which each text belongs (T,).
    """

    image: Tensor
    text: Tensor
    image_of_text: Tensor


def image_features_of(states: Tensor) -> Tensor:
    """The class token beside the mean of the patches (B, 2 * width), for image states (B, 1 + P, width)."""
    return torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=-1)


def text_features_of(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens (N, width) of text states (N, L, width), without padding (mask 0)."""
    mask = attention_mask[..., None].to(states.dtype)  # (N, L, 1)
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def frozen_features(
    model: TCLModel,
    processor: TCLProcessor,
    records: Sequence[dict],
    captions_per_image: int | None = None,
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> FrozenFeatures:
    """Features of the images and captions of records by a model's encoders, without its projections.

    Texts end with [SEP] here, because a BERT was trained on texts that do, and so its features are better: without it
    they are a weaker baseline. Records whose image cannot be read or that have no caption are left out, as training
    leaves them out. This process encodes all records by itself. Where the states of a record's image are kept (see
    `kept_states`), they take the place of its pixels.

    Args:
        model: the encoders. Its mode is restored.
        processor: makes pixels and tokens.
        records: images with captions.
        captions_per_image: number of captions to use of each record, the first ones; all if None.
        batch_size: images or texts in a forward.
        max_tokens: longest text, [CLS] included.
        progress: show a progress bar.
    """
    images: list[Tensor] = []
    texts: list[str] = []
    image_of_text: list[int] = []
    bar = tqdm(total=len(records), desc="Frozen features", disable=not progress, leave=False)
    with eval_mode(model):
        for rows in in_batches(list(range(len(records))), batch_size):
            views: list[Tensor] = []
            for record in (records[row] for row in rows):
                captions = [text for text in record["captions"] or () if text and text.strip()][:captions_per_image]
                if not captions:
                    continue
                try:
                    view = plain_view_of(processor, record)
                except IMAGE_ERRORS:
                    continue
                image_of_text += [len(images) + len(views)] * len(captions)
                texts += captions
                views.append(view)
            if views:
                states = model.encode_image(torch.stack(views).to(model.device))
                images += image_features_of(states).float().cpu().unbind()
            bar.update(len(rows))
        bar.close()
        features: list[Tensor] = []
        for batch in in_batches(texts, batch_size):
            tokens = processor(text=batch, return_tensors="pt", max_length=max_tokens).to(model.device)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            if not processor.tokenizer.add_sep_token:
                ids, mask = ended(ids, mask, processor.tokenizer.sep_token_id)
            features.append(text_features_of(model.encode_text(ids, mask), mask).float().cpu())
    return FrozenFeatures(torch.stack(images), torch.cat(features), torch.tensor(image_of_text))


def ended(input_ids: Tensor, attention_mask: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (N, L + 1) of texts (N, L) with the token `end` behind the last one."""
    lengths = attention_mask.sum(-1, keepdim=True)  # (N, 1)
    return F.pad(input_ids, (0, 1)).scatter(1, lengths, end), F.pad(attention_mask, (1, 0), value=1)


def ridge_scores(
    train_image: Tensor, train_text: Tensor, image: Tensor, text: Tensor, strength: float = 100.0
) -> Tensor:
    """Scores (I, T) of ridge regression from standardised image features to centred text features.

    A score is the cosine of a predicted text feature with a true one, both less the mean of the training texts.

    Args:
        train_image: image features to fit on (N, Dv).
        train_text: text features to fit on (N, Dt), row n for image n.
        image: image features (I, Dv).
        text: text features (T, Dt).
        strength: ridge penalty.
    """
    inputs, image = _standardised(train_image.double(), image.double())
    targets, centre = train_text.double(), train_text.double().mean(0)
    penalty = strength * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    weight = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - centre))  # (Dv, Dt)
    return F.normalize(image @ weight, dim=-1) @ F.normalize(text.double() - centre, dim=-1).T


def ridge_on_features(
    train_image: Tensor,
    train_text: Tensor,
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    strength: float = 100.0,
    train_image_of_text: Tensor | None = None,
) -> dict[str, float]:
    """Recall in percent of ridge regression from image features to L2-normalised text features; see `ridge_scores`.

    An image with several texts is fitted to the mean of their normalised features. Where all images have c texts, that
    is the fit to all pairs with the penalty c * strength, from a problem c times smaller.

    Args:
        train_image: image features to fit on (N, Dv).
        train_text: text features to fit on (M, Dt).
        image, text, image_of_text: features to rank (I, Dv) and (T, Dt), and the image of each text (T,).
        strength: ridge penalty.
        train_image_of_text: the image of each text to fit on (M,), where every image has a text; text n belongs to
            image n if None.
    """
    train_text, text = F.normalize(train_text, dim=-1), F.normalize(text, dim=-1)
    if train_image_of_text is not None:
        sums = train_text.new_zeros(len(train_image), train_text.shape[1])
        counts = train_image_of_text.bincount(minlength=len(train_image))
        train_text = sums.index_add(0, train_image_of_text, train_text) / counts[:, None]
    scores = ridge_scores(train_image, train_text, image, text, strength)
    return retrieval_metrics(scores, scores, image_of_text)


def linear_on_features(
    train_image: Tensor,
    train_text: Tensor,
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    train_image_of_text: Tensor | None = None,
    *,
    projection_dim: int = 256,
    num_train_epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    temperature_init_value: float = 0.07,
    seed: int = 0,
) -> dict[str, float]:
    """Recall in percent of one linear layer on each side, trained with symmetric InfoNCE over the batch.

    Features are standardised. A step reads one text of each image, drawn at random. AdamW's learning rate falls along
    a cosine to 0, and the temperature is learned. The random state outside is left as it is.

    Args:
        train_image: image features to train on (N, Dv).
        train_text: text features to train on (M, Dt).
        image, text, image_of_text: features to rank (I, Dv) and (T, Dt), and the image of each text (T,).
        train_image_of_text: the image of each text to train on (M,), where every image has a text; text n belongs to
            image n if None.
        projection_dim: width of the shared space (D).
        num_train_epochs: passes over the images.
        batch_size: pairs in a step.
        learning_rate: the first learning rate.
        temperature_init_value: starting value of the temperature.
        seed: seed of starting values, order and drawn texts.
    """
    train_image, image = _standardised(train_image, image)
    train_text, text = _standardised(train_text, text)
    owner = torch.arange(len(train_image)) if train_image_of_text is None else train_image_of_text
    texts = owner.argsort(stable=True)  # the texts, image by image
    counts = owner.bincount(minlength=len(train_image))
    first = counts.cumsum(0) - counts  # where the texts of an image begin
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sides = nn.ModuleList(nn.Linear(x.shape[1], projection_dim) for x in (train_image, train_text))
        log_temperature = nn.Parameter(torch.tensor(temperature_init_value).log())
        optimizer = torch.optim.AdamW([*sides.parameters(), log_temperature], lr=learning_rate)
        num_steps = num_train_epochs * -(-len(train_image) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_train_epochs):
            for rows in torch.randperm(len(train_image)).split(batch_size):
                drawn = texts[first[rows] + (torch.rand(len(rows)) * counts[rows]).long()]
                pair = (train_image[rows], train_text[drawn])
                images, captions = (F.normalize(side(x), dim=-1) for side, x in zip(sides, pair, strict=True))
                logits = images @ captions.T / log_temperature.exp()
                labels = torch.arange(len(rows))
                loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        images, captions = (F.normalize(side(x), dim=-1) for side, x in zip(sides, (image, text), strict=True))
        scores = images @ captions.T
    return retrieval_metrics(scores, scores, image_of_text)


def _standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both features, (N, D) and (I, D), less the training features' mean and divided by their deviation."""
    mean, std = train.mean(0), train.std(0)
    return tuple((x - mean) / std.clamp_min(SMALLEST_STD) for x in (train, other))  # type: ignore[return-value]
