"""The models as users of transformers expect them: loading, saving, attention implementations, outputs, bad input."""

import json
import logging
import math

import pytest
import torch
from helpers import (
    EVERY_VISION_PART,
    ReadBack,
    assert_teacher_equals_student,
    small_patches,
    stir,
    stirred,
    tiny_config,
    training_batch,
)
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLModel,
    TCLTextModel,
    TCLVisionModel,
)
from tcl_hf.data.collators import masked_positions
from tcl_hf.models.checksums import CHECKSUMS
from tcl_hf.models.fitting import resize_positions
from tcl_hf.training.engine import shard

HEADS = [TCLForPreTraining, TCLForImageTextRetrieval]
CLASSES = [*HEADS, TCLForMaskedLM, TCLModel]


def inputs_of(config: TCLConfig, num_pairs: int = 3) -> dict:
    batch = training_batch(num_pairs, config=config)
    return {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}


def outputs_of(model, inputs: dict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {k: v for k, v in model.eval()(**inputs).items() if isinstance(v, torch.Tensor)}


def assert_new_queue(queue):
    for features in (queue.image, queue.text):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    assert queue.cursor.item() == 0
    assert (queue.ids == -100).all()


# Starting values


@pytest.mark.parametrize("model_class", HEADS)
def test_a_new_model_has_a_teacher_equal_to_the_student_and_a_new_queue(model_class):
    model = model_class(small_patches())
    assert_teacher_equals_student(model)
    assert_new_queue(model.queue)
    assert model.tcl.temperature.item() == pytest.approx(0.07)
    assert not hasattr(model.teacher, "itm_head")
    assert model.teacher.tcl.temperature is None


def test_starting_values_follow_the_paper():
    torch.manual_seed(0)
    model = TCLForPreTraining(
        small_patches(vision_config={"hidden_size": 96, "intermediate_size": 384}, text_config={"hidden_size": 96})
    )
    vision, text = model.tcl.vision_model, model.tcl.text_model
    for weight in (
        vision.layers[0].fc1.weight,
        vision.embeddings.position_embeddings,
        text.layers[2].cross_attn.k_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert vision.layers[0].fc1.weight.abs().max() <= 2  # truncated at two units, far out
    for bias in (vision.layers[0].fc1.bias, text.layers[0].self_attn.q_proj.bias, model.lm_head.dense.bias):
        assert torch.equal(bias, torch.zeros_like(bias))
    assert text.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (model.itm_head, model.tcl.visual_projection):  # PyTorch's own: uniform up to 1 / sqrt(inputs)
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert layer.bias.abs().max() > 0


# Saving and loading


@pytest.mark.parametrize("model_class", CLASSES)
def test_round_trip_keeps_every_tensor(model_class, tmp_path):
    model = model_class(small_patches())
    if hasattr(model, "teacher"):  # a teacher and a queue that have moved
        with torch.no_grad():
            for parameter in model.teacher.parameters():
                parameter.add_(0.1)
        model.queue.push(torch.ones(3, 16), torch.ones(3, 16), torch.arange(3))
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_class", [TCLModel, *HEADS])
def test_a_checkpoint_opens_at_another_resolution(model_class, tmp_path):
    model = model_class(small_patches())
    model.save_pretrained(tmp_path)
    larger = model_class.from_pretrained(tmp_path, image_size=64)
    assert larger.config.vision_config.image_size == 64
    places = [name for name in model.state_dict() if name.endswith("vision_model.embeddings.position_embeddings")]
    assert places
    for name in places:
        old, new = model.state_dict()[name], larger.state_dict()[name]
        torch.testing.assert_close(new, resize_positions(old, 8), rtol=0, atol=0)
    with torch.no_grad():
        larger(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=torch.tensor([[2, 5]]))


@pytest.mark.parametrize("missing", ["teacher", "queue", "both"])
@pytest.mark.parametrize("model_class", HEADS)
def test_a_checkpoint_without_teacher_or_queue_gets_them(model_class, missing, tmp_path):
    model = model_class(small_patches())
    with torch.no_grad():
        for parameter in model.tcl.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    prefixes = ("teacher.", "queue.") if missing == "both" else (f"{missing}.",)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(prefixes)}, file, {"format": "pt"})
    (tmp_path / CHECKSUMS).unlink()
    loaded = model_class.from_pretrained(tmp_path)
    if missing != "queue":
        assert_teacher_equals_student(loaded)
    if missing != "teacher":
        assert_new_queue(loaded.queue)
    assert torch.equal(loaded.itm_head.weight, model.itm_head.weight)


