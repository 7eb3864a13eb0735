"""Zero-shot classification equals a plain loop, transformers' pipeline, and matrices counted by hand."""

import math

import pytest
import torch
from helpers import labelled, tiny
from transformers import pipeline

from tcl_hf import TCLForImageTextRetrieval, TCLModel
from tcl_hf.data.images import open_image
from tcl_hf.evaluation.zero_shot import (
    best_classes,
    class_features,
    classification_metrics,
    encode_classes,
    evaluate_zero_shot,
    fill_templates,
)

CLASSES = ["red dog", "big cat", "house near the tree", "car", "small photo", "blue"]
TEMPLATES = ["{}", "a photo of the {}", "a {} on a {}"]


@pytest.fixture(scope="module")
def model_and_processor():
    model, processor = tiny(TCLModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that images differ in their classes
    return model, processor


# Parts


def test_a_template_takes_the_name_wherever_it_has_a_place():
    assert fill_templates(TEMPLATES, "car {1}") == ["car {1}", "a photo of the car {1}", "a car {1} on a car {1}"]


def test_a_class_has_the_normalised_mean_of_its_texts():
    texts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.6, 0.8]]])  # 2 classes, 2 texts, 2 numbers
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.6, 0.8]])
    torch.testing.assert_close(class_features(texts), expected, rtol=0, atol=1e-6)


def test_probabilities_are_a_softmax_of_cosines_over_the_temperature():
    images, classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    scores, numbers = best_classes(images, classes, torch.tensor(0.5))
    assert numbers.tolist() == [[1, 0], [0, 1]]
    by_hand = [[1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(1.2))], [1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(0.4))]]
    torch.testing.assert_close(scores, torch.tensor(by_hand), rtol=0, atol=1e-6)


def test_five_classes_are_ranked_at_most():
    classes = torch.nn.functional.normalize(torch.arange(1.0, 8.0)[:, None] * torch.tensor([[0.0, 1.0]]) + 1, dim=-1)
    _, numbers = best_classes(torch.tensor([[0.0, 1.0]]), classes, torch.tensor(1.0))
    assert numbers.tolist() == [[6, 5, 4, 3, 2]]  # the steeper, the more similar


def test_metrics_counted_by_hand():
    ranked = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    labels = torch.tensor([0, 0, 0, 5])
    assert classification_metrics(ranked, labels, num_classes=6) == pytest.approx(
        {"top1": 50, "top5": 75, "mean_per_class": 100 * (1 / 3 + 1) / 2, "most_frequent_label": 75}
    )


@pytest.mark.parametrize("num_classes", [4, 5])
def test_top5_is_left_out_where_it_must_be_100(num_classes):
    ranked = torch.arange(num_classes)[None]
    metrics = classification_metrics(ranked, torch.tensor([0]), num_classes)
    assert list(metrics) == ["top1", "mean_per_class", "most_frequent_label"]


# The evaluator


def test_it_equals_a_plain_loop(model_and_processor):
    model, processor = model_and_processor
    records = labelled(CLASSES, 8)
    found = evaluate_zero_shot(model.train(), processor, records, CLASSES, TEMPLATES, batch_size=5)
    assert model.training
    model.eval()
    features = []
    with torch.no_grad():
        for name in CLASSES:
            texts = [template.replace("{}", name) for template in TEMPLATES]
            of_texts = [model(**processor(text=[text], return_tensors="pt")).text_embeds[0] for text in texts]
            mean = sum(of_texts) / len(of_texts)
            features.append(mean / mean.norm())
        right = []
        for record, prediction in zip(records, found.predictions, strict=True):
            pixels = processor(images=[open_image(record["image"]).convert("RGB")], return_tensors="pt")
            image = model(**pixels).image_embeds[0]
            shares = (torch.stack(features) @ image / model.temperature).softmax(-1)
            expected = sorted(zip(shares.tolist(), CLASSES, strict=True), reverse=True)
            assert list(prediction["scores"]) == [name for _, name in expected[:5]]
            assert prediction["label"] == expected[0][1] and prediction["image_id"] == record["image_id"]
            assert list(prediction["scores"].values()) == pytest.approx([share for share, _ in expected[:5]], abs=1e-5)
            right.append([name for _, name in expected].index(record["label"]))
    assert found.metrics["top1"] == pytest.approx(100 * sum(rank < 1 for rank in right) / 8)
    assert found.metrics["top5"] == pytest.approx(100 * sum(rank < 5 for rank in right) / 8)
    assert found.metrics["most_frequent_label"] == pytest.approx(100 * 2 / 8)


def test_it_equals_the_pipeline_of_transformers(model_and_processor):
    """With one template, classes, order and probabilities are the same."""
    model, processor = model_and_processor
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    pipe = pipeline("zero-shot-image-classification", model=model, device="cpu", **parts)
    records, template = labelled(CLASSES[:5], 4), "a photo of the {}"
    images = [open_image(record["image"]).convert("RGB") for record in records]
    expected = pipe(images, candidate_labels=CLASSES[:5], hypothesis_template=template)
    found = evaluate_zero_shot(model, processor, records, CLASSES[:5], [template])
    assert len({prediction["label"] for prediction in found.predictions}) > 1
    for prediction, of_image in zip(found.predictions, expected, strict=True):
        assert list(prediction["scores"]) == [one["label"] for one in of_image]
        assert list(prediction["scores"].values()) == pytest.approx([one["score"] for one in of_image], abs=1e-6)


def test_a_head_gives_the_result_of_the_model_within_it():
    head, processor = tiny(TCLForImageTextRetrieval)
    records = labelled(CLASSES)
    found = evaluate_zero_shot(head, processor, records, CLASSES)
    assert found == evaluate_zero_shot(head.tcl, processor, records, CLASSES)


def test_features_of_classes_do_not_depend_on_the_size_of_batches(model_and_processor):
    model, processor = model_and_processor
    whole = encode_classes(model, processor, CLASSES, TEMPLATES)
    assert whole.shape == (6, 16)
    torch.testing.assert_close(encode_classes(model, processor, CLASSES, TEMPLATES, 4), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], TEMPLATES, "There are no classes: give their names"),
        (CLASSES, [], "There are no templates: give at least one"),
        (CLASSES, ["{}", "a photo"], r"the template 'a photo' has no \{\}: write it where the name"),
        (CLASSES[1:], TEMPLATES, "Record 0 has the label 'red dog', which is not among the 5 classes: add it"),
    ],
)
def test_bad_input_is_refused(model_and_processor, classes, templates, message):
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(*model_and_processor, labelled(CLASSES), classes, templates)
