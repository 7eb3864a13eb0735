"""Collators make batches of records: augmented views, one caption of each record, masked tokens, labels and answers.

If a record carries a `Visit`, all random choices of its sample are drawn under the visit's seed, so that a batch does
not depend on the worker that makes it. Other records draw from PyTorch's global generator.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from ..models.losses import NO_IMAGE_ID
from ..models.processing_tcl import MAX_QUESTION_WORDS_IN_TRAINING, MAX_TOKENS, TCLProcessor
from .augmentation import TCLAugmentation
from .captions import usable_captions
from .images import IMAGE_ERRORS, identity_of, open_image
from .kept_states import plain_view_of
from .records import DataError
from .skipped import SkippedSamples


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    probability: float,
    mask_token_id: int,
    uniform: Tensor,
    random_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mask tokens by BERT's rule: 80 % of the chosen tokens become [MASK], 10 % a random token, and 10 % stay.

    Args:
        input_ids: token ids (N, L).
        maskable: whether a token may be chosen (N, L); false for [CLS] and padding.
        probability: share of the maskable tokens that is chosen.
        uniform: two random numbers from [0, 1) for each token (N, L, 2). The first decides whether the token is chosen,
            the second by what it is replaced.
        random_ids: a random token id for each token (N, L).

    Returns:
        The masked ids (N, L), and the labels (N, L): the original id of each chosen token, -100 elsewhere.
    """
    chosen = maskable & (uniform[..., 0] < probability)
    fate = uniform[..., 1]
    masked_ids = torch.where(chosen & (fate < 0.8), mask_token_id, input_ids)
    masked_ids = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked_ids)
    return masked_ids, input_ids.masked_fill(~chosen, -100)


