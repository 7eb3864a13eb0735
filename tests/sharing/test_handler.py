"""The handler of Inference Endpoints answers as the pipelines do, where the package is not installed."""

import base64
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import encoded, photo, tiny, tiny_processor
from transformers import pipeline

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
    TCLProcessor,
)
from tcl_hf.sharing.hub import CODE, HANDLER, export

CLASSES = (TCLModel, TCLForImageTextRetrieval, TCLForQuestionAnswering, TCLForVisualEntailment, TCLForVisualReasoning)
PHOTOS = [photo(60, 50), photo(40, 50, seed=1)]
IMAGES = [base64.b64encode(encoded(one, "PNG")).decode() for one in PHOTOS]
TEXTS = ["a red dog", "the big house near a tree"]
ASKED = {"image": IMAGES[0], "question": "Is the dog red?"}
CANDIDATES = ["red", "big cat", "green"]
RIGHT = {
    "TCLModel": [{"inputs": {"image": IMAGES[0]}}, {"inputs": TEXTS[0]}, {"inputs": {"text": TEXTS}}],
    "TCLForImageTextRetrieval": [
        {"inputs": {"image": IMAGES[0], "text": TEXTS}},
        {"inputs": {"image": IMAGES[0], "text": TEXTS[0]}},
    ],
    "TCLForQuestionAnswering": [
        {"inputs": ASKED},
        {"inputs": ASKED, "parameters": {"candidates": CANDIDATES, "top_k": 2}},
    ],
    "TCLForVisualEntailment": [{"inputs": {"image": IMAGES[0], "text": TEXTS[0]}}],
    "TCLForVisualReasoning": [{"inputs": {"images": IMAGES, "text": TEXTS[0]}, "parameters": {"top_k": 1}}],
}
TEXT_FILE = base64.b64encode(b"a text called .jpg").decode()
WRONG = {
    "TCLModel": [
        ({}, "inputs is not a record"),
        ({"inputs": {"picture": 1}}, "picture: this is not read"),
        ({"inputs": {"text": ""}}, "text='' is not a text"),
        ({"inputs": {"text": []}}, "as text one or a list of at most 256"),
        ({"inputs": {"image": "%%%"}}, "image cannot be read"),
        ({"inputs": {"image": TEXT_FILE}}, "image cannot be read"),
        ({"inputs": {"image": 3}}, "image is not a text"),
    ],
    "TCLForQuestionAnswering": [
        ({"inputs": {"question": "a dog?"}}, "about one picture, but got 0"),
        ({"inputs": ASKED, "parameters": {"candidates": [1]}}, "candidate=1 is not a text"),
        ({"inputs": ASKED, "parameters": {"candidates": ["red"], "top_k": 0}}, "top_k=0 is not a whole number"),
        ({"inputs": ASKED, "parameters": {"beams": 3}}, "beams: this is not read"),
    ],
    "TCLForVisualReasoning": [({"inputs": {"image": IMAGES[0], "text": "a dog"}}, "reads 2 picture(s)")],
}
PROGRAM = """
import importlib.util, json, sys
sys.modules["tcl_hf"] = None  # cannot be imported
root, requests, out = sys.argv[1:]
answers = {}
for name, asked in json.load(open(requests)).items():
    spec = importlib.util.spec_from_file_location("handler", f"{root}/{name}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(f"{root}/{name}")
    answers[name] = [handler(one) for one in asked]
json.dump(answers, open(out, "w"))
"""


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> TCLProcessor:
    """The processor as it is opened from a folder."""
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor().save_pretrained(folder)
    return TCLProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """The answers of exported models to all requests, in a process that cannot import the package."""
    root = tmp_path_factory.mktemp("exported")
    for model_class in CLASSES:
        folder = root / "run" / model_class.__name__
        tiny(model_class)[0].save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        export(folder, root / model_class.__name__, with_code=True)
    requests = {name: right + [request for request, _ in WRONG.get(name, [])] for name, right in RIGHT.items()}
    (root / "requests.json").write_text(json.dumps(requests))
    environment = os.environ | {"HF_HOME": str(root / "home"), "PYTHONPATH": ""}
    arguments = [str(root), str(root / "requests.json"), str(root / "answers.json")]
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, env=environment, cwd=root)
    return json.loads((root / "answers.json").read_text())


def same(answer: list[dict], expected: list[dict], *texts: str) -> None:
    assert [{name: row[name] for name in texts} for row in answer] == [{n: row[n] for n in texts} for row in expected]
    for name in expected[0].keys() - set(texts):
        numbers = [torch.tensor([row[name] for row in rows]) for rows in (answer, expected)]
        torch.testing.assert_close(*numbers, atol=1e-6, rtol=1e-5)


def test_embeddings_are_those_of_the_model(answers, processor):
    model, _ = tiny(TCLModel)
    with torch.no_grad():
        output = model(**processor(images=PHOTOS[:1], text=TEXTS, return_tensors="pt"))
    image, text, texts = answers["TCLModel"][:3]
    torch.testing.assert_close(torch.tensor(image["embedding"]), output.image_embeds[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(text["embedding"]), output.text_embeds[0], atol=1e-6, rtol=1e-5)
    both = torch.tensor([row["embedding"] for row in texts])
    torch.testing.assert_close(both, output.text_embeds, atol=1e-6, rtol=1e-5)


def test_answers_are_those_of_the_pipelines(answers, processor):
    def of(task: str, model_class):
        return pipeline(task, model=tiny(model_class)[0], processor=processor, device="cpu")

    matching = of("image-text-matching", TCLForImageTextRetrieval)(PHOTOS[0], TEXTS)
    same(answers["TCLForImageTextRetrieval"][0], matching, "text")
    same([answers["TCLForImageTextRetrieval"][1]], matching[:1], "text")
    asked = of("visual-question-answering", TCLForQuestionAnswering)
    generated, ranked = answers["TCLForQuestionAnswering"][:2]
    assert generated == asked(PHOTOS[0], "Is the dog red?")
    same(ranked, asked(PHOTOS[0], "Is the dog red?", candidates=CANDIDATES, top_k=2), "answer")
    same(
        answers["TCLForVisualEntailment"][0],
        of("visual-entailment", TCLForVisualEntailment)(PHOTOS[0], TEXTS[0]),
        "label",
    )
    (judged,) = of("visual-reasoning", TCLForVisualReasoning)([{"images": PHOTOS, "text": TEXTS[0]}])
    same(answers["TCLForVisualReasoning"][0], judged[:1], "label")


def test_a_wrong_request_is_answered_with_a_sentence(answers):
    for name, wrong in WRONG.items():
        for answer, (request, part) in zip(answers[name][len(RIGHT[name]) :], wrong, strict=True):
            assert set(answer) == {"error"} and part in answer["error"] and answer["error"].endswith("."), request


def test_the_handler_needs_no_more_than_the_code_beside_it():
    imported = {
        line.split()[1].split(".")[0]
        for line in HANDLER.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported <= {"torch", "transformers", "PIL", *sys.stdlib_module_names}
    assert HANDLER not in CODE
