"""The tokenizer of TCL: BERT's WordPiece with [CLS] in front and no [SEP], and the original's text clean-up."""

import copy
import os
import re
import threading
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import BatchEncoding, BertTokenizer

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_WHITE_SPACE_RUN = re.compile(r"\s{2,}")
_COMPOUND = re.compile("[-/]")
_PERSON_BRACKET = re.compile("<(?=person>)|(?<=<person)>")
_CLEAN_UP = ((_DELETED, ""), (_COMPOUND, " "), (_PERSON_BRACKET, ""))  # what a pattern matches is replaced

# A capital sigma at the end of a word: Python's `lower` makes another letter of it, `normalizers.Lowercase` does not.
_FINAL_SIGMA = (
    r"(?<=\p{Cased}|\p{Cased}\p{Case_Ignorable}|\p{Cased}\p{Case_Ignorable}{2})Σ(?!\p{Case_Ignorable}*\p{Cased})"
)


def encodable(text: str) -> str:
    """A text whose halves of characters, which JSON can hold and UTF-8 cannot, are joined or become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clean_caption(caption: str, max_words: int = 30, lower_case: bool = True) -> str:
    """Clean a caption as the original does: lower case, no punctuation, at most `max_words` words.

    `-` and `/` become a space, `<person>` becomes `person`, runs of white space become one space. `lower_case=False`
    keeps capitals, for a cased vocabulary; `TCLProcessor.clean_caption` chooses what its tokenizer needs.
    """
    caption = _split_compounds(caption, lower_case).replace("<person>", "person")
    caption = _WHITE_SPACE_RUN.sub(" ", caption)
    return _first_words(caption.rstrip("\n").strip(" "), max_words)


def clean_caption_with_origins(caption: str, max_words: int = 30, lower_case: bool = True) -> tuple[str, list[int]]:
    """The result of `clean_caption`, and for each of its characters the position in `caption` that it comes from.

    Positions never decrease. The space that replaces a run of white space has the position where the run began.
    """
    text, origins = caption, list(range(len(caption)))
    if lower_case:
        text = caption.lower()
        # A character may become several in lower case.
        origins = [position for position, char in enumerate(caption) for _ in char.lower()]
    for pattern, replacement in (*_CLEAN_UP, (_WHITE_SPACE_RUN, " ")):
        matches = list(pattern.finditer(text))
        text = pattern.sub(replacement, text)
        for match in reversed(matches):
            del origins[match.start() + len(replacement) : match.end()]
    cleaned = _first_words(text.rstrip("\n").strip(" "), max_words)
    start = len(text) - len(text.lstrip(" "))
    return cleaned, origins[start : start + len(cleaned)]


def clean_question(question: str, max_words: int = 50, lower_case: bool = True) -> str:
    """Clean a question as the original does: like a caption, but inner and leading spaces are kept."""
    return _first_words(_split_compounds(question, lower_case).rstrip(" "), max_words)


def _split_compounds(text: str, lower_case: bool) -> str:
    return _DELETED.sub("", text.lower() if lower_case else text).replace("-", " ").replace("/", " ")


def _first_words(text: str, max_words: int) -> str:
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text


MAX_LENGTH = 512  # positions of a BERT
_encoding = threading.RLock()


def _renew_lock() -> None:
    """Give a forked process a lock of its own, because another thread of its parent may hold the old one."""
    global _encoding
    _encoding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class TCLTokenizer(BertTokenizer):
    """BERT's tokenizer without [SEP]: the input of TCL is `[CLS] tokens`, from texts that are cleaned as captions are.

    The clean-up is part of the tokenizer's normalizer, so that it also applies to texts that are passed directly to
    the tokenizer. Offsets refer to the text before the clean-up; special tokens such as [MASK] are kept. Only
    `clean_caption` and `clean_question` limit the number of words.

    Args:
        add_sep_token: end texts with [SEP], as for VQA answers.
        clean_up_text: clean texts as `clean_caption` does; on by default. The argument of the same name of a call
            overrides it: VQA answers are not cleaned.

    The other arguments are those of `BertTokenizer`.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        *args,
        add_sep_token: bool = False,
        clean_up_text: bool = True,
        **kwargs,
    ):
        kwargs.setdefault("model_max_length", MAX_LENGTH)
        super().__init__(vocab, *args, add_sep_token=add_sep_token, clean_up_text=clean_up_text, **kwargs)
        if len(self) <= len(self.all_special_tokens):
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The tokenizer'} has no vocabulary: its folder needs tokenizer.json "
                "or vocab.txt. Save the processor beside the model, or name another tokenizer."
            )
        self.add_sep_token = add_sep_token
        sep = f" {self.sep_token}" if add_sep_token else ""
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{self.cls_token} $A{sep}",
            pair=f"{self.cls_token} $A{sep} $B{sep}",
            special_tokens=[(self.cls_token, self.cls_token_id), (self.sep_token, self.sep_token_id)],
        )
        self._normalizer_of_bert = self._tokenizer.normalizer
        self.clean_up_text = clean_up_text

    @property
    def clean_up_text(self) -> bool:
        """Whether texts are cleaned as captions are. Set it before the tokenizer is shared with other threads."""
        return self._clean_up_text

    @clean_up_text.setter
    def clean_up_text(self, clean_up_text: bool) -> None:
        self._clean_up_text = clean_up_text
        self._tokenizer.normalizer = self._normalizer(clean_up_text)
        self._other_backend: Tokenizer | None = None  # the one for calls with the other `clean_up_text`, once needed

    def _normalizer(self, clean_up_text: bool) -> normalizers.Normalizer:
        steps: list[normalizers.Normalizer] = []
        if clean_up_text:
            if self.do_lower_case:
                steps += [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()]
            steps += [normalizers.Replace(Regex(pattern.pattern), replacement) for pattern, replacement in _CLEAN_UP]
        return normalizers.Sequence([*steps, self._normalizer_of_bert])

    def _encode_plus(self, *args, clean_up_text: bool | None = None, **kwargs) -> BatchEncoding:
        with _encoding:  # Truncation and padding are settings of one object, which threads would mix.
            if clean_up_text in (None, self.clean_up_text):
                return super()._encode_plus(*args, **kwargs)
            if self._other_backend is None:
                self._other_backend = copy.deepcopy(self._tokenizer)
                self._other_backend.normalizer = self._normalizer(not self.clean_up_text)
            # A copy, because another thread may save, copy or ask this tokenizer meanwhile.
            other = copy.copy(self)
            other._tokenizer = self._other_backend
            return super(TCLTokenizer, other)._encode_plus(*args, **kwargs)

    def _add_tokens(self, *args, **kwargs) -> int:
        self._other_backend = None
        return super()._add_tokens(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the second backend, which holds the vocabulary once more."""
        return self.__dict__ | {"_other_backend": None}


__all__ = ["TCLTokenizer", "clean_caption", "clean_caption_with_origins", "clean_question"]
