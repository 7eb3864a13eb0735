"""LoRA in a run: what is trained, what the teacher follows, what is saved, and what is refused."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import config_of as tiny_config_of
from helpers import in_two_processes, losses, small_patches, statements, tiny_processor, tiny_run, training_batch
from safetensors.torch import load_file

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from tcl_hf.data.collators import TCLTaskCollator
from tcl_hf.models.momentum import weights_of
from tcl_hf.models.starting_points import StartingPoint
from tcl_hf.recipes.arguments import CheckpointArguments
from tcl_hf.recipes.build import open_model
from tcl_hf.training.adapters import add_lora, config_of, is_adapter, merged_state_dict, open_checkpoint
from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError
from tcl_hf.training.log import read_metrics
from tcl_hf.training.states import read_state

peft = pytest.importorskip("peft", reason="PEFT is not installed")

INPUTS = ("input_ids", "attention_mask", "pixel_values")
LINEAR = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
CONTRAST = {"tcl.temperature", *(f"tcl.{s}_projection.{p}" for s in ("visual", "text") for p in ("weight", "bias"))}
ITM = {"itm_head.weight", "itm_head.bias"}
WORDS = {f"lm_head.{part}.{p}" for part in ("dense", "layer_norm") for p in ("weight", "bias")} | {
    "lm_head.decoder.bias"
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pre-trained checkpoint with its processor, whose teacher differs from its student."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = TCLForPreTraining(tiny_config_of())
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def with_lora(model, **fields):
    add_lora(model, TCLTrainingArguments(lora={"r": 4, "lora_alpha": 8} | fields))
    return model


def stir_adapters(model, seed=0):
    """Give the factors B, which start at 0, values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model, seed=1) -> dict[str, torch.Tensor]:
    batch = training_batch(3, config=model.config, seed=seed)
    inputs = {name: batch[name] for name in INPUTS}
    if isinstance(model, TCLForVisualReasoning):
        inputs["pixel_values"] = torch.stack([batch["pixel_values"], batch["pixel_values_augmented"]], dim=1)
    if isinstance(model, TCLForTextAssignment):  # otherwise it draws the images
        inputs |= {"first_image_index": torch.tensor([0, 1, 2]), "second_image_index": torch.tensor([1, 2, 0])}
    if isinstance(model, TCLForQuestionAnswering):
        inputs["labels"] = batch["input_ids"]
    with torch.no_grad():
        found = model.eval()(**inputs)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


