"""Rows of JSON files: a broken one is named with its number."""

import pytest

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.pairs import DataError


def test_bad_json_lines_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "1", "sentence": "a", "label": "neutral"}\n\n{"image": \n')
    with pytest.raises(DataError, match=r"rows.jsonl, row 3: this line is not JSON"):
        load_entailment(str(file))
    file.write_text('{"image": ')
    with pytest.raises(DataError, match=r"rows.jsonl could not be read as a JSON list or JSON lines"):
        load_entailment(str(file))
