"""A WordPiece tokenizer trained on captions."""

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
    characters = sorted({character for text in texts for character in tokenizer.normalizer.normalize_str(text)} - {" "})
    if not characters:
        raise DataError(
            "There are no captions to train a tokenizer on: name an existing tokenizer, or check the caption column."
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"##{character}" for character in characters)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(set(tokenizer.get_vocab()) - set(special))
    return TCLTokenizer({piece: number for number, piece in enumerate([*special, *pieces])})
