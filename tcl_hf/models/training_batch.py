"""The tensors of one training step: the batch, its two views, its hard negatives, and the rows that are fused.

Shapes: N pairs, P patches, L tokens, M masked tokens, D feature dimensions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_tcl import TCLVisionConfig
from .losses import NO_IMAGE_ID


@dataclass
class MaskedTokens:
    """Texts with masked tokens, and the words to predict.

    Args:
        input_ids: token ids with masks (N, L).
        labels: the masked tokens' own ids, -100 elsewhere (N, L).
        mlm_positions: positions of the masked tokens, padded with -1 (N, M); None to predict at every position.
    """

    input_ids: Tensor
    labels: Tensor
    mlm_positions: Tensor | None

    def token_index(self) -> Tensor | None:
        """The tokens whose last states are needed (N, 1 + M): [CLS], then the masked ones; None if all are needed."""
        return None if self.mlm_positions is None else F.pad(self.mlm_positions.clamp(min=0), (1, 0))

    def select(self, states: Tensor) -> Tensor:
        """Select the masked tokens' states (N * M, width) from those of `token_index` (N, 1 + M, width)."""
        length = self.labels.shape[1]  # states may be padded to the longest text of any process
        return (states[:, :length] if self.mlm_positions is None else states[:, 1:]).flatten(0, 1)

    def selected_labels(self) -> Tensor:
        """The labels of the masked tokens (N * M,), -100 for padding."""
        if self.mlm_positions is None:
            return self.labels.flatten()
        labels = self.labels.gather(1, self.mlm_positions.clamp(min=0))
        return labels.masked_fill(self.mlm_positions < 0, -100).flatten()


@dataclass
class TrainingBatch:
    """A batch of pairs to train on: image n belongs to text n. Inputs that may be left out are filled in.

    Raises:
        ValueError: if the number of images, or of rows of another input, differs from that of texts.
    """

    input_ids: Tensor  # (N, L)
    pixel_values: (
        Tensor  # (N, 3, height, width), or states (N, 1 + P, width) of a locked encoder: view a, the student's
    )
    attention_mask: Tensor  # (N, L), of ones if None is given
    pixel_values_augmented: Any  # likewise: view b, the teacher's; view a if None is given
    image_ids: Any  # (N,), `NO_IMAGE_ID` if None is given
    masked: MaskedTokens | None
    interpolate_pos_encoding: bool

    def __post_init__(self):
        images, texts = (0 if given is None else len(given) for given in (self.pixel_values, self.input_ids))
        if images != texts or self.input_ids is None:
            raise ValueError(
                f"The losses need pairs, but got {images} images and {texts} texts: pass as many pixel_values as "
                "input_ids, or return_loss=False."
            )
        masked = self.masked
        others = {
            "attention_mask": self.attention_mask,
            "pixel_values_augmented": self.pixel_values_augmented,
            "image_ids": self.image_ids,
            "mlm_input_ids": masked and masked.input_ids,
            "mlm_labels": masked and masked.labels,
            "mlm_positions": masked and masked.mlm_positions,
        }
        for name, given in others.items():
            if given is not None and len(given) != texts:
                raise ValueError(f"{name} has {len(given)} rows, but there are {texts} pairs: pass one for each.")
        if self.attention_mask is None:
            self.attention_mask = torch.ones_like(self.input_ids)
        if self.pixel_values_augmented is None:
            self.pixel_values_augmented = self.pixel_values
        if self.image_ids is None:
            self.image_ids = torch.full_like(self.input_ids[:, 0], NO_IMAGE_ID, dtype=torch.long)

    def patch_grid(self, config: TCLVisionConfig) -> tuple[int, int]:
        """Patches along the height and the width of the teacher's images; states are those of the model's own size."""
        if self.pixel_values_augmented.ndim == 3:
            return config.grid_of_states(config.image_size, config.image_size)
        return config.grid_of_states(*self.pixel_values_augmented.shape[-2:])


@dataclass
class View:
    """One encoder's view of a batch. Texts, as they are or masked, are None where no objective needs them."""

    image_states: Tensor  # (N, 1 + P, width), P the patches that the encoder read
    image: Tensor  # (N, D)
    text_states: Tensor = None  # type: ignore[assignment]  # (N, L, width)
    text: Tensor = None  # type: ignore[assignment]  # (N, D)
    masked_states: Tensor = None  # type: ignore[assignment]  # (N, L, width)


