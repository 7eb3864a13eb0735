"""Flickr30k Entities: images with captions, phrases and boxes become records, and errors name the file."""

import shutil

import pytest
from helpers import ANNOTATIONS, image_at

from tcl_hf.data.annotations.phrases import load_phrases
from tcl_hf.data.pairs import DataError


def test_flickr30k_entities_images_become_records():
    folder = ANNOTATIONS / "flickr30k_entities"
    boys, both = [0, 19, 100, 375], [89, 199, 500, 300]
    assert list(load_phrases(str(folder), image_root="flickr30k")) == [
        {
            "image": image_at("flickr30k/1001.jpg"),
            "captions": ["Two boys carry a small boat that leaks .", "They are in the harbour ."],
            "image_id": "1001",
            "phrases": [
                {
                    "caption_index": 0,
                    "start": 0,
                    "end": 8,
                    "types": ["people"],
                    "boxes": [boys, both],
                    "phrase_id": "12",
                },
                {
                    "caption_index": 0,
                    "start": 15,
                    "end": 27,
                    "types": ["vehicles", "other"],
                    "boxes": [both],
                    "phrase_id": "13",
                },
                {"caption_index": 0, "start": 28, "end": 32, "types": ["notvisual"], "boxes": [], "phrase_id": "0"},
                {
                    "caption_index": 1,
                    "start": 0,
                    "end": 4,
                    "types": ["people"],
                    "boxes": [boys, both],
                    "phrase_id": "12",
                },
                {"caption_index": 1, "start": 12, "end": 23, "types": ["scene"], "boxes": [], "phrase_id": "14"},
            ],
            "proposals": [],
            "width": 500,
            "height": 375,
        }
    ]


def test_faults_in_flickr30k_entities_are_named(tmp_path):
    folder = tmp_path / "entities"
    shutil.copytree(ANNOTATIONS / "flickr30k_entities", folder)
    with pytest.raises(DataError, match=r"1003.xml could not be read"):
        load_phrases(str(folder), "validation")
    with pytest.raises(DataError, match=r"has no test.txt"):
        load_phrases(str(folder), "test")
    (folder / "Annotations" / "1003.xml").write_text("<annotation><size><width>9</width></size></annotation>")
    with pytest.raises(DataError, match=r"1003.xml could not be read"):
        load_phrases(str(folder), "val")
    xml = (folder / "Annotations" / "1001.xml").read_text()
    (folder / "Annotations" / "1003.xml").write_text(xml.replace("<xmax>500<", "<xmax>502<"))
    with pytest.raises(DataError, match=r"1003.txt is missing: val.txt names it"):
        load_phrases(str(folder), "val")
    shutil.copy(folder / "Sentences" / "1001.txt", folder / "Sentences" / "1003.txt")
    with pytest.raises(
        DataError, match=r"val.txt, row 1: its box \[89.0, 199.0, 502.0, 300.0\] lies outside of the image"
    ):
        load_phrases(str(folder), "val")
    (folder / "Sentences" / "1003.txt").write_text("A dog .\n[/EN#people Two boys] run .\n")
    with pytest.raises(
        DataError, match=r"1003.txt, row 2: a phrase does not have the form '\[/EN#12/people Two boys\]'"
    ):
        load_phrases(str(folder), "val")
