"""Recipes and command line: the paper's numbers, overrides, and clear refusals."""

import json
import re

import pytest
import torch
from helpers import ROOT, png

from tcl_hf.recipes.arguments import DataArguments, ModelArguments, RecipeError, parse_recipe
from tcl_hf.recipes.build import build_collator, build_model, load_data
from tcl_hf.recipes.tasks import TaskArguments
from tcl_hf.training.arguments import TCLTrainingArguments

RECIPES = ROOT / "tcl_hf" / "recipes"
TYPES = (DataArguments, ModelArguments, TCLTrainingArguments)
TINY = [
    *("--image_size", "16", "--vocab_size", "60"),
    "--config",
    '{"queue_size": 8, "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,'
    ' "intermediate_size": 32, "patch_size": 8}, "text_config": {"hidden_size": 16, "num_hidden_layers": 2,'
    ' "fusion_layer": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}}',
]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    of_a_task = re.search(r"^task: ", recipe.read_text(), flags=re.MULTILINE)
    types = (TaskArguments, *TYPES[1:]) if of_a_task else TYPES
    data, model, training = parse_recipe(types, recipe, [])
    assert data.data and training.output_dir.startswith("runs/")
    assert isinstance(model.config_fields, dict)


@pytest.mark.parametrize(
    ("name", "learning_rate", "warmup", "epochs", "batch_size"),
    [
        ("tcl_retrieval_coco", 1e-5, 100, 5, 32),
        ("tcl_retrieval_flickr30k", 1e-5, 100, 10, 32),
        ("tcl_vqa", 2e-5, 400, 8, 32),
        ("tcl_snli_ve", 2e-5, 100, 5, 32),
        ("tcl_nlvr2", 2e-5, 100, 10, 16),
        ("tcl_refcoco_plus", 1e-5, 100, 5, 32),
    ],
)
def test_the_paper_s_fine_tuning_has_the_paper_s_numbers(name, learning_rate, warmup, epochs, batch_size):
    data, model, training = parse_recipe((TaskArguments, *TYPES[1:]), RECIPES / f"{name}.yaml", [])
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.warmup_steps) == (
        epochs,
        batch_size,
        warmup,
    )
    assert (training.learning_rate, training.min_learning_rate) == (learning_rate, 1e-6)
    assert (training.warmup_learning_rate, training.weight_decay, training.lr_scheduler_type) == (1e-5, 0.02, "paper")
    assert model.image_size == 384 and model.config_fields["alpha"] == 0.4
    assert training.alpha_ramp == (name != "tcl_snli_ve")
    assert data.crop_scale == ([1.0, 1.0] if name == "tcl_refcoco_plus" else [0.5, 1.0])
    k = {"tcl_retrieval_coco": 256, "tcl_retrieval_flickr30k": 128, "tcl_vqa": 128}
    assert data.eval_k == k.get(name, data.eval_k)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"no task 'captioning'.*visual_entailment"):
        parse_recipe((TaskArguments, *TYPES[1:]), RECIPES / "easy_vqa.yaml", ["--task", "captioning"])


def test_the_paper_s_recipe_has_the_paper_s_numbers():
    data, model, training = parse_recipe(TYPES, RECIPES / "tcl_4m.yaml", [])
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.lr_scheduler_type) == (
        30,
        64,
        "paper",
    )
    assert (training.learning_rate, training.min_learning_rate, training.warmup_learning_rate) == (1e-4, 1e-5, 1e-5)
    assert (training.warmup_steps, training.weight_decay, training.max_grad_norm) == (2000, 0.02, 0)
    assert training.decay_rule == "original"
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    assert data.crop_scale == [0.2, 1.0] and data.two_views and data.color_jitter and data.max_tokens == 25
    assert (model.image_size, model.fusion_layer, model.num_fusion_layers) == (256, 6, 6)
    from tcl_hf import TCLConfig

    config = TCLConfig(**model.config_fields)
    assert (config.queue_size, config.momentum, config.projection_dim) == (65536, 0.995, 256)
    assert (config.alpha, config.mlm_probability, config.temperature_init_value) == (0.4, 0.15, 0.07)
    assert config.cma_weight == config.imc_weight == config.lmi_weight == pytest.approx(1 / 3)
    assert config.itm_weight == config.mlm_weight == 1


def test_the_command_line_has_the_last_word(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 7\nlearning_rate: 1e-3\ndata: [one, two]\n"
        "config: {queue_size: 5}\ncolor_jitter: false"
    )
    data, model, training = parse_recipe(
        TYPES, "unused.yaml", ["--recipe", str(recipe), "--per_device_train_batch_size", "9"]
    )
    assert (training.per_device_train_batch_size, training.learning_rate) == (9, 1e-3)
    assert data.data == ["one", "two"] and data.color_jitter is False
    assert model.config_fields == {"queue_size": 5}
    data, *_ = parse_recipe(TYPES, recipe, ["--data", "three"])
    assert data.data == ["three"]


