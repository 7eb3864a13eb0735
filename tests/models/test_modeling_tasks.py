"""The heads of the tasks: their starting values, their losses and outputs, and their use through transformers."""

import copy
import math

import pytest
import torch
from helpers import (
    CLS,
    SEP,
    ReadBack,
    answers,
    assert_teacher_equals_student,
    config_of,
    questions_of,
    small_patches,
    stirred,
    training_batch,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel, Trainer
from transformers import TrainingArguments as TrainerArguments

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
    TCLTextModel,
)
from tcl_hf.models.checksums import CHECKSUMS
from tcl_hf.models.losses import draw_two_images
from tcl_hf.training.trainer_callback import TCLMomentumCallback

CLASSIFIERS = [TCLForVisualEntailment, TCLForVisualReasoning]
TAUGHT = [*CLASSIFIERS, TCLForQuestionAnswering]
HEADS = [*TAUGHT, TCLForTextAssignment]
FUSION_LAYER = 2


def pre_trained(folder, model_class: type = TCLForPreTraining, **fields) -> dict[str, torch.Tensor]:
    """Save a checkpoint whose teacher differs from its student; return its tensors, tied ones too."""
    model = stirred(model_class, **fields)
    model.save_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def batch_of(model: PreTrainedModel, number: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths about images, with the labels of the model's task."""
    batch = questions_of(model.config, number, seed)
    rows = torch.arange(number)
    if isinstance(model, TCLForQuestionAnswering):
        ids, mask = answers(number + 2, seed=seed)
        batch["labels"] = ids.masked_fill(mask == 0, -100)
        batch["question_index"] = (torch.arange(number + 2) * 2 + 1) % number  # not in order
        batch["answer_weights"] = torch.linspace(0.2, 1, number + 2)
        return batch
    batch["labels"] = rows % model.config.num_labels
    if isinstance(model, TCLForVisualReasoning):
        other = training_batch(number, config=model.config, seed=seed)["pixel_values_augmented"]
        batch["pixel_values"] = torch.stack([batch["pixel_values"], other], dim=1)
    if isinstance(model, TCLForTextAssignment):
        batch["first_image_index"], batch["second_image_index"] = rows, (rows + 1) % number
    return batch


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(computed: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-6):
    assert computed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(computed[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def twin_of_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the teacher's weights as its own."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.teacher.named_parameters():
            twin.get_parameter(name).copy_(parameter)
    return twin


# The weights from which a head starts


def origin(name: str, images: int, same_width: bool) -> str | None:
    """The tensor of a pre-training checkpoint from which a tensor of a head starts; None where it starts new."""
    owner = "teacher." if name.startswith("teacher.") else ""
    name = name.removeprefix("teacher.")
    if name.startswith(("cls_head.", "ta_head.")):
        return None
    parts = name.split(".")
    if name.startswith("text_decoder.text_model.layers."):
        if not same_width and parts[4] == "cross_attn" and parts[5] in ("k_proj", "v_proj"):
            return None
        return ".".join([f"{owner}tcl.text_model.layers", str(int(parts[3]) + FUSION_LAYER), *parts[4:]])
    if name.startswith("text_decoder.lm_head."):
        return owner + name.removeprefix("text_decoder.")
    if name.startswith("text_decoder."):
        return f"{owner}tcl." + name.removeprefix("text_decoder.")
    if name.startswith("tcl.text_model.layers.") and int(parts[3]) >= FUSION_LAYER:
        parts[3] = str(FUSION_LAYER + (int(parts[3]) - FUSION_LAYER) // images)
    return owner + ".".join(parts)


@pytest.mark.parametrize("vision_width", [24, 32])
@pytest.mark.parametrize("model_class", HEADS)
def test_every_head_starts_from_a_pre_training_checkpoint_alone(model_class, vision_width, tmp_path):
    source = pre_trained(tmp_path, vision_config={"hidden_size": vision_width})
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    images, state, new = model.config.text_config.images_per_text, model.state_dict(), set()
    for name, value in state.items():
        start = origin(name, images, vision_width == 32)
        if start is None and not name.startswith("teacher."):
            new.add(name)
        else:
            expected = state[name.removeprefix("teacher.")] if start is None else source[start]
            assert torch.equal(value, expected), name
    assert info["missing_keys"] == new
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert any(n.startswith("teacher.") for n in state) == (model_class is not TCLForTextAssignment)


@pytest.mark.parametrize("model_class", HEADS)
def test_no_two_weights_of_a_filled_head_share_memory(model_class, tmp_path):
    """A layer that starts as a copy of another must be trained separately, and safetensors must be able to save it."""
    pre_trained(tmp_path)
    model = model_class.from_pretrained(tmp_path)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(places) == len(set(places))
    model.save_pretrained(tmp_path / "again")


def test_the_decoders_words_are_tied_in_student_and_teacher(tmp_path):
    pre_trained(tmp_path)
    for model in (TCLForQuestionAnswering(config_of()), TCLForQuestionAnswering.from_pretrained(tmp_path)):
        for part in (model, model.teacher):
            words = part.text_decoder.text_model.embeddings.word_embeddings.weight
            assert part.text_decoder.lm_head.decoder.weight is words
            assert words is not part.tcl.text_model.embeddings.word_embeddings.weight


@pytest.mark.parametrize("model_class", [TCLForVisualReasoning, TCLForTextAssignment])
def test_fusion_layers_are_doubled_for_two_images_with_one_projection(model_class):
    layers = model_class(config_of()).tcl.text_model.layers
    assert len(layers) == FUSION_LAYER + 2 * 2
    assert [hasattr(layer, "cross_attn") for layer in layers] == [False] * 2 + [True] * 4
    for projection in ("k_proj", "v_proj"):
        assert [hasattr(layer.cross_attn, projection) for layer in layers[2:]] == [True, False, True, False]


@pytest.mark.parametrize("model_class", TAUGHT)
def test_a_checkpoint_without_teacher_gives_one_equal_to_the_student(model_class, tmp_path):
    pre_trained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("teacher.")}, file, {"format": "pt"})
    (tmp_path / CHECKSUMS).unlink()
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_teacher_equals_student(model)
    assert not any(key.startswith("teacher.") for key in info["missing_keys"])


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("source_class", [TCLModel, TCLForImageTextRetrieval])
def test_heads_start_from_a_bare_model_and_from_a_retrieval_checkpoint(source_class, model_class, tmp_path):
    source = pre_trained(tmp_path, source_class, vision_config={"hidden_size": 32})
    if source_class is TCLModel:
        source = {f"tcl.{name}": value for name, value in source.items()}
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    state, new = model.state_dict(), set()
    for name, value in state.items():
        start = origin(name, model.config.text_config.images_per_text, True)
        student = name.removeprefix("teacher.")
        if start == "lm_head.decoder.weight":  # tied
            start = "tcl.text_model.embeddings.word_embeddings.weight"
        if start == "teacher.lm_head.decoder.weight":
            start = "teacher.tcl.text_model.embeddings.word_embeddings.weight"
        if start in source:
            assert torch.equal(value, source[start]), name
        elif student != name:
            assert torch.equal(value, state[student]), name
        else:
            new.add(name)
    assert info["missing_keys"] == new
    assert {name.rsplit(".", 1)[0] for name in new} <= {
        *("cls_head.0", "cls_head.2", "ta_head", "text_decoder.lm_head.dense"),
        *("text_decoder.lm_head.layer_norm", "text_decoder.lm_head.decoder"),
    }
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("model_class", TAUGHT)
def test_loading_without_teacher_leaves_it_out_and_alpha_without_effect(model_class, tmp_path):
    stirred(model_class).save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, use_momentum_teacher=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.teacher is None
    assert not any(name.startswith("teacher") for name in model.state_dict())
    whole = model_class.from_pretrained(tmp_path).train()
    batch = batch_of(model)
    torch.testing.assert_close(model.train()(**batch, alpha=0.4).loss, whole(**batch, alpha=0).loss)


def test_text_assignment_has_no_teacher():
    model = TCLForTextAssignment(config_of())
    assert not any("teacher" in name or "queue" in name for name in model.state_dict())


def test_reasoning_starts_from_text_assignment_with_its_layers_and_own_labels(tmp_path):
    source = pre_trained(tmp_path, TCLForTextAssignment)
    model, info = TCLForVisualReasoning.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"cls_head"} and not info["unexpected_keys"]
    for name, value in model.tcl.state_dict().items():
        assert torch.equal(value, source[f"tcl.{name}"]), name
    assert_teacher_equals_student(model)
    first, second = model.tcl.text_model.layers[2:4]
    assert not torch.equal(first.fc1.weight, second.fc1.weight)
    assert model.config.id2label == {0: "False", 1: "True"}
    assert model(**batch_of(model)).logits.shape == (3, 2)


def test_doubled_layers_are_distinguished_from_as_many_single_ones(tmp_path):
    """Six fusion layers, and three that were doubled, have the same names."""
    single = pre_trained(tmp_path / "single", text_config={"num_hidden_layers": 8})
    doubled = pre_trained(tmp_path / "doubled", TCLForTextAssignment, text_config={"num_hidden_layers": 5})
    query = "tcl.text_model.layers.{}.cross_attn.q_proj.weight"
    layers = [query.format(number) for number in range(2, 8)]
    assert all(name in single and name in doubled for name in layers)
    state = TCLForVisualReasoning.from_pretrained(tmp_path / "doubled").state_dict()
    assert all(torch.equal(state[name], doubled[name]) for name in layers)
    assert query.format(8) not in state
    state = TCLForVisualReasoning.from_pretrained(tmp_path / "single").state_dict()
    for number, name in enumerate(layers):
        for copy_number in range(2):
            assert torch.equal(state[query.format(2 + 2 * number + copy_number)], single[name])


@pytest.mark.parametrize("model_class", [TCLModel, AutoModel, TCLTextModel])
def test_a_doubled_checkpoint_opens_as_the_bare_model(model_class, tmp_path):
    source = pre_trained(tmp_path, TCLForVisualReasoning)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    prefix = "tcl.text_model." if model_class is TCLTextModel else "tcl."
    state = model.state_dict()
    assert set(state) == {n.removeprefix(prefix) for n in source if n.startswith(prefix)}
    assert all(torch.equal(value, source[prefix + name]) for name, value in state.items())


@pytest.mark.parametrize("model_class", [TCLForVisualEntailment, TCLForQuestionAnswering])
def test_a_doubled_checkpoint_is_refused_by_heads_of_one_image(model_class, tmp_path):
    pre_trained(tmp_path, TCLForTextAssignment)
    with pytest.raises(ValueError, match=r"text_config\.images_per_text=2"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", HEADS)
def test_positions_are_resized_to_another_image_size(model_class, tmp_path):
    source = pre_trained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vision_config.image_size = 48
    model = model_class.from_pretrained(tmp_path, config=config)
    for owner in ("", "teacher.")[: 1 + (model.teacher is not None)]:
        name = f"{owner}tcl.vision_model.embeddings.position_embeddings"
        grid = source[name][:, 1:].transpose(1, 2).reshape(1, -1, 4, 4)
        expected = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        positions = model.get_parameter(name)
        assert torch.equal(positions[:, :1], source[name][:, :1])
        torch.testing.assert_close(positions[:, 1:], expected)


@pytest.mark.parametrize("model_class", HEADS)
def test_heads_of_tasks_have_one_loss_and_no_queue(model_class):
    model = model_class(small_patches())
    assert model.loss_names == ("loss",)
    assert model(**batch_of(model)).loss.shape == ()
    teacher = {"teacher_distance"} if model_class in TAUGHT else set()
    assert model.training_statistics().keys() == {"temperature"} | teacher


# Saving


@pytest.mark.parametrize("model_class", HEADS)
def test_round_trip_keeps_every_tensor_and_stores_tied_ones_once(model_class, tmp_path):
    model = stirred(model_class)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert stored == {name for name in state if not name.endswith("text_decoder.lm_head.decoder.weight")}


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (TCLForVisualEntailment, ["contradiction", "neutral", "entailment"]),
        (TCLForVisualReasoning, ["False", "True"]),
        (TCLForTextAssignment, ["first", "second", "neither"]),
    ],
)
def test_labels_of_the_task_are_in_the_config_and_the_callers_is_left_alone(model_class, labels, tmp_path):
    config = config_of()
    before = config.to_dict()
    model = model_class(config)
    assert config.to_dict() == before
    model.save_pretrained(tmp_path)
    for saved in (model.config, AutoConfig.from_pretrained(tmp_path), model_class.from_pretrained(tmp_path).config):
        assert saved.id2label == dict(enumerate(labels))
        assert saved.label2id == {name: number for number, name in enumerate(labels)}


