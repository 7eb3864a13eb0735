"""Recipes and command line: the paper's numbers, overrides, and clear refusals."""

import re
from dataclasses import replace

import pytest
from helpers import ROOT

from tcl_hf import TCLConfig
from tcl_hf.models.processing_tcl import MAX_TOKENS
from tcl_hf.recipes.arguments import RecipeError
from tcl_hf.recipes.parsing import COMMANDS, EVALUATE, FINETUNE, PLAN, PRETRAIN, parse_recipe
from tcl_hf.recipes.tasks import TASKS
from tcl_hf.training.arguments import TrainingError

RECIPES = ROOT / "tcl_hf" / "recipes"


def command_of(recipe):
    return FINETUNE if re.search(r"^task: ", recipe.read_text(), flags=re.MULTILINE) else PRETRAIN


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    data, model, training = parse_recipe(command_of(recipe), ["--recipe", recipe.stem])
    assert data.data and training.output_dir.startswith("runs/")
    assert isinstance(model.config_fields, dict)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_for_training_is_also_one_for_what_comes_before_and_after_it(recipe):
    """A plan reads recipes of pre-training, an evaluation those of fine-tuning."""
    other = PLAN if command_of(recipe) is PRETRAIN else EVALUATE
    data, *_ = parse_recipe(other, ["--recipe", recipe.stem])
    expected = parse_recipe(command_of(recipe), ["--recipe", recipe.stem])[0]
    assert data == (replace(expected, eval_images=0) if other is EVALUATE else expected)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_reads_only_what_it_takes_and_parses_an_empty_command_line(command):
    known = {name for one in command.types for name in one.__dataclass_fields__}
    assert command.reads <= known
    parse_recipe(command, [])


@pytest.mark.parametrize(
    ("command", "argv", "data", "fusion_layers"),
    [
        (PRETRAIN, [], ["openmoji"], 1),
        (PRETRAIN, ["--data", "openmoji"], ["openmoji"], 1),
        (PRETRAIN, ["--data", "photos"], ["photos"], 6),
        (PRETRAIN, ["--recipe", "openmoji", "--data", "photos"], ["photos"], 1),
    ],
)
def test_only_the_embedded_data_brings_a_recipe(command, argv, data, fusion_layers):
    data_args, model_args, args = parse_recipe(command, argv)
    assert (data_args.data, model_args.num_fusion_layers) == (data, fusion_layers)
    if fusion_layers == 6:  # The defaults of an own run.
        assert model_args.image_size is None and data_args.max_tokens == MAX_TOKENS and not model_args.config_fields
        assert args.output_dir == "runs/photos"


def test_a_run_without_a_recipe_has_a_folder_of_its_own():
    argv = ["--data", "my/statements_train.jsonl", "--task", "visual_entailment", "--model", "x"]
    data_args, _, args = parse_recipe(FINETUNE, argv)
    assert args.output_dir == "runs/statements_visual_entailment" and data_args.validation_split == "validation"
    assert parse_recipe(FINETUNE, [*argv, "--output_dir", "here"])[2].output_dir == "here"
    assert parse_recipe(FINETUNE, ["--recipe", "easy_vqa", *argv[:2]])[2].output_dir == "runs/easy_vqa"


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
    data, model, training = parse_recipe(FINETUNE, ["--recipe", name])
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


