"""Arguments: checks of their values, and names of data."""

import pytest

from tcl_hf.recipes.arguments import (
    FinetuningDataArguments,
    ModelArguments,
    PretrainingDataArguments,
    RecipeError,
    TaskArguments,
    name_of,
)


def test_an_unknown_kind_of_heat_map_is_refused():
    with pytest.raises(RecipeError, match="there is no map of 'cold'"):
        TaskArguments(task="grounding", heat="cold")


@pytest.mark.parametrize("arguments", [PretrainingDataArguments, TaskArguments, FinetuningDataArguments])
def test_a_negative_weight_of_matching_is_refused(arguments):
    with pytest.raises(RecipeError, match="rerank_weight=-1 is negative: choose 0"):
        arguments(rerank_weight=-1)


def test_tuning_data_cannot_be_cut_off_a_stream():
    with pytest.raises(RecipeError, match="tuning_images=9 cannot be cut off a stream: set streaming to false"):
        PretrainingDataArguments(tuning_images=9, streaming=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quue_size": 4}', r"config has no field 'quue_size' \(did you mean 'queue_size'\?\)"),
        ('{"vision_config": {"hidden_sise": 4}}', r"config\.vision_config has no field 'hidden_sise'"),
        ('{"text_config": {"fusion_layers": 4}}', r"config\.text_config has no field 'fusion_layers'"),
        ("{", "--config is not JSON"),
        ("[]", r"--config is not an object, but \[\]"),
    ],
)
def test_a_config_names_fields_of_the_model(config, message):
    with pytest.raises(RecipeError, match=message):
        ModelArguments(config=config)


@pytest.mark.parametrize("ridges", [[0.1], [0.1, 0.2, 0.3], [0.1, 0.0]])
def test_the_closed_form_has_a_ridge_for_images_and_one_for_texts(ridges):
    with pytest.raises(RecipeError, match=r"projection_ridge=\[0.1.* must be two numbers above 0"):
        ModelArguments(projection_ridge=ridges)
    assert ModelArguments(projection_ridge=[0.25, 1.0]).projection_ridge == [0.25, 1.0]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/json_down/coco_train.json", "coco"),
        ("runs/x/flickr8k/", "flickr8k"),
        ("ve_dev.json", "ve"),
        ("data/pairs-*.tar", "pairs"),
        ("train.jsonl", "train"),
        ("openmoji", "openmoji"),
    ],
)
def test_data_is_called_by_its_name_without_the_split(source, name):
    assert name_of([source]) == name


def test_pre_training_names_each_source_and_a_task_its_data_set():
    sources = ["coco_train.json", "vg.json"]
    assert PretrainingDataArguments(data=sources).dataset_names == ["coco", "vg"]
    assert FinetuningDataArguments(data=sources).dataset_names == ["coco"]
    assert FinetuningDataArguments(data=sources, dataset_name="mixture").dataset_names == ["mixture"]
