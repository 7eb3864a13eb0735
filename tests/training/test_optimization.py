"""Groups of parameters and learning rates."""

import itertools
import math

import pytest
from helpers import small_patches

from tcl_hf import TCLForPreTraining
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.optimization import learning_rate, parameter_groups


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
