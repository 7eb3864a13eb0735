"""The pipelines equal the models called step by step, singly and in batches, and their errors name the fault."""

import base64
import io

import pytest
import torch
from helpers import png, small_patches, tiny_processor
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForVisualQuestionAnswering, AutoTokenizer, pipeline
from transformers.pipelines import PipelineException

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLImageProcessor,
    TCLModel,
    TCLProcessor,
    TCLTokenizer,
)
from tcl_hf.inference.grounding import (
    box_from_heat_map,
    box_scores,
    draw_heat_map,
    heat_point,
    matching_heat_map,
    phrase_tokens,
    similarity_heat_map,
    sliding_boxes,
)
from tcl_hf.models.processing_tcl import MAX_QUESTION_TOKENS
from tcl_hf.models.tokenization_tcl import clean_caption

# It has the image processor that transformers chooses when it opens a folder.
PROCESSOR = TCLProcessor(TCLImageProcessor(size={"height": 32, "width": 32}), tiny_processor().tokenizer)
TEXTS = ["a red dog runs", "The cat, near the (big) house!", "a photo of the small blue car on the tree"]


def picture(color: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.open(io.BytesIO(png(color, size))).convert("RGB")


IMAGES = [picture(color) for color in range(3)]


def saved(folder, model_class, seed: int = 0) -> str:
    """Save a tiny model, with weights large enough for different outputs, and its processor."""
    torch.manual_seed(seed)
    tokenizer = PROCESSOR.tokenizer
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    model = model_class(small_patches(text_config={"vocab_size": len(tokenizer), **ids}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    classes = (
        TCLForPreTraining,
        TCLForImageTextRetrieval,
        TCLForQuestionAnswering,
        TCLForVisualEntailment,
        TCLForVisualReasoning,
        TCLModel,
    )
    return {cls: saved(tmp_path_factory.mktemp(cls.__name__), cls) for cls in classes}


@pytest.fixture(scope="module")
def matching(folders):
    return pipeline("image-text-matching", model=folders[TCLForImageTextRetrieval], device="cpu")


@pytest.fixture(scope="module")
def answering(folders):
    return pipeline("visual-question-answering", model=folders[TCLForQuestionAnswering], device="cpu")


@pytest.fixture(scope="module")
def entailment(folders):
    return pipeline("visual-entailment", model=folders[TCLForVisualEntailment], device="cpu")


@pytest.fixture(scope="module")
def reasoning(folders):
    return pipeline("visual-reasoning", model=folders[TCLForVisualReasoning], device="cpu")


@pytest.fixture(scope="module")
def grounding(folders):
    return pipeline("visual-grounding", model=folders[TCLForPreTraining], device="cpu")


def pixels_of(image: Image.Image) -> torch.Tensor:
    return PROCESSOR(images=image, return_tensors="pt")["pixel_values"]


def tokens_of(text: str) -> dict[str, torch.Tensor]:
    return dict(PROCESSOR(text=[text], return_tensors="pt"))


def assert_same(found, expected, atol: float = 1e-5):
    """Nested results are equal, numbers and tensors within `atol`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value, atol)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, atol)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=atol)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    elif not isinstance(expected, Image.Image):
        assert found == expected


# Matching


@torch.no_grad()
def test_matching_equals_the_output_of_the_model_for_each_pair(matching, folders):
    model = TCLForImageTextRetrieval.from_pretrained(folders[TCLForImageTextRetrieval])
    results = matching(IMAGES[0], TEXTS)
    assert [result["text"] for result in results] == TEXTS
    for result in results:
        output = model(**tokens_of(result["text"]), pixel_values=pixels_of(IMAGES[0]))
        assert result["score"] == pytest.approx(output.itm_logits.softmax(-1)[0, 1].item(), abs=1e-5)
        cosine = (output.image_embeds * output.text_embeds).sum().item()
        assert result["similarity"] == pytest.approx(cosine, abs=1e-5)
    assert len({round(result["score"], 3) for result in results}) == 3


def test_one_text_gets_one_result_and_a_list_gets_a_list(matching):
    alone = matching({"image": IMAGES[0], "text": TEXTS[1]})
    assert alone.keys() == {"text", "score", "similarity"}
    assert_same(matching(IMAGES[0], [TEXTS[1]]), [alone])


def test_an_image_is_read_once_for_all_its_texts(matching, monkeypatch):
    read, projected = [], []
    encode_image, project_images = matching.model.tcl.encode_image, matching.model.tcl.text_model.project_images
    monkeypatch.setattr(
        matching.model.tcl, "encode_image", lambda pixels: read.append(len(pixels)) or encode_image(pixels)
    )
    monkeypatch.setattr(
        matching.model.tcl.text_model,
        "project_images",
        lambda states: projected.append(len(states)) or project_images(states),
    )
    matching(IMAGES[0], TEXTS)
    assert (read, projected) == ([1], [1])


def test_images_come_from_files_urls_of_data_and_pil_alike(matching, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(0))
    encoded = base64.b64encode(png(0)).decode()
    expected = matching(IMAGES[0], TEXTS[0])
    for image in (str(path), path, encoded, f"data:image/png;base64,{encoded}"):
        assert_same(matching(image, TEXTS[0]), expected, atol=0)
        assert_same(matching(images=image, text=TEXTS[0]), expected, atol=0)


# Kinds of input, and batches


class Records(Dataset):
    """Records as a data set of PyTorch."""

    def __init__(self, records: list[dict]):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number: int) -> dict:
        return self.records[number]


class Rows:
    """Records as a data set of the library `datasets`, which is neither a list nor a data set of PyTorch."""

    def __init__(self, records: list[dict]):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number: int) -> dict:
        return self.records[number]

    def __iter__(self):
        return iter(self.records)


MATCHING_RECORDS = [
    {"image": IMAGES[0], "text": TEXTS},
    {"image": IMAGES[1], "text": TEXTS[2]},
    {"image": IMAGES[2], "text": TEXTS[:2]},
]


def test_lists_generators_and_datasets_give_the_same(matching):
    expected = [matching(record) for record in MATCHING_RECORDS]
    assert isinstance(matching(MATCHING_RECORDS), list)
    for inputs in (
        MATCHING_RECORDS,
        (record for record in MATCHING_RECORDS),
        Records(MATCHING_RECORDS),
        Rows(MATCHING_RECORDS),
        iter(MATCHING_RECORDS),
    ):
        assert_same(list(matching(inputs, batch_size=2)), expected)


def test_worker_processes_give_the_same(matching):
    expected = [matching(record) for record in MATCHING_RECORDS]
    assert_same(matching(MATCHING_RECORDS, num_workers=1, batch_size=3), expected)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_equal_single_records(batch_size, matching, answering, entailment, reasoning, grounding, monkeypatch):
    boxes = [[0, 0, 10, 10], [5, 5, 30, 20.5]]
    questions = ["what is the dog?", "the big house near the small car?", "a cat"]
    cases = [
        (matching, MATCHING_RECORDS, {}),
        (answering, [{"image": i, "question": q} for i, q in zip(IMAGES, questions, strict=True)], {}),
        (
            answering,
            [{"image": i, "question": q} for i, q in zip(IMAGES, questions, strict=True)],
            {"candidates": ["a dog", "cat", "the red house"]},
        ),
        (entailment, [{"image": i, "text": t} for i, t in zip(IMAGES, TEXTS, strict=True)], {}),
        (reasoning, [{"images": [IMAGES[0], i], "text": t} for i, t in zip(IMAGES, TEXTS, strict=True)], {}),
        (
            grounding,
            [
                {"image": IMAGES[0], "text": TEXTS[0]},
                {"image": IMAGES[1], "text": TEXTS[1], "phrase": "(big) house", "boxes": boxes},
                {"image": picture(3, (24, 50)), "text": TEXTS[2], "phrase": (2, 7), "boxes": None},
            ],
            {"draw": True},
        ),
    ]
    for pipe, records, parameters in cases:
        expected = [pipe(record, **parameters) for record in records]
        assert_same(pipe(records, batch_size=batch_size, **parameters), expected)
    sizes = []
    forward = entailment.model.forward
    monkeypatch.setattr(
        entailment.model, "forward", lambda **inputs: sizes.append(len(inputs["input_ids"])) or forward(**inputs)
    )
    entailment(cases[3][1], batch_size=batch_size)
    assert sizes == {2: [2, 1], 3: [3]}[batch_size]


def test_images_and_texts_as_two_arguments_are_records(matching, entailment, reasoning):
    assert_same(matching(IMAGES[:2], TEXTS), [matching(image, TEXTS) for image in IMAGES[:2]])
    pairs = [entailment({"image": image, "text": text}) for image, text in zip(IMAGES, TEXTS, strict=True)]
    assert_same(entailment(IMAGES, TEXTS), pairs)
    assert_same(entailment(image=IMAGES, text=TEXTS), pairs)
    assert_same(entailment(IMAGES[0], TEXTS)[0], pairs[0])
    assert_same(entailment(IMAGES, TEXTS[2])[2], pairs[2])
    two = reasoning({"images": IMAGES[:2], "text": TEXTS[0]})
    assert_same(reasoning(images=IMAGES[:2], text=TEXTS[0]), two)
    assert_same(reasoning([IMAGES[:2], IMAGES[1:]], TEXTS[0])[0], two)
    with pytest.raises(ValueError, match="2 images and 3 texts cannot be paired"):
        entailment(IMAGES[:2], TEXTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for(dtype, folders, matching):
    pipe = pipeline("image-text-matching", model=folders[TCLForImageTextRetrieval], device="cpu", dtype=dtype)
    assert pipe.model.itm_head.weight.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_same(pipe(IMAGES[0], TEXTS), matching(IMAGES[0], TEXTS), tolerance)


def test_a_model_in_training_answers_as_in_eval_mode(folders, entailment):
    model = TCLForVisualEntailment.from_pretrained(folders[TCLForVisualEntailment]).train()
    pipe = pipeline("visual-entailment", model=model, processor=PROCESSOR, device="cpu")
    assert not model.training
    assert_same(pipe(IMAGES[0], TEXTS[0]), entailment(IMAGES[0], TEXTS[0]))


# Questions


def question_of(text: str) -> dict[str, torch.Tensor]:
    return dict(PROCESSOR.tokenizer([text], return_tensors="pt"))


def test_candidates_are_ranked_by_the_model(answering, folders):
    model = TCLForQuestionAnswering.from_pretrained(folders[TCLForQuestionAnswering])
    ids = PROCESSOR.tokenizer.convert_tokens_to_ids
    candidates = ["dog", "a red cat", "house"]
    rows = [["[CLS]", *answer.split(), "[SEP]"] for answer in candidates]
    padded = torch.tensor([ids(row + ["[PAD]"] * (5 - len(row))) for row in rows])
    ranked = model.rank_answers(
        **question_of("is the dog near the cats tree"),
        pixel_values=pixels_of(IMAGES[0]),
        candidate_ids=padded,
        candidate_mask=(padded != 0).long(),
        k=2,
    )
    expected = [
        {"answer": candidates[index], "score": score}
        for index, score in zip(ranked.indices[0].tolist(), ranked.probabilities[0].tolist(), strict=True)
    ]
    question = "Is the DOG near the cat's tree?"
    assert_same(answering(IMAGES[0], question, candidates=candidates, k=2), expected)
    assert_same(answering(image=IMAGES[0], question=question, candidates=candidates, k=2, top_k=1), expected[:1])
    assert len(answering(IMAGES[0], question, candidates=candidates)) == 3
    assert sum(answer["score"] for answer in answering(IMAGES[0], question, candidates=candidates)) == pytest.approx(1)


def test_candidates_may_be_given_once_for_all(folders, answering):
    pipe = pipeline(
        "visual-question-answering",
        model=folders[TCLForQuestionAnswering],
        candidates=["dog", "cat"],
        top_k=1,
        device="cpu",
    )
    record = {"image": IMAGES[0], "question": "what is on the tree?"}
    assert_same(pipe(record), answering(record, candidates=["dog", "cat"], top_k=1))


def test_without_candidates_the_model_generates_an_answer(answering, folders):
    model = TCLForQuestionAnswering.from_pretrained(folders[TCLForQuestionAnswering])
    inputs = {**question_of("what is near the house"), "pixel_values": pixels_of(IMAGES[1])}
    written = PROCESSOR.tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    assert answering({"image": IMAGES[1], "question": "What is near the house?"}) == [{"answer": written.strip()}]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    rows = model.generate(**inputs, **beams)
    several = answering([{"image": IMAGES[1], "question": "What is near the house?"}] * 2, batch_size=2, **beams)
    expected = [{"answer": PROCESSOR.tokenizer.decode(row, skip_special_tokens=True).strip()} for row in rows]
    assert several == [expected, expected]


def test_answers_are_not_cleaned_and_questions_are_cut_at_50_tokens(answering, monkeypatch):
    _, parameters, _ = answering._sanitize_parameters(candidates=["dog's", "dog"])
    ids, mask = parameters["candidates"]
    tokens = [PROCESSOR.tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert tokens[0][:2] == ["[CLS]", "dog"] and tokens[0][-1] == "[SEP]" and "[UNK]" in tokens[0]
    assert tokens[1][:3] == ["[CLS]", "dog", "[SEP]"] and set(tokens[1][3:]) == {"[PAD]"}
    assert mask.sum(1).tolist() == [len(tokens[0]), 3]
    long = {"image": IMAGES[0], "question": "dog " * 60}
    assert answering.preprocess(long)["input_ids"].shape == (1, 40)  # the model has 40 positions
    answering(long)
    monkeypatch.setattr(answering.model.config.text_config, "max_position_embeddings", 100)
    assert answering.preprocess(long)["input_ids"].shape == (1, MAX_QUESTION_TOKENS)


def test_the_auto_class_of_questions_opens_the_checkpoint(folders):
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folders[TCLForQuestionAnswering])
    assert type(model) is TCLForQuestionAnswering


# Entailment and reasoning


@torch.no_grad()
def test_labels_come_with_their_probabilities_best_first(entailment, folders):
    model = TCLForVisualEntailment.from_pretrained(folders[TCLForVisualEntailment])
    probabilities = model(**tokens_of(TEXTS[1]), pixel_values=pixels_of(IMAGES[1])).logits[0].softmax(-1)
    names = ["contradiction", "neutral", "entailment"]
    expected = [{"label": names[i], "score": probabilities[i].item()} for i in probabilities.argsort(descending=True)]
    assert_same(entailment({"image": IMAGES[1], "text": TEXTS[1]}), expected)
    assert_same(entailment({"image": IMAGES[1], "text": TEXTS[1]}, top_k=2), expected[:2])


@torch.no_grad()
def test_two_images_are_read_in_their_order(reasoning, folders):
    model = TCLForVisualReasoning.from_pretrained(folders[TCLForVisualReasoning])
    for pair in ([0, 1], [1, 0]):
        pixels = torch.stack([pixels_of(IMAGES[number])[0] for number in pair])[None]  # (1, 2, 3, height, width)
        probabilities = model(**tokens_of(TEXTS[0]), pixel_values=pixels).logits[0].softmax(-1)
        scores = {one["label"]: one["score"] for one in reasoning([IMAGES[i] for i in pair], TEXTS[0])}
        assert_same(scores, {"False": probabilities[0].item(), "True": probabilities[1].item()})


def test_entailment_opens_the_class_that_was_saved(folders, reasoning):
    pipe = pipeline("visual-entailment", model=folders[TCLForVisualReasoning], device="cpu")
    assert type(pipe.model) is TCLForVisualReasoning
    record = {"images": IMAGES[:2], "text": TEXTS[0]}
    assert_same(pipe(record), reasoning(record))


# Grounding


def heat_of(folders, text: str, tokens: torch.Tensor | None) -> torch.Tensor:
    """The mean of the maps of the marked tokens, or of all if None, summed token by token."""
    model = TCLForPreTraining.from_pretrained(folders[TCLForPreTraining])
    inputs = tokens_of(text)
    maps = matching_heat_map(model, inputs["input_ids"], inputs["attention_mask"], pixels_of(IMAGES[0]))[0]
    return sum(maps if tokens is None else maps[tokens]) / (len(maps) if tokens is None else int(tokens.sum()))


def test_grounding_of_a_phrase_is_that_of_its_tokens(grounding, folders):
    caption = "A Red dog, near the (small) house"
    tokens = phrase_tokens(PROCESSOR, caption, 2, 9)
    assert tokens.sum() == 2
    heat = heat_of(folders, caption, tokens)
    assert heat.max() > 0
    for phrase in ("red dog", (2, 9)):
        result = grounding({"image": IMAGES[0], "text": caption, "phrase": phrase}, draw=True)
        torch.testing.assert_close(result["heat_map"], heat, rtol=1e-4, atol=1e-7)
        box = box_from_heat_map(heat, IMAGES[0].size)
        assert result["box"] == box
        assert result["score"] == pytest.approx(box_scores(heat, [box], IMAGES[0].size).item(), rel=1e-4)
        assert result["point"] == heat_point(heat, IMAGES[0].size)
        assert result["drawn"].size == IMAGES[0].size
        expected = draw_heat_map(IMAGES[0], result["heat_map"], [box])
        assert result["drawn"].tobytes() == expected.tobytes()
    assert "drawn" not in grounding(IMAGES[0], caption, phrase="red dog")


@pytest.mark.parametrize("layer", [None, 0])
def test_grounding_by_similarity_reads_the_phrase_alone(grounding, folders, layer):
    model = TCLForPreTraining.from_pretrained(folders[TCLForPreTraining])
    inputs = tokens_of("red dog")
    asked = {} if layer is None else {"layer": layer}
    expected = similarity_heat_map(model, inputs["input_ids"], inputs["attention_mask"], pixels_of(IMAGES[0]), **asked)
    result = grounding(IMAGES[0], "A Red dog, near the house", phrase="red dog", heat="similarity", **asked)
    torch.testing.assert_close(result["heat_map"], expected[0], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="heat='cold' does not exist"):
        grounding(IMAGES[0], "red dog", heat="cold")


def test_the_best_of_candidate_boxes_is_chosen(grounding, folders):
    boxes = [[0, 0, 9, 9], [20, 10, 40, 30], [0, 0, 40, 30], [4.5, 3.25, 18, 22]]
    heat = heat_of(folders, TEXTS[0], None)
    scores = box_scores(heat, boxes, IMAGES[0].size)
    for given in (boxes, torch.tensor(boxes)):
        result = grounding(IMAGES[0], TEXTS[0], boxes=given)
        assert list(result["box"]) == boxes[int(scores.argmax())]
        assert result["score"] == pytest.approx(scores.max().item(), rel=1e-4)
    proposals = sliding_boxes(IMAGES[0].size)
    result = grounding(IMAGES[0], TEXTS[0], sliding=True)
    assert result["score"] == pytest.approx(box_scores(heat, proposals, IMAGES[0].size).max().item(), rel=1e-4)
    assert list(result["box"]) in proposals.tolist()
    assert_same(grounding(IMAGES[0], TEXTS[0], boxes=boxes, sliding=True)["box"], tuple(boxes[int(scores.argmax())]))


# Checkpoints


def test_a_pre_training_checkpoint_matches_and_leaves_its_teacher_behind(folders):
    pipe = pipeline("image-text-matching", model=folders[TCLForPreTraining], device="cpu")
    assert pipe.model.teacher is None and pipe.model.queue is None
    model = TCLForPreTraining.from_pretrained(folders[TCLForPreTraining])
    assert torch.equal(pipe.model.itm_head.weight, model.itm_head.weight)


def test_a_saved_pipeline_opens_again(matching, tmp_path):
    matching.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline("image-text-matching", model=str(tmp_path), device="cpu")
    assert_same(again(IMAGES[0], TEXTS), matching(IMAGES[0], TEXTS))


@pytest.mark.parametrize(
    ("task", "needed"),
    [
        ("image-text-matching", "TCLForImageTextRetrieval or TCLForPreTraining"),
        ("visual-grounding", "TCLForImageTextRetrieval or TCLForPreTraining"),
        ("visual-question-answering", "TCLForQuestionAnswering"),
        ("visual-entailment", "TCLForVisualEntailment or TCLForVisualReasoning"),
        ("visual-reasoning", "TCLForVisualReasoning"),
    ],
)
def test_a_checkpoint_without_the_heads_of_a_task_is_refused(task, needed, folders):
    sentence = f"{task} needs the heads of {needed}, but the model is TCLModel"
    with pytest.raises(PipelineException, match=sentence):
        pipeline(task, model=folders[TCLModel])
    with pytest.raises(PipelineException, match=sentence):
        pipeline(task, model=TCLModel(small_patches()), processor=PROCESSOR)


# Wrong input


@pytest.mark.parametrize(
    ("name", "record", "parameters", "sentence"),
    [
        ("matching", {"text": "a dog"}, {}, "has no image"),
        ("matching", {"image": None, "text": "a dog"}, {}, "has no image"),
        (
            "matching",
            {"image": "nowhere.png", "text": "a dog"},
            {},
            "nowhere.png. cannot be opened: it is neither a file",
        ),
        ("matching", "nowhere.png", {}, "of type str is not a record: pass {'image': ..., 'text': ...}"),
        ("matching", {"image": IMAGES[0]}, {}, "text=None is not a text"),
        ("matching", {"image": IMAGES[0], "text": []}, {}, "list of texts is empty"),
        ("matching", {"image": IMAGES[0], "text": ["a dog", " "]}, {}, "text=' ' is not a text"),
        ("answering", {"image": IMAGES[0], "question": " "}, {}, "question=' ' is not a text"),
        ("answering", {"image": IMAGES[0], "text": "what?"}, {}, "question=None is not a text"),
        ("answering", {"image": IMAGES[0], "question": "what?"}, {"candidates": []}, "candidates=.* at least one"),
        ("answering", {"image": IMAGES[0], "question": "what?"}, {"candidates": "dog"}, "'dog' must be a list"),
        ("answering", {"image": IMAGES[0], "question": "what?"}, {"candidates": ["dog", ""]}, "candidate='' is not"),
        (
            "answering",
            {"image": IMAGES[0], "question": "what?"},
            {"candidates": ["dog"], "num_beams": 2},
            "num_beams: candidates are ranked without generation",
        ),
        ("entailment", {"images": IMAGES[:2], "text": "a dog"}, {}, "reads 1 image with a text, but got 2"),
        ("entailment", {"text": "a dog"}, {}, "has no image"),
        ("reasoning", {"image": IMAGES[0], "text": "a dog"}, {}, "reads 2 images with a text, but got 1"),
        ("grounding", {"image": IMAGES[0], "text": "a dog", "phrase": "cat"}, {}, "'cat' does not occur in 'a dog'"),
        ("grounding", {"image": IMAGES[0], "text": "a dog", "phrase": (0, 9)}, {}, "span 0 to 9 is empty or outside"),
        (
            "grounding",
            {"image": IMAGES[0], "text": "a dog", "phrase": (0, 9)},
            {"heat": "similarity"},
            "span 0 to 9 is empty or outside",
        ),
        ("grounding", {"image": IMAGES[0], "text": "a dog", "boxes": []}, {}, "boxes is empty"),
        ("grounding", {"image": IMAGES[0], "text": "a dog"}, {"boxes": [[0, 0, 99, 9]]}, "leaves the image of 40 x 30"),
    ],
)
def test_bad_input_is_named(name, record, parameters, sentence, request):
    pipe = request.getfixturevalue(name)
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match=sentence):
            pipe(record if batch_size == 1 else [record], batch_size=batch_size, **parameters)


# Pipelines of transformers


@torch.no_grad()
def test_zero_shot_classification_cleans_its_prompt_like_a_caption(folders):
    pipe = pipeline("zero-shot-image-classification", model=folders[TCLForPreTraining], device="cpu")
    model = TCLModel.from_pretrained(folders[TCLForPreTraining])
    prompts = [clean_caption(f"This is a photo of {label}.") for label in ("dog", "cat")]
    logits = model(
        **PROCESSOR(text=prompts, return_tensors="pt"), pixel_values=pixels_of(IMAGES[0])
    ).logits_per_image.softmax(-1)[0]
    scores = {one["label"]: one["score"] for one in pipe(IMAGES[0], candidate_labels=["dog", "cat"])}
    assert_same(scores, {"dog": logits[0].item(), "cat": logits[1].item()})
    both = pipe(IMAGES[:2], candidate_labels=["dog", "cat"], batch_size=2)
    assert_same({one["label"]: one["score"] for one in both[0]}, scores)


@torch.no_grad()
def test_feature_extraction_returns_the_features_of_texts(folders):
    pipe = pipeline("feature-extraction", model=folders[TCLForPreTraining], device="cpu")
    model = TCLModel.from_pretrained(folders[TCLForPreTraining])
    expected = [model.get_text_features(**tokens_of(text)).pooler_output for text in TEXTS]
    assert_same([torch.tensor(one) for one in pipe(TEXTS)], expected)
    assert_same([torch.tensor(one) for one in pipe(TEXTS, batch_size=3)], expected)


@torch.no_grad()
def test_feature_extraction_returns_the_features_of_images(folders):
    pipe = pipeline("image-feature-extraction", model=folders[TCLForPreTraining], device="cpu")
    model = TCLModel.from_pretrained(folders[TCLForPreTraining])
    expected = [model.get_image_features(pixels_of(image)).pooler_output for image in IMAGES]
    assert_same([torch.tensor(one) for one in pipe(IMAGES)], expected)
    assert_same([torch.tensor(one) for one in pipe(IMAGES, batch_size=2)], expected)


# The clean-up of texts, which all pipelines share

RAW = [
    "This is a photo of a dog.",
    '  Two men -- one in red/blue -- talk ; "loudly"!  ',
    "<person> and <PERSON>, holding a (very) big #1 sign ~ night",
    "the dog's t-shirt: 1,000.5 * 3",
    "İ Café naïve — 東京 ß Σας",
    "",
]


def test_the_tokenizer_reads_a_raw_text_like_the_cleaned_one(tmp_path):
    PROCESSOR.tokenizer.save_pretrained(tmp_path)
    small_patches().save_pretrained(tmp_path)
    for tokenizer in (PROCESSOR.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.clean_up_text
        for text in RAW:
            assert tokenizer(text)["input_ids"] == tokenizer(clean_caption(text, 100))["input_ids"]
    assert PROCESSOR.tokenizer.tokenize("a dog.") == ["a", "dog"]


def test_offsets_are_those_of_the_raw_text_and_special_tokens_stay():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "t", "shirt", "person"]
    tokenizer = TCLTokenizer({word: number for number, word in enumerate(words)})
    text = "A [MASK], <person>'s t-shirt. Dog's!"
    found = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in found["offset_mapping"]]
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert tokens == ["[CLS]", "a", "[MASK]", "person", "##s", "t", "shirt", "dog", "##s"]
    assert pieces == ["", "A", "[MASK]", "person", "s", "t", "shirt", "Dog", "s"]


def test_the_clean_up_can_be_left_out_for_a_tokenizer_or_a_call(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "."]
    tokenizer = TCLTokenizer({word: number for number, word in enumerate(words)}, clean_up_text=False)
    assert tokenizer("dog.")["input_ids"] == [2, 5, 6]
    assert tokenizer("dog.", clean_up_text=True)["input_ids"] == [2, 5]
    assert tokenizer("dog.")["input_ids"] == [2, 5, 6]
    tokenizer.save_pretrained(tmp_path)
    loaded = TCLTokenizer.from_pretrained(tmp_path)
    assert not loaded.clean_up_text and loaded("dog.")["input_ids"] == [2, 5, 6]
    loaded.clean_up_text = True
    assert loaded("dog.")["input_ids"] == [2, 5]
    assert loaded("dog.", clean_up_text=False)["input_ids"] == [2, 5, 6]


def test_a_processor_that_does_not_clean_leaves_the_tokenizer_of_others_alone(tmp_path):
    other = TCLProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer, clean_text=False)
    assert PROCESSOR.clean_text and PROCESSOR.tokenizer.clean_up_text
    assert other(text="dog!")["input_ids"] != PROCESSOR(text="dog!")["input_ids"]
    other.save_pretrained(tmp_path)
    loaded = TCLProcessor.from_pretrained(tmp_path)
    assert not loaded.clean_text
    assert loaded(text="dog!")["input_ids"] == other(text="dog!")["input_ids"]