def test_a_config_of_questions_is_left_alone():
    config = config_of()
    before = config.to_dict()
    TCLForQuestionAnswering(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("model_class", CLASSIFIERS)
@pytest.mark.parametrize("given", [{"num_labels": 5}, {"id2label": {0: "no", 1: "yes"}}])
def test_own_labels_and_their_number_survive(model_class, given, tmp_path):
    pre_trained(tmp_path)
    number = given.get("num_labels", 2)
    for model in (model_class(config_of(**given)), model_class.from_pretrained(tmp_path, **given)):
        assert model.config.num_labels == model.cls_head[-1].out_features == number
        model.save_pretrained(tmp_path / "again")
        again = model_class.from_pretrained(tmp_path / "again")
        assert again.config.id2label == given.get("id2label", {n: f"LABEL_{n}" for n in range(number)})
        assert torch.equal(again.cls_head[-1].weight, model.cls_head[-1].weight)


@pytest.mark.parametrize("new_size", [90, 60])
def test_both_vocabularies_and_the_teachers_are_resized(new_size, tmp_path):
    model = stirred(TCLForQuestionAnswering)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.resize_token_embeddings(new_size)
    kept = min(new_size, 80)
    for owner, part in (("", model), ("teacher.", model.teacher)):
        for stack in ("tcl", "text_decoder"):
            name = f"{stack}.text_model.embeddings.word_embeddings"
            words = part.get_submodule(name)
            assert words.weight.shape[0] == words.num_embeddings == new_size
            assert torch.equal(words.weight[:kept], before[f"{owner}{name}.weight"][:kept])
            assert words.weight.requires_grad == (owner == "")
            student = model.get_parameter(f"{name}.weight")
            assert torch.equal(words.weight[kept:], student[kept:])
        decoder = part.text_decoder
        assert decoder.lm_head.decoder.weight is decoder.text_model.embeddings.word_embeddings.weight
        assert decoder.lm_head.decoder.bias.shape == (new_size,)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert_only_the_contrast_is_frozen(model)
    model.train().update_teacher()
    batch = batch_of(model)
    batch["labels"] = batch["labels"].clamp(max=59)
    output = model(**batch)
    assert torch.isfinite(output.loss) and output.logits.shape[-1] == new_size
    model.save_pretrained(tmp_path)
    again, info = TCLForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.text_config.vocab_size == again.text_decoder.config.vocab_size == new_size
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


# The parameters that are trained


def assert_only_the_contrast_is_frozen(model):
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    contrast = {f"tcl.{side}_projection.{kind}" for side in ("visual", "text") for kind in ("weight", "bias")}
    assert {name for name in frozen if not name.startswith("teacher.")} == contrast | {"tcl.temperature"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("alpha", [0, 0.4])
@pytest.mark.parametrize("model_class", HEADS)
def test_every_parameter_that_is_not_frozen_gets_a_gradient(model_class, alpha, loaded, tmp_path):
    """A distributed run stops at a trained parameter that has no gradient."""
    if loaded:
        pre_trained(tmp_path)
        model = model_class.from_pretrained(tmp_path).train()
    else:
        model = stirred(model_class).train()
    assert_only_the_contrast_is_frozen(model)
    teacher_alpha = {} if model_class is TCLForTextAssignment else {"alpha": alpha}
    model(**batch_of(model), **teacher_alpha).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("model_class", HEADS)
def test_training_lowers_the_loss(model_class):
    torch.manual_seed(0)
    model = model_class(config_of(momentum=0.9)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch, losses = batch_of(model, 4), []
    for _ in range(15):
        model.update_teacher()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("model_class", HEADS)
def test_a_training_step_reads_nothing_back_from_the_device(model_class):
    model = model_class(config_of()).train()
    batch = batch_of(model)
    if model_class is TCLForTextAssignment:
        batch = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    with ReadBack() as watch:
        model.update_teacher()
        model(**batch).loss.backward()
        seen = list(watch.seen)
    assert seen == []


# Attention, checkpointing, precision, export, compilation


@pytest.mark.parametrize("model_class", HEADS)
def test_sdpa_equals_eager_forward_and_backward(model_class):
    results = []
    for attention in ("sdpa", "eager"):
        model = stirred(model_class).train()
        model.set_attn_implementation(attention)
        output = model(**batch_of(model))
        output.loss.backward()
        results.append((output.loss.detach(), output.logits.detach(), gradients_of(model)))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=1e-5)
    assert_same_gradients(results[0][2], results[1][2])


@pytest.mark.parametrize("model_class", HEADS)
def test_every_part_loads_with_the_attention_that_is_asked_for(model_class, tmp_path):
    pre_trained(tmp_path)
    model = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    model.set_attn_implementation("sdpa")
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}


@pytest.mark.slow
def test_flex_attention_equals_sdpa_in_the_decoder():
    model = stirred(
        TCLForQuestionAnswering, 0, vision_config={"hidden_size": 64}, text_config={"hidden_size": 64}
    ).eval()
    batch = batch_of(model)
    with torch.no_grad():
        expected = model(**batch, alpha=0)
        model.set_attn_implementation("flex_attention")
        try:
            computed = model(**batch, alpha=0)
        except Exception as error:  # flex attention compiles, which takes a compiler
            pytest.skip(f"flex attention does not run here: {str(error)[:80]}")
    torch.testing.assert_close(computed.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(computed.loss, expected.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_class", HEADS)
def test_gradient_checkpointing_gives_the_same_gradients(model_class, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = stirred(model_class).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model(**batch_of(model)).loss.backward()
        gradients.append(gradients_of(model))
    assert_same_gradients(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_class", HEADS)
def test_bfloat16_autocast_stays_within_two_percent(model_class):
    model = stirred(model_class, 0).train()
    batch = batch_of(model, 4)
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 0.02 * expected


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_torch_export_of_classification(model_class):
    model = stirred(model_class).eval()
    batch = batch_of(model)
    del batch["labels"]
    program = torch.export.export(model, (), batch)
    torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", [TCLForVisualReasoning, TCLForQuestionAnswering])
def test_a_step_with_a_changing_alpha_is_compiled_once(model_class):
    few_layers = {"text_config": {"num_hidden_layers": 2, "fusion_layer": 1}, "vision_config": {"num_hidden_layers": 1}}
    model, counter, counts = stirred(model_class, **few_layers).train(), CompileCounter(), []
    forward = torch.compile(model.forward, backend=counter)
    for step in range(3):
        model.update_teacher()
        batch, alpha = batch_of(model, seed=step), 0.2 * step
        loss = forward(**batch, alpha=torch.tensor(alpha)).loss
        torch.testing.assert_close(loss, model(**batch, alpha=alpha).loss, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[0]] * 2


# Entailment and reasoning


@pytest.mark.parametrize("alpha", [0, 0.4, torch.tensor(0.4)])
@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_classes_are_learned_from_labels_and_teacher(model_class, alpha):
    """Value and gradient against a loop over texts and classes; the teacher's share carries no gradient."""
    model = stirred(model_class).train()
    batch = batch_of(model, 4)
    labels = batch["labels"]
    model(**batch, alpha=alpha).loss.backward()
    computed = gradients_of(model)
    model.zero_grad()
    loss = model(**batch, alpha=alpha).loss
    with torch.no_grad():
        taught = twin_of_teacher(model)(**batch).logits.tolist()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, slow = model(**inputs).logits, 0.0
    for row in range(4):
        total = sum(torch.exp(logit) for logit in logits[row])
        taught_total = sum(math.exp(logit) for logit in taught[row])
        for number in range(model.config.num_labels):
            hard = float(number == labels[row])
            target = (1 - float(alpha)) * hard + float(alpha) * math.exp(taught[row][number]) / taught_total
            slow = slow - target * torch.log(torch.exp(logits[row, number]) / total) / 4
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-6)
    slow.backward()
    assert_same_gradients(computed, gradients_of(model))


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_a_batch_equals_its_texts_one_by_one_without_padding(model_class):
    model = stirred(model_class).eval()
    batch = batch_of(model, 4)
    with torch.no_grad():
        logits = model(**batch).logits
        for row in range(4):
            length = int(batch["attention_mask"][row].sum())
            one = model(batch["input_ids"][row : row + 1, :length], batch["pixel_values"][row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], one.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_batch_of_one_trains(model_class):
    model = stirred(model_class).train()
    output = model(**batch_of(model, 1))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(model).values())


@pytest.mark.parametrize("alpha", [0, 0.4])
@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_texts_without_label_leave_the_mean(model_class, alpha):
    model = stirred(model_class).train()
    batch = batch_of(model, 4)
    some = {name: value[::2] for name, value in batch.items()}
    batch["labels"] = batch["labels"].where(torch.arange(4) % 2 == 0, -100)
    torch.testing.assert_close(model(**batch, alpha=alpha).loss, model(**some, alpha=alpha).loss)
    batch["labels"].fill_(-100)
    loss = model(**batch, alpha=alpha).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients_of(model).values())


@pytest.mark.parametrize("model_class", TAUGHT)
def test_texts_that_share_an_image_give_what_they_give_with_a_copy_each(model_class):
    model = stirred(model_class).train()
    batch = batch_of(model, number=5)
    index = torch.tensor([1, 0, 1, 1, 0])
    losses, gradients = [], []
    for pixels, which in ((batch["pixel_values"][:2], index), (batch["pixel_values"][index], None)):
        model.zero_grad()
        loss = model(**batch | {"pixel_values": pixels, "image_index": which}, alpha=0.4).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: gradient.clone() for name, gradient in gradients_of(model).items()})
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("model_class", TAUGHT)
def test_as_many_texts_as_images_or_an_index_are_asked_for(model_class):
    model = stirred(model_class)
    batch = batch_of(model, number=4)
    with pytest.raises(ValueError, match="4 texts about 2 images: pass image_index, the image of each"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})