def test_an_empty_checkpoint_still_gives_a_sound_model(tmp_path):
    """All that `__init__` computes is lost on the meta device and must be computed again."""
    config = small_patches()
    config.save_pretrained(tmp_path)
    save_file({"itm_head.bias": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    model = TCLForPreTraining.from_pretrained(tmp_path, strict=False)
    assert model.tcl.temperature.item() == pytest.approx(0.07)
    assert_teacher_equals_student(model)
    assert_new_queue(model.queue)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    std = model.tcl.vision_model.embeddings.position_embeddings.std().item()
    assert std == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("model_class", [TCLModel, TCLForImageTextRetrieval, TCLForMaskedLM])
def test_every_class_opens_a_pre_training_checkpoint(model_class, tmp_path, caplog):
    source = TCLForPreTraining(small_patches())
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = source.state_dict()
    for name, value in model.state_dict().items():
        key = name if name in expected else f"tcl.{name}"
        assert torch.equal(value, expected[key]), name


@pytest.mark.parametrize("source_class", [TCLForPreTraining, TCLModel])
@pytest.mark.parametrize(("encoder_class", "part"), [(TCLVisionModel, "vision_model"), (TCLTextModel, "text_model")])
def test_an_encoder_alone_opens_any_checkpoint(source_class, encoder_class, part, tmp_path):
    source = source_class(small_patches())
    source.save_pretrained(tmp_path)
    encoder, info = encoder_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = getattr(getattr(source, "tcl", source), part).state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, expected[name]), name
    encoder.save_pretrained(tmp_path / "alone")
    again = encoder_class.from_pretrained(tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))


def test_pre_training_starts_from_a_bare_model(tmp_path):
    source = TCLModel(small_patches())
    source.save_pretrained(tmp_path)
    model = TCLForPreTraining.from_pretrained(tmp_path)
    assert_teacher_equals_student(model)
    assert torch.equal(model.tcl.visual_projection.weight, source.visual_projection.weight)
    assert model.lm_head.decoder.weight is model.tcl.text_model.embeddings.word_embeddings.weight


def test_inference_without_teacher_leaves_it_out(tmp_path):
    TCLForPreTraining(small_patches()).save_pretrained(tmp_path)
    model, info = TCLForPreTraining.from_pretrained(tmp_path, use_momentum_teacher=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.teacher is None and model.queue is None
    assert not any(name.startswith(("teacher", "queue")) for name in model.state_dict())
    assert "itm_logits" in outputs_of(model, inputs_of(model.config))
    with pytest.raises(ValueError, match="use_momentum_teacher=True"):
        model.train()(**training_batch())


def test_auto_classes_open_a_checkpoint(tmp_path):
    TCLForPreTraining(small_patches()).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TCLConfig)
    assert type(AutoModel.from_pretrained(tmp_path)) is TCLModel
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is TCLForPreTraining
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is TCLForMaskedLM
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is TCLModel


@pytest.mark.parametrize("model_class", [TCLForPreTraining, TCLModel, TCLVisionModel])
def test_positions_are_resized_when_the_image_size_changes(model_class, tmp_path):
    source = TCLForPreTraining(small_patches())
    source.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vision_config.image_size = 48
    config = config.vision_config if model_class is TCLVisionModel else config
    model = model_class.from_pretrained(tmp_path, config=config)
    vision = {TCLForPreTraining: lambda m: m.tcl.vision_model, TCLModel: lambda m: m.vision_model}.get(
        model_class, lambda m: m
    )(model)
    old = source.tcl.vision_model.embeddings.position_embeddings
    grid = old[:, 1:].transpose(1, 2).reshape(1, -1, 4, 4)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    positions = vision.embeddings.position_embeddings
    assert torch.equal(positions[:, :1], old[:, :1])
    torch.testing.assert_close(positions[:, 1:], expected)
    if model_class is TCLForPreTraining:
        assert torch.equal(model.teacher.tcl.vision_model.embeddings.position_embeddings, positions)


def test_a_queue_of_another_size_starts_anew(tmp_path):
    TCLForPreTraining(small_patches()).save_pretrained(tmp_path)
    model = TCLForPreTraining.from_pretrained(tmp_path, queue_size=7)
    assert len(model.queue.image) == 7
    assert_new_queue(model.queue)


def test_loading_in_bfloat16_keeps_temperature_and_queues_in_float32(tmp_path):
    TCLForPreTraining(small_patches()).save_pretrained(tmp_path)
    model = TCLForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.tcl.temperature.dtype == model.queue.image.dtype == torch.float32
    assert model.tcl.visual_projection.weight.dtype == torch.bfloat16
    output = model.train()(**training_batch())
    assert torch.isfinite(output.loss) and output.loss.dtype == torch.float32


# Attention, checkpointing, compilation, export


@pytest.mark.parametrize("model_class", CLASSES)
def test_sdpa_equals_eager(model_class):
    model = model_class(small_patches())
    inputs = inputs_of(model.config)
    model.set_attn_implementation("sdpa")
    fast = outputs_of(model, inputs)
    model.set_attn_implementation("eager")
    slow = outputs_of(model, inputs)
    assert fast.keys() == slow.keys()
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-5, atol=1e-5)


