"""A tokenizer is trained on captions."""

import json

import pytest
from helpers import WORDS

from tcl_hf.data.pairs import DataError
from tcl_hf.data.tokenizer import train_tokenizer


def test_a_trained_tokenizer_knows_the_words_and_is_the_same_each_time():
    captions = ["The quick, brown fox!", "a FOX and a dog"] * 3
    first = train_tokenizer(captions, 60)
    rare = [f"{word}ish {word[::-1]}" for word in WORDS]  # many pieces of one frequency
    assert len({json.dumps(train_tokenizer(rare, 70).get_vocab(), sort_keys=True) for _ in range(8)}) == 1
    assert first.tokenize("fox and dog") == ["fox", "and", "dog"]
    assert (first.pad_token_id, first.unk_token_id, first.cls_token_id, first.mask_token_id) == (0, 1, 2, 4)
    assert len(first) <= 60


def test_a_tokenizer_without_captions_is_refused():
    with pytest.raises(DataError, match="no captions"):
        train_tokenizer([])


@pytest.mark.parametrize("size", [20, 100, 300])
def test_the_size_is_a_limit_whatever_the_script(size):
    """A thousand ideographs, each of which is a word of its own, beside Latin letters."""
    captions = [chr(0x4E00 + number) * (1 + number % 3) + " a cat" for number in range(1000)]
    tokenizer = train_tokenizer(captions, size)
    assert len(tokenizer) <= size
    assert tokenizer.tokenize("\u4e02\u4e02 a") == ["\u4e02", "\u4e02", "a"]  # one of the most frequent
    assert tokenizer.tokenize(chr(0x4E00 + 999)) == ["[UNK]"]
    assert not any(piece.startswith("##\u4e02") for piece in tokenizer.get_vocab())
    large = train_tokenizer(captions, 2000)
    assert large.tokenize("\u4e00 cat") == ["\u4e00", "cat"]
