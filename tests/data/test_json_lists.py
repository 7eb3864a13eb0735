"""JSON lists are read piece by piece, and their faults are reported with the row."""

import json

import pytest
from helpers import tiny_processor, write_json

from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import DataError, load_pairs
from tcl_hf.data.skipped import SkippedSamples


def test_bad_json_is_reported_in_one_sentence(tmp_path):
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="not a JSON list"):
        load_pairs(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match="not a list of objects"):
        load_pairs(write_json(tmp_path, {"image": 1}))
    with pytest.raises(DataError, match="holds no pairs"):
        load_pairs(write_json(tmp_path, []))


def test_a_list_loses_only_the_row_that_is_not_utf_8(pictures):
    rows = b'[{"image": "0.png", "caption": "caf\xe9"},\n {"image": "1.png", "caption": ["caf\xc3\xa9"]}]'
    (pictures / "latin.json").write_bytes(rows)
    records = list(load_pairs(str(pictures / "latin.json")))
    skipped = SkippedSamples(pictures / "skipped.jsonl")
    assert len(TCLPreTrainingCollator(tiny_processor(), skipped=skipped)(records)["input_ids"]) == 1
    assert "0.png: ValueError: a caption that is not UTF-8" in skipped.last
    assert records[1]["captions"] == ["café"]


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_a_long_list_is_read_piece_by_piece(pictures, monkeypatch, piece):
    """A piece may end anywhere: within a name, an escape sequence or white space."""
    rows = [{"image": f"{n}.png", "caption": [f'"{n}" \\ é', "ü"] if n % 2 else f"[{n}], {{}}"} for n in range(20)]
    monkeypatch.setattr("tcl_hf.data.json_lists._PIECE", piece)
    for indent in (None, 3):
        text = json.dumps(rows, indent=indent, ensure_ascii=indent is None)
        (pictures / "rows.json").write_text(f" \n{text}\n", encoding="utf-8")
        dataset = load_pairs(str(pictures / "rows.json"))
        captions = [row["caption"] if isinstance(row["caption"], list) else [row["caption"]] for row in rows]
        assert [record["captions"] for record in dataset] == captions
        assert dataset["image_id"] == [f"{n}.png" for n in range(20)]
    for broken, message in (
        (text[:-20], "row 20"),
        (text.replace("},", "}", 1), "after row 1 a comma"),
        ("[" + text, "see row 1"),
        ("[", "row 1"),
        ('[{"image": "0.png"}', "after row 1"),
    ):
        (pictures / "rows.json").write_text(broken)
        with pytest.raises(DataError, match=f"not a.* list.*{message}"):
            load_pairs(str(pictures / "rows.json"))