def test_flex_attention_equals_sdpa():
    config = small_patches(vision_config={"hidden_size": 64}, text_config={"hidden_size": 64})
    model = TCLForImageTextRetrieval(config)
    inputs = inputs_of(model.config)

    @torch.no_grad()
    def found() -> dict[str, torch.Tensor]:
        outputs = outputs_of(model, inputs)
        states = (
            model.tcl.encode_text(inputs["input_ids"], inputs["attention_mask"]),
            model.tcl.encode_image(inputs["pixel_values"]),
        )
        return outputs | {"of [CLS] alone": model.match(states[0], inputs["attention_mask"], states[1])}

    expected = found()
    torch.testing.assert_close(expected["of [CLS] alone"], expected["itm_logits"], rtol=1e-5, atol=1e-6)
    model.set_attn_implementation("flex_attention")
    try:
        computed = found()
    except Exception as error:  # flex attention compiles, which takes a compiler
        pytest.skip(f"flex attention does not run here: {str(error)[:80]}")
    for name in expected:
        torch.testing.assert_close(computed[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = TCLForPreTraining(small_patches()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(1)  # the same hard negatives
        model(**training_batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-7)


def test_attentions_and_hidden_states_are_returned():
    config = small_patches()
    model = TCLModel(config).eval()
    inputs = inputs_of(config)
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    vision, text = output.vision_model_output, output.text_model_output
    patches, length = 17, inputs["input_ids"].shape[1]
    assert [tuple(a.shape) for a in vision.attentions] == [(3, 4, patches, patches)] * 2
    assert [tuple(a.shape) for a in text.attentions] == [(3, 4, length, length)] * 2
    assert len(vision.hidden_states) == 3 and len(text.hidden_states) == 3
    for weights in (*vision.attentions, *text.attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    padding = ~inputs["attention_mask"].bool()
    assert text.attentions[0].mean(1).masked_select(padding[:, None].expand(-1, length, -1)).max() < 1e-6
    plain = model(**inputs)
    torch.testing.assert_close(plain.image_embeds, output.image_embeds, rtol=1e-5, atol=1e-6)


def test_register_tokens_are_read_by_the_layers_and_not_returned():
    model = TCLVisionModel(small_patches(vision_config=EVERY_VISION_PART).vision_config).eval()
    output = model(torch.randn(2, 3, 32, 32), output_attentions=True, output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 1 + 16, 24)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 1 + 3 + 16, 1 + 3 + 16)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 1 + 3 + 16, 24)] * 3
    with torch.no_grad():
        last = model.layer_norm(output.hidden_states[-1])
    assert torch.equal(output.last_hidden_state[:, 0], last[:, 0])
    assert torch.equal(output.last_hidden_state[:, 1:], last[:, 4:])
    first = output.hidden_states[0]  # normalised, with the scale 1 and the shift 0 of the start
    torch.testing.assert_close(first.mean(-1), torch.zeros(2, 20), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("lock", "num_states"), [(1, 1 + 3 + 16), (2, 1 + 3 + 16), (True, 1 + 16)])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_kept_states_of_locked_layers_hold_the_register_tokens(lock, num_states, patch_dropout):
    torch.manual_seed(0)
    model = TCLVisionModel(small_patches(vision_config=EVERY_VISION_PART, lock_vision=lock).vision_config)
    images = torch.randn(2, 3, 32, 32)
    kept = model.encode_locked(images)
    assert kept.shape == (2, num_states, 24) and model.locked_shape == (num_states, 24)
    outputs = []
    for pixel_values in (images, kept):
        torch.manual_seed(1)
        outputs.append(model(pixel_values, patch_dropout=patch_dropout).last_hidden_state)
    assert outputs[0].shape == (2, 9 if patch_dropout else 17, 24)
    assert torch.equal(*outputs)


def test_every_part_of_a_vision_encoder_trains_follows_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches(vision_config=EVERY_VISION_PART, momentum=0.5)).train()
    model(**training_batch(4), alpha=0.4).loss.backward()
    vision, teacher = model.tcl.vision_model, model.teacher.tcl.vision_model
    for name, parameter in vision.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    start = teacher.embeddings.register_tokens.clone()
    with torch.no_grad():
        vision.embeddings.register_tokens.add_(1.0)
    model.update_teacher()
    torch.testing.assert_close(teacher.embeddings.register_tokens, start + 0.5)
    model.save_pretrained(tmp_path)
    saved = TCLForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_heads_return_states_and_attentions_of_the_encoders():
    model = TCLForImageTextRetrieval(small_patches()).eval()
    output = model(**inputs_of(model.config), output_attentions=True, output_hidden_states=True)
    assert len(output.vision_model_output.hidden_states) == 3
    assert len(output.text_model_output.attentions) == 2
    assert len(output.cross_attentions) == 2


def test_cross_attentions_are_returned_and_carry_gradients():
    model = TCLForImageTextRetrieval(small_patches()).eval()
    output = model(**inputs_of(model.config), output_attentions=True)
    assert [tuple(a.shape) for a in output.cross_attentions] == [(3, 4, 7, 17)] * 2
    (gradient,) = torch.autograd.grad(output.itm_logits[:, 1].sum(), output.cross_attentions[0])
    assert gradient.abs().sum() > 0


def test_attentions_of_flex_attention_are_refused():
    model = TCLVisionModel(small_patches().vision_config).eval()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        model(torch.zeros(1, 3, 32, 32), output_attentions=True)


