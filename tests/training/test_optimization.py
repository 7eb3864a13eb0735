"""Groups of parameters and learning rates."""

import itertools
import math

import pytest
import torch
from helpers import losses, small_patches, tiny_run

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
)
from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError
from tcl_hf.training.engine import Engine
from tcl_hf.training.log import read_metrics
from tcl_hf.training.optimization import learning_rate, parameter_groups, places_of, split_by_rate


def test_only_matrices_decay():
    model = TCLForPreTraining(small_patches())
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.02))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == decayed | others
    assert "tcl.temperature" in others
    assert "tcl.vision_model.embeddings.cls_token" in others
    assert "tcl.vision_model.embeddings.position_embeddings" in others
    assert "tcl.vision_model.embeddings.patch_embedding.weight" in decayed
    assert "tcl.text_model.embeddings.word_embeddings.weight" in decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert not any(name.startswith("teacher.") for name in decayed | others)


def test_the_original_decays_temperature_class_token_and_positions_too():
    model = TCLForPreTraining(small_patches())
    names = {id(p): n for n, p in model.named_parameters()}
    ours, original = (
        {names[id(p)] for p in parameter_groups(model, 0.02, rule)[0]["params"]} for rule in ("matrices", "original")
    )
    vision = "tcl.vision_model.embeddings"
    assert original - ours == {"tcl.temperature", f"{vision}.cls_token", f"{vision}.position_embeddings"}


def test_the_paper_s_schedule():
    args = TCLTrainingArguments(lr_scheduler_type="paper")  # 30 epochs, 1e-5 to 1e-4 and back, 2,000 steps of warm-up

    def lr(step, epoch):
        return learning_rate(args, step, epoch, 300_000)

    assert lr(0, 0) == lr(99, 0) == pytest.approx(1e-5)
    assert lr(100, 0) == pytest.approx(1e-5 + 9e-5 / 20)
    assert lr(1999, 0) == pytest.approx(1e-5 + 9e-5 * 19 / 20)
    assert lr(2000, 0) == lr(9999, 0) == pytest.approx(1e-4)
    for epoch in (1, 15, 29):
        expected = 1e-5 + 0.45e-4 * (1 + math.cos(math.pi * epoch / 30))
        assert lr(epoch * 10_000 + 77, epoch) == pytest.approx(expected)