def test_the_paper_s_recipe_has_the_paper_s_numbers():
    data, model, training = parse_recipe(PRETRAIN, ["--recipe", "tcl_4m"])
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
    config = TCLConfig(**model.config_fields)
    assert (config.queue_size, config.momentum, config.projection_dim) == (65536, 0.995, 256)
    assert (config.alpha, config.mlm_probability, config.temperature_init_value) == (0.4, 0.15, 0.07)
    assert config.cma_weight == config.imc_weight == config.lmi_weight == pytest.approx(1 / 3)
    assert config.itm_weight == config.mlm_weight == 1


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "per_device_train_batch_size: 7\nlearning_rate: 1e-3\ndata: [one, two]\n"
        "config: {queue_size: 5}\ncolor_jitter: false"
    )
    argv = ["--recipe", str(recipe)]
    data, model, training = parse_recipe(PRETRAIN, [*argv, "--per_device_train_batch_size", "9"])
    assert (training.per_device_train_batch_size, training.learning_rate) == (9, 1e-3)
    assert data.data == ["one", "two"] and data.color_jitter is False
    assert model.config_fields == {"queue_size": 5}
    data, *_ = parse_recipe(PRETRAIN, [*argv, "--data", "three"])
    assert data.data == ["three"]


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        ([], False),
        (["--flip"], True),
        (["--flip", "yes"], True),
        (["--flip=1"], True),
        (["--flip", "false"], False),
        (["--no_flip"], False),
        (["--no-flip"], False),
    ],
)
def test_booleans_are_written_as_in_transformers(argv, flip, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("flip: no\n")
    data, *_ = parse_recipe(PRETRAIN, ["--recipe", str(recipe), *argv])
    assert data.flip is flip


def test_config_on_the_command_line_changes_only_what_it_names(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("config: {queue_size: 5, momentum: 0.9, vision_config: {hidden_size: 32, patch_size: 8}}")
    argv = ["--config", '{"momentum": 0.5, "vision_config": {"hidden_size": 64}}', "--config", '{"alpha": 0}']
    _, model, _ = parse_recipe(PRETRAIN, ["--recipe", str(recipe), *argv])
    assert model.config_fields == {
        "queue_size": 5,
        "momentum": 0.5,
        "alpha": 0,
        "vision_config": {"hidden_size": 64, "patch_size": 8},
    }


def test_a_mapping_is_written_in_yaml_or_as_json(tmp_path):
    """YAML reads 1e-5 as a text, because it has no dot. The mapping of the command line replaces the recipe's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("part_learning_rates: {vision: 1.0e-5, text: 2e-5}")
    *_, training = parse_recipe(PRETRAIN, ["--recipe", str(recipe)])
    assert training.part_rates == {"vision": 1e-5, "text": 2e-5}
    *_, training = parse_recipe(PRETRAIN, ["--recipe", str(recipe), "--part_learning_rates", '{"heads": 1e-3}'])
    assert training.part_rates == {"heads": 1e-3}
    recipe.write_text("part_learning_rates: {}")
    assert parse_recipe(FINETUNE, ["--recipe", str(recipe)])[-1].part_rates == {}
    with pytest.raises(TrainingError, match="part_learning_rates is not a mapping of parts to learning rates"):
        parse_recipe(PRETRAIN, ["--part_learning_rates", "vision=1e-5"])


def test_lora_is_an_object_of_the_recipe_of_which_the_command_line_changes_fields(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}\nlora_save: adapter")
    *_, args = parse_recipe(PRETRAIN, ["--recipe", str(recipe), "--lora", '{"r": 4}'])
    assert args.lora_fields == {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    assert args.lora_save == "adapter"
    for argv, fields in (([], None), (["--lora", "{}"], {}), (["--lora", '{"r": 2}'], {"r": 2})):
        *_, args = parse_recipe(FINETUNE, argv)
        assert args.lora_fields == fields


def test_a_task_on_the_command_line_alone_takes_nothing_from_the_default_recipe():
    data, model, *_ = parse_recipe(EVALUATE, ["--task", "retrieval", "--data", "coco_test.json"])
    assert (data.task, data.data, data.add_words, model.image_size) == ("retrieval", ["coco_test.json"], False, None)
    data, *_ = parse_recipe(EVALUATE, ["--task", "question_answering", "--recipe", "easy_vqa"])
    assert data.add_words


# Each list stands for ten of the list before it.
MANY_ANCHORS = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("config: {quue_size: 4}", [], r"config has no field 'quue_size' \(did you mean 'queue_size'\?\)"),
        ("config: {vision_config: {hidden_sise: 4}}", [], r"config\.vision_config has no field 'hidden_sise'"),
        ("config: {lock_vision: all}", [], r"config\.lock_vision is 'all': give a value of the type bool or int"),
        ("config: {queue_size: true}", [], r"config\.queue_size is True: give a value of the type int"),
        ("config: {text_config: 5}", [], r"config\.text_config is 5: give a value of the type mapping or null"),
        ("config: {vision_config: {lock: 1}}", [], r"config\.vision_config has no field 'lock' \(set lock_vision"),
        ("batchsize: 7", [], r"no argument 'batchsize' \(did you mean 'per_device_train_batch_size'\?\)"),
        ("batchsize:", [], r"no argument 'batchsize' \(did you mean 'per_device_train_batch_size'\?\)"),
        ("config: 5", [], "--config is not an object, but 5"),
        ("queue_size: 7", [], r"no argument 'queue_size' \(it is a field of the model: set it in config\)"),
        ("per_device_train_batch_size: many", [], "per_device_train_batch_size.*: invalid int value: 'many'"),
        ("lr_scheduler_type: linear", [], "lr_scheduler_type.*: invalid choice: 'linear'"),
        ("color_jitter: perhaps", [], "color_jitter.*: Truthy value expected: got perhaps"),
        ("[1, 2]", [], "is not a list of `name: value`"),
        ("a: [", [], "could not be read as YAML"),
        pytest.param(f"a: {'[' * 5000}{']' * 5000}", [], "could not be read as YAML", id="deep nesting"),
        pytest.param(MANY_ANCHORS, [], r"has more than 100,000 values, those of its anchors among them", id="anchors"),
        ("", ["--batchsize", "7"], r"no option --batchsize \(did you mean 'per_device_train_batch_size'\?\)"),
        ("", ["--learning", "7"], r"no option --learning \(did you mean"),
        ("", ["learning_rate", "7"], "'learning_rate' does not belong to any option: write options as --name value"),
        ("", ["--recipe", "nowhere.yaml"], r"no recipe nowhere\.yaml: name a YAML file, or one of daquar"),
        ("", ["--config", "{"], "--config is not JSON"),
        pytest.param("", ["--config", "[" * 100_000], "--config is not JSON", id="deep JSON"),
        ("", ["--config"], "Argument --config: expected one argument"),
        ("", ["--config", "[]"], "--config is not an object"),
        ("lora: 16", [], "--lora is not an object, but 16: give fields of LoRA by name"),
        ("r: 16", [], r"no argument 'r' \(it is a field of LoRA: set it in lora\)"),
    ],
)
def test_mistakes_are_named(tmp_path, text, argv, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(PRETRAIN, ["--recipe", str(recipe), *argv])


# Arguments that are not read


@pytest.mark.parametrize(
    ("command", "option", "readers"),
    [
        (FINETUNE, "streaming", "pretrain"),
        (FINETUNE, "data_weights", "pretrain"),
        (FINETUNE, "vision_model", "pretrain"),
        (FINETUNE, "vocab_size", "pretrain and plan"),
        (PRETRAIN, "task", "finetune and evaluate"),
        (PRETRAIN, "share_images", "finetune"),
        (PRETRAIN, "shuffle_images", "finetune and evaluate"),
        (EVALUATE, "learning_rate", "pretrain and finetune"),
        (EVALUATE, "max_tokens", "pretrain, finetune and plan"),
        (EVALUATE, "share_images", "finetune"),
        (EVALUATE, "split", "pretrain and finetune"),
        (PLAN, "save_steps", "pretrain and finetune"),
        (PLAN, "vision_model", "pretrain"),
    ],
)
def test_an_option_that_the_command_ignores_is_refused_with_those_that_read_it(command, option, readers):
    message = f"^--{option} is read by {readers} only: leave it out of {command.name}.$"
    for argv in ([f"--{option}", "1"], [f"--{option}=1"], [f"--{option.replace('_', '-')}", "1"]):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(command, argv)


def test_the_other_way_to_write_a_boolean_is_refused_too():
    with pytest.raises(RecipeError, match=r"--two_views is read by pretrain and finetune only"):
        parse_recipe(EVALUATE, ["--no_two_views"])


@pytest.mark.parametrize(("command", "key"), [(FINETUNE, "streaming: true"), (PRETRAIN, "task: retrieval")])
def test_a_key_of_another_command_s_recipe_is_refused_with_the_file(command, key, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(key)
    with pytest.raises(RecipeError, match=rf"mine\.yaml: {key.split(':')[0]} is read by .*leave it out of"):
        parse_recipe(command, ["--recipe", str(recipe)])


@pytest.mark.parametrize(
    ("task", "option", "readers"),
    [
        ("retrieval", "heat", "grounding"),
        ("retrieval", "answer_list", "question_answering"),
        ("retrieval", "share_images", "question_answering, visual_entailment and visual_reasoning"),
        ("retrieval", "annotations", "question_answering and grounding"),
        ("visual_entailment", "eval_k", "pretraining, retrieval and question_answering"),
        ("visual_entailment", "eval_captions", "pretraining and retrieval"),
        ("visual_entailment", "validation_annotations", "question_answering and grounding"),
        ("question_answering", "half_precision_states", "pretraining and retrieval"),
        ("question_answering", "image_column", "pretraining, retrieval, text_assignment and classification"),
        ("question_answering", "label_column", "classification"),
        ("retrieval", "templates", "classification"),
        ("classification", "image_root", "pretraining, retrieval, .* and grounding"),
        ("question_answering", "two_views", "pretraining, retrieval, text_assignment and grounding"),
        ("text_assignment", "metric_for_best_model", "pretraining, retrieval, .* and grounding"),
        ("text_assignment", "eval_max_tokens", "pretraining, retrieval, .* and grounding"),
    ],
)
def test_an_argument_that_the_task_ignores_is_refused_with_the_tasks_that_read_it(task, option, readers, tmp_path):
    message = f"{option} is read by {readers} only: leave it out for {task}."
    with pytest.raises(RecipeError, match=f"^--{message}$"):
        parse_recipe(FINETUNE, ["--task", task, f"--{option}", "1"])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"task: {task}\n{option}: 1\n")
    with pytest.raises(RecipeError, match=rf"mine\.yaml: {message}$"):
        parse_recipe(FINETUNE, ["--recipe", str(recipe)])


def test_every_argument_that_depends_on_the_task_exists():
    known = {name for command in COMMANDS for name in command.reads}
    for task in TASKS.values():
        assert {name for name in task.options if name != f"validation_{name.removeprefix('validation_')}"} <= known


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"no task 'captioning'.*visual_entailment"):
        parse_recipe(FINETUNE, ["--recipe", "easy_vqa", "--task", "captioning"])
    with pytest.raises(RecipeError, match=r"no task 'pretraining': choose one of retrieval"):
        parse_recipe(EVALUATE, ["--task", "pretraining"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_lists_what_the_command_reads(command, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(command, ["--help"])
    listed = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert {name for name in listed if not name.startswith("no_")} == command.reads | {"recipe"}
