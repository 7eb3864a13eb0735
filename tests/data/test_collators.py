"""Batches: masked tokens and views for pre-training, questions, labels and answers for the tasks."""

import io

import pytest
import torch
from datasets import Dataset
from helpers import picture, png, questions, statements, tiny_processor, tiny_records
from PIL import Image

from tcl_hf.data.collators import TCLPreTrainingCollator, TCLTaskCollator, image_number, mask_tokens, masked_positions
from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import DataError
from tcl_hf.data.sampling import SharedImages, Visit
from tcl_hf.data.skipped import SkippedSamples

# Pre-training


def test_masking_rule_case_by_case():
    input_ids = torch.tensor([[2, 10, 11, 12, 13, 0]])
    maskable = torch.tensor([[False, True, True, True, True, False]])
    uniform = torch.tensor([[[0.0, 0.0], [0.14, 0.79], [0.14, 0.85], [0.14, 0.95], [0.16, 0.0], [0.0, 0.0]]])
    random_ids = torch.full((1, 6), 77)
    masked, labels = mask_tokens(input_ids, maskable, 0.15, 4, uniform, random_ids)
    assert masked.tolist() == [[2, 4, 77, 12, 13, 0]]
    assert labels.tolist() == [[-100, 10, 11, 12, -100, -100]]


def test_masking_frequencies():
    """200,000 tokens: the shares are within four standard deviations of 15 %, and of 80, 10 and 10 % of these."""
    torch.manual_seed(0)
    number = 200_000
    input_ids = torch.full((1, number), 5)
    uniform, random_ids = torch.rand(1, number, 2), torch.randint(100, 200, (1, number))
    masked, labels = mask_tokens(input_ids, torch.ones(1, number, dtype=torch.bool), 0.15, 4, uniform, random_ids)
    chosen = labels != -100
    assert abs(chosen.sum() - 0.15 * number) < 4 * (number * 0.15 * 0.85) ** 0.5
    total = int(chosen.sum())
    for share, count in ((0.8, masked == 4), (0.1, masked >= 100), (0.1, chosen & (masked == 5))):
        assert abs(count.sum() - share * total) < 4 * (total * share * (1 - share)) ** 0.5
    assert (masked[~chosen] == 5).all()


def test_masked_positions_list_every_label_once():
    labels = torch.full((3, 7), -100)
    labels[0, [1, 4, 6]] = 1
    labels[1, 2] = 1
    positions = masked_positions(labels, multiple_of=2)
    assert positions.tolist() == [[1, 4, 6, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]
    assert masked_positions(torch.full((2, 3), -100)).shape == (2, 3)  # The width is at most the length of the texts.
    assert (masked_positions(torch.full((2, 3), -100)) == -1).all()


def test_a_batch_has_everything_the_model_needs():
    processor = tiny_processor()
    records = tiny_records(6)
    records[0]["captions"] = ["dog " * 60]
    batch = TCLPreTrainingCollator(processor, max_tokens=25)(records)
    assert set(batch) == {
        *("pixel_values", "pixel_values_augmented", "input_ids", "attention_mask"),
        *("mlm_input_ids", "mlm_labels", "mlm_positions"),
    }
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert not torch.equal(batch["pixel_values"], batch["pixel_values_augmented"])
    assert batch["input_ids"].shape == (6, 25)
    assert (batch["input_ids"][:, 0] == processor.tokenizer.cls_token_id).all()
    assert processor.tokenizer.sep_token_id not in batch["input_ids"]
    special = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.tokenizer.cls_token_id)
    assert (batch["mlm_labels"][special] == -100).all()
    chosen = batch["mlm_labels"] != -100
    assert (batch["mlm_labels"][chosen] == batch["input_ids"][chosen]).all()
    assert (batch["mlm_input_ids"][~chosen] == batch["input_ids"][~chosen]).all()


def test_without_a_second_view_and_masking_a_batch_has_neither():
    batch = TCLPreTrainingCollator(tiny_processor(), two_views=False, mlm_probability=0.0)(tiny_records(2))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}


