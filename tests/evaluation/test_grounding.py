"""Grounding equals a plain loop over phrases, and the pipeline."""

import pytest
from helpers import phrases, tiny
from transformers import pipeline

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.data.images import open_image
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.inference.grounding import heat_point, matching_heat_map, similarity_heat_map


def test_grounding_equals_a_plain_loop_and_counts_phrases_with_boxes():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=2, batch_size=3)
    assert found.metrics["phrases"] == 4
    hits = 0
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=row["captions"][1], return_tensors="pt")
        maps = matching_heat_map(model, **inputs, layer=2)[0]
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        last = max(i for i, word in enumerate(words) if word == "dog")
        x, y = heat_point(maps[1 : last + 1].mean(0), image.size)
        assert prediction["point"] == [x, y]
        hits += 2 <= x <= 20 and 2 <= y <= 20
    assert found.metrics["pointing_accuracy"] == pytest.approx(100 * hits / 4)
    assert found.metrics["random_point"] == pytest.approx(100 * 18 * 18 / (40 * 30))


def test_grounding_by_similarity_reads_the_phrase_alone():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=0, batch_size=3, heat="similarity")
    assert found.metrics["phrases"] == 4
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=prediction["phrase"], return_tensors="pt")
        x, y = heat_point(similarity_heat_map(model, **inputs, layer=0)[0], image.size)
        assert prediction["point"] == [x, y]
    with pytest.raises(ValueError, match="heat='cold' does not exist"):
        evaluate_grounding(model, processor, rows, heat="cold")


@pytest.mark.parametrize("heat", ["matching", "similarity"])
def test_evaluation_and_pipeline_locate_a_phrase_at_the_same_point(heat):
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, heat=heat)
    assert len(found.predictions) == 4
    pipe = pipeline("visual-grounding", model=model, processor=processor, device="cpu")
    for row, prediction in zip(rows, found.predictions, strict=True):
        caption = row["captions"][1]
        located = pipe(open_image(row["image"]), caption, phrase=prediction["phrase"], heat=heat)
        assert prediction["point"] == list(located["point"])
        if row["proposals"]:
            image = open_image(row["image"])
            best = pipe(image, caption, phrase=prediction["phrase"], boxes=row["proposals"], heat=heat)["box"]
            assert prediction["box"] == list(best)


@pytest.mark.parametrize("heat", ["matching", "similarity"])
def test_phrases_that_the_model_does_not_read_are_not_counted(heat):
    """In matching a phrase behind the 30th word; in both a phrase that the clean-up deletes."""
    model, processor = tiny(TCLForImageTextRetrieval)
    (row,) = phrases(1)
    caption = row["captions"][1] + " a" * 30 + " red car!!"
    row["captions"][1] = caption
    found = row["phrases"][0]
    for phrase in ("red car", "!!"):
        start = caption.index(phrase, 60)
        row["phrases"].append(found | {"start": start, "end": start + len(phrase), "phrase_id": phrase})
    evaluated = evaluate_grounding(model, processor, [row], heat=heat)
    located = [prediction["phrase"] for prediction in evaluated.predictions]
    assert located[1:] == ([] if heat == "matching" else ["red car"])
    assert evaluated.metrics["phrases"] == len(located)


def test_boxes_follow_an_image_that_was_resized_and_other_proportions_are_refused():
    model, processor = tiny(TCLForImageTextRetrieval)
    records = phrases()
    expected = evaluate_grounding(model, processor, records)
    for record in records:  # The boxes were drawn on an image twice as large.
        with open_image(record["image"]) as image:
            width, height = image.size
        record |= {"width": 2 * width, "height": 2 * height}
        for phrase in record["phrases"]:
            phrase["boxes"] = [[2 * edge for edge in box] for box in phrase["boxes"]]
        record["proposals"] = [[2 * edge for edge in box] for box in record["proposals"]]
    found = evaluate_grounding(model, processor, records)
    assert found.metrics == expected.metrics and found.predictions == expected.predictions
    records[1]["height"] *= 2
    with pytest.raises(ValueError, match=r"^The image 1 has \d+ x \d+ pixels, but its boxes were drawn on \d+ x \d+"):
        evaluate_grounding(model, processor, records)
