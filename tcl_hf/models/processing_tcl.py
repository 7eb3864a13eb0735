"""The processor of TCL: images to pixels, texts to tokens, with the original's text clean-up."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import BatchEncoding

from .image_processing_tcl import TCLImageProcessorPil
from .starting_points import read_image_format
from .tokenization_tcl import TCLTokenizer, clean_caption, clean_question, encodable

# The longest texts; [CLS], and [SEP] where there is one, count as tokens. The original pre-trains with 25 tokens,
# evaluates retrieval with 30, and sets no other limit on tokens. Its limits on words are the same as these.
MAX_WORDS = 30
MAX_TOKENS = 30
MAX_QUESTION_WORDS = 50
MAX_QUESTION_WORDS_IN_TRAINING = 30
MAX_QUESTION_TOKENS = 50
MAX_ANSWER_TOKENS = 12


class TCLProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call of the processor, with their defaults."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True, "max_length": MAX_TOKENS}}


class TCLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, with the text clean-up the model was trained with.

    Args:
        image_processor: a [`TCLImageProcessor`] or [`TCLImageProcessorPil`].
        tokenizer: a [`TCLTokenizer`].
        clean_text: clean texts as the original does (lower case, no punctuation, 30 words); if None, the tokenizer's
            `clean_up_text` decides.
    """

    valid_processor_kwargs = TCLProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, clean_text: bool | None = None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        if clean_text is not None:
            self.clean_text = clean_text

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model: str, text_model: str, *, image_size: int | None = None
    ) -> "TCLProcessor":
        """Make the processor of a model that starts from a vision and a text model of transformers.

        Images are normalised as for the vision model, and texts are split into the text model's tokens.

        Args:
            vision_model, text_model: folders or Hub names.
            image_size: pixels of a side of the images; the vision model's own if None.

        Raises:
            ValueError: for a vision model that TCL cannot start from.
        """
        image_processor = TCLImageProcessorPil(**read_image_format(vision_model, image_size))
        return cls(image_processor, TCLTokenizer.from_pretrained(text_model))

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that it makes; to be set where a model is opened at another resolution."""
        return self.image_processor.size["height"]

    @image_size.setter
    def image_size(self, image_size: int) -> None:
        self.image_processor.size = {"height": image_size, "width": image_size}

    @property
    def clean_text(self) -> bool:
        """Whether texts are cleaned; the tokenizer's `clean_up_text`."""
        return self.tokenizer.clean_up_text

    @clean_text.setter
    def clean_text(self, clean_text: bool) -> None:
        if clean_text != self.clean_text:
            self.tokenizer = copy.deepcopy(self.tokenizer)  # another processor may share it
            self.tokenizer.clean_up_text = clean_text

    def __call__(self, images=None, text=None, **kwargs: Unpack[TCLProcessorKwargs]) -> BatchEncoding:
        """Make `pixel_values` from images, and `input_ids` and `attention_mask` from texts.

        Args:
            images: one image or several: PIL, array, tensor, path or URL.
            text: one text or several. [MASK] stays as it is.
            kwargs: `return_tensors="pt"`, and arguments of the tokenizer and the image processor; by default texts are
                padded, and truncated to 30 tokens.

        Raises:
            ValueError: if there is no text, or one of them is not a text.
        """
        if text is not None:
            texts = self._cleaned([text] if isinstance(text, str) else text)
            text = texts[0] if isinstance(text, str) else texts
        return super().__call__(images=images, text=text, **kwargs)

    def _cleaned(self, texts: Any) -> list[str]:
        """Texts that can be encoded, cleaned if this processor cleans texts, with [MASK] between what is cleaned."""
        if not hasattr(texts, "__iter__"):
            raise ValueError(f"text is {texts!r}: give one text, or a list of texts.")
        texts = list(texts)
        if not texts:
            raise ValueError("text is an empty list: give at least one text.")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {number} is {text!r}, of type {type(text).__name__}: give texts in one list.")
        texts = [encodable(text) for text in texts]
        if not self.clean_text:
            return texts
        mask = str(self.tokenizer.mask_token)
        return [f" {mask} ".join(map(self.clean_caption, text.split(mask))).strip() for text in texts]

    def clean_caption(self, caption: str, max_words: int = MAX_WORDS) -> str:
        """A caption as the model reads it: cleaned as the original does if this processor cleans texts.

        A cased vocabulary (`do_lower_case: false`) keeps its capitals.

        Args:
            max_words: longer captions are truncated.
        """
        if not self.clean_text:
            return caption
        return clean_caption(caption, max_words, self.tokenizer.do_lower_case)

    def clean_question(self, question: str, max_words: int = MAX_QUESTION_WORDS) -> str:
        """A question as the model reads it, see `clean_caption`.

        Args:
            max_words: longer questions are truncated (original: 30 in training, 50 in evaluation).
        """
        if not self.clean_text:
            return question
        return clean_question(question, max_words, self.tokenizer.do_lower_case)

    def encode_answers(self, answers: Sequence[str], max_tokens: int = MAX_ANSWER_TOKENS) -> tuple[Tensor, Tensor]:
        """Token ids of answers, `[CLS] answer [SEP]`, padded, and their mask: (A, L) each.

        Answers are not cleaned, as in the original. Longer ones lose their last words, but keep [SEP].
        """
        tokenizer = self.tokenizer
        rows = [
            torch.tensor([tokenizer.cls_token_id, *tokens[: max_tokens - 2], tokenizer.sep_token_id])
            for tokens in tokenizer(list(answers), add_special_tokens=False, clean_up_text=False)["input_ids"]
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


__all__ = ["TCLProcessor"]