def test_the_order_of_two_images_matters():
    model = stirred(TCLForVisualReasoning).eval()
    batch = batch_of(model)
    with torch.no_grad():
        logits = model(**batch).logits
        swapped = model(**batch | {"pixel_values": batch["pixel_values"].flip(1)}).logits
    assert (logits - swapped).abs().max() > 1e-3


def test_each_copy_of_a_fusion_layer_reads_its_own_image():
    """Keys and values of copy n are those of image n, by the projections of the first copy."""
    model = stirred(TCLForVisualReasoning).eval()
    batch = batch_of(model)
    left, right = batch["pixel_values"].unbind(1)
    with torch.no_grad():
        images = tuple(model.tcl.encode_image(image) for image in (left, right))
        projected = model.tcl.text_model.project_images(images)
        for number, (key, value) in enumerate(projected):
            owner = model.tcl.text_model.layers[2 + number // 2 * 2].cross_attn
            for made, layer in ((key, owner.k_proj), (value, owner.v_proj)):
                expected = layer(images[number % 2]).view(3, 17, 4, 8).transpose(1, 2)
                torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("model_class", HEADS)
def test_interpolated_positions_equal_those_of_a_model_of_that_size(model_class, tmp_path):
    stirred(model_class).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vision_config.image_size = 48
    small, large = model_class.from_pretrained(tmp_path), model_class.from_pretrained(tmp_path, config=config)
    batch = batch_of(large)
    with pytest.raises(ValueError, match="48 x 48 do not fit the model's 32 x 32"):
        small(**batch)
    small.train(), large.train()
    torch.testing.assert_close(small(**batch, interpolate_pos_encoding=True).loss, large(**batch).loss)


@pytest.mark.parametrize(
    ("model_class", "shape", "message"),
    [
        (TCLForVisualEntailment, (3, 1, 3, 32, 32), r"reads pixel_values \(B, 3, height, width\), but got \(3, 1, 3"),
        (TCLForVisualEntailment, (3, 2, 3, 32, 32), r"TCLForVisualEntailment reads pixel_values \(B, 3"),
        (TCLForVisualReasoning, (3, 3, 32, 32), r"reads pixel_values \(B, 2, 3, height, width\), but got \(3, 3, 32"),
        (TCLForVisualReasoning, (3, 3, 3, 32, 32), r"TCLForVisualReasoning reads pixel_values \(B, 2, 3"),
    ],
)
def test_another_number_of_images_is_refused_with_a_sentence(model_class, shape, message):
    model = model_class(config_of())
    with pytest.raises(ValueError, match=message):
        model(questions_of(model.config)["input_ids"], torch.zeros(shape))


@pytest.mark.parametrize("model_class", HEADS)
def test_missing_texts_or_images_are_refused_with_a_sentence(model_class):
    model = model_class(config_of())
    batch = batch_of(model)
    for missing in ("input_ids", "pixel_values"):
        with pytest.raises(ValueError, match="pass both input_ids and pixel_values"):
            model(**{name: value for name, value in batch.items() if name != missing})


# Text assignment


def test_text_assignment_reads_the_named_images_of_each_text():
    model = stirred(TCLForTextAssignment).eval()
    batch = questions_of(model.config, 3)
    first, second = torch.tensor([2, 0, 1, 1]), torch.tensor([1, 1, 0, 2])
    texts = torch.tensor([0, 1, 2, 1])  # more texts than images
    ids, mask = batch["input_ids"][texts], batch["attention_mask"][texts]
    labels = torch.tensor([1, 0, 2, -100])
    with torch.no_grad():
        output = model(ids, batch["pixel_values"], mask, first, second, labels)
        losses = []
        for row in range(4):
            images = [model.tcl.encode_image(batch["pixel_values"][i[row], None]) for i in (first, second)]
            fused = model.tcl.text_model(ids[row : row + 1], mask[row : row + 1], encoder_hidden_states=tuple(images))
            logits = model.ta_head(fused.last_hidden_state[:, 0])
            torch.testing.assert_close(output.logits[row : row + 1], logits, rtol=1e-4, atol=1e-5)
            if labels[row] >= 0:
                losses.append(-logits[0].log_softmax(-1)[labels[row]])
    torch.testing.assert_close(output.loss, sum(losses) / 3)


def test_text_assignment_draws_images_by_its_own_image_features():
    model = stirred(TCLForTextAssignment).train()
    batch = questions_of(model.config, 4)
    torch.manual_seed(7)
    drawn = model(**batch).loss
    features = model.tcl.get_image_features(batch["pixel_values"]).pooler_output
    torch.manual_seed(7)
    first, second, labels = draw_two_images(features)
    given = model(**batch, first_image_index=first, second_image_index=second, labels=labels).loss
    torch.testing.assert_close(drawn, given)
    torch.manual_seed(8)
    assert not torch.equal(model(**batch).loss, drawn)


@pytest.mark.parametrize("number", [1, 2])
def test_text_assignment_trains_on_batches_with_too_few_images(number):
    model = stirred(TCLForTextAssignment).train()
    for seed in range(6):
        torch.manual_seed(seed)
        model.zero_grad()
        output = model(**questions_of(model.config, number))
        output.loss.backward()
        assert torch.isfinite(output.loss) and output.logits.shape == (number, 3)
        assert all(torch.isfinite(gradient).all() for gradient in gradients_of(model).values())
        if number == 1:
            assert output.loss.item() == 0


def test_one_index_without_the_other_and_unequal_batches_are_refused():
    model = TCLForTextAssignment(config_of())
    batch = questions_of(model.config, 3)
    with pytest.raises(ValueError, match="both first_image_index and second_image_index"):
        model(**batch, first_image_index=torch.arange(3))
    with pytest.raises(ValueError, match="got 2 images and 3 texts"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})