@pytest.mark.parametrize("with_index", [False, True])
def test_an_image_serves_several_texts_without_being_repeated(with_index):
    """Grouped queries and gathered keys compute the same as repeated images."""
    model = TCLForImageTextRetrieval(small_patches()).eval()
    batch = training_batch(6)
    states = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
    images = model.tcl.encode_image(batch["pixel_values"][:2])
    index = torch.tensor([1, 0, 0, 1, 1, 0]) if with_index else None
    repeated = images[index] if with_index else images.repeat_interleave(3, dim=0)
    expected = model.match(states, batch["attention_mask"], repeated)
    computed = model.match(states, batch["attention_mask"], images, index)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)
    attentions = model.tcl.fuse(states, batch["attention_mask"], images, index, output_attentions=True)
    one_by_one = model.tcl.fuse(states, batch["attention_mask"], repeated, output_attentions=True)
    torch.testing.assert_close(attentions.cross_attentions[1], one_by_one.cross_attentions[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", ["neighbours", "by index"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_last_layer_can_compute_some_tokens_only(implementation, rows):
    """States and gradients are the same as if all tokens were computed and some selected afterwards."""
    model = TCLForImageTextRetrieval(small_patches()).eval()
    model.set_attn_implementation(implementation)
    batch = training_batch(6)
    index = torch.tensor([1, 0, 0, 1, 1, 0])
    token_index = torch.tensor([[0, 3], [2, 2], [0, 1], [4, 0], [0, 0], [1, 3]])
    image_of_text = {"neighbours": torch.tensor([0, 0, 0, 1, 1, 1])}.get(rows, index)
    given = {"neighbours": None, "by index": index}[rows]
    states = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"]).detach().requires_grad_()
    images = model.tcl.encode_image(batch["pixel_values"][:2]).detach().requires_grad_()

    whole = model.tcl.fuse(states, batch["attention_mask"], images[image_of_text]).last_hidden_state
    expected = whole.gather(1, token_index[..., None].expand(-1, -1, whole.shape[-1]))  # (6, 2, width)
    some = model.tcl.fuse(states, batch["attention_mask"], images, given, token_index=token_index)
    torch.testing.assert_close(some.last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.pooler_output, expected[:, 0], rtol=1e-5, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((expected * weights).sum(), [states, images])
    found = torch.autograd.grad((some.last_hidden_state * weights).sum(), [states, images])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weights_of_some_tokens_are_theirs():
    model = TCLForImageTextRetrieval(small_patches()).eval()
    batch = training_batch(4)
    states = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
    images = model.tcl.encode_image(batch["pixel_values"][:2])
    token_index, index = torch.tensor([[3], [0], [1], [2]]), torch.tensor([0, 1, 1, 0])
    inputs = (states, batch["attention_mask"], images)
    some = model.tcl.fuse(*inputs, index, token_index=token_index, output_attentions=True)
    whole = model.tcl.fuse(*inputs, index, output_attentions=True)
    assert [tuple(a.shape) for a in some.cross_attentions] == [(4, 4, 7, 17), (4, 4, 1, 17)]
    torch.testing.assert_close(some.cross_attentions[0], whole.cross_attentions[0], rtol=1e-4, atol=1e-6)
    rows = torch.arange(4)
    for name in ("attentions", "cross_attentions"):
        expected = whole[name][1][rows, :, token_index[:, 0]]
        torch.testing.assert_close(some[name][1][:, :, 0], expected, rtol=1e-4, atol=1e-6)


def test_a_backend_that_needs_all_queries_gets_them():
    """Flash attention assumes that a mask of padding ends where the queries end."""
    lengths = []

    def attend(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    torch.manual_seed(0)  # For some weights the two paths differ by rounding.
    model = TCLForImageTextRetrieval(small_patches()).eval()
    batch = training_batch(4)
    states = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
    images = model.tcl.encode_image(batch["pixel_values"])
    expected = model.match(states, batch["attention_mask"], images)
    AttentionInterface.register("flash_of_a_test", attend)
    AttentionMaskInterface.register("flash_of_a_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config.text_config._attn_implementation = "flash_of_a_test"
    assert torch.equal(model.match(states, batch["attention_mask"], images), expected)
    assert lengths == [7, 7, 7, 7]  # self- and cross-attention of two layers


def test_dropout_of_attention_is_the_same_for_sdpa_and_eager_on_a_cpu():
    """The kernel is chosen by what it costs: the same numbers are drawn and the same weights dropped."""
    dropped = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.1}
    model = TCLForPreTraining(small_patches(text_config=dropped)).train()
    batch, losses = training_batch(4), []
    queue = {name: value.clone() for name, value in model.queue.state_dict().items()}
    for implementation in ("sdpa", "eager"):
        model.queue.load_state_dict(queue)
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        losses.append(model(**batch, alpha=0.4).loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_torch_export_of_the_inference_forward():
    model = TCLModel(small_patches()).eval()
    inputs = inputs_of(model.config, 2)
    program = torch.export.export(model, (), inputs)
    exported = program.module()(**inputs)
    expected = model(**inputs)
    torch.testing.assert_close(exported.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)


def test_torch_compile_of_the_inference_forward():
    model = TCLForImageTextRetrieval(small_patches()).eval()
    inputs = inputs_of(model.config, 2)
    expected = outputs_of(model, inputs)
    try:
        with torch.no_grad():
            computed = torch.compile(model, fullgraph=True)(**inputs)
    except Exception as error:
        if "compiler" in str(error).lower() and "not found" in str(error).lower():
            pytest.skip(f"there is no compiler here: {str(error)[:80]}")
        raise
    for name in ("logits_per_image", "itm_logits"):
        torch.testing.assert_close(computed[name], expected[name], rtol=1e-4, atol=1e-4)


def test_images_of_another_size_with_interpolated_positions():
    model = TCLModel(small_patches()).eval()
    for size in ((48, 48), (16, 40)):
        images = torch.randn(2, 3, *size)
        features = model.get_image_features(images, interpolate_pos_encoding=True)
        assert features.last_hidden_state.shape[1] == 1 + size[0] * size[1] // 64
        torch.testing.assert_close(features.pooler_output.norm(dim=-1), torch.ones(2))
    same = torch.randn(2, 3, 32, 32)
    a, b = model.get_image_features(same), model.get_image_features(same, interpolate_pos_encoding=True)
    assert torch.equal(a.pooler_output, b.pooler_output)


# Objectives


def test_every_objective_can_be_switched_off():
    """An objective with weight 0 is not computed; the total is the weighted sum of the others."""
    names = ("cma", "imc", "lmi", "itm", "mlm")
    for off in names:
        model = TCLForPreTraining(small_patches(**{f"{off}_weight": 0})).train()
        output = model(**training_batch())
        assert output[f"loss_{off}"] is None if f"loss_{off}" in output else True
        total = sum(getattr(model.config, f"{name}_weight") * output[f"loss_{name}"] for name in names if name != off)
        torch.testing.assert_close(output.loss, total)
        output.loss.backward()


def test_cma_alone_runs_no_fusion_layer_and_no_masked_text():
    config = small_patches(imc_weight=0, lmi_weight=0, itm_weight=0, mlm_weight=0)
    model = TCLForPreTraining(config).train()
    for layer in model.tcl.text_model.fusion_layers:
        layer.forward = None  # calling it would raise
    batch = training_batch()
    output = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    torch.testing.assert_close(output.loss, output.loss_cma / 3)


def test_mlm_alone_needs_neither_similarities_nor_queues():
    config = small_patches(cma_weight=0, imc_weight=0, lmi_weight=0, itm_weight=0)
    model = TCLForPreTraining(config).train()
    output = model(**training_batch())
    torch.testing.assert_close(output.loss, output.loss_mlm)
    assert model.queue.cursor.item() == 0


def test_alpha_zero_needs_no_teacher_for_words():
    model = TCLForPreTraining(small_patches()).train()
    model.teacher.lm_head.forward = None
    assert torch.isfinite(model(**training_batch(), alpha=0).loss)


def test_alpha_may_be_a_tensor():
    losses = []
    for alpha in (0.3, torch.tensor(0.3)):
        torch.manual_seed(0)
        model = TCLForPreTraining(small_patches()).train()
        torch.manual_seed(1)
        losses.append(model(**training_batch(), alpha=alpha).loss)
    torch.testing.assert_close(*losses)


def test_evaluation_computes_losses_without_touching_the_queue():
    model = TCLForPreTraining(small_patches()).eval()
    before = model.queue.image.clone()
    output = model(**training_batch())
    assert torch.isfinite(output.loss)
    assert torch.equal(model.queue.image, before) and model.queue.cursor.item() == 0


def test_pairs_of_one_image_are_positives_and_never_negatives():
    model = TCLForImageTextRetrieval(small_patches()).train()
    batch = training_batch(3)
    del batch["mlm_input_ids"], batch["mlm_labels"]
    output = model(**batch, image_ids=torch.tensor([5, 5, 5]))
    assert torch.isfinite(output.loss)
    assert model.queue.ids[:3].tolist() == [5, 5, 5]
    # No negative is left: matching sees the three true pairs alone.
    logits = model.eval()(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).itm_logits
    expected = F.cross_entropy(logits, torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(output.loss_itm, expected, rtol=1e-5, atol=1e-5)


def test_unknown_image_ids_exclude_nothing():
    """-100 stands for an unknown image: rows with it are negatives of each other, as if there were no ids."""
    losses = []
    for ids in (None, torch.full((4,), -100)):
        torch.manual_seed(0)
        model = TCLForImageTextRetrieval(small_patches()).train()
        batch = training_batch(4)
        del batch["mlm_input_ids"], batch["mlm_labels"]
        torch.manual_seed(1)
        losses.append(model(**batch, image_ids=ids))
    for name in ("loss_cma", "loss_imc", "loss_itm"):
        torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("model_class", HEADS)
def test_a_batch_of_one_trains(model_class):
    model = model_class(small_patches()).train()
    batch = training_batch(1)
    if model_class is TCLForImageTextRetrieval:
        del batch["mlm_input_ids"], batch["mlm_labels"]
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("length", [1, 2])
def test_texts_of_cls_alone_and_of_one_token_train(length):
    model = TCLForPreTraining(small_patches()).train()
    batch = training_batch(4, length=length)
    batch["attention_mask"] = torch.ones(4, length, dtype=torch.long)
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    if length == 1:
        assert output.loss_lmi_text.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("queue_size", [0, 1, 3, 7])
def test_a_batch_larger_than_the_queue_trains(queue_size):
    model = TCLForPreTraining(small_patches(queue_size=queue_size)).train()
    for seed in range(3):
        assert torch.isfinite(model(**training_batch(5, seed=seed)).loss)
    if queue_size:
        torch.testing.assert_close(model.queue.image.norm(dim=-1), torch.ones(queue_size))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches(momentum=0.9)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = training_batch(6)
    losses = []
    for _ in range(25):
        model.update_teacher()
        loss = model(**batch, alpha=0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("with_ids", "patch_dropout"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_a_training_step_reads_nothing_back_from_the_device(with_ids, patch_dropout):
    from tcl_hf.training.guard import UpdateGuard
    from tcl_hf.training.log import Meter
    from tcl_hf.training.optimization import parameter_groups

    model = TCLForPreTraining(small_patches(patch_dropout=patch_dropout)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), fused=True)
    batch = training_batch()
    batch["mlm_positions"] = masked_positions(batch["mlm_labels"])
    if with_ids:
        batch["image_ids"] = torch.tensor([1, 2, 2, 3])
    guard, meter = UpdateGuard(torch.device("cpu")), Meter()
    with ReadBack() as watch:
        model.update_teacher()
        output = model(**batch, alpha=0.4)
        output.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        guard.watch(optimizer, 0, output.loss, norm)
        meter.add(output, model.loss_names, 4, norm)
        seen = list(watch.seen)
    optimizer.step()  # its step counter is the only thing that fused AdamW reads, and it lives on the device
    assert seen == []


def test_the_watch_for_reads_sees_them():
    with ReadBack() as watch:
        torch.ones(()).item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert watch.seen == ["_local_scalar_dense", "index"]


# The teacher and the temperature


def test_update_teacher_clamps_the_temperature_in_place():
    model = TCLForPreTraining(small_patches())
    for value, expected in ((0.9, 0.5), (1e-5, 0.001), (0.2, 0.2)):
        model.tcl.temperature.data.fill_(value)
        model.update_teacher()
        assert model.tcl.temperature.item() == pytest.approx(expected)


def test_a_teacher_that_never_moves_is_reported_once(caplog):
    model = TCLForPreTraining(small_patches()).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            model(**training_batch())
    assert sum("stands still" in record.message for record in caplog.records) == 1


def test_a_teacher_that_moves_is_not_reported(caplog):
    model = TCLForPreTraining(small_patches()).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.update_teacher()
            model(**training_batch())
    assert not any("stands still" in record.message for record in caplog.records)


def test_a_teacher_too_coarse_to_move_is_reported(caplog):
    model = TCLForPreTraining(small_patches()).to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        model.update_teacher()
        model.update_teacher()
    assert sum("too coarse for its small steps" in record.message for record in caplog.records) == 1


def test_training_statistics_equal_a_slow_computation():
    model = stirred(TCLForPreTraining, queue_size=12)
    found = model.training_statistics()
    squares = [0.0, 0.0]
    for name, parameter in model.teacher.named_parameters():
        student = model.get_parameter(name).double()
        squares[0] += (parameter.double() - student).square().sum().item()
        squares[1] += student.square().sum().item()
    spreads = [1 - features.double().mean(0).norm().item() for features in (model.queue.image, model.queue.text)]
    assert found.keys() == {"temperature", "teacher_distance", "queue_spread"}
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    assert found["temperature"].item() == model.tcl.temperature.item()
    assert found["teacher_distance"].item() == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-5)
    assert found["queue_spread"].item() == pytest.approx(min(spreads), abs=1e-6)


def test_training_statistics_at_the_start_and_of_a_queue_whose_features_are_equal():
    model = TCLForPreTraining(small_patches(queue_size=12))
    assert model.training_statistics()["teacher_distance"] == 0
    model.queue.text[:] = model.queue.text[0]
    assert model.training_statistics()["queue_spread"].item() == pytest.approx(0, abs=1e-6)


def test_training_statistics_leave_out_a_teacher_or_queue_that_is_missing():
    assert TCLForPreTraining(small_patches(queue_size=0)).training_statistics().keys() == {
        "temperature",
        "teacher_distance",
    }
    without = TCLForPreTraining(small_patches(use_momentum_teacher=False))
    assert without.training_statistics().keys() == {"temperature"}


def test_training_statistics_of_a_sharded_model_are_those_of_the_whole():
    model = stirred(TCLForPreTraining, queue_size=12)
    expected = model.training_statistics()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard(model, init_device_mesh("cpu", (1,)))
        assert isinstance(model.tcl.temperature, DTensor)
        found = model.training_statistics()
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == () and found[name].item() == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("model_class", [*HEADS, TCLForMaskedLM])
def test_loss_names_are_the_losses_of_the_output(model_class):
    model = model_class(small_patches()).train()
    batch = training_batch()
    if model_class is TCLForMaskedLM:
        batch = {name: batch[name] for name in ("pixel_values", "attention_mask", "mlm_input_ids", "mlm_labels")}
        batch = {name.removeprefix("mlm_"): value for name, value in batch.items()}
    output = model(**batch)
    parts = {
        "loss_i2t",
        "loss_t2i",
        "loss_i2i",
        "loss_t2t",
        "loss_lmi_image",
        "loss_lmi_text",
    }  # the parts of CMA, IMC and LMI
    assert set(model.loss_names) == {name for name in output if name.startswith("loss")} - parts
    assert all(output[name].shape == () for name in model.loss_names)


@pytest.mark.parametrize("new_size", [90, 60])
def test_teacher_and_tied_head_follow_resized_token_embeddings(new_size, tmp_path):
    model = TCLForPreTraining(small_patches())
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1)
    before = model.teacher.tcl.text_model.embeddings.word_embeddings.weight.clone()
    model.resize_token_embeddings(new_size)
    kept = min(new_size, 80)
    for part in (model, model.teacher):
        words = part.tcl.text_model.embeddings.word_embeddings
        assert words.weight.shape[0] == words.num_embeddings == new_size
        assert part.lm_head.decoder.weight is words.weight
        assert part.lm_head.decoder.bias.shape == (new_size,)
    teacher_words = model.teacher.tcl.text_model.embeddings.word_embeddings.weight
    assert torch.equal(teacher_words[:kept], before[:kept])
    assert not teacher_words.requires_grad
    assert torch.equal(teacher_words[kept:], model.get_input_embeddings().weight[kept:])
    assert model.config.text_config.vocab_size == new_size
    batch = training_batch(config=small_patches(text_config={"vocab_size": 60}))
    model.train().update_teacher()
    assert torch.isfinite(model(**batch).loss)
    model.save_pretrained(tmp_path)
    assert TCLForPreTraining.from_pretrained(tmp_path).config.text_config.vocab_size == new_size


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"image_size": 30, "patch_size": 16}}, "image_size=30 does not divide"),
        ({"vision_config": {"num_register_tokens": -1}}, "num_register_tokens=-1 is negative"),
        ({"text_config": {"fusion_layer": 5}}, "fusion_layer=5 lies outside the 4 layers"),
        ({"text_config": {"fusion_layer": -1}}, "fusion_layer=-1 lies outside"),
        ({"text_config": {"num_attention_heads": 5}}, "does not divide into 5 heads"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"itm_weight": -1}, "itm_weight=-1"),
        ({"rerank_weight": -0.5}, "rerank_weight=-0.5"),
        ({"patch_dropout": 1.0}, "patch_dropout=1.0 leaves no patch"),
        ({"patch_dropout": -0.5}, "patch_dropout=-0.5 leaves no patch or is not a share"),
        ({"temperature_init_value": 3.0}, "temperature_init_value=3.0"),
    ],
)
def test_a_config_out_of_range_is_refused_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tiny_config(**fields)