def trained(model) -> tuple[set[str], set[str]]:
    """The layers with adapters that are trained, and the names of the other trained parameters."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in names if ".lora_" in name}
    return {name.split(".lora_")[0] for name in adapters}, names - adapters


# What is trained


@pytest.mark.parametrize(
    ("model_class", "in_full"),
    [
        (TCLForPreTraining, CONTRAST | ITM | WORDS),
        (TCLForImageTextRetrieval, CONTRAST | ITM),
        (TCLForVisualEntailment, {f"cls_head.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}),
        (TCLForVisualReasoning, {f"cls_head.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}),
        (TCLForTextAssignment, {"ta_head.weight", "ta_head.bias"}),
    ],
)
def test_layers_of_the_encoders_get_adapters_and_heads_are_trained_in_full(base, model_class, in_full):
    model = with_lora(model_class.from_pretrained(base))
    adapted, others = trained(model)
    assert others == in_full
    copies = 2 if model_class in (TCLForVisualReasoning, TCLForTextAssignment) else 1
    assert {name.rpartition(".")[2] for name in adapted} == LINEAR
    # Two vision layers of six linear layers, two text layers of six, and two fusion layers of ten. The second copy of a
    # fusion layer shares the projections to keys and values of images.
    assert len(adapted) == 2 * 6 + 2 * 6 + 2 * (10 + 8 * (copies - 1))
    assert not any(name.startswith("teacher.") for name in adapted)


def test_the_decoder_of_answers_learns_to_read_questions_in_full(base):
    adapted, others = trained(with_lora(TCLForQuestionAnswering.from_pretrained(base)))
    head = {f"text_decoder.{name}" for name in WORDS}
    cross = {name for name in others if ".cross_attn" in name}
    assert others == head | cross
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert cross == {
        f"text_decoder.text_model.layers.{n}.cross_attn{part}.{p}"
        for n in (0, 1)
        for part in [*(f".{name}" for name in parts), "_layer_norm"]
        for p in ("weight", "bias")
    }
    assert {f"text_decoder.text_model.layers.{n}.self_attn.q_proj" for n in (0, 1)} < adapted


def test_target_modules_and_modules_to_save_choose(base):
    fields = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["cross_attn.q_proj", "cross_attn.v_proj"]}
    model = with_lora(TCLForVisualEntailment.from_pretrained(base), **fields, modules_to_save=["embeddings.layer_norm"])
    adapted, others = trained(model)
    stacks = [f"tcl.vision_model.layers.{n}" for n in (0, 1)] + [f"tcl.text_model.layers.{n}" for n in range(4)]
    assert adapted == {f"{stack}.self_attn.{part}" for stack in stacks for part in ("q_proj", "v_proj")}
    assert {n for n in others if "cls_head" not in n} == {
        f"tcl.text_model.embeddings.layer_norm.{p}" for p in ("weight", "bias")
    }
    pattern = with_lora(TCLForVisualEntailment.from_pretrained(base), target_modules=r"tcl\.vision_model\..*\.fc1")
    assert trained(pattern)[0] == {f"tcl.vision_model.layers.{n}.fc1" for n in (0, 1)}


def test_weights_that_the_start_lacks_are_trained_in_full():
    """A text encoder and no image encoder: new are the whole vision model, all fusion layers and the heads."""
    whole = TCLForPreTraining(tiny_config_of())
    text = {k: v for k, v in whole.tcl.text_model.state_dict().items() if not k.startswith(("layers.2.", "layers.3."))}
    config = whole.config.text_config.to_dict()
    start = StartingPoint({name: config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")}, text)
    fields = {name: config[name] for name in ("fusion_layer", "num_attention_heads", "intermediate_size")}
    fields |= {"max_position_embeddings": config["max_position_embeddings"]}
    vision = whole.config.vision_config.to_dict()
    model = TCLForPreTraining.from_vision_text_pretrained(None, start, vision_config=vision, text_config=fields)
    adapted, others = trained(with_lora(model))
    assert {name.split(".")[3] for name in adapted if name.startswith("tcl.text_model")} == {"0", "1"}
    assert not any(name.startswith("tcl.vision_model") for name in adapted)
    new = {name for name, _ in model.named_parameters() if name.startswith("tcl.vision_model")}
    new |= {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("tcl.text_model.layers.2.", "tcl.text_model.layers.3."))
    }
    assert new < others
    assert not any(name.startswith("tcl.text_model.embeddings") for name in others)


def test_frozen_layers_get_no_adapters(base):
    model = TCLForVisualEntailment.from_pretrained(base)
    model.tcl.vision_model.requires_grad_(False)
    adapted, others = trained(with_lora(model))
    assert adapted and not any("vision_model" in name for name in adapted | others)


def test_locked_layers_get_no_adapters_and_stay_the_teachers_too(base):
    config = TCLConfig.from_pretrained(base, lock_vision=True, lock_text=1)
    model = stir_adapters(with_lora(TCLForPreTraining.from_pretrained(base, config=config))).train()
    adapted, _ = trained(model)
    assert {".".join(name.split(".")[:4]) for name in adapted} == {f"tcl.text_model.layers.{n}" for n in (1, 2, 3)}
    model.update_teacher()
    model(**training_batch(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_rates_by_part_and_averaged_weights_know_adapters(base, tmp_path):
    run(tmp_path / "run", base, max_steps=2, part_learning_rates={"vision": 1e-4}, layer_decay=0.5)
    with pytest.raises(TrainingError, match="average_weights does not work with adapters"):
        run(tmp_path, base, average_weights=True)


def test_layers_without_an_objective_get_no_adapters(base):
    """Otherwise a trained parameter would have no gradient, which stops a run of several processes."""
    config = TCLConfig.from_pretrained(base, itm_weight=0, mlm_weight=0)
    model = stir_adapters(with_lora(TCLForPreTraining.from_pretrained(base, config=config))).train()
    model(**training_batch(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not any(".layers.2." in name for name in trained(model)[0] if "text_model" in name)


# The teacher


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merged_weights_are_those_that_peft_merges(base, fields):
    model = stir_adapters(with_lora(TCLForVisualEntailment.from_pretrained(base), **fields))
    found = weights_of(model)
    adapted = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    for name, layer in adapted:
        layer.merge()
        for part, expected in layer.get_base_layer().named_parameters():
            torch.testing.assert_close(found[f"{name}.{part}"], expected, rtol=1e-6, atol=1e-7, msg=name)


def test_the_teacher_is_the_average_of_the_merged_weights(base):
    """After one update: 0.9 times the teacher and 0.1 times base + 8 / 4 * B @ A."""
    config = TCLConfig.from_pretrained(base, momentum=0.9)
    model = stir_adapters(with_lora(TCLForPreTraining.from_pretrained(base, config=config)))
    layer = model.tcl.text_model.layers[3].cross_attn.k_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    followed = model.teacher.tcl.text_model.layers[3].cross_attn.k_proj
    expected = 0.9 * followed.weight + 0.1 * (layer.base_layer.weight + 8 / 4 * (b @ a))
    expected_bias = 0.9 * followed.bias + 0.1 * layer.base_layer.bias
    model.update_teacher()
    torch.testing.assert_close(followed.weight, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(followed.bias, expected_bias.detach(), rtol=1e-6, atol=1e-7)
    # distance_to measures to the merged weights too
    model.teacher.copy_from(model)
    assert model.teacher.distance_to(model) == 0


def test_a_teacher_may_lack_modules_of_the_student(base):
    model = TCLForVisualEntailment.from_pretrained(base)
    model.teacher.tcl.vision_model = None
    model = stir_adapters(with_lora(model))
    before = model.teacher.tcl.text_model.layers[0].fc1.weight.clone()
    model.update_teacher()
    assert not torch.equal(model.teacher.tcl.text_model.layers[0].fc1.weight, before)


# Runs


def entailment_run(folder, base, **options):
    from datasets import Dataset

    rows = Dataset.from_list(statements(("entailment", "neutral", "contradiction"), 12))
    model, processor = open_model(CheckpointArguments(model=str(base)), TCLForVisualEntailment)
    collator = TCLTaskCollator(processor, label2id=model.config.label2id)
    tiny_run(folder, model=model, pairs=rows, collator=collator, learning_rate=1e-2, **options)
    return model


def run(folder, base, **options):
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    model = TCLForPreTraining.from_pretrained(base)
    tiny_run(folder, model=model, learning_rate=1e-2, **{"lora": {"r": 4, "lora_alpha": 8}} | options)
    return model


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, base)


def test_a_run_changes_only_what_is_trained_and_gives_the_optimizer_only_that(base, tmp_path):
    before = TCLForPreTraining.from_pretrained(base).state_dict()
    model = run(tmp_path, base, save_steps=4)
    after = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    changed = {name for name in after if not name.startswith("teacher.") and not torch.equal(after[name], before[name])}
    assert changed == CONTRAST | ITM | WORDS
    moved = [name for name, parameter in model.named_parameters() if ".lora_B." in name and parameter.any()]
    assert len(moved) == len(trained(model)[0])
    state = read_state(tmp_path / "checkpoints/step-00000004/optimizer.safetensors")
    assert len(state["state"]) == sum(parameter.requires_grad for parameter in model.parameters())


def test_new_adapters_change_no_output(base):
    model = TCLForPreTraining.from_pretrained(base)
    expected = outputs(model)
    assert_close(outputs(with_lora(model)), expected, rtol=0, atol=0)


def test_gradient_checkpointing_does_not_change_the_losses(base, finished, tmp_path):
    run(tmp_path, base, gradient_checkpointing=True)
    assert losses(tmp_path) == pytest.approx(losses(finished[0]), rel=1e-5)


def test_mixed_precision_stays_close(base, finished, tmp_path):
    model = run(tmp_path, base, bf16=True)
    assert losses(tmp_path) == pytest.approx(losses(finished[0]), rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_resumed_run_goes_on_bit_for_bit(base, finished, tmp_path):
    class Killed(Exception):
        pass

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, base, save_steps=2, eval_steps=3, evaluate=kill)
    run(tmp_path, base, resume=True)
    assert losses(tmp_path) == losses(finished[0])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, finished[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_evaluates_the_model_with_its_adapters(base, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(outputs(model))
        return {"recall@1": 1.0}

    run(tmp_path, base, evaluate=evaluate, eval_steps=3)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "recall@1" in line] == [3, 6]
    assert_close(outputs(TCLForPreTraining.from_pretrained(tmp_path)), seen[-1], rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_and_no_teacher_work(base, tmp_path):
    entailment_run(tmp_path, base, lora='{"r": 2}', per_device_train_batch_size=2, gradient_accumulation_steps=2)
    config = TCLConfig.from_pretrained(base, use_momentum_teacher=False)
    model = TCLForVisualEntailment.from_pretrained(base, config=config)
    assert trained(with_lora(model))[0]


def adapted_rank(rank, folder, checkpoint):
    model = run(folder, checkpoint, max_steps=2, per_device_train_batch_size=3)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name.startswith("teacher.")}
    torch.save(state, f"{folder}/rank{rank}.pt")


def test_two_processes_train_the_same_adapters(base, tmp_path):
    """Each draws its own starting values, and takes those of the first."""
    in_two_processes(adapted_rank, str(tmp_path), str(base))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert any(".lora_A." in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


# Saving and opening


def test_a_merged_run_is_a_plain_checkpoint_with_its_teacher(base, finished):
    folder, model = finished
    plain = TCLForPreTraining.from_pretrained(base)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == load_file(base / "model.safetensors").keys()
    assert not is_adapter(str(folder))
    opened = TCLForPreTraining.from_pretrained(folder)
    assert_close(outputs(opened), outputs(model), rtol=1e-4, atol=1e-5)
    assert (outputs(opened)["itm_logits"] - outputs(plain)["itm_logits"]).abs().max() > 1e-2
    for name, parameter in model.teacher.named_parameters():
        assert torch.equal(saved[f"teacher.{name}"], parameter), name
    assert all(torch.equal(opened.state_dict()[name], value) for name, value in merged_state_dict(model).items())


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, run(folder, base, lora_save="adapter")


def test_adapters_are_small_and_have_the_files_of_peft(base, adapters):
    folder, model = adapters
    assert is_adapter(str(folder)) and not (folder / "model.safetensors").exists()
    tensors = load_file(folder / "adapter_model.safetensors")
    own = {name for name in tensors if ".teacher." not in name}
    names = {name.replace(".default.", ".") for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own == {f"base_model.model.{name}" for name in names}
    # The temperature and the bias of words are not whole modules.
    whole = {name.rpartition(".")[0] for name in CONTRAST | WORDS} - {"tcl", "lm_head.decoder"} | {"itm_head"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == whole
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(base))
    assert config["auto_mapping"]["base_model_class"] == "TCLForPreTraining"


def test_adapters_open_in_peft_alone_with_the_same_outputs(base, adapters):
    folder, model = adapters
    for with_teacher in (False, True):
        plain = TCLForPreTraining.from_pretrained(base, use_momentum_teacher=with_teacher)
        opened = peft.PeftModel.from_pretrained(plain, folder)
        assert_close(outputs(opened.base_model.model), outputs(model), rtol=0, atol=0)
        assert opened.base_model.model.tcl.temperature == model.tcl.temperature
    allowed = {"import_allowlist": ["tcl_hf"]}
    by_itself = peft.AutoPeftModel.from_pretrained(folder, use_momentum_teacher=False, **allowed)
    assert_close(outputs(by_itself.base_model.model), outputs(model), rtol=0, atol=0)
    by_transformers = TCLForPreTraining.from_pretrained(folder)
    assert_close(outputs(by_transformers), outputs(model), rtol=0, atol=0)


def test_open_model_takes_adapters_as_it_takes_a_checkpoint(base, adapters, tmp_path):
    folder, model = adapters
    opened, processor = open_model(CheckpointArguments(model=str(folder)), TCLForPreTraining)
    assert processor(text="a red dog") == tiny_processor()(text="a red dog")
    assert opened.name_or_path == str(folder) and not hasattr(opened, "peft_config")
    assert_close(outputs(opened), outputs(model), rtol=1e-4, atol=1e-5)
    for name, parameter in opened.teacher.named_parameters():
        assert torch.equal(parameter, opened.get_parameter(name)), name
    for_inference, _ = open_model(CheckpointArguments(model=str(folder)), TCLForPreTraining, to_train=False)
    assert for_inference.teacher is None
    assert_close(outputs(for_inference), outputs(opened), rtol=0, atol=0)
    again = entailment_run(tmp_path, folder, lora={"r": 2})
    assert_close(outputs(TCLForVisualEntailment.from_pretrained(tmp_path)), outputs(again), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [TCLForVisualEntailment, TCLForQuestionAnswering])
def test_adapters_open_as_another_head_as_their_merged_model_does(adapters, tmp_path, model_class):
    folder, model = adapters
    model.save_pretrained(tmp_path, state_dict=merged_state_dict(model))
    found = open_checkpoint(str(folder), model_class, config_of(str(folder), use_momentum_teacher=False))
    expected = model_class.from_pretrained(tmp_path, use_momentum_teacher=False)
    assert found.new_weights == expected.new_weights
    for name, parameter in expected.named_parameters():
        if name not in expected.new_weights:
            assert torch.equal(found.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "model_class", [TCLForQuestionAnswering, TCLForVisualReasoning, TCLForTextAssignment, TCLForImageTextRetrieval]
)
def test_adapters_of_every_head_open_with_the_same_outputs(base, tmp_path, model_class):
    from tcl_hf.training.adapters import save_adapted

    torch.manual_seed(0)
    model = stir_adapters(with_lora(model_class.from_pretrained(base)))
    save_adapted(model, tmp_path, "adapter")
    found = open_checkpoint(str(tmp_path), model_class, config_of(str(tmp_path)))
    for name in ("logits", "itm_logits", "loss", "image_embeds"):
        if name in outputs(model):
            torch.testing.assert_close(outputs(found)[name], outputs(model)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_of_another_image_size_and_of_more_words_open(base, tmp_path):
    from datasets import Dataset

    from tcl_hf.recipes.build import add_words
    from tcl_hf.training.adapters import save_adapted

    args = CheckpointArguments(model=str(base), image_size=16)
    model, processor = open_model(args, TCLForQuestionAnswering)
    add_words(model, processor, Dataset.from_list([{"question": "a zebra?", "answers": ["zebra"]}]))
    embeddings = {"tcl.text_model", "text_decoder.text_model"}
    with_lora(model)
    names = {f"{part}.embeddings.word_embeddings.weight" for part in embeddings}
    assert names < trained(model)[1]
    stir_adapters(model)
    save_adapted(model, tmp_path, "adapter")
    processor.save_pretrained(tmp_path)
    found, its_processor = open_model(CheckpointArguments(model=str(tmp_path)), TCLForQuestionAnswering)
    assert found.config.vision_config.image_size == 16 and len(its_processor.tokenizer) == len(processor.tokenizer)
    assert found.config.text_config.vocab_size == model.config.text_config.vocab_size
    torch.testing.assert_close(outputs(found)["loss"], outputs(model)["loss"], rtol=1e-4, atol=1e-5)


def test_a_damaged_adapter_is_refused(base, adapters, tmp_path):
    import shutil

    shutil.copytree(adapters[0], tmp_path / "copy")
    file = tmp_path / "copy" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="is not the file that was saved"):
        open_checkpoint(str(tmp_path / "copy"), TCLForPreTraining, config_of(str(tmp_path / "copy")))


# Errors


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, r"lora has no field 'rank' \(did you mean 'r'\?\)"),
        ({"lora_aplha": 4}, r"no field 'lora_aplha' \(did you mean 'lora_alpha'\?\)"),
        ({"xyzzy": 4}, "no field 'xyzzy': its fields are r, lora_alpha"),
        ({"r": 0}, "lora.r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "lora.r must be a whole number of at least 1, got 2.5"),
        ("[1]", "lora is not an object, but"),
        ("{", "lora is not JSON"),
    ],
)
def test_fields_that_do_not_exist_or_make_no_sense_are_refused(lora, message):
    with pytest.raises(TrainingError, match=message):
        TCLTrainingArguments(lora=lora)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            r"target_modules: \['query'\] matches no layer of TCLForVisualEntailment that can have an adapter. Those "
            "that can are fc1, fc2, k_proj, out_proj, q_proj, v_proj",
        ),
        ({"target_modules": r"cls_head\.0"}, r"cls_head\\.0 matches no layer"),
        ({"modules_to_save": ["itm_head"]}, "TCLForVisualEntailment trains no module 'itm_head'. It has .*fc1"),
        ({"lora_dropout": "much"}, "PEFT refuses the fields of lora"),
    ],
)
def test_fields_that_do_not_fit_the_model_are_refused(base, fields, message):
    with pytest.raises(TrainingError, match=message):
        with_lora(TCLForVisualEntailment.from_pretrained(base), **fields)


def test_a_model_with_adapters_gets_no_more(base):
    model = with_lora(TCLForVisualEntailment.from_pretrained(base))
    with pytest.raises(TrainingError, match="has adapters already"):
        with_lora(model)


def test_lora_without_peft_names_the_extra(base, adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"LoRA needs PEFT: pip install 'tcl_hf\[interoperability\]'"):
        with_lora(TCLForVisualEntailment.from_pretrained(base))
    with pytest.raises(ValueError, match=r"cannot be opened: LoRA needs PEFT: pip install"):
        open_model(CheckpointArguments(model=str(adapters[0])), TCLForPreTraining)


def test_sharded_runs_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("tcl_hf.training.engine.Engine.is_sharded", True)
    with pytest.raises(TrainingError, match="lora does not work with FSDP2 and DeepSpeed"):
        run(tmp_path, base)


def test_adapters_alone_need_a_whole_model_to_be_added_to(base, adapters, tmp_path):
    new = TCLForPreTraining(small_patches())
    with pytest.raises(TrainingError, match="this model does not come from one: start from --model"):
        tiny_run(tmp_path, model=new, lora={"r": 2}, lora_save="adapter")
    with pytest.raises(TrainingError, match="holds adapters: choose lora_save: merged"):
        entailment_run(tmp_path, adapters[0], lora={"r": 2}, lora_save="adapter")


def test_one_folder_holds_a_whole_model_or_adapters(base, adapters, finished):
    with pytest.raises(TrainingError, match="holds a whole model, and this run saves adapters"):
        run(finished[0], base, lora_save="adapter")
    for options in ({}, {"lora": None}):
        with pytest.raises(TrainingError, match="holds adapters, and this run saves a whole model"):
            run(adapters[0], base, **options)


def test_adapters_whose_model_is_gone_name_it(adapters, tmp_path):
    import shutil

    shutil.copytree(adapters[0], tmp_path / "copy")
    file = tmp_path / "copy" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "gone/away"}))
    with pytest.raises(ValueError, match="copy cannot be opened: it holds adapters of gone/away, and"):
        open_model(CheckpointArguments(model=str(tmp_path / "copy")), TCLForPreTraining)