def test_the_cosine_schedule():
    args = TCLTrainingArguments(warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, warmup_learning_rate=0.0)
    rates = [learning_rate(args, step, 0, 110) for step in range(111)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


# Rates by part and layer


def part_of(name: str) -> str:
    """The part of a parameter of the tiny models, whose text layers from 2 on are fusion layers."""
    if name == "tcl.temperature":
        return "temperature"
    if name.startswith("tcl.text_model.layers."):
        return "text" if int(name.split(".")[3]) < 2 else "fusion"
    parts = {"vision_model": "vision", "text_model": "text"}
    parts |= {"visual_projection": "projections", "text_projection": "projections"}
    return parts[name.split(".")[1]] if name.startswith("tcl.") else "heads"


@pytest.mark.parametrize(
    ("model_class", "heads"),
    [
        (TCLForPreTraining, {"itm_head", "lm_head"}),
        (TCLForImageTextRetrieval, {"itm_head"}),
        (TCLForQuestionAnswering, {"text_decoder"}),
        (TCLForVisualEntailment, {"cls_head"}),
        (TCLForVisualReasoning, {"cls_head"}),
        (TCLForTextAssignment, {"ta_head"}),
    ],
)
def test_every_head_class_has_its_parts(model_class, heads):
    model = model_class(small_patches())
    places = places_of(model)
    trained = {name: places[p].part for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name: part_of(name) for name in trained}
    assert {name.split(".")[0] for name, part in trained.items() if part == "heads"} == heads
    idle = set() if model.contrasts else {"projections", "temperature"}
    assert set(trained.values()) == {"vision", "text", "fusion", "projections", "heads", "temperature"} - idle


def test_a_model_without_head_has_parts_too():
    model = TCLModel(small_patches())
    places = places_of(model)
    assert {name: places[p].part for name, p in model.named_parameters()} == {
        name: part_of(f"tcl.{name}") for name, _ in model.named_parameters()
    }


def rates_by_name(model, **options) -> dict[str, float]:
    args = TCLTrainingArguments(**options)
    groups, factors = split_by_rate(parameter_groups(model, args.weight_decay, args.decay_rule), model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = zip(groups, factors, strict=True)
    found = [(names[id(p)], args.learning_rate * factor) for group, factor in pairs for p in group["params"]]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in model.parameters())
    return dict(found)


def test_rates_by_part_and_layer_of_a_tiny_model():
    """Two vision, two text and two fusion layers; a rate of 1 halves from layer to layer."""
    rates = rates_by_name(
        TCLForPreTraining(small_patches()),
        learning_rate=1.0,
        part_learning_rates={"vision": 0.25, "projections": 4.0, "temperature": 2.0},
        layer_decay=0.5,
    )
    expected = {
        "tcl.vision_model.embeddings": 0.0625,
        "tcl.vision_model.layers.0": 0.125,
        "tcl.vision_model.layers.1": 0.25,
        "tcl.vision_model.layer_norm": 0.25,
        "tcl.text_model.embeddings": 0.25,
        "tcl.text_model.layers.0": 0.5,
        "tcl.text_model.layers.1": 1.0,
        "tcl.text_model.layers.2": 0.5,
        "tcl.text_model.layers.3": 1.0,
        "tcl.visual_projection": 4.0,
        "tcl.text_projection": 4.0,
        "tcl.temperature": 2.0,
        "itm_head": 1.0,
        "lm_head": 1.0,
    }
    for name, rate in rates.items():
        assert rate == next(value for start, value in expected.items() if name.startswith(start)), name


def test_copies_of_a_fusion_layer_share_its_rate():
    """Two fusion layers, each doubled for two images."""
    rates = rates_by_name(TCLForVisualReasoning(small_patches()), learning_rate=1.0, layer_decay=0.5)
    by_layer = {name.split(".")[3]: rate for name, rate in rates.items() if "text_model.layers" in name}
    assert by_layer == {"0": 0.5, "1": 1.0, "2": 0.5, "3": 0.5, "4": 1.0, "5": 1.0}


@pytest.mark.parametrize("rule", ["matrices", "original"])
def test_rates_do_not_change_what_decays(rule):
    model = TCLForPreTraining(small_patches())
    groups = parameter_groups(model, 0.02, rule)
    args = TCLTrainingArguments(part_learning_rates={"vision": 1e-5, "text": 2e-5}, layer_decay=0.9)
    split, _ = split_by_rate(groups, model, args)
    for group in groups:
        same = [p for part in split if part["weight_decay"] == group["weight_decay"] for p in part["params"]]
        assert {id(p) for p in same} == {id(p) for p in group["params"]} and len(same) == len(group["params"])


def test_without_rates_there_are_the_two_groups_of_before():
    model = TCLForPreTraining(small_patches())
    groups = parameter_groups(model, 0.02)
    split, factors = split_by_rate(groups, model, TCLTrainingArguments(learning_rate=0.0))
    assert split is groups and len(groups) == 2 and factors == [1.0, 1.0]


def test_the_groups_do_not_depend_on_the_order_in_which_parts_are_named():
    model = TCLForPreTraining(small_patches())
    rates = {"temperature": 1e-3, "heads": 1e-3, "vision": 1e-5}
    one, other = (
        split_by_rate(parameter_groups(model, 0.02), model, TCLTrainingArguments(part_learning_rates=given))[0]
        for given in (rates, dict(reversed(rates.items())))
    )
    assert [[id(p) for p in group["params"]] for group in one] == [[id(p) for p in group["params"]] for group in other]


@pytest.mark.parametrize("given", [{"vision": "1e-5"}, '{"vision": 1e-5}'])
def test_rates_are_given_as_a_mapping_or_as_json(given):
    assert TCLTrainingArguments(part_learning_rates=given).part_rates == {"vision": 1e-5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_learning_rates": "vision"}, "is not a mapping of parts to learning rates, but vision: write"),
        ({"part_learning_rates": "[1]"}, r"is not a mapping of parts to learning rates, but \[1\]: write"),
        ({"part_learning_rates": {"vision": "low"}}, "is not a mapping of parts to learning rates"),
        ({"part_learning_rates": {"vision": None}}, "is not a mapping of parts to learning rates"),
        ({"part_learning_rates": {"vision": 0}}, "rate of 'vision' must be above 0, got 0: .* lock_vision"),
        ({"part_learning_rates": {"heads": -1e-4}}, "rate of 'heads' must be above 0, got -0.0001"),
        ({"part_learning_rates": {"heads": math.nan}}, "rate of 'heads' must be above 0, got nan"),
        ({"part_learning_rates": {"heads": 1.0}, "learning_rate": 0.0}, r"learning_rate=0\.0 must be above 0"),
        ({"layer_decay": 0.0}, r"layer_decay=0\.0 must be above 0 and at most 1"),
        ({"layer_decay": 1.1}, r"layer_decay=1\.1 must be above 0 and at most 1"),
    ],
)
def test_rates_that_make_no_sense_are_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        TCLTrainingArguments(**options)