def test_random_choices_follow_from_the_visit_and_leave_the_global_generator_alone():
    collator = TCLPreTrainingCollator(tiny_processor())
    records = [{**record, "visit": Visit(0, 0, n)} for n, record in enumerate(tiny_records(4))]
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = collator(records)
    assert torch.equal(torch.rand(3), expected_next)
    torch.manual_seed(6)
    second = collator(records)
    assert all(torch.equal(first[name], second[name]) for name in first)
    later = collator([{**record, "visit": Visit(0, 1, n)} for n, record in enumerate(tiny_records(4))])
    assert not torch.equal(first["pixel_values"], later["pixel_values"])


def test_every_usable_caption_is_chosen_at_some_time():
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0.0)
    record = {"image": {"bytes": png(0)}, "captions": ["dog", "cat", "", "house"]}
    torch.manual_seed(0)
    texts = {
        collator.processor.tokenizer.decode(collator([record])["input_ids"][0], skip_special_tokens=True)
        for _ in range(40)
    }
    assert texts == {"dog", "cat", "house"}


def test_an_open_image_of_the_caller_is_not_changed():
    file = io.BytesIO()
    Image.new("RGB", (800, 600)).save(file, "JPEG")
    image = Image.open(file)
    TCLPreTrainingCollator(tiny_processor())([{"image": image, "captions": ["a dog"]}])
    assert image.size == (800, 600)
    image.load()


def test_image_ids_are_equal_where_the_image_is():
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0, with_image_ids=True)
    rows = tiny_records(3)
    batch = collator([rows[0], rows[1], rows[0]])
    ids = batch["image_ids"].tolist()
    assert ids[0] == ids[2] != ids[1] and min(ids) >= 0
    assert image_number({}) == -100


def test_images_are_told_apart_by_their_content_and_not_by_numbers_that_begin_anew(tmp_path):
    """Two sources count from 0, two folders have files of one name, and a picture stands under two ids."""
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0, with_image_ids=True)
    rows = [
        {"image": picture(0), "captions": ["a dog"], "image_id": "0"},
        {"image": picture(1), "captions": ["a cat"], "image_id": "0"},
        {"image": picture(0), "captions": ["one dog"], "image_id": "7"},
        {"image": picture(2) | {"path": "a.png"}, "captions": ["a bird"], "image_id": "1"},
        {"image": picture(3) | {"path": "a.png"}, "captions": ["a fish"], "image_id": "1"},
    ]
    ids = collator(rows)["image_ids"].tolist()
    assert ids[0] == ids[2] and len(set(ids)) == 4
    groups = [item["records"] for item in SharedImages(Dataset.from_list(rows))]
    assert [[record["captions"][0] for record in group] for group in groups] == [
        ["a dog", "one dog"],
        ["a cat"],
        ["a bird"],
        ["a fish"],
    ]


def test_a_batch_of_bad_samples_is_empty(pictures):
    collator = TCLPreTrainingCollator(tiny_processor()).for_run(SkippedSamples())
    bad = [{"image": None, "captions": ["a"], "image_id": 5}, {"captions": None}, {"image": b"x", "captions": [None]}]
    assert collator(bad) == {}
    with pytest.raises(DataError, match="No sample of a batch could be used; the last: 5: ValueError: no image"):
        TCLPreTrainingCollator(tiny_processor())(bad[:1])


# Tasks


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
    """Records that come as one, as `SharedImages` gives them, get one view."""
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


def test_only_the_bad_one_of_the_texts_that_share_an_image_is_left_out():
    rows = questions(3)
    rows[1] |= {"question": " ", "image": rows[0]["image"]}
    collator = TCLTaskCollator(tiny_processor())
    batch = collator(list(SharedImages(Dataset.from_list(rows))))
    assert len(batch["input_ids"]) == 2 and "image_index" not in batch
    assert collator.skipped.count == 1 and "no question" in collator.skipped.last


def test_a_label_of_another_spelling_is_refused_with_its_record():
    collator = TCLTaskCollator(tiny_processor(), label2id={"no": 0, "yes": 1}).for_run(SkippedSamples())
    with pytest.raises(DataError, match=r"Record 0 has the label 'maybe', but the model has the classes no, yes"):
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"answers": []}, "no answer"), ({"question": " "}, "no question"), ({"image": None}, "no image")],
)
def test_an_unusable_question_is_left_out_and_listed(change, reason):
    collator = TCLTaskCollator(tiny_processor())
    rows = questions(3)
    rows[1] |= change
    batch = collator(rows)
    assert len(batch["input_ids"]) == 2 and collator.skipped.count == 1
    assert reason in collator.skipped.last
