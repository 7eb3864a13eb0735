"""Locked encoders: losses and gradients of frozen ones, no copy in the teacher, and states in place of pixels."""

import copy

import pytest
import torch
from helpers import small_patches, stir, stirred, training_batch

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
)
from tcl_hf.models.momentum import SharedModule

LOCKS = [
    {"lock_vision": True},
    {"lock_vision": 1},
    {"lock_text": True},
    {"lock_text": 1},
    {"lock_vision": True, "lock_text": True},
    {"lock_vision": 2, "image_pooling": "cls_mean", "text_pooling": "mean"},
]


def losses_and_gradients(model, batch, seed: int = 3):
    torch.manual_seed(seed)  # for the hard negatives
    output = model(**batch, alpha=0.4)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(output, name) for name in model.loss_names}, gradients


@pytest.mark.parametrize("lock", LOCKS)
def test_locked_parts_give_the_losses_and_gradients_of_frozen_ones(lock):
    pooling = {name: value for name, value in lock.items() if "pooling" in name}
    frozen = stirred(TCLForPreTraining, **pooling).train()
    locked = TCLForPreTraining(small_patches(**lock)).train()
    for name in locked.tcl.locked_parts("tcl."):
        student = frozen.get_submodule(name).requires_grad_(False)
        # As in a run that froze them from its start.
        frozen.teacher.get_submodule(name).load_state_dict(student.state_dict())
    locked.load_state_dict({k: v for k, v in frozen.state_dict().items() if k in locked.state_dict()})
    for _ in range(2):
        expected, expected_gradients = losses_and_gradients(frozen, training_batch())
        found, gradients = losses_and_gradients(locked, training_batch())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)
        for model in (frozen, locked):
            model.zero_grad()
            model.update_teacher()


def test_the_teacher_has_no_copy_of_a_locked_part():
    model = TCLForPreTraining(small_patches(lock_vision=1, lock_text=True))
    names = [name for name, _ in model.teacher.named_parameters()]
    shared = ("tcl.vision_model.embeddings.", "tcl.vision_model.layers.0.", "tcl.text_model.embeddings.")
    shared += ("tcl.text_model.layers.0.", "tcl.text_model.layers.1.")
    assert not [name for name in names if name.startswith(shared)]
    assert {"tcl.vision_model.layers.1.fc1.weight", "tcl.text_model.layers.2.fc1.weight"} <= set(names)
    assert isinstance(model.teacher.tcl.vision_model.layers[0], SharedModule)
    assert model.teacher.lm_head.decoder.weight is model.tcl.text_model.embeddings.word_embeddings.weight
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if name.startswith(tuple(f"tcl.{part[4:]}" for part in shared))]


def test_a_copy_of_a_model_has_its_own_locked_parts():
    model = TCLForPreTraining(small_patches(lock_vision=True))
    other = copy.deepcopy(model)
    (shared,) = other.teacher.tcl.vision_model.layers[0].owned_elsewhere
    assert shared is other.tcl.vision_model.layers[0]
    assert shared is not model.tcl.vision_model.layers[0]


@pytest.mark.parametrize("lock", LOCKS)
def test_checkpoints_open_with_other_locks(tmp_path, lock):
    source = stirred(TCLForPreTraining, **{name: value for name, value in lock.items() if "pooling" in name})
    source.save_pretrained(tmp_path / "unlocked")
    locked = TCLForPreTraining.from_pretrained(tmp_path / "unlocked", **lock)
    assert torch.equal(locked.tcl.vision_model.layers[0].fc1.weight, source.tcl.vision_model.layers[0].fc1.weight)
    locked.save_pretrained(tmp_path / "locked")
    again = TCLForPreTraining.from_pretrained(tmp_path / "locked")
    assert again.state_dict().keys() == locked.state_dict().keys()
    torch.testing.assert_close(dict(again.state_dict()), dict(locked.state_dict()), rtol=0, atol=0)
    unlocked = TCLForPreTraining.from_pretrained(tmp_path / "locked", lock_vision=False, lock_text=False)
    assert unlocked.state_dict().keys() == source.state_dict().keys()
    for name in locked.tcl.locked_parts("tcl."):  # The teacher's missing parts are copies of the student's.
        taught, student = unlocked.teacher.get_submodule(name), source.get_submodule(name)
        torch.testing.assert_close(taught.state_dict(), student.state_dict(), rtol=0, atol=0)
    assert all(p.requires_grad for p in unlocked.tcl.parameters())
    assert not any(p.requires_grad for p in unlocked.teacher.parameters())


@pytest.mark.parametrize("lock", [True, 1, 2])
def test_states_give_the_losses_of_their_pixels(lock):
    model = stir(TCLForPreTraining(small_patches(lock_vision=lock)).train())
    batch = training_batch()
    expected, expected_gradients = losses_and_gradients(copy.deepcopy(model), batch)
    with torch.no_grad():
        states = {
            name: model.tcl.vision_model.encode_locked(batch[name])
            for name in ("pixel_values", "pixel_values_augmented")
        }
    found, gradients = losses_and_gradients(model, batch | states)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lock", [True, 1])
