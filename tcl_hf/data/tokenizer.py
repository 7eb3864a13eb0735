"""A WordPiece tokenizer trained on captions."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ..models.tokenization_tcl import TCLTokenizer, clean_caption
from .captions import MAX_CHARACTERS
from .records import DataError


def train_tokenizer(captions: Iterable[str], vocab_size: int = 30522) -> TCLTokenizer:
    """Train a WordPiece tokenizer on cleaned captions.

    Args:
        captions: texts as they are; they are cleaned here.
        vocab_size: the largest number of tokens, including the five special ones.

    Raises:
        DataError: if there are no captions, or nothing is left of them after cleaning.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [clean_caption(caption[:MAX_CHARACTERS]) for caption in captions]
    # The trainer numbers the characters within words in an order that differs between runs, and breaks ties by
    # number. Passing these characters as special tokens fixes their order, so that each run makes the same vocabulary.
    counts = Counter(character for text in texts for character in tokenizer.normalizer.normalize_str(text))
    del counts[" "]
    if not counts:
        raise DataError(
            "There are no captions to train a tokenizer on: name an existing tokenizer, or check the caption column."
        )
    # A character stands alone and within words, except for ideographs, each of which is a word.
    room = max(1, vocab_size - len(special) - 1)
    alphabet: list[str] = []
    for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room -= 1 if _is_ideograph(character) else 2
        if room < 0:
            break
        alphabet.append(character)
    inner = sorted(character for character in alphabet if not _is_ideograph(character))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"##{character}" for character in inner)],
        limit_alphabet=len(alphabet),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(set(tokenizer.get_vocab()) - set(special))
    return TCLTokenizer({piece: number for number, piece in enumerate([*special, *pieces])})


def _is_ideograph(character: str) -> bool:
    """Whether BERT's tokenizer takes a character as a word of its own, as those of Chinese."""
    return any(
        first <= ord(character) <= last
        for first, last in (
            (0x3400, 0x4DBF),
            (0x4E00, 0x9FFF),
            (0xF900, 0xFAFF),
            (0x20000, 0x2CEAF),
            (0x2F800, 0x2FA1F),
        )
    )
