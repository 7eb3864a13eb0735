"""The samples of WebDataset tars."""

import pytest
from helpers import encoded, png, write_tar
from PIL import Image

from tcl_hf.data.pairs import DataError, load_pairs


def test_the_samples_of_a_tar_may_lack_files_or_have_others(tmp_path):
    files = [
        ("a/0.txt", b"text 0"),  # This sample has no image.
        ("a/1.PNG", png(1)),
        ("a/1.txt", b"text 1"),
        ("a/1.cls", b"7"),
        ("README", b"no sample"),
        ("a/2.gif", encoded(Image.new("RGB", (4, 4)), "GIF")),
        ("a/2.json", b'{"caption": "text 2", "width": null}'),
        ("a/3.json", b"{"),
    ]
    write_tar(tmp_path / "0.tar", files)
    for streaming in (False, True):
        records = list(load_pairs(str(tmp_path), streaming=streaming))
        assert [record["image_id"] for record in records] == ["a/0", "a/1", "a/2", "a/3"]
        assert [record["captions"] for record in records] == [["text 0"], ["text 1"], ["text 2"], []]
        assert [record["image"] is not None for record in records] == [False, True, True, False]
    with pytest.raises(DataError, match=r"no caption column among cls, gif, json, png, txt .looked for text."):
        load_pairs(str(tmp_path), caption_column="text")
