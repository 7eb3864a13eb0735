"""The captions of a record: how they are read from a source, and how they are cleaned before they become tokens."""

from collections.abc import Callable
from typing import Any

from ..models.tokenization_tcl import encodable

MAX_CHARACTERS = 10_000  # Longer captions are cut. The model reads far less of one: its first 30 words.
# Names of columns, of fields of tars, and of keys in JSON that hold captions; further ones stand behind.
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence", "json")
TEXT_COLUMNS = (*CAPTION_COLUMNS, "caption_text", "comment", "description", "raw", "title", "alt_text", "alt", "prompt")
NOT_UTF8 = "\ufffd"  # Readers put this character where they could not decode the bytes of a caption.


def caption_texts(value: Any) -> list[str]:
    """The texts of a caption column's value: a text, a list of texts, or objects that hold one or several.

    img2dataset writes `{"caption": text}`, Karpathy's splits `{"raw": text}`; the key may be any of `TEXT_COLUMNS`.
    """
    texts: list[Any] = []
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, dict):
            one = next((one[key] for key in TEXT_COLUMNS if one.get(key)), None)
        texts += one if isinstance(one, list | tuple) else [one]
    texts = [text.get("raw") if isinstance(text, dict) else text for text in texts]
    return [encodable(text[:MAX_CHARACTERS]) for text in texts if isinstance(text, str)]


def _as_list(captions: Any) -> Any:
    """The captions of a record; one that stands alone, and not in a list, is not taken for a list of letters."""
    return [captions] if isinstance(captions, str) else captions or ()


def usable_captions(record: dict, clean: Callable[[str], str]) -> list[str]:
    """The captions of a record that the model can read, in their order.

    Args:
        clean: makes of a caption what the model reads, as `TCLProcessor.clean_caption` does.

    Raises:
        ValueError: if there are none.
    """
    captions = [text[:MAX_CHARACTERS] for text in _as_list(record.get("captions")) if isinstance(text, str)]
    decoded = [text for text in captions if NOT_UTF8 not in text]
    if captions and not decoded:
        raise ValueError("a caption that is not UTF-8")
    usable = [text for text in map(clean, decoded) if text.strip()]
    if not usable:
        raise ValueError("no caption")
    return usable