def test_a_config_accepts_whole_numbers_and_survives_json(tmp_path):
    config = small_patches(momentum=1, alpha=0, cma_weight=1, imc_weight=0)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tcl"
    assert TCLConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_model_without_fusion_layers_is_refused_unless_no_objective_needs_them():
    with pytest.raises(ValueError, match="leaves no fusion layer"):
        TCLForPreTraining(small_patches(text_config={"fusion_layer": 4}))
    config = small_patches(text_config={"fusion_layer": 4}, itm_weight=0, mlm_weight=0)
    batch = training_batch()
    assert torch.isfinite(TCLForPreTraining(config).train()(**batch).loss)


def test_tokens_are_selected_where_no_layer_fuses():
    model = TCLForImageTextRetrieval(small_patches(text_config={"fusion_layer": 4}, itm_weight=0, mlm_weight=0)).eval()
    states, token_index = torch.randn(2, 5, 32), torch.tensor([[3, 1], [0, 4]])
    fused = model.tcl.text_model.fuse(states, None, [], token_index=token_index)
    assert torch.equal(fused.last_hidden_state, torch.stack([states[0, [3, 1]], states[1, [0, 4]]]))
    assert torch.equal(fused.pooler_output, torch.stack([states[0, 3], states[1, 0]]))


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_a_mask_of_padding_may_have_any_type(model_class, dtype):
    torch.manual_seed(0)
    model = model_class(small_patches()).eval()
    batch = training_batch(4) | {"image_ids": torch.tensor([0, 1, 2, 3])}
    losses = []
    for mask in (batch["attention_mask"], batch["attention_mask"].to(dtype)):
        torch.manual_seed(1)
        losses.append(model(**batch | {"attention_mask": mask}).loss)
    assert torch.equal(*losses)