# Question answering


def read_alone(model, batch: dict, question: int) -> torch.Tensor:
    """States (1, L, width) of one question with its image, without padding."""
    length = int(batch["attention_mask"][question].sum())
    image = model.tcl.encode_image(batch["pixel_values"][question : question + 1])
    ids = batch["input_ids"][question : question + 1, :length]
    return model.tcl.text_model(ids, encoder_hidden_states=image).last_hidden_state


@pytest.mark.parametrize("alpha", [0, 0.4, torch.tensor(0.4)])
def test_answers_are_learned_from_tokens_and_teacher(alpha):
    """Value and gradient against a loop over answers and tokens, each answer alone and without padding."""
    model = stirred(TCLForQuestionAnswering).train()
    batch = batch_of(model)
    loss = model(**batch, alpha=alpha).loss
    loss.backward()
    computed = gradients_of(model)
    model.zero_grad()
    twin, slow = twin_of_teacher(model), 0.0
    for answer, labels in enumerate(batch["labels"]):
        question = int(batch["question_index"][answer])
        ids = labels[labels != -100]
        logits = model.text_decoder(ids[None, :-1], encoder_hidden_states=read_alone(model, batch, question)).logits[0]
        with torch.no_grad():
            states = read_alone(twin, batch, question)
            taught = twin.text_decoder(ids[None, :-1], encoder_hidden_states=states).logits[0]
        for position, token in enumerate(ids[1:]):
            log_p = logits[position] - torch.log(torch.exp(logits[position]).sum())
            p = torch.exp(taught[position]) / torch.exp(taught[position]).sum()
            token_loss = (1 - float(alpha)) * -log_p[token] - float(alpha) * (p * log_p).sum()
            slow = slow + batch["answer_weights"][answer] * token_loss / 3
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-5)
    slow.backward()
    assert_same_gradients(computed, gradients_of(model), rtol=1e-3, atol=2e-5)