def test_a_part_that_the_model_does_not_train_is_refused_with_those_that_it_does():
    """The projections of a classifier are idle, and a locked encoder has no trained parameter."""
    model = TCLForVisualEntailment(small_patches())
    for part in ("visoin", "projections"):
        with pytest.raises(TrainingError, match=f"trains no part '{part}', but vision, text, fusion, heads: name one"):
            rates_by_name(model, part_learning_rates={part: 1e-5})
    model = TCLForVisualEntailment(small_patches(lock_vision=True))
    with pytest.raises(TrainingError, match="trains no part 'vision', but text, fusion, heads: name one"):
        rates_by_name(model, part_learning_rates={"vision": 1e-5})


def test_the_layers_above_locked_ones_have_rates():
    model = TCLForPreTraining(small_patches(lock_vision=1, lock_text=True))
    rates = rates_by_name(model, learning_rate=1.0, part_learning_rates={"vision": 0.25}, layer_decay=0.5)
    layers = {".".join(name.split(".")[1:4]): rate for name, rate in rates.items() if ".layers." in name}
    vision, text = "vision_model.layers", "text_model.layers"
    assert layers == {f"{vision}.1": 0.25, f"{text}.2": 0.5, f"{text}.3": 1.0}


RATES = {"part_learning_rates": {"vision": 2e-4, "heads": 4e-3}, "layer_decay": 0.5}  # beside a learning rate of 1e-3


def test_adamw_s_first_step_is_as_long_as_the_rate_of_its_layer(tmp_path):
    """Its length is the rate times gradient / (|gradient| + 1e-8), which for large gradients is the rate."""
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny_run(tmp_path, model=model, max_steps=1, warmup_steps=0, weight_decay=0.0, **RATES)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    expected = {
        "tcl.vision_model.embeddings.patch_embedding.weight": 0.5e-4,
        "tcl.vision_model.layers.0.fc1.weight": 1e-4,
        "tcl.vision_model.layers.1.fc1.weight": 2e-4,
        "tcl.text_model.embeddings.word_embeddings.weight": 2.5e-4,
        "tcl.text_model.layers.0.fc1.weight": 5e-4,
        "tcl.text_model.layers.1.fc1.weight": 1e-3,
        "tcl.text_model.layers.2.cross_attn.q_proj.weight": 5e-4,
        "tcl.text_model.layers.3.fc1.weight": 1e-3,
        "tcl.visual_projection.weight": 1e-3,
        "tcl.temperature": 1e-3,
        "itm_head.weight": 4e-3,
        "lm_head.dense.weight": 4e-3,
    }
    assert {name: moved[name] for name in expected} == pytest.approx(expected, rel=2e-3)


def test_the_schedule_scales_all_groups_alike_and_the_log_shows_its_value(tmp_path, monkeypatch):
    """Two steps of warm-up from 1e-5 to 1e-3, then a cosine over two steps to 1e-5."""
    seen = []

    class Watched(Engine):
        def forward(self, batch, alpha):
            seen.append([group["lr"] for group in self.optimizer.param_groups])
            return super().forward(batch, alpha)

    monkeypatch.setattr("tcl_hf.training.loop.Engine", Watched)
    tiny_run(tmp_path, max_steps=4, part_learning_rates={"vision": 1e-4, "temperature": 3e-3})
    schedule = [1e-5, 5.05e-4, 1e-3, 5.05e-4]
    # The temperature is the model's first parameter, but does not decay.
    factors = [0.1, 1.0, 3.0, 0.1, 1.0]
    assert seen == [pytest.approx([rate * factor for factor in factors]) for rate in schedule]
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")] == pytest.approx(schedule)


class Killed(Exception):
    pass


def kill(model):
    raise Killed


def test_a_run_with_rates_goes_on_bit_for_bit(tmp_path):
    tiny_run(tmp_path / "whole", **RATES)
    with pytest.raises(Killed):
        tiny_run(tmp_path / "killed", evaluate=kill, save_steps=3, eval_steps=4, **RATES)
    torch.manual_seed(99)
    tiny_run(tmp_path / "killed", model=TCLForPreTraining(small_patches()), resume=True, **RATES)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_resuming_with_other_groups_is_refused(tmp_path):
    with pytest.raises(Killed):
        tiny_run(tmp_path, evaluate=kill, save_steps=1, eval_steps=2)
    with pytest.raises(TrainingError, match="step-00000001 has other groups of parameters: name the same parts"):
        tiny_run(tmp_path, resume=True, **RATES)
