"""Pipelines take what those of transformers take, with the pixels of training, and refuse the rest in a sentence."""

import datasets
import numpy as np
import pytest
import torch
from helpers import encoded, photo, png, tiny
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from tcl_hf import TCLForImageTextRetrieval, TCLForVisualEntailment, TCLForVisualReasoning
from tcl_hf.data.images import open_image as open_in_training
from tcl_hf.inference.inputs import open_image

TEXTS = ["a red dog", "the house near a car", "a cat"]
ROWS = datasets.Dataset.from_list([{"image": {"bytes": png(i), "path": None}, "text": TEXTS[i]} for i in range(3)])
DATA = ROWS.cast_column("image", datasets.Image())


def opened(head, task, **fields):
    model, processor = tiny(head, **fields)
    return pipeline(task, model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def matching():
    return opened(TCLForImageTextRetrieval, "image-text-matching")


@pytest.fixture(scope="module")
def entailment():
    return opened(TCLForVisualEntailment, "visual-entailment")


@pytest.fixture(scope="module")
def reasoning():
    return opened(TCLForVisualReasoning, "visual-reasoning")


def columns_of(data) -> dict:
    """The images of a dataset in the forms that people pass them in."""
    pictures = [row["image"] for row in data]
    return {
        "a column": data["image"],
        "a KeyDataset": KeyDataset(data, "image"),
        "a list": pictures,
        "a tuple": tuple(pictures),
        "a generator": (picture for picture in pictures),
        "an iterator": iter(pictures),
        "a column of a stream": data.to_iterable_dataset()["image"],
        "undecoded": ROWS["image"],
        "tensors": data.with_format("torch")["image"],
        "one array": np.stack([np.asarray(picture) for picture in pictures]),
    }


@pytest.mark.parametrize("form", columns_of(DATA))
def test_images_in_any_form_give_the_same(form, matching, entailment):
    expected = [matching(row["image"], TEXTS[0]) for row in DATA]
    assert list(matching(columns_of(DATA)[form], text=TEXTS[0])) == expected
    assert list(entailment(columns_of(DATA)[form], TEXTS[1])) == [entailment(row["image"], TEXTS[1]) for row in DATA]
    paired = list(entailment(images=columns_of(DATA)[form], text=DATA["text"]))
    assert paired == [entailment(dict(row)) for row in DATA]


def test_batches_of_a_column_are_those_of_records(entailment):
    found = list(entailment(DATA["image"], text=KeyDataset(DATA, "text"), batch_size=2))
    for one, row in zip(found, DATA, strict=True):
        expected = entailment(dict(row))
        assert [e["label"] for e in one] == [e["label"] for e in expected]
        assert np.allclose([e["score"] for e in one], [e["score"] for e in expected], atol=1e-6)


def test_an_image_of_a_column_is_opened_when_its_turn_comes(matching):
    class Counting(torch.utils.data.Dataset):
        seen = 0

        def __len__(self):
            return 1000

        def __getitem__(self, number):
            self.seen += 1
            return photo(seed=number)

    images = Counting()
    results = iter(matching(images, text="a dog"))
    next(results)
    assert images.seen < 5


def test_every_image_of_a_column_is_scored_with_all_texts(matching):
    found = list(matching(DATA["image"], text=DATA["text"]))
    assert found == [matching({"image": row["image"], "text": TEXTS}) for row in DATA]
    assert matching(DATA[0]["image"], text=np.array(TEXTS)) == matching(DATA[0]["image"], TEXTS)


def test_two_images_of_a_text_come_as_pairs(reasoning):
    left, right = DATA["image"], list(reversed(list(DATA["image"])))
    expected = [reasoning({"images": pair, "text": "a dog"}) for pair in zip(left, right, strict=True)]
    assert list(reasoning(zip(left, right, strict=True), text="a dog")) == expected
    assert reasoning((left[0], right[0]), "a dog") == reasoning([left[0], right[0]], "a dog") == expected[0]
    assert reasoning([(left[0], right[0]), [left[1], right[1]]], "a dog") == expected[:2]


def test_nothing_gives_nothing(matching, entailment):
    assert matching([]) == entailment([], text="a dog") == entailment([], text=[]) == []


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray((np.arange(30 * 40, dtype=np.uint16) * 50).reshape(30, 40)),
        photo(40, 30).convert("RGBA"),
        photo(40, 30).convert("P"),
        photo(40, 30).convert("L"),
    ],
    ids=["16-bit grey", "transparent", "palette", "grey"],
)
def test_pixels_are_those_of_training(picture, tmp_path):
    content = encoded(picture, "PNG")
    (tmp_path / "picture.png").write_bytes(content)
    expected = np.asarray(open_in_training(content).convert("RGB"))
    sources = [picture, content, tmp_path / "picture.png", str(tmp_path / "picture.png"), {"bytes": content}]
    if picture.mode != "P":
        sources.append(np.asarray(picture))
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), expected)


def test_arrays_are_images_with_their_channels_first_or_last():
    pixels = np.asarray(photo(40, 30))
    first = pixels.transpose(2, 0, 1)
    for array in (pixels, first, pixels / 255, torch.tensor(first), torch.tensor(first) / 255, torch.tensor(pixels)):
        assert np.array_equal(np.asarray(open_image(array)), pixels)
    assert open_image(pixels[..., 0]).size == open_image(pixels[..., 0] / 255).size == (40, 30)


@pytest.mark.parametrize(
    ("inputs", "text", "sentence"),
    [
        (7, "a dog", r"^The image 7 cannot be opened: it is of type int, and neither an image, a path, a URL, base64"),
        ({"image": 7, "text": "a dog"}, None, "^The image 7 cannot be opened: it is of type int"),
        ([DATA[0]["image"], 7], "a dog", "^The image 7 cannot be opened"),
        ("nowhere.png", "a dog", r"^The image 'nowhere.png' cannot be opened: it is neither a file, nor a URL, nor a"),
        ("http://127.0.0.1:9/a.png", "a dog", r"^The image 'http://127.0.0.1:9/a.png' cannot be opened: "),
        (b"no picture", "a dog", r"^The image b'no picture' cannot be opened: cannot identify image file"),
        (png(0)[:60], "a dog", "^The image b.* cannot be opened: "),
        (
            torch.linspace(-2, 2, 192).view(3, 8, 8),
            "a dog",
            r"(?s)^The image tensor.* cannot be opened: .* outside the range \[0, 1\]",
        ),
        ({"path": None, "bytes": None}, "a dog", "^The image .* cannot be opened: it is of type dict"),
        (KeyDataset(DATA, "image"), None, "of type PngImageFile is not a record: pass {'image': ..., 'text': ...}"),
        (DATA["image"], ["a dog"] * 2, "^3 images and 2 texts cannot be paired"),
        ({"image": DATA[0]["image"], "text": None}, None, "^text=None is not a text"),
        ({"image": DATA[0]["image"], "text": 3}, None, "^text=3 is not a text"),
    ],
)
def test_what_is_not_an_image_or_a_text_is_refused_in_a_sentence(inputs, text, sentence, entailment):
    with pytest.raises(ValueError, match=sentence):
        list(entailment(inputs, text))