def test_answers_may_come_in_any_order_and_weigh_one_by_default():
    model = stirred(TCLForQuestionAnswering).train()
    batch = batch_of(model)
    expected = model(**batch).loss
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = {name: batch[name][order] for name in ("labels", "question_index", "answer_weights")}
    torch.testing.assert_close(model(**batch | moved).loss, expected)
    without = {name: value for name, value in batch.items() if name != "answer_weights"}
    ones = model(**without | {"answer_weights": torch.ones(5)}).loss
    torch.testing.assert_close(model(**without).loss, ones)
    single = [model(**without | {"answer_weights": F.one_hot(torch.tensor(n), 5).float()}).loss for n in range(5)]
    torch.testing.assert_close(sum(w * loss for w, loss in zip(batch["answer_weights"], single, strict=True)), expected)


def test_without_index_answer_n_belongs_to_question_n():
    model = stirred(TCLForQuestionAnswering).train()
    batch = batch_of(model)
    batch = {name: value[:3] for name, value in batch.items() if name != "question_index"}
    torch.testing.assert_close(model(**batch).loss, model(**batch, question_index=torch.arange(3)).loss)


def test_questions_without_answers_are_read_only():
    model = stirred(TCLForQuestionAnswering).eval()
    batch = questions_of(model.config)
    with torch.no_grad():
        output = model(**batch)
        assert output.loss is None and output.logits is None
        for question in range(3):
            alone = read_alone(model, batch, question)
            states = output.encoder_last_hidden_state[question : question + 1, : alone.shape[1]]
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_answers_without_questions_are_refused_with_a_sentence():
    model = TCLForQuestionAnswering(config_of())
    batch = batch_of(model)
    with pytest.raises(ValueError, match=r"question_index \(3,\) must have one entry for each of 5 answers"):
        model(**batch | {"question_index": torch.arange(3)})
    del batch["question_index"]
    with pytest.raises(ValueError, match="There are 5 answers to 3 questions: pass question_index"):
        model(**batch)