def test_inputs_that_do_not_fit_are_refused_with_a_sentence():
    model = TCLForPreTraining(small_patches()).train()
    batch = training_batch(4)
    with pytest.raises(ValueError, match="neither pixel_values nor input_ids"):
        TCLModel(small_patches())()
    with pytest.raises(ValueError, match="got 4 images and 3 texts"):
        model(**{**batch, "input_ids": batch["input_ids"][:3], "attention_mask": batch["attention_mask"][:3]})
    with pytest.raises(ValueError, match="mlm_input_ids and mlm_labels"):
        model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    with pytest.raises(ValueError, match="40 x 40 do not fit the model's 32 x 32"):
        model.tcl.encode_image(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="do not divide into patches of 8"):
        model.tcl.encode_image(torch.zeros(1, 3, 30, 30), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="41 tokens and the model 40 positions"):
        model.tcl.encode_text(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="both input_ids and pixel_values"):
        TCLForMaskedLM(small_patches())(batch["input_ids"])


def test_matching_learns_from_several_negatives_of_each_text_and_image(monkeypatch):
    """The loss of two negatives each is the weighted mean over pairs that `match` scores one by one."""
    model = stir(TCLForPreTraining(small_patches(itm_negatives=2, mlm_weight=0.0))).train()
    batch = {name: value for name, value in training_batch().items() if not name.startswith("mlm")}
    drawn = iter([torch.tensor([1, 2, 3, 0, 2, 3, 0, 1]), torch.tensor([3, 0, 1, 2, 1, 3, 0, 2])])  # images, texts
    exist = torch.ones(8, dtype=torch.bool)
    monkeypatch.setattr(
        "tcl_hf.models.modeling_tcl.sample_hard_negatives", lambda logits, excluded, number: (next(drawn), exist)
    )
    loss = model(**batch, alpha=0.0).loss_itm
    states = model.tcl.encode_image(batch["pixel_values"])
    texts = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
    pairs = [(row, row, 1, 1.0) for row in range(4)]  # text, image, label, weight
    images, negatives = [1, 2, 3, 0, 2, 3, 0, 1], [3, 0, 1, 2, 1, 3, 0, 2]
    pairs += [(n % 4, image, 0, 0.5) for n, image in enumerate(images)]
    pairs += [(text, n % 4, 0, 0.5) for n, text in enumerate(negatives)]
    total = 0.0
    for text, image, label, weight in pairs:
        length = int(batch["attention_mask"][text].sum())
        logits = model.match(texts[text : text + 1, :length], None, states[image : image + 1])
        total -= weight * logits.log_softmax(-1)[0, label].item()
    assert loss.item() == pytest.approx(total / 12, abs=1e-5)


