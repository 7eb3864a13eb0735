"""Situations that people report in public threads, each with the value that is right."""

import base64
import json

import pytest
from helpers import encoded, photo, png, write_tar

from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.records import DataError


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def captions_of(source, **options) -> list[list[str]]:
    """The captions of records whose images can be read."""
    records = load_pairs(str(source), **options)
    for record in records:
        open_image(record["image"]).convert("RGB")
    return [record["captions"] for record in records]


def test_a_caption_that_is_one_text_is_not_taken_for_its_letters(folder):
    """github.com/salesforce/ALBEF/issues/72"""
    (folder / "r.json").write_text(json.dumps([{"image": "0.png", "caption": "a dog"}]))
    assert captions_of(folder / "r.json") == [["a dog"]]


def test_a_sample_of_a_tar_without_an_image_stays_to_be_skipped(folder):
    """github.com/mlfoundations/open_clip/pull/179"""
    write_tar(folder / "0.tar", [("a.jpg", png(0)), ("a.txt", b"a dog"), ("b.txt", b"none"), ("b.json", b"{}")])
    assert [record["image"] is None for record in load_pairs(str(folder / "0.tar"))] == [False, True]


def test_fields_of_a_tar_may_have_a_name_before_their_ending(folder):
    """github.com/mlfoundations/open_clip/issues/480"""
    files = [("s0.input.jpg", png(0)), ("s0.outputs.txt", b"a dog"), ("s1.input.jpg", png(1)), ("s1.outputs.txt", b"b")]
    write_tar(folder / "0.tar", files)
    assert captions_of(folder / "0.tar") == [["a dog"], ["b"]]


def test_two_images_of_a_sample_are_not_chosen_from(folder):
    """github.com/webdataset/webdataset/issues/20"""
    write_tar(folder / "0.tar", [("s.left.png", png(0)), ("s.right.png", png(1)), ("s.txt", b"a dog")])
    with pytest.raises(DataError, match=r"no image column among left.png, right.png, txt .* name it with image_column"):
        load_pairs(str(folder / "0.tar"))
    assert captions_of(folder / "0.tar", image_column="right.png") == [["a dog"]]


def test_captions_that_spell_a_missing_value_are_captions(folder):
    """github.com/huggingface/transformers/issues/28286"""
    (folder / "r.csv").write_text("image,caption\n0.png,None\n1.png,null\n2.png,NA\n")
    assert captions_of(folder / "r.csv") == [["None"], ["null"], ["NA"]]


def test_images_that_no_list_names_are_passed_over(folder):
    """github.com/Georgefwt/AquaLoRA/issues/8"""
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a dog"}\n')
    assert captions_of(folder) == [["a dog"]]


def test_a_list_beside_the_images_may_call_its_captions_prompts(folder):
    """github.com/huggingface/datasets/issues/6442"""
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "prompt": "a dog"}\n')
    assert captions_of(folder) == [["a dog"]]


def test_a_text_beside_each_image_is_its_caption(folder):
    """github.com/webdataset/webdataset/issues/296"""
    (folder / "train").mkdir()
    for number in range(2):
        (folder / "train" / f"{number}.JPG").write_bytes(encoded(photo(), "JPEG"))
        (folder / "train" / f"{number}.txt").write_text(f"dog {number}\n", encoding="utf-8-sig")
    (folder / "train" / "notes.txt").write_text("not a caption")
    assert captions_of(folder) == [["dog 0\n"], ["dog 1\n"]]
    (folder / "train" / "1.txt").write_text("changed")
    assert captions_of(folder) == [["dog 0\n"], ["changed"]]


def test_paths_of_windows_are_found(folder):
    """github.com/AILab-CVC/YOLO-World/issues/535"""
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(png(5))
    (folder / "r.csv").write_text("image,caption\nimages\\a.png,a dog\n.\\0.png,b\n")
    assert captions_of(folder / "r.csv") == [["a dog"], ["b"]]


def test_images_in_base64_are_images(folder):
    """github.com/OFA-Sys/OFA/issues/42"""
    picture = base64.b64encode(encoded(photo(), "PNG")).decode()
    short = base64.b64encode(encoded(photo(4, 4), "PNG")).decode()
    (folder / "r.tsv").write_text(f"image\tcaption\n{picture}\ta dog\ndata:image/png;base64,{short}\tb\n")
    records = load_pairs(str(folder / "r.tsv"))
    assert [open_image(record["image"]).size for record in records] == [(96, 80), (4, 4)]
    assert all(len(record["image_id"]) < 300 for record in records)
    (folder / "bare.tsv").write_text(f"1\t10\ta dog\t\t{picture}\n" * 2)
    with pytest.raises(DataError, match="has no image column among 1, 10, a dog") as refused:
        load_pairs(str(folder / "bare.tsv"))
    assert len(str(refused.value)) < 800


def test_paths_of_another_machine_are_looked_for_beside_the_list(folder):
    """github.com/salesforce/LAVIS/issues/478"""
    (folder / "vg.json").write_text(json.dumps([{"image": "/export/share/vg/image/0.png", "caption": "a dog"}]))
    assert captions_of(folder / "vg.json") == [["a dog"]]


def test_files_of_a_sample_may_stand_apart_in_a_tar_and_its_last_copy_counts(folder):
    """github.com/webdataset/webdataset/issues/140 and 157"""
    write_tar(folder / "0.tar", [("0.png", png(0)), ("1.txt", b"one"), ("1.png", png(1)), ("0.txt", b"zero")])
    assert captions_of(folder / "0.tar") == [["zero"], ["one"]]
    write_tar(folder / "1.tar", [("0.png", png(0)), ("0.txt", b"first"), ("0.txt", b"last")])
    assert captions_of(folder / "1.tar") == [["last"]]