def test_config_on_the_command_line_changes_only_what_it_names(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("config: {queue_size: 5, momentum: 0.9, vision_config: {hidden_size: 32, patch_size: 8}}")
    argv = ["--config", '{"momentum": 0.5, "vision_config": {"hidden_size": 64}}', "--config", '{"alpha": 0}']
    _, model, _ = parse_recipe(TYPES, recipe, argv)
    assert model.config_fields == {
        "queue_size": 5,
        "momentum": 0.5,
        "alpha": 0,
        "vision_config": {"hidden_size": 64, "patch_size": 8},
    }


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("config: {quue_size: 4}", [], r"config has no field 'quue_size' \(did you mean 'queue_size'\?\)"),
        ("config: {vision_config: {hidden_sise: 4}}", [], r"config\.vision_config has no field 'hidden_sise'"),
        ("batchsize: 7", [], r"no argument 'batchsize' \(did you mean 'per_device_train_batch_size'\?\)"),
        ("per_device_train_batch_size: many", [], "per_device_train_batch_size.*: invalid int value: 'many'"),
        ("lr_scheduler_type: linear", [], "lr_scheduler_type.*: invalid choice: 'linear'"),
        ("[1, 2]", [], "is not a list of `name: value`"),
        ("a: [", [], "is not YAML"),
        ("", ["--batchsize", "7"], r"no option --batchsize \(did you mean 'per_device_train_batch_size'\?\)"),
        ("", ["--recipe", "nowhere.yaml"], r"no recipe nowhere\.yaml"),
        ("", ["--config", "{"], "--config is not JSON"),
        ("", ["--config", "[]"], "--config is no object"),
    ],
)
def test_mistakes_are_named(tmp_path, text, argv, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TYPES, recipe, argv)


def build(*argv):
    data, model, _ = parse_recipe(TYPES, RECIPES / "openmoji.yaml", [*TINY, *argv])
    torch.manual_seed(0)
    return data, *build_model(model, ["a red dog", "a blue cat"])


def test_a_new_model_and_its_processor_fit_together():
    data, model, processor = build()
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size == 16
    collator = build_collator(data, model.config, processor)
    assert collator.augmentation.image_size == 16
    assert collator.augmentation.crop_scale == tuple(data.crop_scale)


def test_a_run_goes_on_from_a_checkpoint_at_another_size(tmp_path):
    _, model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again, its_processor = build("--model", str(tmp_path), "--image_size", "32", "--config", '{"queue_size": 4}')
    assert again.config.vision_config.image_size == 32 and len(again.queue.image) == 4
    assert its_processor.image_processor.size["height"] == 32
    assert torch.equal(again.itm_head.weight, model.itm_head.weight)
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    _, parts, _ = parse_recipe(TYPES, RECIPES / "tcl_4m.yaml", ["--model", str(tmp_path)])
    parts.vision_model = parts.text_model = parts.image_size = None
    same, _ = build_model(parts, [])
    assert same.config.vision_config.image_size == 16  # its own size
    with pytest.raises(RecipeError, match="image_size=30 does not divide"):
        build("--model", str(tmp_path), "--image_size", "30")


def test_patch_dropout_is_a_field_of_the_run_and_not_of_the_checkpoint(tmp_path):
    _, model, processor = build("--config", '{"patch_dropout": 0.5}')
    assert model.config.patch_dropout == 0.5
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again, _ = build("--model", str(tmp_path), "--config", '{"patch_dropout": 0}')
    assert again.config.patch_dropout == 0


def test_a_run_without_a_validation_split_says_that_it_does_not_evaluate(tmp_path, caplog):
    (tmp_path / "0.png").write_bytes(png(0))
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([{"image": "0.png", "caption": "a dog"}]))
    pairs, records = load_data(DataArguments(data=[str(file)]))
    assert len(pairs) == 1
    assert records == []
    assert "nothing is evaluated" in caplog.text
    _, records = load_data(DataArguments(data=[str(file)], validation_data=[str(file)]))
    assert records[0]["captions"] == ["a dog"]


def test_held_out_samples_that_cannot_be_used_are_named_and_left_out(tmp_path, caplog):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(b"broken")
    file = tmp_path / "pairs.json"
    rows = [{"image": f"{n}.png", "caption": "a dog"} for n in range(2)] + [{"image": "0.png", "image_id": "x"}]
    file.write_text(json.dumps(rows))
    _, records = load_data(DataArguments(data=[str(file)], validation_data=[str(file)]))
    assert len(records) == 1
    assert "Not evaluated: 1.png (UnidentifiedImageError" in caplog.text
    assert "Not evaluated: x (no caption)" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image_size", "17"], "image_size=17 does not divide into patches of 8"),
        (["--config", '{"momentum": 2}'], "momentum=2"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "./nowhere", "--vision_model", "x"], "leave out the others"),
        (["--vision_model", "./nowhere"], "nowhere"),
    ],
)
def test_models_that_cannot_be_built_are_one_sentence(argv, message):
    with pytest.raises(RecipeError, match=message):
        build(*argv)