@pytest.mark.parametrize("num_fusion_layers", [1, 2])
def test_matching_by_contrast_finds_each_text_and_image_among_all_of_the_batch(num_fusion_layers):
    """The loss is that of softmaxes over log-odds that `match` gives to pairs one by one; 0 and 2 share an image."""
    fields = {"itm_contrast": True, "cma_weight": 0.0, "imc_weight": 0.0, "lmi_weight": 0.0, "mlm_weight": 0.0}
    text_config = {"num_hidden_layers": 2 + num_fusion_layers}
    model = stir(TCLForPreTraining(small_patches(text_config=text_config, **fields))).train()
    batch = {name: value for name, value in training_batch().items() if not name.startswith("mlm")}
    batch["image_ids"] = torch.tensor([5, 6, 5, -100])
    model.teacher.tcl = None  # no teacher is needed
    output = model(**batch)
    states = model.tcl.encode_image(batch["pixel_values"])
    texts = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
    log_odds = torch.zeros(4, 4)
    for image in range(4):
        for text in range(4):
            length = int(batch["attention_mask"][text].sum())
            logits = model.match(texts[text : text + 1, :length], None, states[image : image + 1])
            log_odds[image, text] = (logits[0, 1] - logits[0, 0]).item()
    positives = {0: (0, 2), 1: (1,), 2: (0, 2), 3: (3,)}
    total, found = 0.0, 0
    for scores in (log_odds, log_odds.T):
        for row, columns in positives.items():
            total -= sum(scores[row].log_softmax(0)[column].item() for column in columns) / len(columns)
            found += int(scores[row].argmax()) in columns
    assert output.loss_itm.item() == pytest.approx(total / 8, abs=1e-5)
    assert output.loss.item() == pytest.approx(output.loss_itm.item())
    assert output.itm_accuracy.item() == pytest.approx(found / 8)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.tcl.text_model.parameters())