def slow_scores(model, batch: dict, candidates: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each candidate's first token (N, C), and its score with the first token twice (N, C)."""
    first, scores = torch.zeros(2, len(batch["input_ids"]), len(candidates))
    for question in range(len(first)):
        states = read_alone(model, batch, question)
        for number in range(len(candidates)):
            ids = candidates[number][mask[number].bool()]
            log_p = model.text_decoder(ids[None], encoder_hidden_states=states).logits[0].log_softmax(-1)
            tokens = [log_p[position, token] for position, token in enumerate(ids[1:])]
            first[question, number] = tokens[0]
            scores[question, number] = tokens[0] + sum(tokens)
    return first, scores


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("k", [3, 9, 20])
def test_ranking_equals_reading_every_candidate(number, k):
    model = stirred(TCLForQuestionAnswering).eval()
    batch = questions_of(model.config, number)
    candidates, mask = answers(9)
    before = model.config.to_dict()
    ranked = model.rank_answers(
        batch["input_ids"], batch["pixel_values"], candidates, mask, k, attention_mask=batch["attention_mask"]
    )
    assert model.config.to_dict() == before
    with torch.no_grad():
        first, scores = slow_scores(model, batch, candidates, mask)
    chosen = first.sort(descending=True).indices[:, : min(k, 9)]
    expected, order = scores.gather(1, chosen).sort(descending=True)
    assert torch.equal(ranked.indices, chosen.gather(1, order))
    torch.testing.assert_close(ranked.scores, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranked.probabilities, expected.exp() / expected.exp().sum(1, keepdim=True))
    torch.testing.assert_close(ranked.probabilities.sum(1), torch.ones(number))


def test_ranking_of_candidates_with_the_same_first_word_and_of_empty_ones():
    model = stirred(TCLForQuestionAnswering).eval()
    batch = questions_of(model.config)
    candidates = torch.tensor([[2, 9, 3, 0], [2, 9, 7, 3], [2, 3, 0, 0], [2, 8, 3, 0]])
    mask = (candidates != 0).long()
    given = (batch["input_ids"], batch["pixel_values"])
    ranked = model.rank_answers(*given, candidates, mask, attention_mask=batch["attention_mask"])
    with torch.no_grad():
        _, scores = slow_scores(model, batch, candidates, mask)
    torch.testing.assert_close(ranked.scores, scores.gather(1, ranked.indices), rtol=1e-5, atol=1e-5)
    assert torch.equal(ranked.indices, scores.sort(descending=True).indices)
    empty = model.rank_answers(*given, candidates[2:3], mask[2:3], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(empty.scores, scores[:, 2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 7])
def test_ranking_does_not_depend_on_the_size_of_chunks(chunk_size):
    model = stirred(TCLForQuestionAnswering).eval()
    batch = questions_of(model.config)
    given = (batch["input_ids"], batch["pixel_values"], *answers(9), 6, batch["attention_mask"])
    expected, ranked = model.rank_answers(*given), model.rank_answers(*given, chunk_size=chunk_size)
    assert torch.equal(ranked.indices, expected.indices)
    torch.testing.assert_close(ranked.scores, expected.scores)


def test_ranking_uses_no_dropout_and_restores_the_mode():
    model = stirred(TCLForQuestionAnswering, 0, text_config={"hidden_dropout_prob": 0.5}).eval()
    batch = questions_of(model.config)
    given = (batch["input_ids"], batch["pixel_values"], *answers(9))
    expected = model.rank_answers(*given).scores
    assert not model.training
    model.train()
    assert torch.equal(model.rank_answers(*given).scores, expected)
    assert model.training and model.text_decoder.training
    with pytest.raises(ValueError, match="do not fit"):
        model.rank_answers(batch["input_ids"], torch.zeros(3, 3, 40, 40), *answers(9))
    assert model.training and model.text_decoder.training


def test_attentions_of_answers_are_causal_with_any_mask():
    """transformers leaves out a mask that is only causal, and the weights must be causal all the same."""
    decoder = stirred(TCLForQuestionAnswering, 0).eval().text_decoder
    ids, states = torch.tensor([[CLS, 31, 54, 68, 70]] * 2), torch.randn(2, 6, decoder.config.hidden_size)
    with torch.no_grad():
        expected = decoder(ids, encoder_hidden_states=states).logits
        for mask in (None, torch.ones_like(ids)):
            output = decoder(ids, mask, encoder_hidden_states=states, output_attentions=True)
            torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
            for weights in output.attentions:
                assert weights.triu(1).abs().max() == 0
                torch.testing.assert_close(weights.sum(-1), torch.ones(2, weights.shape[1], 5))


def test_a_decoder_takes_its_cache_by_both_names():
    decoder = stirred(TCLForQuestionAnswering, 0).eval().text_decoder
    ids, states = torch.tensor([[CLS, 31, 54]]), torch.randn(1, 6, decoder.config.hidden_size)
    with torch.no_grad():
        expected = decoder(ids, encoder_hidden_states=states).logits[:, -1]
        for name in ("cache", "past_key_values"):
            first = decoder(ids[:, :2], encoder_hidden_states=states, use_cache=True)
            found = decoder(ids[:, 2:], **{name: first.cache}).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def writer():
    """A model that ends some of its answers early."""
    model = stirred(TCLForQuestionAnswering, 0).eval()
    with torch.no_grad():
        model.text_decoder.lm_head.decoder.bias[SEP] += 1.5
    return model


def write_slowly(model, states: torch.Tensor, longest: int) -> list[int]:
    """Append the most probable next token again and again, without a cache."""
    ids = [CLS]
    while len(ids) <= longest and ids[-1] != SEP:
        logits = model.text_decoder(torch.tensor([ids]), encoder_hidden_states=states).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


def test_greedy_generation_equals_a_slow_loop_question_by_question(writer):
    batch = questions_of(writer.config, 6)
    written = writer.generate(**batch, max_new_tokens=7, do_sample=False)
    with torch.no_grad():
        slow = [write_slowly(writer, read_alone(writer, batch, question), 7) for question in range(6)]
    width = max(map(len, slow))
    assert written.tolist() == [ids + [0] * (width - len(ids)) for ids in slow]
    assert {ids[-1] == SEP for ids in slow} == {True, False}  # some end early, some do not
    for question in range(6):
        length = int(batch["attention_mask"][question].sum())
        ids, image = batch["input_ids"][question, None, :length], batch["pixel_values"][question, None]
        assert writer.generate(ids, image, max_new_tokens=7)[0].tolist() == slow[question]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_cache_equals_that_without(writer, num_beams):
    batch = questions_of(writer.config, 4)
    with_cache, without = (
        writer.generate(**batch, max_new_tokens=5, num_beams=num_beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_beams_find_an_answer_at_least_as_probable_as_the_greedy_one(writer):
    """With as many beams as words, and two words to write, the search is exhaustive."""
    batch = questions_of(writer.config, 2)
    with torch.no_grad():
        writer.text_decoder.lm_head.decoder.bias[SEP] = -100  # no answer ends early
        written = writer.generate(**batch, max_new_tokens=2, num_beams=80)
        for question in range(2):
            states = read_alone(writer, batch, question)
            first = (
                writer.text_decoder(torch.tensor([[CLS]]), encoder_hidden_states=states).logits[0, 0].log_softmax(-1)
            )
            starts = torch.stack([torch.full((80,), CLS), torch.arange(80)], dim=1)
            second = writer.text_decoder(starts, encoder_hidden_states=states.expand(80, -1, -1)).logits[:, 1]
            best = int((first[:, None] + second.log_softmax(-1)).argmax())
            assert written[question].tolist() == [CLS, best // 80, best % 80]


def test_generation_stops_at_the_end_and_at_the_limit(writer):
    batch = questions_of(writer.config)
    bias = writer.text_decoder.lm_head.decoder.bias
    with torch.no_grad():
        bias[SEP] = 100
        assert writer.generate(**batch).tolist() == [[CLS, SEP]] * 3
        bias[SEP] = -100
        assert writer.generate(**batch, max_new_tokens=4).shape == (3, 5)
        assert writer.generate(**batch).shape == (3, 11)


# transformers' Trainer


@pytest.mark.parametrize("model_class", [TCLForVisualEntailment, TCLForQuestionAnswering])
def test_transformers_trainer_trains_a_head_with_the_callback(model_class, tmp_path):
    torch.manual_seed(0)
    model = model_class(config_of())
    batch = batch_of(model, 8)
    batch = {name: batch[name][:8] for name in ("input_ids", "pixel_values", "attention_mask", "labels")}
    data = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    args = TrainerArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[TCLMomentumCallback()])
    head = "cls_head.0.weight" if model_class is TCLForVisualEntailment else "text_decoder.lm_head.dense.weight"
    before, taught_before = model.get_parameter(head).clone(), model.teacher.get_parameter(head).clone()
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(map(math.isfinite, logged))
    assert [entry for entry in trainer.state.log_history if math.isfinite(entry.get("eval_loss", math.nan))]
    assert not torch.equal(model.get_parameter(head), before)
    assert not torch.equal(model.teacher.get_parameter(head), taught_before)
    trainer.save_model(tmp_path / "model")
    model_class.from_pretrained(tmp_path / "model")


def test_a_head_for_other_classes_starts_new(tmp_path):
    """Fine-tuning for one task may start from a checkpoint of another task, whose classes have another meaning."""
    entailment = TCLForVisualEntailment(small_patches())
    entailment.save_pretrained(tmp_path)
    model = TCLForVisualReasoning.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "False", 1: "True"}
    assert model.cls_head[2].weight.shape[0] == 2
    assert torch.equal(model.tcl.visual_projection.weight, entailment.tcl.visual_projection.weight)
    assert torch.equal(model.teacher.cls_head[2].weight, model.cls_head[2].weight)
