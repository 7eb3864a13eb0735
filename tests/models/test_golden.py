"""The model computes what the original computes: the original's outputs at a tiny size are in fixtures/golden."""

import pytest
import torch
from helpers import task_inputs, tiny_config

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from tcl_hf.sharing.convert import from_original
from tcl_hf.sharing.original_files import CheckpointError
from tcl_hf.sharing.original_names import kind_of, original_names

TOLERANCE = 1e-5


def assert_gradients(model, original):
    """Every trained parameter has the original's gradient, with an absolute tolerance where that is truly 0."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gradients = from_original(original, model.config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained
    for key, value in gradients.items():
        error = (parameters[key].grad - value).norm()
        assert error <= 1e-4 * value.norm() + 1e-6, f"gradient of {key}: {error:g} off"


def test_features_equal_the_original(golden):
    file = golden("features")
    model = file.load(TCLForPreTraining(tiny_config())).eval()
    inputs, expected = file["in"], file["out"]
    mask = inputs["attention_mask"]
    with torch.no_grad():
        output = model(inputs["input_ids"], inputs["pixel_values"], mask)
        image = model.tcl.encode_image(inputs["pixel_values"])
        text = model.tcl.encode_text(inputs["input_ids"], mask)
        fused = model.tcl.fuse(text, mask, image).last_hidden_state
        masked = model.tcl.fuse(model.tcl.encode_text(inputs["mlm_input_ids"], mask), mask, image)
        computed = {
            "image_embeds": output.image_embeds,
            "text_embeds": output.text_embeds,
            "itm_logits": output.itm_logits,
            "vision_last_hidden_state": image,
            "text_last_hidden_state": text,
            "fusion_last_hidden_state": fused,
            "mlm_logits": model.lm_head(masked.last_hidden_state),
        }
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(computed[name], value, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_masked_lm_head_equals_the_original(golden):
    file = golden("features")
    weights = from_original(file["state"], tiny_config())
    model = TCLForMaskedLM(tiny_config()).eval()
    model.load_state_dict({k: v for k, v in weights.items() if k.startswith(("tcl.", "lm_head."))})
    inputs = file["in"]
    with torch.no_grad():
        logits = model(inputs["mlm_input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    torch.testing.assert_close(logits, file["out"]["mlm_logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "model_class"), [("pretrain", TCLForPreTraining), ("retrieval", TCLForImageTextRetrieval)]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_step_equals_the_original(golden, fixed_negatives, name, model_class, attention):
    file = golden(name)
    model = file.load(model_class(tiny_config())).train()
    model.set_attn_implementation(attention)
    model.update_teacher()
    output = model(**fixed_negatives(file["in"]))
    output.loss.backward()

    expected = file["out"]
    contrast = (output.loss_cma + output.loss_imc + output.loss_lmi) / 3
    for loss, value in expected.items():
        computed = contrast if loss == "loss_ita" else output[loss]
        torch.testing.assert_close(computed, value, rtol=0, atol=TOLERANCE, msg=lambda m, n=loss: f"{n}: {m}")
    total = expected["loss_ita"] + expected["loss_itm"] + expected.get("loss_mlm", 0)
    torch.testing.assert_close(output.loss, total, rtol=0, atol=TOLERANCE)

    assert_gradients(model, file["grad"])
    state = model.state_dict()
    after = from_original(file["after"], model.config)
    assert {key for key in state if key.startswith(("teacher.", "queue."))} - after.keys() <= {"queue.ids"}
    for key, value in after.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


def test_masked_positions_give_the_same_loss_as_all_positions(golden, fixed_negatives):
    losses = []
    for with_positions in (False, True):
        file = golden("pretrain")
        model = file.load(TCLForPreTraining(tiny_config())).train()
        model.update_teacher()
        inputs = fixed_negatives(file["in"])
        if with_positions:
            chosen = inputs["mlm_labels"] != -100
            width = int(chosen.sum(1).max()) + 2
            positions = torch.full((len(chosen), width), -1)
            for row, flags in enumerate(chosen):
                places = flags.nonzero().flatten()
                positions[row, : len(places)] = places
            inputs["mlm_positions"] = positions
        losses.append(model(**inputs).loss_mlm)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "images"),
    [
        ("pretrain", "pretrain", 1),
        ("retrieval", "retrieval", 1),
        ("visual_entailment", "classification", 1),
        ("nlvr", "classification", 2),
        ("nlvr_pretrain", "text_assignment", 2),
        ("vqa", "question_answering", 1),
    ],
)
def test_table_of_names_covers_every_tensor_of_the_original_once(golden, name, kind, images):
    original = {key for key in golden(name)["state"] if not key.endswith("position_ids")}
    assert kind_of(original) == kind
    rows = original_names(tiny_config(text_config={"images_per_text": images}), kind)
    names = [row.original for row in rows]
    assert len(names) == len(set(names))
    assert set(names) == original


def test_an_unknown_tensor_is_refused_by_name(golden):
    state = golden("pretrain")["state"] | {"visual_encoder.blocks.0.gate": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"visual_encoder\.blocks\.0\.gate"):
        from_original(state, tiny_config())


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
def test_bfloat16_losses_stay_within_two_percent(golden, fixed_negatives, pure):
    file = golden("pretrain")
    model = file.load(TCLForPreTraining(tiny_config())).train()
    model.update_teacher()
    inputs = fixed_negatives(file["in"])
    if pure:
        model = model.to(torch.bfloat16)
        output = model(**inputs)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**inputs)
    for name in ("cma", "imc", "lmi", "itm", "mlm"):
        assert output[f"loss_{name}"].dtype == torch.float32
    for loss, value in file["out"].items():
        computed = (output.loss_cma + output.loss_imc + output.loss_lmi) / 3 if loss == "loss_ita" else output[loss]
        assert abs(computed - value) <= 0.02 * value, f"{loss}: {computed:g} is not {value:g}"


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("visual_entailment", TCLForVisualEntailment),
        ("nlvr", TCLForVisualReasoning),
        ("nlvr_pretrain", TCLForTextAssignment),
        ("vqa", TCLForQuestionAnswering),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_step_of_a_task_equals_the_original(golden, name, model_class, attention):
    """Loss and gradients after one update of the teacher, and the logits of evaluation before it."""
    file = golden(name)
    model = file.load(model_class(tiny_config()))
    model.set_attn_implementation(attention)
    if "logits" in file["out"]:
        with torch.no_grad():
            logits = model.eval()(**task_inputs(name, file["in"])).logits
        torch.testing.assert_close(logits, file["out"]["logits"], rtol=0, atol=TOLERANCE)
    model.train()
    if hasattr(model, "update_teacher"):
        model.update_teacher()
    loss = model(**task_inputs(name, file["in"])).loss
    loss.backward()
    torch.testing.assert_close(loss, file["out"]["loss"], rtol=0, atol=TOLERANCE)
    assert_gradients(model, file["grad"])


def test_ranking_of_answers_equals_the_original(golden):
    file = golden("vqa")
    model = file.load(TCLForQuestionAnswering(tiny_config())).eval()
    inputs = file["in"]
    ranked = model.rank_answers(
        inputs["input_ids"],
        inputs["pixel_values"],
        inputs["candidate_input_ids"],
        inputs["candidate_attention_mask"],
        k=int(inputs["k"]),
        attention_mask=inputs["attention_mask"],
    )
    assert ranked.indices.tolist() == file["out"]["topk_ids"].tolist()
    torch.testing.assert_close(ranked.probabilities, file["out"]["topk_probs"], rtol=0, atol=TOLERANCE)