def test_matching_by_contrast_and_masked_words_are_learned_together():
    model = stir(TCLForPreTraining(small_patches(itm_contrast=True))).train()
    alone = stir(TCLForPreTraining(small_patches(itm_weight=0.0))).train()
    alone.load_state_dict(model.state_dict())
    found, expected = model(**training_batch(), alpha=0.4), alone(**training_batch(), alpha=0.4)
    for name in ("loss_cma", "loss_imc", "loss_lmi", "loss_mlm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss + found.loss_itm)


@pytest.mark.parametrize("token_index", [None, torch.tensor([[0, 2], [1, 0], [3, 1]])])
@pytest.mark.parametrize("num_fusion_layers", [1, 2])
@pytest.mark.parametrize("by_index", [True, False])
def test_rows_that_share_texts_are_fused_as_rows_of_their_own(num_fusion_layers, token_index, by_index):
    model = stir(TCLModel(small_patches(text_config={"num_hidden_layers": 2 + num_fusion_layers}))).eval()
    batch = training_batch(num_pairs=3)
    states = model.encode_image(batch["pixel_values"])
    mask = batch["attention_mask"]
    texts = model.encode_text(batch["input_ids"], mask)
    rows = torch.tensor([2, 0, 1, 1, 0, 2])
    images = torch.tensor([0, 0, 1, 2, 1, 2]) if by_index else None  # else each image serves two neighbouring rows
    found = model.fuse(texts, mask, states, images, token_index=token_index, text_index=rows).last_hidden_state
    own = None if token_index is None else token_index[rows]
    expected = model.fuse(texts[rows], mask[rows], states, images, token_index=own).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rows_that_share_texts_cannot_return_weights():
    model = TCLModel(small_patches())
    states = torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match="text_index shares texts among rows, which works without image_mask"):
        model.fuse(states, None, torch.zeros(1, 17, 24), text_index=torch.tensor([0]), output_attentions=True)


@pytest.mark.parametrize("hardness", [0.0, 1.0, 2.5])
def test_negatives_are_drawn_by_similarities_times_the_hardness(monkeypatch, hardness):
    model = stir(TCLForPreTraining(small_patches(itm_hardness=hardness))).train()
    seen = []

    def draw(logits, excluded):
        seen.append(logits)
        return logits.argmax(-1), ~excluded.all(-1)

    monkeypatch.setattr("tcl_hf.models.modeling_tcl.sample_hard_negatives", draw)
    batch = training_batch()
    output = model(**batch, alpha=0.0)
    with torch.no_grad():
        images = model.teacher.tcl.get_image_features(batch["pixel_values_augmented"]).pooler_output
    expected = hardness * output.text_embeds.detach() @ images.T / model.tcl.temperature.detach()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)
