"""The health of a run: statistics in its log, and warnings."""

import math

import pytest
import torch
from helpers import small_patches, tiny_run, training_batch
from torch.nn import functional as F

from tcl_hf import TCLForPreTraining, TCLForTextAssignment
from tcl_hf.models.modeling_tcl import TCLLossOutput
from tcl_hf.training.health import Monitor, batch_statistics
from tcl_hf.training.log import read_metrics


def test_similarities_of_pairs_and_others_equal_a_slow_loop():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    found = batch_statistics(TCLLossOutput(image_embeds=image, text_embeds=text))
    pairs = [float(image[i] @ text[i]) for i in range(5)]
    others = [float(image[i] @ text[j]) for i in range(5) for j in range(5) if i != j]
    assert found["positive_similarity"].item() == pytest.approx(sum(pairs) / 5, abs=1e-6)
    assert found["negative_similarity"].item() == pytest.approx(sum(others) / 20, abs=1e-6)
    assert batch_statistics(TCLLossOutput(image_embeds=image[:1], text_embeds=text[:1])).keys() == {
        "positive_similarity"
    }
    assert batch_statistics(TCLLossOutput()) == {}


def test_accuracies_of_matching_and_words_are_those_of_the_logits(monkeypatch):
    model = TCLForPreTraining(small_patches()).train()
    model.update_teacher()
    batch = training_batch(4)
    seen = {}
    for name in ("itm_head", "lm_head"):
        getattr(model, name).register_forward_hook(lambda m, i, o, n=name: seen.setdefault(n, o))
    output = model(**batch)
    labels = torch.tensor([1] * 4 + [0] * 8)
    assert output.itm_accuracy.item() == pytest.approx((seen["itm_head"].argmax(-1) == labels).float().mean().item())
    words = batch["mlm_labels"].flatten()
    right = (seen["lm_head"].argmax(-1) == words)[words != -100]
    assert output.mlm_accuracy.item() == pytest.approx(right.float().mean().item())


def test_the_age_of_the_queue_by_hand(tmp_path):
    """12 features, of which a step of two forwards with 4 samples each replaces 8."""
    model = TCLForPreTraining(small_patches(queue_size=12))
    last = tiny_run(tmp_path, model=model, max_steps=1, gradient_accumulation_steps=2)
    assert last["queue_age"] == 1.5


def test_a_head_without_teacher_and_queue_has_no_statistics_of_them(tmp_path):
    last = tiny_run(tmp_path, model=TCLForTextAssignment(small_patches()), max_steps=1)
    assert not {"queue_age", "queue_spread", "teacher_distance"} & last.keys()


def test_spikes_collapse_drift_and_the_ends_of_the_temperature_are_warned_of(caplog):
    monitor = Monitor()
    good = {"step": 1, "loss": 2.0, "temperature": 0.07, "queue_spread": 0.8, "teacher_distance": 0.01}
    assert monitor.watch(good) == [] and monitor.watch(good | {"loss": 2.9}) == []
    (spike,) = monitor.watch(good | {"step": 3, "loss": 4.0})
    assert spike.startswith("the loss is 4, and was 2.09 on average")
    assert "Step 3: the loss is 4" in caplog.text
    assert "all alike" in monitor.watch(good | {"queue_spread": 0.001})[0]
    assert "does not keep up" in monitor.watch(good | {"teacher_distance": 0.7})[0]
    assert "end of its range" in monitor.watch(good | {"temperature": 0.001})[0]
    other = Monitor()
    other.load_state_dict(monitor.state_dict())
    assert other.mean_loss == monitor.mean_loss and not math.isnan(other.mean_loss)


def test_the_log_contains_the_statistics(tmp_path):
    tiny_run(tmp_path, max_steps=2)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line.keys() >= {
            *("positive_similarity", "negative_similarity", "itm_accuracy", "mlm_accuracy"),
            *("teacher_distance", "queue_age", "queue_spread", "temperature", "gradient_norm"),
        }
        assert -1 <= line["negative_similarity"] <= 1 and 0 <= line["itm_accuracy"] <= 1