def test_patches_are_dropped_from_states_as_from_images(lock):
    model = stir(TCLForPreTraining(small_patches(lock_vision=lock, patch_dropout=0.5)).train())
    batch = training_batch()
    states = model.tcl.vision_model.encode_locked(batch["pixel_values"])
    found = []
    for images in (batch["pixel_values"], states):
        torch.manual_seed(1)
        found.append(model.tcl.encode_image(images, patch_dropout=0.5))
    assert found[0].shape[1] == 1 + 8  # of 16 patches
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_class", [TCLForVisualEntailment, TCLForVisualReasoning, TCLForQuestionAnswering])
def test_heads_read_states_in_place_of_pixels(model_class):
    model = stir(model_class(small_patches(lock_vision=True))).eval()
    batch = training_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    number = 2 if model_class is TCLForVisualReasoning else 1
    pixels = torch.stack([batch["pixel_values"], batch["pixel_values_augmented"]][:number], dim=1)
    states = model.tcl.vision_model.encode_locked(pixels.flatten(0, 1)).unflatten(0, (-1, number))
    if number == 1:
        pixels, states = pixels[:, 0], states[:, 0]
    if model_class is TCLForQuestionAnswering:
        inputs["labels"] = batch["input_ids"][:, :4]
    with torch.no_grad():
        expected, found = (model(pixel_values=images, **inputs) for images in (pixels, states))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)


def test_retrieval_compares_states_as_images():
    model = stir(TCLForImageTextRetrieval(small_patches(lock_vision=1))).eval()
    batch = training_batch()
    states = model.tcl.vision_model.encode_locked(batch["pixel_values"])
    with torch.no_grad():
        expected, found = (model(batch["input_ids"], images) for images in (batch["pixel_values"], states))
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.itm_logits, expected.itm_logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lock", [False, True, 1])
def test_an_output_grid_holds_the_means_of_its_patches(lock):
    whole = stir(TCLForPreTraining(small_patches())).eval()
    pooled = TCLForPreTraining(small_patches(lock_vision=lock, vision_config={"output_grid": 2})).eval()
    pooled.load_state_dict({k: v for k, v in whole.state_dict().items() if k in pooled.state_dict()})
    pixels = training_batch()["pixel_values"]
    with torch.no_grad():
        states, found = whole.tcl.encode_image(pixels), pooled.tcl.encode_image(pixels)
        inputs = pooled.tcl.vision_model.encode_locked(pixels) if lock else pixels
        again = pooled.tcl.encode_image(inputs)
    assert found.shape == (4, 1 + 4, 24)
    patches = states[0, 1:].view(4, 4, 24)
    torch.testing.assert_close(found[0, 0], states[0, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0, 2], patches[:2, 2:].reshape(4, 24).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-6)
    assert pooled(**training_batch()).loss.isfinite()


def test_pooling_is_a_mean_over_patches_and_over_real_tokens():
    model = stir(TCLModel(small_patches(image_pooling="cls_mean", text_pooling="mean"))).eval()
    batch = training_batch()
    with torch.no_grad():
        output = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
        for row in range(4):
            states = output.vision_model_output.last_hidden_state[row]
            both = torch.cat([states[0], torch.stack(list(states[1:])).mean(0)])
            feature = torch.nn.functional.normalize(model.visual_projection(both), dim=0)
            torch.testing.assert_close(output.image_embeds[row], feature, rtol=0, atol=1e-6)
            length = int(batch["attention_mask"][row].sum())
            mean = output.text_model_output.last_hidden_state[row, :length].mean(0)
            feature = torch.nn.functional.normalize(model.text_projection(mean), dim=0)
            torch.testing.assert_close(output.text_embeds[row], feature, rtol=0, atol=1e-6)
    # The mean of the patches' projections is what the projection makes of a class token of zeros and the mean patch.
    weight = model.visual_projection.weight[:, 24:]
    patches = states[1:] @ weight.T + model.visual_projection.bias
    expected = torch.nn.functional.normalize(patches, dim=-1)
    torch.testing.assert_close(
        model.patch_features(output.vision_model_output.last_hidden_state)[-1], expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lock_vision": 3}, "lock_vision=3 locks layers that are not there, because the encoder has 2"),
        ({"lock_text": 3}, "lock_text=3 locks layers that are not there, because the encoder has 2"),
        ({"lock_vision": -1}, "lock_vision=-1"),
        ({"image_pooling": "max"}, "image_pooling='max' is unknown: choose one of cls, mean, cls_mean"),
    ],
)
def test_a_config_refuses_locks_and_pooling_that_do_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        small_patches(**fields)


def test_states_are_refused_where_nothing_is_locked_or_the_size_is_another():
    batch = training_batch()
    states = torch.randn(4, 17, 24)
    with pytest.raises(ValueError, match="no layer of the vision encoder is locked"):
        TCLModel(small_patches())(pixel_values=states)
    with pytest.raises(ValueError, match=r"which are \(B, 17, 24\): keep the states anew"):
        TCLModel(small_patches(lock_vision=True))(batch["input_ids"], pixel_values=torch.randn(4, 10, 24))


def test_locked_parts_have_no_dropout_and_others_keep_theirs():
    dropout = {"text_config": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}}
    batch = training_batch()
    inputs = batch["input_ids"], batch["attention_mask"]
    locked = stir(TCLForPreTraining(small_patches(lock_text=True, **dropout)))
    expected = locked.eval().tcl.encode_text(*inputs)
    locked.train()
    assert torch.equal(locked.tcl.encode_text(*inputs), expected)
    assert torch.equal(locked.teacher.tcl.encode_text(*inputs), expected)
    assert locked.tcl.text_model.fusion_layers[0].training
    half = stir(TCLForPreTraining(small_patches(lock_text=1, **dropout))).train()
    assert [layer.training for layer in half.tcl.text_model.layers] == [False, True, True, True]
    assert not torch.equal(half.tcl.encode_text(*inputs), half.tcl.encode_text(*inputs))


def test_adapters_in_a_locked_part_keep_their_dropout():
    peft = pytest.importorskip("peft")
    model = TCLForPreTraining(small_patches(lock_text=True))
    target = r"tcl\.text_model\.layers\.0\.self_attn\.q_proj"
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=target, lora_dropout=0.5), model)
    model.train()
    assert model.tcl.text_model.layers[0].training
    assert not model.tcl.text_model.layers[1].training
