"""Classes and their scores equal those of a plain loop over records."""

import pytest
import torch
from helpers import statements, tiny

from tcl_hf import TCLForVisualEntailment, TCLForVisualReasoning, TCLModel
from tcl_hf.data.collators import TCLTaskCollator
from tcl_hf.evaluation.classes import evaluate_classes


def test_neighbours_about_one_image_are_evaluated_together_with_the_same_result(monkeypatch):
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    for row in (1, 2, 4):
        rows[row] |= {"images": rows[row - 1]["images"]}
    encoded = []
    encode = TCLModel.encode_image
    monkeypatch.setattr(TCLModel, "encode_image", lambda self, p, **k: encoded.append(len(p)) or encode(self, p, **k))
    found = evaluate_classes(model, processor, rows, batch_size=5)
    assert encoded == [2 * 2, 2]  # rows 0 to 2, and 3 and 4; row 5
    for row, prediction in zip(rows, found.predictions, strict=True):
        with torch.no_grad():
            shares = model(**TCLTaskCollator(processor)([row])).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)


def test_classes_equal_a_plain_loop_and_are_scored():
    model, processor = tiny(TCLForVisualEntailment)
    rows = statements(("entailment", "neutral", "contradiction"), 7)
    found = evaluate_classes(model.train(), processor, rows, batch_size=3)
    assert model.training
    model.eval()
    for row, prediction in zip(rows, found.predictions, strict=True):
        batch = TCLTaskCollator(processor)([row])
        with torch.no_grad():
            shares = model(**batch).logits.softmax(-1)[0]
        assert prediction["label"] == model.config.id2label[int(shares.argmax())]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)
    right = sum(row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True))
    assert found.metrics["accuracy"] == pytest.approx(100 * right / 7)
    assert found.metrics["most_frequent_label"] == pytest.approx(100 * 3 / 7)


def test_two_image_reasoning_is_scored_by_sentence_too():
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    found = evaluate_classes(model, processor, rows)
    right = [row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True)]
    whole = [right[i] and right[i + 1] for i in (0, 2, 4)]
    assert found.metrics["consistency"] == pytest.approx(100 * sum(whole) / 3)


def test_own_identifiers_leave_out_the_consistency_and_nothing_else(caplog):
    model, processor = tiny(TCLForVisualReasoning)
    rows = [
        row | {"pair_id": f"mine/{number}"} for number, row in enumerate(statements(("True", "False"), 6, images=2))
    ]
    found = evaluate_classes(model, processor, rows)
    assert "accuracy" in found.metrics and "consistency" not in found.metrics and len(found.predictions) == 6
    assert "6 identifiers are not of NLVR2's form split-set-pair-sentence, the first of them 'mine/0'" in caplog.text