def encode_view(
    tcl: Any, batch: TrainingBatch, pixel_values: Tensor, texts: bool, masked_texts: bool, patch_dropout: float = 0.0
) -> View:
    """Encode a batch by a [`TCLModel`]: its images, and its texts and masked texts where they are asked for.

    Args:
        tcl: student or teacher.
        batch: the batch, of which the texts are read.
        pixel_values: the view of the images (B, 3, height, width), or kept states of them (B, P, D).
        texts, masked_texts: whether to encode them.
        patch_dropout: share of each image's patches that are dropped.
    """
    image_states = tcl.encode_image(
        pixel_values, interpolate_pos_encoding=batch.interpolate_pos_encoding, patch_dropout=patch_dropout
    )
    view = View(image_states, tcl.image_features(image_states))
    input_ids = [batch.input_ids] * texts + ([batch.masked.input_ids] if masked_texts else [])
    if input_ids:  # in one pass
        mask = batch.attention_mask.repeat(len(input_ids), 1)
        states = tcl.encode_text(torch.cat(input_ids), mask).chunk(len(input_ids))
        if texts:
            view.text_states, view.text = states[0], tcl.text_features(states[0], batch.attention_mask)
        if masked_texts:
            view.masked_states = states[-1]
    return view


@dataclass
class HardNegatives:
    """For each text K images and for each image K texts that do not belong to it, as rows of all states.

    The first ones of all texts (or images) come first, then the second ones, and so on.
    """

    image: Tensor  # (K * N,)
    has_image: Tensor  # (K * N,) False where too few images do not belong to the text: `image` is then meaningless
    text: Tensor  # (K * N,)
    has_text: Tensor  # (K * N,)


@dataclass
class FusionRows:
    """Pairs of a text and an image that the fusion encoder reads in one pass.

    For matching, these are the N true pairs, the N texts with K hard negative images each, and the N images with K hard
    negative texts each; for masked language modelling, the N masked texts with their images.
    """

    text_states: Tensor  # (S, L, width), S texts
    attention_mask: Tensor  # (S, L)
    text_index: Tensor | None  # (R,), the text of each of the R rows; None where row n has text n
    image_index: Tensor | None  # (R,); None where row n has image n
    token_index: Tensor | None  # (S, T), the tokens whose last states are needed; None for all


def fusion_rows(
    batch: TrainingBatch,
    masked_states: Tensor,
    text_states: Tensor,
    attention_mask: Tensor,
    negatives: HardNegatives | None,
) -> FusionRows:
    """Lay out the rows of a step: those of matching, if there are negatives, and those of masked texts, if any.

    Args:
        masked_states: states of the masked texts (N, L, width); None where no text is masked.
        text_states, attention_mask: states and mask of the batch's own texts, and then perhaps of those of other
            processes (K, L, width) and (K, L), L the longest text of any process. States are None without negatives.
    """
    num_pairs, length = batch.attention_mask.shape
    own = torch.arange(num_pairs, device=attention_mask.device)
    batch_mask = attention_mask[:num_pairs]  # (N, L)
    # [CLS] alone (T = 1) where no text is masked; all tokens where masked tokens come without positions.
    token_index = (
        batch.masked.token_index() if batch.masked else attention_mask.new_zeros(num_pairs, 1, dtype=torch.long)
    )
    states: list[Tensor] = []
    masks: list[Tensor] = []
    texts: list[Tensor] = []
    images: list[Tensor] = []
    if negatives is not None:
        number = len(negatives.image) // num_pairs
        negative_texts = negatives.text
        if len(text_states) == num_pairs:
            states, masks = [text_states], [attention_mask]
        else:  # Other processes have many texts, and only the drawn ones are fused.
            states = [text_states[:num_pairs], text_states[negatives.text]]
            masks = [batch_mask, attention_mask[negatives.text]]
            negative_texts = num_pairs + torch.arange(len(negatives.text), device=own.device)
        texts = [own.repeat(1 + number), negative_texts]
        images = [own, negatives.image, own.repeat(number)]
    token_indices: list[Any] = []
    if token_index is not None:
        token_indices = [token_index.new_zeros(len(rows), token_index.shape[1]) for rows in states]
    if batch.masked is not None:
        padding = attention_mask.shape[1] - length
        texts.append(sum(map(len, states)) + own)
        states.append(F.pad(masked_states, (0, 0, 0, padding)))
        masks.append(batch_mask)
        images.append(own)
        token_indices.append(token_index)
    return FusionRows(
        torch.cat(states),
        torch.cat(masks),
        None if negatives is None else torch.cat(texts),
        None if negatives is None else torch.cat(images),
        None if token_index is None else torch.cat(token_indices),
    )
