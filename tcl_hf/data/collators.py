"""From records to batches: augmented views, the choice of a caption, token masking, labels and answers.

Every random choice of a sample is drawn under its own seed where the record carries a `Visit`, so that batches do
not depend on which worker makes them; other records draw from PyTorch's global generator.
"""

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..models.losses import NO_IMAGE_ID
from ..models.processing_tcl import MAX_QUESTION_WORDS_IN_TRAINING, MAX_TOKENS, MAX_WORDS, TCLProcessor
from ..models.tokenization_tcl import TCLTokenizer, clean_caption
from .augmentation import TCLAugmentation
from .images import IMAGE_ERRORS, open_image
from .pairs import MAX_CHARACTERS, NOT_UTF8, DataError
from .sampling import Visit
from .skipped import SkippedSamples


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    probability: float,
    mask_token_id: int,
    uniform: Tensor,
    random_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mask tokens by BERT's rule: of those chosen 80 % become [MASK], 10 % a random id, 10 % stay.

    Args:
        input_ids: token ids (N, L).
        maskable: tokens that may be chosen (N, L): not [CLS], not padding.
        probability: share of them that is chosen.
        uniform: two random numbers from [0, 1) for each token (N, L, 2): is it chosen, and what becomes of it.
        random_ids: a random id for each token (N, L).

    Returns:
        The masked ids (N, L) and the labels (N, L): the chosen tokens' own ids, -100 elsewhere.
    """
    chosen = maskable & (uniform[..., 0] < probability)
    fate = uniform[..., 1]
    masked_ids = torch.where(chosen & (fate < 0.8), mask_token_id, input_ids)
    masked_ids = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked_ids)
    return masked_ids, input_ids.masked_fill(~chosen, -100)


def masked_positions(labels: Tensor, multiple_of: int = 4) -> Tensor:
    """Positions (N, M) of the labels (N, L) that count, padded with -1; M is the largest number, rounded up."""
    chosen = labels != -100
    most = max(int(chosen.sum(1).max()), 1)
    width = min(-(-most // multiple_of) * multiple_of, labels.shape[1])
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order.masked_fill(~chosen.gather(1, order), -1)


@dataclass
class _Collator:
    """What all collators share: samples drawn under their visit's seed, and bad ones left out.

    A sample whose image can not be read, or whose text is empty, is left out, counted and listed in `skipped`.

    Args:
        processor: gives tokenizer, clean-up, image size and normalisation.
        augmentation: makes the views; None for the default of the collator.
        max_tokens: longest text, [CLS] included.
        skipped: where bad samples are noted.
        empty_batches: a batch of which nothing is left is an empty dictionary, as our loop wants it, and no error.

    Raises:
        DataError: if nothing is left of a batch, unless `empty_batches`.
    """

    processor: TCLProcessor
    augmentation: TCLAugmentation | None = None
    max_tokens: int = MAX_TOKENS
    skipped: SkippedSamples = None  # type: ignore[assignment]  # made in __post_init__
    empty_batches: bool = False

    def __post_init__(self):
        if self.skipped is None:
            self.skipped = SkippedSamples()

    def for_run(self, skipped: SkippedSamples) -> Self:
        """A copy for a training run: it notes bad samples in `skipped`, and makes an empty dictionary of none."""
        collator = copy.copy(self)
        collator.skipped, collator.empty_batches = skipped, True
        return collator

    def __call__(self, records: list[dict]) -> dict[str, Tensor]:
        """Make a batch; of it, the samples that can be used."""
        samples = [sample for sample in map(self._usable_sample, records) if sample is not None]
        self.skipped.saw(len(records))
        if not samples:
            if self.empty_batches:
                return {}
            raise DataError(f"No sample of a batch could be used; the last: {self.skipped.last}.")
        return self._batch(samples)

    def _usable_sample(self, record: dict) -> Any | None:
        """What `_sample` makes of a record; None if it can not be used."""
        self.skipped.begins(record.get("image_id", "?"))
        with _choices_of(record.get("visit")):
            try:
                return self._sample(record)
            except IMAGE_ERRORS as error:
                if isinstance(error, DataError):
                    raise
                self.skipped.add(record.get("image_id", "?"), f"{type(error).__name__}: {error}", record.get("visit"))
                return None

    def _sample(self, record: dict) -> Any:
        raise NotImplementedError

    def _batch(self, samples: list) -> dict[str, Tensor]:
        raise NotImplementedError

    def _caption(self, record: dict) -> str:
        """One of the record's captions, cleaned."""
        captions = [text[:MAX_CHARACTERS] for text in record.get("captions") or () if isinstance(text, str)]
        texts = [text for text in captions if NOT_UTF8 not in text]
        if captions and not texts:
            raise ValueError("a caption that is not UTF-8")
        captions = texts
        if self.processor.clean_text:
            captions = [clean_caption(text, MAX_WORDS) for text in captions]
        captions = [text for text in captions if text.strip()]
        if not captions:
            raise ValueError("no caption")
        return captions[int(torch.randint(len(captions), ()))]  # a visit's first choice, which it foresees

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of texts."""
        return dict(
            self.processor.tokenizer(
                list(texts),
                padding="longest",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )


@dataclass
class TCLPreTrainingCollator(_Collator):
    """Make batches for [`TCLForPreTraining`] and [`TCLForImageTextRetrieval`] of records with `image` and `captions`.

    A sample whose image can not be read, or whose captions are all empty, is left out, counted and listed in
    `skipped`.

    Args:
        processor: gives tokenizer, clean-up, image size and normalisation.
        augmentation: makes the views; None for the paper's, at the processor's size.
        max_tokens: longest text, [CLS] included; the paper pre-trains with 25.
        skipped: where bad samples are noted.
        empty_batches: a batch of which nothing is left is an empty dictionary, as our loop wants it, and no error.
        two_views: a second view for the teacher; ALBEF has one for both.
        mlm_probability: share of the tokens masked; 0 leaves masked texts out.
        with_image_ids: add numbers that are equal for texts of one image, as retrieval is fine-tuned.

    Raises:
        DataError: if nothing is left of a batch, unless `empty_batches`.
    """

    augmentation: TCLAugmentation = None  # type: ignore[assignment]  # made in __post_init__
    two_views: bool = True
    mlm_probability: float = 0.15
    with_image_ids: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.augmentation is None:
            pixels = self.processor.image_processor
            self.augmentation = TCLAugmentation(pixels.size["height"], pixels.image_mean, pixels.image_std)

    def __call__(self, records: list[dict]) -> dict[str, Tensor]:
        """Return `pixel_values`, `input_ids`, `attention_mask`; with two views `pixel_values_augmented`, with masking
        `mlm_input_ids`, `mlm_labels`, `mlm_positions`, with image ids `image_ids`."""
        return super().__call__(records)

    def _sample(self, record: dict) -> tuple[list[Tensor], str, Tensor, Tensor, int]:
        """Views, caption, random numbers for masking, and image id of one record."""
        caption = self._caption(record)
        with open_image(record.get("image")) as image:
            views = self.augmentation(image, 1 + self.two_views)
        uniform = torch.rand(self.max_tokens, 2)
        random_ids = torch.randint(len(self.processor.tokenizer), (self.max_tokens,))
        return views, caption, uniform, random_ids, image_number(record.get("image_id"))

    def _batch(self, samples: list) -> dict[str, Tensor]:
        tokenizer: TCLTokenizer = self.processor.tokenizer
        views, captions, uniform, random_ids, image_ids = zip(*samples, strict=True)
        batch = self._tokens(captions)
        batch["pixel_values"] = torch.stack([view[0] for view in views])
        if self.two_views:
            batch["pixel_values_augmented"] = torch.stack([view[1] for view in views])
        if self.with_image_ids:
            batch["image_ids"] = torch.tensor(image_ids)
        if self.mlm_probability:
            input_ids = batch["input_ids"]
            length = input_ids.shape[1]
            maskable = batch["attention_mask"].bool() & (input_ids != tokenizer.cls_token_id)
            batch["mlm_input_ids"], batch["mlm_labels"] = mask_tokens(
                input_ids,
                maskable,
                self.mlm_probability,
                tokenizer.mask_token_id,
                torch.stack(uniform)[:, :length],
                torch.stack(random_ids)[:, :length],
            )
            batch["mlm_positions"] = masked_positions(batch["mlm_labels"])
        return batch


def image_number(image_id: str | None) -> int:
    """A number for an image id, the same in every process and run; `NO_IMAGE_ID` for none."""
    if image_id is None:
        return NO_IMAGE_ID
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class TCLTaskCollator(_Collator):
    """Make batches for the heads of the tasks; what a record has decides what is made of it.

    `image`, or several as `images`; a `question`, or else one of the `captions`; a `label`, or `answers` with the
    `weight` that they share in proportion to how often each was given. Records of the same image may come together,
    as the `records` of one: they get one view of it, and the model reads it once.

    Args:
        processor: gives tokenizer, clean-up, image size and normalisation.
        augmentation: makes the view; None for the pixels of test time.
        max_tokens: longest text, [CLS] included.
        skipped: where bad samples are noted.
        empty_batches: a batch of which nothing is left is an empty dictionary, as our loop wants it, and no error.
        label2id: the classes by name; None leaves labels out.
        with_answers: `False` leaves answers out, as for evaluation.
        max_question_words: longer questions are cut (original: 30 in training, 50 at test).

    Raises:
        DataError: if nothing is left of a batch, unless `empty_batches`, or a label is none of the classes.
    """

    label2id: dict[str, int] | None = None
    with_answers: bool = True
    max_question_words: int = MAX_QUESTION_WORDS_IN_TRAINING

    def __call__(self, records: list[dict]) -> dict[str, Tensor]:
        """Return `pixel_values`, `input_ids`, `attention_mask`; for classes `labels`; for answers `labels`,
        `answer_weights` and `question_index`; where an image has several texts `image_index`."""
        return super().__call__(records)

    def _sample(self, record: dict) -> tuple[Tensor, list[tuple[str, int | None, Counter]]]:
        """Pixels of one image, or of several for each text; and of each text about them itself, class and answers."""
        records = record.get("records") or [record]
        first, texts = records[0], []
        for one in records:
            try:
                texts.append(self._text(one))
            except ValueError as error:
                if isinstance(error, DataError) or len(records) == 1:
                    raise
                self.skipped.add(one.get("image_id", "?"), f"ValueError: {error}", record.get("visit"))
        if not texts:
            raise ValueError("no text")
        images = first["images"] if "images" in first else [first.get("image")]
        pixels = torch.stack([self._pixels(image) for image in images])
        return pixels if "images" in first else pixels[0], texts

    def _text(self, record: dict) -> tuple[str, int | None, Counter]:
        """Text, class, and weights of the answers of one record."""
        if "question" in record:
            text = self.processor.clean_question(record["question"] or "", self.max_question_words)
            if not text.strip():
                raise ValueError("no question")
        else:
            text = self._caption(record)
        label = None
        if self.label2id is not None:
            label = self.label2id.get(record["label"])
            if label is None:
                raise DataError(
                    f"Record {record.get('image_id', '?')} has the label '{record['label']}': the model knows "
                    f"{', '.join(self.label2id)}."
                )
        given = Counter(record.get("answers") or ()) if self.with_answers else Counter()
        if self.with_answers and "question" in record and not given:
            raise ValueError("no answer")
        total = record.get("weight", 1.0) / max(given.total(), 1)
        return text, label, Counter({answer: count * total for answer, count in given.items()})

    def _pixels(self, source: object) -> Tensor:
        with open_image(source) as image:
            if self.augmentation is not None:
                return self.augmentation(image)[0]
            return self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def _batch(self, samples: list) -> dict[str, Tensor]:
        pixels, about = zip(*samples, strict=True)
        texts, labels, weights = zip(*itertools.chain(*about), strict=True)
        batch = self._tokens(texts)
        batch["pixel_values"] = torch.stack(pixels)
        if len(texts) > len(pixels):
            batch["image_index"] = torch.tensor([row for row, own in enumerate(about) for _ in own])
        if self.label2id is not None:
            batch["labels"] = torch.tensor(labels)
        answers = [(answer, weight, row) for row, own in enumerate(weights) for answer, weight in own.items()]
        if answers:
            ids, mask = self.processor.encode_answers([answer for answer, _, _ in answers])
            batch["labels"] = ids.masked_fill(mask == 0, -100)
            batch["answer_weights"] = torch.tensor([weight for _, weight, _ in answers])
            batch["question_index"] = torch.tensor([row for _, _, row in answers])
        return batch


@contextmanager
def _choices_of(visit: Visit | None) -> Iterator[None]:
    """Draw from the visit's own random numbers, and leave the global ones as they were."""
    if visit is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(visit.entropy())
    try:
        yield
    finally:
        torch.set_rng_state(state)