def masked_positions(labels: Tensor, multiple_of: int = 4) -> Tensor:
    """Positions (N, M) of the labels (N, L) that are not -100, padded with -1.

    M is the largest number of such labels in a text, rounded up to a multiple of `multiple_of`, but at most L.
    """
    chosen = labels != -100
    most = max(int(chosen.sum(1).max()), 1)
    width = min(-(-most // multiple_of) * multiple_of, labels.shape[1])
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order.masked_fill(~chosen.gather(1, order), -1)


@dataclass
class _Collator:
    """The common part of the collators: it draws samples under their visits' seeds, and leaves out bad ones.

    A sample whose image cannot be read, or whose text is empty, is counted and listed in `skipped`.
    """

    processor: TCLProcessor
    augmentation: TCLAugmentation | None = None
    max_tokens: int = MAX_TOKENS
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    empty_batches: bool = False

    def for_run(self, skipped: SkippedSamples) -> Self:
        """A copy for a training run: it lists bad samples in `skipped`, and may return empty batches."""
        collator = copy.copy(self)
        collator.skipped, collator.empty_batches = skipped, True
        return collator

    def __call__(self, records: list[dict]) -> dict[str, Tensor]:
        """Make a batch of the records that can be used."""
        samples = [sample for sample in map(self._usable_sample, records) if sample is not None]
        self.skipped.saw(sum(map(_num_samples, records)))
        if not samples:
            if self.empty_batches:
                return {}
            raise DataError(f"No sample of a batch could be used; the last: {self.skipped.last}.")
        return self._batch(samples)

    def _usable_sample(self, record: dict) -> Any | None:
        """The sample that `_sample` makes of a record; None if the record cannot be used."""
        self.skipped.begins(record.get("image_id", "?"))
        visit = record.get("visit")
        with torch.random.fork_rng(devices=[], enabled=visit is not None):
            if visit is not None:
                torch.default_generator.manual_seed(visit.entropy())
            try:
                return self._sample(record)
            except DataError:
                raise
            except IMAGE_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                self.skipped.add(record.get("image_id", "?"), reason, visit, _num_samples(record))
                return None

    def _sample(self, record: dict) -> Any:
        """Make a sample of one record; None or any error but a DataError leaves it out, and an error lists it."""
        raise NotImplementedError

    def _batch(self, samples: list) -> dict[str, Tensor]:
        """Make a batch of samples."""
        raise NotImplementedError

    def _caption(self, record: dict) -> str:
        """One of the record's usable captions, drawn at random; see `captions.py` for how they are cleaned."""
        captions = usable_captions(record, self.processor.clean_caption)
        return captions[int(torch.randint(len(captions), ()))]  # `Visit.caption` relies on this being drawn first.

    def _views(self, record: dict, number: int = 1) -> list[Tensor]:
        """Augmented views of a record's image, (3, H, W) each; without an augmentation, its pixels as at test time.

        Where states are kept of the image (see `kept_states`), they stand for the views (1 + P, width).
        """
        if self.augmentation is None:
            return [plain_view_of(self.processor, record)]
        if "states" in record:
            return record["states"].draw(number)
        with open_image(record.get("image")) as image:
            return self.augmentation(image, number)

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of texts: (N, L) each."""
        options = {"padding": True, "truncation": True, "return_tensors": "pt", "return_token_type_ids": False}
        return dict(self.processor.tokenizer(list(texts), max_length=self.max_tokens, **options))


@dataclass
class TCLPreTrainingCollator(_Collator):
    """Make batches for [`TCLForPreTraining`] and [`TCLForImageTextRetrieval`] of records with `image` and `captions`.

    A batch has `pixel_values`, `input_ids` and `attention_mask`. With two views it also has `pixel_values_augmented`,
    with masking `mlm_input_ids`, `mlm_labels` and `mlm_positions`, and with image ids `image_ids`.

    A sample whose image cannot be read, or whose captions are all empty, is left out, counted and listed in `skipped`.

    Args:
        processor: cleans captions and makes tokens of them.
        augmentation: makes the views; None for the paper's augmentation, with the processor's size and normalisation.
        max_tokens: longest text in tokens, [CLS] included; the paper pre-trains with 25.
        skipped: counts and lists bad samples.
        empty_batches: return an empty dictionary instead of an error if no sample of a batch can be used.
        two_views: make a second view for the teacher; ALBEF uses one view for both.
        mlm_probability: share of the tokens that are masked; 0 makes no masked texts.
        with_image_ids: add numbers that are equal for texts about the same image, as fine-tuning for retrieval needs.

    Raises:
        DataError: if no sample of a batch can be used, unless `empty_batches`.
    """

    two_views: bool = True
    mlm_probability: float = 0.15
    with_image_ids: bool = False

    def __post_init__(self):
        if self.augmentation is None:
            pixels = self.processor.image_processor
            self.augmentation = TCLAugmentation(pixels.size["height"], pixels.image_mean, pixels.image_std)

    def _sample(self, record: dict) -> tuple[list[Tensor], str, Tensor, Tensor, int]:
        """Views, caption, random numbers and random ids for masking, and image id of one record."""
        caption = self._caption(record)
        views = self._views(record, 1 + self.two_views)
        uniform = torch.rand(self.max_tokens, 2)
        random_ids = torch.randint(len(self.processor.tokenizer), (self.max_tokens,))
        number = image_number(record) if self.with_image_ids else NO_IMAGE_ID
        return views, caption, uniform, random_ids, number

    def _batch(self, samples: list) -> dict[str, Tensor]:
        views, captions, uniform, random_ids, image_ids = zip(*samples, strict=True)
        batch = self._tokens(captions)
        batch["pixel_values"] = torch.stack([view[0] for view in views])
        if self.two_views:
            batch["pixel_values_augmented"] = torch.stack([view[1] for view in views])
        if self.with_image_ids:
            batch["image_ids"] = torch.tensor(image_ids)
        if self.mlm_probability:
            batch |= self._masked(batch, torch.stack(uniform), torch.stack(random_ids))
        return batch

    def _masked(self, batch: dict[str, Tensor], uniform: Tensor, random_ids: Tensor) -> dict[str, Tensor]:
        """The masked texts of a batch, their labels, and the positions of the labels."""
        tokenizer = self.processor.tokenizer
        length = batch["input_ids"].shape[1]
        masked_ids, labels = mask_tokens(
            batch["input_ids"],
            batch["attention_mask"].bool() & (batch["input_ids"] != tokenizer.cls_token_id),
            self.mlm_probability,
            tokenizer.mask_token_id,
            uniform[:, :length],
            random_ids[:, :length],
        )
        return {"mlm_input_ids": masked_ids, "mlm_labels": labels, "mlm_positions": masked_positions(labels)}


def _num_samples(record: dict) -> int:
    """The samples that a record holds: those that share its image, or itself."""
    return len(record.get("records") or (record,))


def image_number(record: dict) -> int:
    """A number for the image of a record, equal in all processes and runs; `NO_IMAGE_ID` where nothing identifies it.

    It follows from the image, see `identity_of`, because ids may begin anew in each source. Only where the image is
    open already, it follows from the id.
    """
    image = record.get("image")
    name = identity_of(image) if isinstance(image, dict) else record.get("image_id")
    if name is None:
        return NO_IMAGE_ID
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class _LabelledText:
    """A text about an image, with its class and the weights of its answers."""

    text: str
    label: int | None
    answer_weights: dict[str, float]


@dataclass
class TCLTaskCollator(_Collator):
    """Make batches for the heads of the tasks. The fields of a record decide which fields a batch has.

    Each record has

    - an `image`, or several as `images`;
    - a `question`, or else `captions`, one of which is taken;
    - for classes, a `label`;
    - for questions, `answers`, and the `weight` of the question (1 by default). The answers share the weight in
      proportion to how often each was given.

    Records about the same image may come as the `records` of one (see [`SharedImages`]). They get one view of the
    image, and the model reads it once.

    A batch has `pixel_values`, `input_ids` and `attention_mask`. Classes add `labels` (N,). Answers add their tokens as
    `labels` (A, L), `answer_weights` (A,) and `question_index` (A,), the row of the question that each belongs to. If
    an image has several texts, `image_index` (N,) is the row of the image that each text is about.

    A sample whose image cannot be read, or whose text is empty, is left out, counted and listed in `skipped`.

    Args:
        processor: cleans texts and makes tokens of them.
        augmentation: makes the view; None for the processor's pixels, as at test time.
        max_tokens: longest text in tokens, [CLS] included.
        skipped: counts and lists bad samples.
        empty_batches: return an empty dictionary instead of an error if no sample of a batch can be used.
        label2id: the number of each class by its name; None leaves labels out.
        with_answers: `False` leaves answers out, as for evaluation.
        max_question_words: longer questions are cut (original: 30 in training, 50 at test).

    Raises:
        DataError: if no sample of a batch can be used, unless `empty_batches`, or if a label is not among the classes.
    """

    label2id: dict[str, int] | None = None
    with_answers: bool = True
    max_question_words: int = MAX_QUESTION_WORDS_IN_TRAINING

    def _sample(self, record: dict) -> tuple[Tensor, list[_LabelledText]] | None:
        """The pixels of an image (3, H, W), or of several (images, 3, H, W), and the texts about them.

        None if each of several texts was listed as one that cannot be used.
        """
        records = record.get("records") or [record]
        texts: list[_LabelledText] = []
        problems: list[tuple[object, str]] = []  # listed last, because a bad image counts all its texts
        pixels = None
        for one in records:
            try:
                texts.append(self._labelled_text(one))
            except IMAGE_ERRORS as error:
                if isinstance(error, DataError) or len(records) == 1:
                    raise
                problems.append((one.get("image_id", "?"), f"{type(error).__name__}: {error}"))
        if texts and "images" in records[0]:
            pixels = torch.stack([self._views({"image": image})[0] for image in records[0]["images"]])
        elif texts:
            pixels = self._views(records[0])[0]
        for image_id, reason in problems:
            self.skipped.add(image_id, reason, record.get("visit"))
        return None if pixels is None else (pixels, texts)

    def why_unreadable(self, record: dict) -> str | None:
        """The reason why the text of a record would be left out of a batch; None if it can be used.

        Raises:
            DataError: if its label is not among the classes.
        """
        try:
            self._labelled_text(record)
        except DataError:
            raise
        except ValueError as error:
            return str(error)
        return None

    def _labelled_text(self, record: dict) -> _LabelledText:
        """The text of one record, with its class and its answers."""
        text = self._question(record) if "question" in record else self._caption(record)
        return _LabelledText(text, self._label(record), self._answer_weights(record))

    def _question(self, record: dict) -> str:
        question = self.processor.clean_question(record["question"] or "", self.max_question_words)
        if not question.strip():
            raise ValueError("no question")
        return question

    def _label(self, record: dict) -> int | None:
        """The number of a record's class; None if batches have no labels."""
        if self.label2id is None:
            return None
        if record["label"] not in self.label2id:
            raise DataError(
                f"Record {record.get('image_id', '?')} has the label '{record['label']}', but the model has the "
                f"classes {', '.join(self.label2id)}: rename or remove it."
            )
        return self.label2id[record["label"]]

    def _answer_weights(self, record: dict) -> dict[str, float]:
        """The share of each answer in the weight of its question."""
        if not self.with_answers:
            return {}
        counts = Counter(record.get("answers") or ())
        if "question" in record and not counts:
            raise ValueError("no answer")
        weight_of_one = record.get("weight", 1.0) / max(counts.total(), 1)
        return {answer: count * weight_of_one for answer, count in counts.items()}

    def _batch(self, samples: list) -> dict[str, Tensor]:
        pixels, texts_of_images = zip(*samples, strict=True)
        texts = [text for texts in texts_of_images for text in texts]
        batch = self._tokens([text.text for text in texts])
        batch["pixel_values"] = torch.stack(pixels)
        if len(texts) > len(pixels):
            batch["image_index"] = torch.tensor([row for row, texts in enumerate(texts_of_images) for _ in texts])
        if self.label2id is not None:
            batch["labels"] = torch.tensor([text.label for text in texts])
        answers = [
            (answer, weight, row) for row, text in enumerate(texts) for answer, weight in text.answer_weights.items()
        ]
        if answers:
            names, weights, rows = zip(*answers, strict=True)
            ids, mask = self.processor.encode_answers(names)
            batch["labels"] = ids.masked_fill(mask == 0, -100)
            batch["answer_weights"] = torch.tensor(weights)
            batch["question_index"] = torch.tensor(rows)
        return batch
