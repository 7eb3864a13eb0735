"""Sizes, checksums and captions that are wrong in small ways get one sentence, or are read rightly."""

import hashlib

import pytest
from helpers import small_patches

from tcl_hf import TCLConfig
from tcl_hf.data.captions import usable_captions
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.records import DataError
from tcl_hf.models.checksums import CHECKSUMS, verify_checksums
from tcl_hf.models.tokenization_tcl import clean_caption


@pytest.mark.parametrize(
    ("part", "field", "size"),
    [
        ("vision_config", "num_hidden_layers", 100_000),
        ("text_config", "num_hidden_layers", 100_000),
        ("text_config", "num_hidden_layers", -1),
        ("vision_config", "hidden_size", 123_456_789),
        ("vision_config", "intermediate_size", -5),
        ("text_config", "vocab_size", 0),
        ("text_config", "max_position_embeddings", 999_999_999),
        ("vision_config", "image_size", 123_456_000),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(part, field, size):
    with pytest.raises(ValueError, match=rf"{part}\.\w+=-?\d+ (must be|lies outside)|{part}.{field}=.* must be"):
        TCLConfig(**{part: {field: size}})


@pytest.mark.parametrize("mark", ["  ", " *"])
def test_checksums_in_text_and_binary_form_are_compared(mark, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / CHECKSUMS).write_text(f"{digest}{mark}model.safetensors\n")
    verify_checksums(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(OSError, match="not the file that was saved"):
        verify_checksums(tmp_path)


def test_one_caption_is_not_a_list_of_letters():
    assert usable_captions({"captions": "A dog"}, clean_caption) == ["a dog"]


@pytest.mark.parametrize("source", ["", " ", [""]])
def test_data_without_a_name_is_refused(source):
    with pytest.raises(DataError, match="The name of the data is empty"):
        load_pairs(source)


def test_usual_sizes_are_unchanged():
    assert small_patches().vision_config.num_hidden_layers == 2
