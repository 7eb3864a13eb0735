"""Texts, images and indices that do not belong together are refused: they would give wrong scores without an error."""

import pytest
import torch
from helpers import small_patches, training_batch

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)

TEXTS = training_batch(4)["input_ids"]  # (4, 7)
MASK = torch.ones_like(TEXTS)
IMAGES = training_batch(4)["pixel_values"]
UNEVEN = "4 texts about 3 images, which cannot be shared out evenly"


@pytest.fixture(scope="module", params=["train", "eval"])
def models(request):
    """A tiny model of any class, opened once."""
    built: dict = {}

    def model(cls):
        if cls not in built:
            built[cls] = cls(small_patches()).train(request.param == "train")
        return built[cls]

    return model


def states(model, number: int):
    return model.tcl.encode_image(IMAGES[:number]), model.tcl.encode_text(TEXTS, MASK)


def test_four_texts_and_three_images_are_refused_without_an_index(models):
    model = models(TCLForImageTextRetrieval)
    image_states, text_states = states(model, 3)
    with pytest.raises(ValueError, match=UNEVEN):
        model.match(text_states, MASK, image_states)
    with pytest.raises(ValueError, match=UNEVEN):
        model.tcl.fuse(text_states, MASK, image_states)
    with pytest.raises(ValueError, match=UNEVEN):
        model.tcl.text_model.fuse(text_states, MASK, model.tcl.text_model.project_images(image_states))
    with pytest.raises(ValueError, match=UNEVEN):
        model.tcl.text_model(TEXTS, MASK, encoder_hidden_states=image_states)
    with pytest.raises(ValueError, match=UNEVEN):
        models(TCLForMaskedLM)(TEXTS, IMAGES[:3], MASK)
    decoder = models(TCLForQuestionAnswering).text_decoder
    with pytest.raises(ValueError, match=UNEVEN):
        decoder.decode(TEXTS, decoder.text_model.project_images(torch.zeros(3, 5, 32)))
    # Two neighbours share an image, which is right.
    assert model.match(text_states, MASK, image_states[:2]).shape == (4, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 2, 3], "image_index names number 3 of 3 images: choose numbers from 0 to 2"),
        ([0, 1, -1, 2], "image_index names number -1 of 3 images"),
        ([0, 1, 2], r"image_index \(3,\) must have one entry for each of 4 texts"),
        ([[0, 1, 2, 2]], r"image_index \(1, 4\) must have one entry for each of 4 texts"),
    ],
)
def test_an_index_names_images_that_are_there(index, message, models):
    index = torch.tensor(index)
    model = models(TCLForImageTextRetrieval)
    image_states, text_states = states(model, 3)
    calls = [
        lambda: model.match(text_states, MASK, image_states, index),
        lambda: models(TCLForVisualEntailment)(TEXTS, IMAGES[:3], MASK, image_index=index),
        lambda: models(TCLForVisualReasoning)(TEXTS, IMAGES[:3, None].repeat(1, 2, 1, 1, 1), MASK, image_index=index),
        lambda: models(TCLForQuestionAnswering)(TEXTS, IMAGES[:3], MASK, image_index=index),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_text_index_names_texts_that_are_there(models):
    model = models(TCLForImageTextRetrieval)
    image_states, text_states = states(model, 3)
    rows = torch.tensor([0, 1, 2])
    assert model.match(text_states, MASK, image_states, rows, torch.tensor([3, 0, 0])).shape == (3, 2)
    with pytest.raises(ValueError, match="text_index names number 4 of 4 texts"):
        model.match(text_states, MASK, image_states, rows, torch.tensor([4, 0, 0]))
    with pytest.raises(ValueError, match=r"image_index \(3,\) must have one entry for each of 2 texts"):
        model.match(text_states, MASK, image_states, rows, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="5 texts about 3 images"):
        model.match(text_states, MASK, image_states, text_index=torch.tensor([0, 1, 2, 3, 0]))


def test_two_images_are_named_among_those_that_are_there(models):
    model, rows = models(TCLForTextAssignment), torch.arange(4)
    labels = torch.zeros(4, dtype=torch.long)
    for first, second, message in (
        (rows, rows - 1, "second_image_index names number -1 of 4 images"),
        (rows + 1, rows, "first_image_index names number 4 of 4 images"),
        (rows[:3], rows, r"first_image_index \(3,\) must have one entry for each of 4 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            model(TEXTS, IMAGES, MASK, first, second, labels)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_other_texts_is_refused(rows, models):
    for cls in (TCLForImageTextRetrieval, TCLForMaskedLM, TCLForVisualEntailment, TCLForQuestionAnswering):
        with pytest.raises(ValueError, match="attention_mask"):
            models(cls)(TEXTS, IMAGES, MASK[:rows])
    with pytest.raises(ValueError, match=r"attention_mask \(4, 6\) does not belong to texts \(4, 7\)"):
        models(TCLForMaskedLM)(TEXTS, IMAGES, MASK[:, 1:])


@pytest.mark.parametrize(
    "name", ["attention_mask", "pixel_values_augmented", "image_ids", "mlm_input_ids", "mlm_labels", "mlm_positions"]
)
def test_a_batch_has_a_row_of_everything_for_each_pair(name, models):
    batch = training_batch(4) | {"image_ids": torch.arange(4), "mlm_positions": torch.ones(4, 1, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"^{name} has 1 rows, but there are 4 pairs"):
        models(TCLForPreTraining)(**batch | {name: batch[name][:1]})


def test_answers_have_questions_weights_and_masks(models):
    model = models(TCLForQuestionAnswering)
    answers = {"labels": TEXTS[:2]}
    with pytest.raises(ValueError, match="question_index names number 4 of 4 questions"):
        model(TEXTS, IMAGES, MASK, **answers, question_index=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="answer_weights has 1 entries for 2 answers"):
        model(TEXTS, IMAGES, MASK, **answers, question_index=torch.tensor([0, 3]), answer_weights=torch.ones(1))
    with pytest.raises(ValueError, match=r"shapes \(4, 7\) and \(2, 7\)"):
        model.rank_answers(TEXTS, IMAGES, TEXTS, MASK[:2])


def test_states_of_other_numbers_of_images_are_refused(models):
    text_model = models(TCLForVisualReasoning).tcl.text_model
    images = models(TCLForVisualReasoning).tcl.encode_image(IMAGES)
    with pytest.raises(ValueError, match="sets of 2 and 4 images: pass equally many"):
        text_model(TEXTS, MASK, encoder_hidden_states=(images, images[:2]))
