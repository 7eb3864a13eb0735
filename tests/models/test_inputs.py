"""Images and texts at inference are those of training: every mode of image, every form of text, in threads too."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import photo, tiny_processor
from PIL import ExifTags, Image

from tcl_hf import TCLImageProcessor, TCLImageProcessorPil
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.images import open_image
from tcl_hf.data.skipped import SkippedSamples


def turned(mode: str = "RGB") -> Image.Image:
    """A photo that its EXIF data turns by a quarter."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    photo().convert(mode).save(file, "PNG", exif=exif)
    return Image.open(file)


def palette_with_transparency() -> Image.Image:
    image = photo().convert("P")
    image.info["transparency"] = 3
    return image


GREY_16 = Image.fromarray((np.arange(80 * 96, dtype=np.uint32).reshape(80, 96) * 8).astype(np.uint16))
TRANSPARENT = photo().convert("RGBA")
TRANSPARENT.putalpha(Image.linear_gradient("L").resize(TRANSPARENT.size))
IMAGES = {
    "16-bit grey": lambda: GREY_16.copy(),
    "transparent": lambda: TRANSPARENT.copy(),
    "grey and transparent": lambda: TRANSPARENT.convert("LA"),
    "palette": palette_with_transparency,
    "CMYK": lambda: photo().convert("CMYK"),
    "black and white": lambda: photo().convert("1"),
    "turned": turned,
    "turned grey": lambda: turned("L"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_at_inference_are_those_of_training(name, tmp_path):
    """An image, its file and its bytes have the same pixels, to the last bit, as a record of training has."""
    image = IMAGES[name]()
    # PNG has no CMYK, and Pillow turns a TIFF itself.
    file = tmp_path / ("image.tif" if image.mode == "CMYK" else "image.png")
    exif = image.getexif()
    image.save(file, **({"exif": exif} if len(exif) else {}))
    with open_image(str(file)) as opened:
        trained_on = opened.convert("RGB")
    for processor, tolerance in ((TCLImageProcessorPil(), 0), (TCLImageProcessor(), 1e-6)):
        expected = processor(images=trained_on, return_tensors="pt")["pixel_values"]
        for given in (image, Image.open(file), open_image({"bytes": file.read_bytes()}), open_image(image)):
            pixels = processor(images=given, return_tensors="pt")["pixel_values"]
            assert torch.allclose(pixels, expected, rtol=0, atol=tolerance), name


def test_an_image_that_was_turned_is_not_turned_again():
    upright = open_image(turned())
    assert upright.size == (80, 96) and open_image(upright).size == (80, 96)
    assert np.array_equal(np.asarray(upright), np.asarray(photo().transpose(Image.Transpose.ROTATE_270)))


def test_a_mask_stays_a_mask_and_what_surrounds_it_is_cleaned():
    processor = tiny_processor()
    mask = processor.tokenizer.mask_token_id
    ids = processor(text=["A big, [MASK] dog!"])["input_ids"][0]
    assert ids == processor.tokenizer("a big [MASK] dog")["input_ids"] and ids.count(mask) == 1
    assert processor(text="[MASK][MASK]")["input_ids"].count(mask) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "text is an empty list: give at least one text"),
        ([None], "text 0 is None, of type NoneType: give texts in one list"),
        (["a dog", ["a", "b"]], r"text 1 is \['a', 'b'\], of type list: give texts in one list"),
        (7, "text is 7: give one text, or a list of texts"),
    ],
)
def test_texts_of_other_forms_are_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(text=text)


def test_half_a_character_is_replaced_and_two_halves_are_joined():
    processor = tiny_processor()
    assert processor(text="dog \ud83d\ude00")["input_ids"] == processor(text="dog \U0001f600")["input_ids"]
    assert processor(text="dog \ud800")["input_ids"] == processor(text="dog \ufffd")["input_ids"]


def test_truncation_has_a_length_that_is_saved(tmp_path):
    tokenizer = tiny_processor().tokenizer
    assert len(tokenizer("dog " * 600, truncation=True)["input_ids"]) == tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path).model_max_length == 512
    assert type(tokenizer).from_pretrained(tmp_path, model_max_length=9).model_max_length == 9


def test_texts_are_tokenized_alike_in_threads_that_mix_options():
    """Questions are cleaned and truncated, answers are neither: settings of one tokenizer."""
    processor = tiny_processor()

    def tokens(number: int) -> list:
        if number % 5 == 0:
            return processor.tokenizer(["Big, dog!"] * 3, clean_up_text=False)["input_ids"]
        if number % 5 == 1:
            return processor.tokenizer(["a big dog near a house"], truncation=True, max_length=4)["input_ids"]
        if number % 5 == 2:
            return processor(text=["Big, dog!", "a [MASK]"], padding="max_length", max_length=9)["input_ids"]
        if number % 5 == 3:
            return processor.encode_answers(["big dog", "Cat!"])[0].tolist()
        return processor(text=["dog " * 40], max_length=50)["input_ids"]

    expected = [tokens(number) for number in range(5)]
    assert len(expected[4][0]) == 31  # 30 words are left
    with ThreadPoolExecutor(8) as threads:
        for number, found in enumerate(threads.map(tokens, range(3000))):
            assert found == expected[number % 5], number


def test_a_call_with_another_clean_up_changes_nothing_that_others_see(monkeypatch):
    tokenizer, seen = tiny_processor().tokenizer, []
    convert = type(tokenizer)._convert_encoding

    def look(self, *args, **kwargs):
        seen.append((tokenizer.clean_up_text, str(tokenizer.backend_tokenizer.normalizer)))
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_convert_encoding", look)
    before = (True, str(tokenizer.backend_tokenizer.normalizer))
    assert tokenizer("Dog!", clean_up_text=False)["input_ids"] != tokenizer("Dog!")["input_ids"]
    assert seen == [before, before]


def test_a_word_that_is_added_is_one_with_and_without_clean_up():
    tokenizer = tiny_processor().tokenizer
    tokenizer("dog", clean_up_text=False)
    tokenizer.add_tokens(["zebra"])
    for clean in (True, False):
        for one in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert one("zebra", clean_up_text=clean)["input_ids"][1:] == [len(tokenizer) - 1]


def counted_in_a_process(skipped: SkippedSamples) -> None:
    skipped.saw(2)
    skipped.add("x", "damaged")


def test_a_collator_travels_with_its_counts():
    collator = TCLPreTrainingCollator(tiny_processor(), skipped=SkippedSamples())
    collator.skipped.add("a", "damaged")
    for copied in (copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
        assert copied.skipped.count == 1
        copied.skipped.add("b", "damaged")
        assert (copied.skipped.count, collator.skipped.count) == (2, 1)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_counts_are_shared_with_processes_however_they_start(method):
    skipped = SkippedSamples()
    process = multiprocessing.get_context(method).Process(target=counted_in_a_process, args=(skipped,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and (skipped.count, skipped.state_dict()["seen"]) == (1, 2)
