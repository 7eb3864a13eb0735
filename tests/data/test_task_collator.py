"""Batches of the tasks: statements, questions and answers, images that several texts share."""

import pytest
import torch
from datasets import Dataset
from helpers import (
    picture,
    questions,
    statements,
    tiny_processor,
    tiny_records,
)

from tcl_hf.data.collators import TCLPreTrainingCollator, TCLTaskCollator, image_number
from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import DataError
from tcl_hf.data.sampling import SharedImages


def test_a_batch_of_statements_has_labels_by_name():
    processor = tiny_processor()
    collator = TCLTaskCollator(processor, label2id={"no": 0, "yes": 1})
    batch = collator(statements(("yes", "no"), 3))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    expected = processor(images=[open_image(picture(0))], return_tensors="pt")
    assert torch.equal(batch["pixel_values"][0], expected["pixel_values"][0])


def test_two_images_are_stacked_side_by_side():
    batch = TCLTaskCollator(tiny_processor(), label2id={"True": 1, "False": 0})(statements(("True",), 2, images=2))
    assert batch["pixel_values"].shape == (2, 2, 3, 32, 32)


def test_texts_about_the_same_image_share_it():
    """Where they come as one record, as from `SharedImages`, they get one view."""
    processor = tiny_processor()
    rows = questions(5)
    for row, source in ((1, 0), (4, 0)):
        rows[row] |= {"image": rows[source]["image"]}
    shared = SharedImages(Dataset.from_list(rows))
    assert [[r["question_id"] for r in item["records"]] for item in shared] == [["0", "1", "4"], ["2"], ["3"]]
    together, apart = (
        TCLTaskCollator(processor)(list(shared)),
        TCLTaskCollator(processor)([rows[i] for i in (0, 1, 4, 2, 3)]),
    )
    assert together.pop("image_index").tolist() == [0, 0, 0, 1, 2]
    assert torch.equal(together.pop("pixel_values"), apart.pop("pixel_values")[[0, 3, 4]])
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in apart)


def test_of_texts_that_share_an_image_a_bad_one_is_left_out_alone():
    rows = questions(3)
    rows[1] |= {"question": " ", "image": rows[0]["image"]}
    collator = TCLTaskCollator(tiny_processor())
    batch = collator(list(SharedImages(Dataset.from_list(rows))))
    assert len(batch["input_ids"]) == 2 and "image_index" not in batch
    assert collator.skipped.count == 1 and "no question" in collator.skipped.last


def test_a_label_of_another_spelling_is_refused_with_its_record():
    collator = TCLTaskCollator(tiny_processor(), label2id={"no": 0, "yes": 1}, empty_batches=True)
    with pytest.raises(DataError, match=r"Record 0 has the label 'maybe': the model knows no, yes"):
        collator(statements(("maybe",), 1))


def test_answers_weigh_by_how_often_they_were_given():
    processor = tiny_processor()
    batch = TCLTaskCollator(processor)(questions(3))
    assert batch["question_index"].tolist() == [0, 1, 1, 2, 2]
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([1.0, 0.5 * 2 / 3, 0.5 / 3, 2 / 3, 1 / 3]))
    rows = [[i for i in row if i != -100] for row in batch["labels"].tolist()]
    texts = processor.tokenizer.batch_decode(rows)
    assert texts == [f"[CLS] {a} [SEP]" for a in ("green", "red", "big cat", "red", "big cat")]


def test_questions_are_cleaned():
    processor = tiny_processor()
    batch = TCLTaskCollator(processor)(questions(2))
    expected = processor.tokenizer(["big dog", "what is the green near"], padding=True)["input_ids"]
    assert batch["input_ids"].tolist() == expected


def test_image_ids_are_equal_where_the_image_is():
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0, with_image_ids=True)
    rows = tiny_records(3)
    batch = collator([rows[0], rows[1], rows[0]])
    ids = batch["image_ids"].tolist()
    assert ids[0] == ids[2] != ids[1] and min(ids) >= 0
    assert image_number(None) == -100


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"answers": []}, "no answer"), ({"question": " "}, "no question"), ({"image": None}, "no image")],
)
def test_what_can_not_be_asked_is_left_out_and_listed(change, reason):
    collator = TCLTaskCollator(tiny_processor())
    rows = questions(3)
    rows[1] |= change
    batch = collator(rows)
    assert len(batch["input_ids"]) == 2 and collator.skipped.count == 1
    assert reason in collator.skipped.last
