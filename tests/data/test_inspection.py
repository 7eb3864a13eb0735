"""Facts about a source: counted by hand on a few samples that have one fault each."""

import json

import pytest
from helpers import encoded, photo, png
from PIL import Image

import tcl_hf_command as program
from tcl_hf.data.inspection import inspect
from tcl_hf.data.tokenizer import train_tokenizer
from tcl_hf.models.image_processing_tcl import TCLImageProcessorPil
from tcl_hf.models.processing_tcl import TCLProcessor


def image(content: bytes) -> dict:
    return {"bytes": content, "path": None}


RECORDS = [
    {"image": image(png(0)), "captions": ["a red door", "a door"], "image_id": "a"},
    {"image": image(png(0)), "captions": ["A red door."], "image_id": "b"},
    {"image": image(encoded(photo(), "JPEG")), "captions": ["a door " * 20], "image_id": "c"},
    {"image": image(encoded(Image.new("L", (7, 9)), "PNG")), "captions": ["красная дверь"], "image_id": "d"},
    {"image": image(b"no image"), "captions": ["a door"], "image_id": "e"},
    {"image": image(b"none either"), "captions": ["a door"], "image_id": "f"},
    {"image": image(png(1)), "captions": ["...", ""], "image_id": "g"},
    {"image": None, "captions": ["a door"], "image_id": "h"},
]


def test_facts_are_those_of_the_samples():
    tokenizer = train_tokenizer(["a red door"] * 9)
    found = inspect(RECORDS, TCLProcessor(TCLImageProcessorPil(), tokenizer), progress=False)
    facts = found.to_dict(max_tokens=30)
    assert (facts["samples"], facts["looked_at"], facts["captions"]) == (8, 8, 5)
    assert facts["captions_per_image"] == {"min": 1, "median": 1, "max": 2}
    assert facts["width"] == {"min": 7, "median": 40, "max": 96} and facts["height"]["max"] == 80
    assert facts["modes"] == {"RGB": 3, "L": 1} and facts["formats"] == {"PNG": 3, "JPEG": 1}
    assert facts["tokens"]["max"] == 1 + 2 * 20 and facts["captions_cut"] == 1
    assert facts["same_images"] == 1 and found.same_images == [[0, 1]]
    assert facts["most_frequent_caption"]["times"] == 1  # "A red door." is another text
    assert set(facts["scripts"]) == {"LATIN", "CYRILLIC"} and found.unknown > 0.01
    assert sorted(facts["skipped"].values()) == [1, 1, 2]
    assert set(found.unusable) == {(4, "e"), (5, "f"), (6, "g"), (7, "h")}
    text = "\n".join(found.describe(max_tokens=30))
    assert "would be skipped: 4 of 8" in text and "row 4 (e), row 5 (f)" in text
    assert "1 of 5 captions are longer than max_tokens=30" in text and "unknown tokens: " in text


def test_large_data_is_looked_at_in_part():
    tokenizer = train_tokenizer(["a red door"])
    found = inspect(RECORDS, TCLProcessor(TCLImageProcessorPil(), tokenizer), max_samples=3, progress=False)
    assert list(found.looked_at) == [0, 3, 6]


def test_the_command_prints_facts_draws_samples_and_has_an_exit_code(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "photos.csv").write_text("Image;Caption\n0.png;a red door\n1.png;two cats\n2.png;a boat\n")
    sheet = tmp_path / "sheet.png"
    program.main(["data", str(tmp_path / "photos.csv"), "--samples", str(sheet)])
    out = capsys.readouterr().out
    assert "columns: image from 'Image', caption from 'Caption'\nsplits: train 3\nsamples: 3, " in out
    assert "would be skipped: 0 of 3" in out and Image.open(sheet).width > 500
    (tmp_path / "photos" / "1.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stopped:
        program.main(["data", str(tmp_path / "photos.csv"), "--json", "--samples", ""])
    facts = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 3 and sum(facts["skipped"].values()) == 1
    assert facts["columns"] == {"image": "Image", "caption": "Caption"} and facts["splits"] == {"train": 3}
    with pytest.raises(SystemExit, match=r"^error: \./nowhere cannot be read as data"):
        program.main(["data", "./nowhere"])
