"""Cards: what they say stands in their metadata too, and every recipe has one."""

from pathlib import Path

import pytest
import yaml
from helpers import ROOT, tiny_records
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from tcl_hf.recipes.arguments import name_of
from tcl_hf.sharing.cards import CITATION, Card, add_results, paper_card

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tcl_hf/recipes").glob("*.yaml"))}
CARDS = {path.parent.name: path for path in sorted((ROOT / "model_cards").glob("*/README.md"))}
PAPER = [name for name in RECIPES if name.startswith("tcl_")]
SAID = {"dataset": "easy_vqa", "split": "test", "protocol": "finetuned", "k": 13, "resolution": 64}
# What the Hub knows; a card with another tag is not found by it.
PIPELINE_TAGS = {"zero-shot-image-classification", "visual-question-answering", None}


def card(**fields) -> Card:
    return Card(
        **{
            "name": "tiny",
            "task": "question_answering",
            "datasets": ["easy_vqa"],
            "summary": "A tiny one.",
            "results": "| accuracy | 87.16 |",
            "training": "`accelerate launch scripts/finetune.py`",
            "metrics": {"accuracy": 87.163, "step": 3, "precision/red": 1.0},
            "said": SAID,
            "base_models": ["user/base"],
            "pictures": [("training.png", "Loss along the run.")],
        }
        | fields
    )


def test_a_card_says_all_of_it_in_text_and_metadata(tmp_path):
    record = tiny_records(1)[0] | {"question": "is it red?"}
    card(example=record).write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    for part in ("A tiny one.", "| accuracy | 87.16 |", "(training.png)", CITATION, "TCLForQuestionAnswering.from_pre"):
        assert part in written.text
    data = written.data
    assert (data.datasets, data.base_model, data.pipeline_tag) == (
        ["easy_vqa"],
        ["user/base"],
        "visual-question-answering",
    )
    assert data.widget == [{"src": "example.png", "text": "is it red?"}]
    assert Image.open(tmp_path / "example.png").size == (40, 30)
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_split) == ("accuracy", 87.16, "test")
    assert result.metric_args == {"protocol": "finetuned", "k": 13, "resolution": 64}
    assert data.license is None and "## Pictures" not in written.text


def test_a_model_of_emojis_takes_over_their_licence(tmp_path):
    card(datasets=["scenes"], task="visual_entailment").write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.license == "cc-by-sa-4.0" and "OpenMoji" in written.text
    assert written.data.pipeline_tag is None


def test_results_of_an_evaluation_are_added_and_replace_those_of_the_same_measurement(tmp_path):
    card().write(tmp_path)
    add_results(tmp_path, "question_answering", {"accuracy": 90.0}, SAID)
    add_results(tmp_path, "question_answering", {"accuracy": 80.0}, SAID | {"split": "validation"})
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [(result.dataset_split, result.metric_value) for result in results] == [("test", 90.0), ("validation", 80.0)]
    add_results(tmp_path / "nowhere", "question_answering", {"accuracy": 1.0}, SAID)  # no card, nothing to add to


def test_every_recipe_has_a_card_and_every_card_a_recipe():
    assert CARDS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_the_project_is_valid(name):
    """Its metadata is what the Hub's card classes read and write, and what it shows is there."""
    written = ModelCard.load(CARDS[name])
    again = ModelCardData(**written.data.to_dict() | {"model_name": None, "eval_results": None})
    assert again.library_name == "transformers" and again.pipeline_tag in PIPELINE_TAGS
    assert written.data.datasets
    for result in written.data.eval_results or []:
        assert result.metric_args["protocol"] and result.dataset_split
    if written.data.eval_results:
        assert eval_results_to_model_index(written.data.model_name, written.data.eval_results)
    for picture in CARDS[name].parent.glob("*.png"):
        assert picture.name in written.content
    assert CITATION in written.text and "## Intended use and limits" in written.text


@pytest.mark.parametrize("name", PAPER)
def test_the_card_of_a_recipe_of_the_paper_is_as_it_is_written_now(name, tmp_path):
    write_paper_card(name, tmp_path)
    assert (tmp_path / "README.md").read_text() == CARDS[name].read_text()
    assert not ModelCard.load(CARDS[name]).data.eval_results  # nothing was measured


def write_paper_card(name: str, folder: Path) -> None:
    recipe = RECIPES[name]
    task = recipe.get("task", "pretraining")
    named = recipe.get("dataset_name")
    datasets = [named] if named else list(dict.fromkeys(name_of([source]) for source in recipe["data"]))
    base = {"pretraining": None, "visual_reasoning": "tcl_nlvr2_pretrain"}.get(task, "tcl_4m")
    paper_card(name, task, datasets, base).write(folder)
