"""Sources of annotations: those without any records are named."""

import pytest
from helpers import write_json

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.pairs import DataError


def test_a_source_without_records_is_named(tmp_path):
    with pytest.raises(DataError, match=r"rows.json holds no records in its split 'dev'"):
        load_entailment(write_json(tmp_path, []), "dev")
    with pytest.raises(DataError, match="No data was named"):
        load_entailment([])
